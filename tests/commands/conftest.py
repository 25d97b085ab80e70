"""Fixtures: a run of `atlas evaluate` that has finished, and assertions about commands that must fail."""

from collections.abc import Callable
from pathlib import Path

import pytest

from atlas_jax.commands.main import main
from tests.commands.sample_evaluation import evaluate_argv, unfinished_files


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> Path:
    """The folder of a successful run: its files are in `runs/run/`, the index that it built in `index/`."""
    folder = tmp_path_factory.mktemp("done")
    assert main(evaluate_argv(folder, save_index_path=folder / "index")) == 0
    return folder


@pytest.fixture
def assert_refused(capsys, tmp_path) -> Callable[..., str]:
    """A function that runs a command and asserts that it fails with status 2 and one line on stderr, which it returns.

    The line must have all of `parts` and a remedy, and no unfinished file may be left in `tmp_path`.
    """

    def run(argv: list[str], *parts: object, status: int = 2) -> str:
        assert main(argv) == status
        captured = capsys.readouterr()
        errors = [line for line in captured.err.splitlines() if not line.startswith("[")]  # the others are log lines
        assert len(errors) == 1, captured.err
        assert errors[0].startswith("atlas: ")
        assert captured.out == ""
        for part in parts:
            assert str(part) in errors[0]
        assert status != 2 or "; " in errors[0] or ": " in errors[0].removeprefix("atlas: ")
        assert unfinished_files(tmp_path) == []
        return errors[0]

    return run


@pytest.fixture
def no_weights(monkeypatch):
    """Makes loading weights, which takes minutes for XXL, fail the test."""

    def restore(config):
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr("atlas_jax.evaluation.loop.restore", restore)
