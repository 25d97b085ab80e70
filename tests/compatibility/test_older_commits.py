"""Runs, checkpoints and indexes written by older commits of this project still work."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.commands.main import main
from atlas_jax.training import loop
from atlas_jax.training.resume import restore_or_init
from tests.compatibility import make

ARCHIVES = sorted(Path(__file__).parent.glob("*.tar.xz"))


@pytest.fixture(scope="module", params=ARCHIVES, ids=lambda path: path.name.split(".")[0])
def folder(request, tmp_path_factory) -> Path:
    """A folder with the files of one older commit."""
    folder = tmp_path_factory.mktemp("older")
    with tarfile.open(request.param) as archive:
        archive.extractall(folder, filter="data")
    return folder


def atlas(folder: Path, monkeypatch, *arguments: str) -> int:
    """Runs a command in the folder; the paths that `make` gives are relative to it."""
    monkeypatch.chdir(folder)
    return main(list(arguments))


def resume(folder: Path, monkeypatch, name: str) -> list[dict]:
    """Trains to step 6 with the flags of the older commit; returns the lines of metrics.jsonl."""
    flags = ["--name", name, "--total_steps", "6", "--mesh", "data=1", *make.TRAIN.split(), "--compile_cache", "auto"]
    assert atlas(folder, monkeypatch, "train", *flags) == 0
    return [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("quick_compiler")
def test_a_run_of_an_older_commit_resumes(folder, monkeypatch):
    """A run stopped after step 2 continues to step 6 with the losses and norms of a run that was not stopped.

    The counter-case: with moments of other values, steps 5 and 6, after the update at step 4, are others.
    """
    uninterrupted = [json.loads(line) for line in (folder / "uninterrupted.jsonl").read_text().splitlines()]
    shutil.copytree(folder / "runs/stopped", folder / "runs/other", symlinks=True)
    resumed = resume(folder, monkeypatch, "stopped")
    assert [row["step"] for row in resumed] == [row["step"] for row in uninterrupted] == [1, 2, 3, 4, 5, 6]
    compared = ("loss/reader_loss", "loss/retriever_loss", "grad_norm", "lr", "lr_retriever", "skipped_steps")
    for row, expected in zip(resumed, uninterrupted, strict=True):
        for name in [name for name in compared if name in expected]:  # grad_norm only where a step updates
            assert row[name] == pytest.approx(expected[name], rel=1e-3), (row["step"], name)

    def restore_with_other_moments(*arguments):
        start, state = restore_or_init(*arguments)
        moments = state.reader.moments
        halved = moments._replace(mu={path: 0.5 * x for path, x in moments.mu.items()})
        return start, state._replace(reader=state.reader._replace(moments=halved))

    monkeypatch.setattr(loop, "restore_or_init", restore_with_other_moments)
    other = resume(folder, monkeypatch, "other")
    assert other[4]["loss/reader_loss"] != pytest.approx(uninterrupted[4]["loss/reader_loss"], rel=1e-3)


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("kind", ["flat", "ivfsq"])
def test_a_checkpoint_and_an_index_of_an_older_commit_evaluate_the_same(folder, monkeypatch, kind):
    """The scores, and the passages that were found in the index then."""
    expected = json.loads((folder / "scores.json").read_text())[kind]
    mode = [] if kind == "flat" else ["--index_mode", "faiss", "--faiss_index_type", kind]
    paths = ["--name", kind, "--model_path", "converted", "--load_index_path", kind]
    flags = [*paths, *mode, "--mesh", "data=1", *make.EVALUATE.split(), "--compile_cache", "auto"]
    assert atlas(folder, monkeypatch, "evaluate", *flags) == 0
    scores = json.loads((folder / "scored" / kind / "rows-step-1.metrics.json").read_text())
    for metric in ("exact_match", "f1", "eval_loss"):
        np.testing.assert_allclose(scores[metric], expected[metric], rtol=1e-4, err_msg=metric)
    lines = (folder / "scored" / kind / "rows-step-1.jsonl").read_text().splitlines()
    assert [[passage["id"] for passage in json.loads(line)["passages"]] for line in lines] == expected["passages"]
