"""Views of files, brought into memory: the same numbers, from the file and not by chance."""

import os
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.errors import UserError
from atlas_jax.storage.lazy_array import contiguous
from atlas_jax.storage.mapped_file import ALIGNMENT, MappedFile, read_view, release_pages


@pytest.fixture
def path(tmp_path):
    """A file of 24 x 1000 numbers behind ten bytes of something else."""
    (tmp_path / "file").write_bytes(b"0123456789" + np.arange(24000, dtype=np.int32).tobytes())
    return tmp_path / "file"


def matrix(path):
    """Its numbers, mapped."""
    return np.ndarray((24, 1000), np.int32, MappedFile(path), offset=10)


@pytest.mark.parametrize("keep", [True, False])
def test_fetched_is_what_the_view_shows(path, keep):
    """Whole, rows, transposed, higher dimensions, a number: in memory of its own, with its axes as in the file."""
    whole = matrix(path)
    for view in (whole, whole[3:7], whole.T, whole[5], whole[2, 7:8], whole.reshape(4, 6, 1000).transpose(2, 0, 1)):
        found = read_view(view, keep=keep)
        np.testing.assert_array_equal(found, view)
        assert not np.shares_memory(found, whole)
        assert (found.dtype, found.strides) == (view.dtype, view.strides)
        assert np.lib.array_utils.byte_bounds(found)[0] % ALIGNMENT == 0


def test_what_cannot_be_fetched_is_left_alone(path):
    """With gaps or backwards in the file, empty, or not of a file: the same object."""
    whole = matrix(path)
    for view in (whole[:, 2:5], whole[::2], whole[::-1], whole[:0], np.arange(3), np.empty(0)):
        assert read_view(view) is view


def resident(path):
    """kB of the mapped file that count as this process's memory."""
    lines = Path("/proc/self/smaps").read_text().split(str(path))[1].splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))


def test_what_is_read_with_gaps_does_not_stay_mapped(path):
    """Pages that numpy had to touch are given back, and come again when they are asked for."""
    whole = matrix(path)
    part = whole[:, 2:900]
    assert int(part.sum()) == int(np.arange(24000).reshape(24, 1000)[:, 2:900].sum())
    assert resident(path) > 0
    np.testing.assert_array_equal(contiguous(whole, (slice(0, 24), slice(2, 900))), part.copy())
    assert contiguous(whole.T[2:900]).shape == (898, 24)
    assert resident(path) == 0
    for view in (whole, np.arange(3), np.empty(0)):
        release_pages(view)
    assert whole[23, 999] == 23999


def test_a_file_that_is_cut_short_meanwhile_is_told(path):
    """A mapping would end the process with SIGBUS there."""
    whole = matrix(path)
    os.truncate(path, 5000)
    np.testing.assert_array_equal(read_view(whole[0]), np.arange(1000))
    with pytest.raises(UserError, match=r"file: was cut short .*; copy or download it again"):
        read_view(whole[1:3])


def test_the_file_is_closed_with_its_last_view(path):
    """A view keeps it open, and nothing else does."""
    opened = len(os.listdir("/proc/self/fd"))
    view = matrix(path)[3]
    assert len(os.listdir("/proc/self/fd")) > opened
    np.testing.assert_array_equal(read_view(view), view)
    del view
    assert len(os.listdir("/proc/self/fd")) == opened


def test_no_file_and_an_empty_one(tmp_path):
    """Both are errors, and leave nothing open."""
    opened = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        MappedFile(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty"):
        MappedFile(tmp_path / "empty")
    assert len(os.listdir("/proc/self/fd")) == opened
