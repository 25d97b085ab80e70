"""What a run says about the disk before its first step, compared with what its checkpoints take."""

import dataclasses
import logging
import random
import shutil
from collections import namedtuple

import numpy as np
import pytest

from atlas_jax.checkpoints import run_checkpoints
from atlas_jax.checkpoints.run_checkpoints import RunCheckpoints
from atlas_jax.checkpoints.store import ResumeState
from atlas_jax.config import RunConfig
from atlas_jax.mesh import make_mesh
from atlas_jax.models.atlas import AtlasConfig
from atlas_jax.training.checkpoint_space import CheckpointSpace, checkpoint_space, report_checkpoint_space
from atlas_jax.training.resume import RunStart, make_state

XXL, XXL_TRAINED = 45, 137  # GB of weights, and of weights with moments


@pytest.mark.parametrize(
    ("flags", "space"),
    [
        ({"keep": 0, "eval_freq": 4}, (XXL, 0)),  # 16 steps
        ({"keep": 1, "eval_freq": 16}, (XXL, XXL)),
        ({"keep": 1, "eval_freq": 4}, (2 * XXL_TRAINED, 2 * XXL)),  # a best one replaces another
        ({"eval_freq": 4}, (2 * XXL_TRAINED, 2 * XXL)),
        ({"eval_freq": 4, "save_freq": 4}, (3 * XXL_TRAINED + XXL, 3 * XXL_TRAINED + XXL)),
        ({"eval_freq": 4, "save_freq": 4, "keep": 0}, (2 * XXL_TRAINED, 0)),
        ({"eval_data": (), "save_freq": 4, "keep": 2}, (3 * XXL_TRAINED, XXL_TRAINED + XXL)),
    ],
)
def test_the_space_of_a_run_of_16_steps(flags, space):
    """Peak and rest, worked out by hand."""
    run = RunConfig(**({"eval_data": ("valid.jsonl",)} | flags))
    assert checkpoint_space(run, 16, 0, 0, XXL_TRAINED, XXL) == space


@pytest.fixture(scope="module")
def weights(tiny_weights):
    """The smallest weights: one array of the retriever."""
    cfg = AtlasConfig(None, tiny_weights.cfg.retriever)
    return dataclasses.replace(tiny_weights, params={"retriever/x": np.zeros(4, np.float32)}, cfg=cfg)


@pytest.mark.parametrize("keep", [None, 1, 3])
@pytest.mark.parametrize(("save_freq", "eval_freq"), [(2, 3), (4, 4), (2, 4), (20, 2)])
def test_checkpoints_take_no_more_than_the_run_says(tmp_path, weights, monkeypatch, keep, save_freq, eval_freq):
    """Real checkpoints of 12 steps, where the first, each or a random evaluation is the best; all count as one unit.

    Their number before removals and at the end; of the three runs one reaches it, or all but one.
    """
    total, counts = 12, []
    run = RunConfig(eval_data=("dev.jsonl",), keep=keep, save_freq=save_freq, eval_freq=eval_freq)

    def count() -> int:
        return len(list(folder.glob("step-*")))

    def counting_link(path, checkpoint):
        counts.append(count())  # a checkpoint is complete, and none is removed yet
        return link(path, checkpoint)

    link = run_checkpoints._link
    monkeypatch.setattr(run_checkpoints, "_link", counting_link)
    peak, left = checkpoint_space(run, total, 0, 0, 1, 1)
    reached = []
    for draw in ("first", "each", "random"):
        folder, rng = tmp_path / draw, random.Random(0)
        counts.clear()
        with RunCheckpoints(folder, keep, save_freq) as checkpoints:
            best = None
            for step in range(1, total + 1):
                saved = step % save_freq == 0 or step == total
                if saved:
                    checkpoints.save(step, weights, ResumeState({}, {}))
                if step % eval_freq == 0 or step == total:
                    if best is None or draw == "each" or (draw == "random" and rng.random() < 0.5):
                        best = step
                        if not saved:
                            checkpoints.save(step, weights, ResumeState({}, {}))
                    checkpoints.link_best(best)
        assert max(counts) <= peak
        assert count() <= left
        assert best is not None
        assert (folder / "best" / "atlas.json").is_file()
        reached.append((max(counts), count()))
    most, rest = map(max, zip(*reached, strict=True))
    assert most >= peak - 1
    assert rest >= left - 1


def test_a_run_says_what_its_checkpoints_take(tiny_config, tiny_weights, tmp_path, monkeypatch, caplog):
    """The bytes of the arrays; a warning names the remedies if that much, but for what is there, is not free."""
    caplog.set_level(logging.INFO, logger="atlas_jax")
    run = dataclasses.replace(tiny_config.run, checkpoint_dir=str(tmp_path), name="run", keep=1, save_freq=10)
    config = dataclasses.replace(tiny_config, run=run)
    config.run_folder.mkdir()
    state = make_state(config, RunStart(tiny_weights, None), make_mesh("data=1"))
    count = dict.fromkeys(("reader", "retriever"), 0)
    for path, array in tiny_weights.params.items():
        count[path.split("/")[0]] += array.size
    last = 4 * sum(count.values())
    each = last + 8 * count["reader"] + 4 * 2  # two numbers count updates
    usage = namedtuple("usage", "free")

    def say(free: int, step: int = 0) -> tuple[int, str]:
        caplog.clear()
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(free))
        report_checkpoint_space(config, step, state)
        (record,) = caplog.records
        return record.levelno, record.getMessage()

    def megabytes(nbytes: int) -> str:
        return f"{nbytes / 1e6:.1f} MB"

    start = (
        f"checkpoints: {megabytes(each)} each, the last one {megabytes(last)}; at most {megabytes(2 * each)} at a time"
    )
    finish = f"and {megabytes(last)} once the run has finished; {{}} are free in {tmp_path}"
    assert say(2_000_000_000) == (logging.INFO, f"{start}, {finish.format('2.0 GB')}")
    assert checkpoint_space(run, 1000, 0, 0, each, last) == CheckpointSpace(2 * each, last)
    level, line = say(2 * each - 1)
    assert level == logging.WARNING
    remedy = "which is too little: lower --keep, raise --save_freq, or use another --checkpoint_dir"
    assert line == f"{start}, {finish.format(megabytes(2 * each))}, {remedy}"
    (config.run_folder / "checkpoint/step-10").mkdir(parents=True)
    assert say(each, 10) == (
        logging.INFO,
        f"{start}, of which {megabytes(each)} are there, {finish.format(megabytes(each))}",
    )
