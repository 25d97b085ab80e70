"""Fixtures of the checkpoint tests."""

import dataclasses
import shutil
from pathlib import Path

import pytest

from atlas_jax.checkpoints import store


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Returns the path to which a test writes its file."""
    return tmp_path / "model.pth.tar"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_weights) -> Path:
    """Saves a checkpoint of the golden weights at step 7."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoint"
    store.save(folder, dataclasses.replace(tiny_weights, step=7))
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    """Returns a copy of a checkpoint, to damage."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))
