"""Fixtures of the checkpoint tests."""

from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Returns the path to which a test writes its file."""
    return tmp_path / "model.pth.tar"
