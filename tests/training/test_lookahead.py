"""Looking ahead retrieves the next step's passages early, and changes no result."""

import dataclasses
import json

import numpy as np
import pytest

from atlas_jax.checkpoints.store import load
from atlas_jax.commands.main import main
from atlas_jax.config import Config
from atlas_jax.runtime.compiled import CompiledFunction
from atlas_jax.training import loop
from atlas_jax.training.lookahead import Lookahead, can_look_ahead

STEPS = 6
# Steps 4 to 6 train the retriever, at a high rate. Later runs load their programs from the cache, see `cpu_threads`
FLAGS = (
    "--freeze_retriever_steps 3 --lr_retriever 0.03 --per_gpu_batch_size 1 --n_context 2 --retriever_n_context 2 "
    "--text_maxlength 32 --target_maxlength 8 --shuffle --dropout 0.1"
)


@pytest.fixture
def events(monkeypatch):
    """The events of a run in order: `begin 2` when the retrieval for step 2 starts, and `step`."""
    seen: list[str] = []
    begin, call = Lookahead.begin, CompiledFunction.__call__

    def begin_and_record(self, model, step):
        seen.append(f"begin {step}")
        return begin(self, model, step)

    def call_and_record(self, *arguments):
        if self.name in ("train step", "gradient step"):
            seen.append("step")
        return call(self, *arguments)

    monkeypatch.setattr(Lookahead, "begin", begin_and_record)
    monkeypatch.setattr(CompiledFunction, "__call__", call_and_record)
    return seen


@pytest.fixture
def run(tmp_path, flags, quick_compiler):
    """Trains a shuffled run with dropout; returns its parameters and its metrics."""

    def run(name):
        assert main(["train", "--name", name, "--checkpoint_dir", str(tmp_path), *flags, *FLAGS.split()]) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        metrics = [{key: value for key, value in row.items() if not key.startswith("runtime/")} for row in rows]
        return load(tmp_path / name / f"checkpoint/step-{STEPS}").params, metrics

    return run


def same(first, second) -> bool:
    """Whether parameters, bit for bit, and metrics are equal."""
    params = all(np.array_equal(array, second[0][path]) for path, array in first[0].items())
    return params and first[1] == second[1]


def test_lookahead_matches_serial_training(run, events, monkeypatch):
    """Steps 2 to 4 are retrieved ahead, since steps 1 to 3 do not train the retriever; the results are the same.

    The counter-case: without waiting for a step that trains the retriever, the next step finds other passages, and the
    results differ.
    """
    ahead = run("ahead")
    waited = [text for step in (5, 6) for text in (f"begin {step}", "step")]
    assert events == ["begin 1", "begin 2", "step", "begin 3", "step", "begin 4", "step", "step", *waited]
    events.clear()
    monkeypatch.setattr(loop, "can_look_ahead", lambda config, step: False)
    assert same(ahead, run("behind"))
    assert events == [text for step in range(1, STEPS + 1) for text in (f"begin {step}", "step")]
    monkeypatch.setattr(loop, "can_look_ahead", lambda config, step: True)
    assert not same(ahead, run("too far"))


@pytest.mark.parametrize(
    ("learns", "changes", "expected"),
    [
        (False, {}, "yyyyyy"),
        (True, {}, "nnnnnn"),
        (True, {"freeze_retriever_steps": 2}, "yynnnn"),
        (True, {"accumulation_steps": 3}, "yynyyn"),
        (True, {"accumulation_steps": 3, "refresh_index": "0-9:2"}, "ynnnyn"),  # built again after steps 2, 4 and 6
        (True, {"freeze_retriever_steps": 3, "refresh_index": "0-9:3"}, "yynnnn"),
        (True, {"accumulation_steps": 2, "query_side_retriever_training": True, "refresh_index": "0-9:1"}, "ynynyn"),
    ],
)
def test_no_lookahead_after_a_step_that_changes_retriever_or_index(tiny_config, learns, changes, expected):
    """`y`: the next step's passages may be retrieved before this step."""
    config: Config = tiny_config
    groups = {}
    for group in ("distill", "optim", "retrieval"):
        fields = {field.name for field in dataclasses.fields(getattr(config, group))}
        groups[group] = {name: value for name, value in changes.items() if name in fields}
    groups["distill"]["train_retriever"] = learns
    config = dataclasses.replace(
        config, **{group: dataclasses.replace(getattr(config, group), **new) for group, new in groups.items()}
    )
    assert "".join("ny"[can_look_ahead(config, step)] for step in range(1, STEPS + 1)) == expected
