"""Commands that must fail, and one that has run."""

from collections.abc import Callable
from pathlib import Path

import pytest

from atlas_jax.commands.main import main
from tests.commands.sample_run import command, leftovers


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """The folder of a run that went well: `runs/run/`, and the index it built in `index/`."""
    folder = tmp_path_factory.mktemp("done")
    assert main(command(folder, save_index_path=folder / "index")) == 0
    return folder


@pytest.fixture
def refused(capsys, tmp_path) -> Callable[..., str]:
    """Runs a command that must fail: status 2, one line that has all of `parts` and a remedy, and nothing left over."""

    def run(argv: list[str], *parts: object, status: int = 2) -> str:
        assert main(argv) == status
        captured = capsys.readouterr()
        said = [line for line in captured.err.splitlines() if not line.startswith("[")]  # besides log lines
        assert len(said) == 1, captured.err
        assert said[0].startswith("atlas: ")
        assert captured.out == ""
        for part in parts:
            assert str(part) in said[0]
        assert status != 2 or "; " in said[0] or ": " in said[0].removeprefix("atlas: ")
        assert leftovers(tmp_path) == []
        return said[0]

    return run


@pytest.fixture
def no_weights(monkeypatch):
    """Loading weights, which takes minutes for XXL, is a failure of the test."""

    def restore(config):
        raise AssertionError("the weights are loaded")

    monkeypatch.setattr("atlas_jax.evaluation.loop.restore", restore)
