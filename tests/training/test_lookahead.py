"""Where a step leaves the retriever as it is, the next one's passages are found before it; nothing else changes."""

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
# Steps 4 to 6 train it, and much. On eight devices: later runs have their programs from the cache, see `cpu_threads`
FLAGS = (
    "--freeze_retriever_steps 3 --lr_retriever 0.03 --per_gpu_batch_size 1 --n_context 2 --retriever_n_context 2 "
    "--text_maxlength 32 --target_maxlength 8 --shuffle --dropout 0.1"
)


@pytest.fixture
def events(monkeypatch):
    """What a run does, in order: `look 2`, when it begins to find what step 2 learns from, and `step`."""
    seen: list[str] = []
    look, call = Lookahead.begin, CompiledFunction.__call__

    def looks(self, model, step):
        seen.append(f"look {step}")
        return look(self, model, step)

    def calls(self, *arguments):
        if self.name in ("train step", "gradient step"):
            seen.append("step")
        return call(self, *arguments)

    monkeypatch.setattr(Lookahead, "begin", looks)
    monkeypatch.setattr(CompiledFunction, "__call__", calls)
    return seen


@pytest.fixture
def run(tmp_path, flags, quick_compiler):
    """Trains a shuffled run with dropout; returns its parameters and its metrics."""

    def run(name):
        assert main(["train", "--name", name, "--checkpoint_dir", str(tmp_path), *flags, *FLAGS.split()]) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        told = [{key: value for key, value in row.items() if not key.startswith("runtime/")} for row in rows]
        return load(tmp_path / name / f"checkpoint/step-{STEPS}").params, told

    return run


def same(one, other) -> bool:
    """Bit for bit."""
    params = all(np.array_equal(array, other[0][path]) for path, array in one[0].items())
    return params and one[1] == other[1]


def test_it_looks_ahead_and_ends_alike(run, events, monkeypatch):
    """Ahead of steps 2 to 4, as 1 to 3 leave the retriever alone; never too far; and to the same end as without.

    The counter-case: where a step that trains it is not waited for, the next finds other passages, and the end differs.
    """
    ahead = run("ahead")
    waited = [text for step in (5, 6) for text in (f"look {step}", "step")]
    assert events == ["look 1", "look 2", "step", "look 3", "step", "look 4", "step", "step", *waited]
    events.clear()
    monkeypatch.setattr(loop, "can_look_ahead", lambda config, step: False)
    assert same(ahead, run("behind"))
    assert events == [text for step in range(1, STEPS + 1) for text in (f"look {step}", "step")]
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
def test_after_which_steps(tiny_config, learns, changes, expected):
    """Not after one that changes the query encoder, nor where the index is built again before the next."""
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
