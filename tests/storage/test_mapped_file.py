"""Reading views of memory-mapped files: equal values, errors for damaged files, memory and descriptors given back."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from atlas_jax.errors import UserError
from atlas_jax.storage.lazy_array import contiguous
from atlas_jax.storage.mapped_file import ALIGNMENT, MappedFile, read_view, release_pages


@pytest.fixture
def path(tmp_path):
    """A file of ten bytes of other data followed by 24 x 1000 int32 values."""
    (tmp_path / "file").write_bytes(b"0123456789" + np.arange(24000, dtype=np.int32).tobytes())
    return tmp_path / "file"


def matrix(path):
    """Maps the file and returns its values, shape (24, 1000)."""
    return np.ndarray((24, 1000), np.int32, MappedFile(path), offset=10)


@pytest.mark.parametrize("keep_cached", [True, False])
def test_read_view_equals_the_view(path, keep_cached):
    """Whole, rows, transposed, three axes, one element: an aligned copy that has the strides of the view."""
    whole = matrix(path)
    for view in (whole, whole[3:7], whole.T, whole[5], whole[2, 7:8], whole.reshape(4, 6, 1000).transpose(2, 0, 1)):
        copy = read_view(view, keep_cached=keep_cached)
        np.testing.assert_array_equal(copy, view)
        assert not np.shares_memory(copy, whole)
        assert (copy.dtype, copy.strides) == (view.dtype, view.strides)
        assert np.lib.array_utils.byte_bounds(copy)[0] % ALIGNMENT == 0


def test_views_that_are_not_contiguous_in_a_file_are_returned_unchanged(path):
    """A view with gaps, reversed, empty, or not of a mapped file: `read_view` returns the same object."""
    whole = matrix(path)
    for view in (whole[:, 2:5], whole[::2], whole[::-1], whole[:0], np.arange(3), np.empty(0)):
        assert read_view(view) is view


def resident(path):
    """Returns the kB of the mapped file that are resident in this process (Rss)."""
    lines = Path("/proc/self/smaps").read_text().split(str(path))[1].splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Rss:"))


def test_pages_read_through_the_map_do_not_stay_resident(path):
    """Pages of a view with gaps, which NumPy reads by page faults, are released; a later access maps them again."""
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


def test_a_file_cut_short_while_mapped_is_a_user_error(path):
    """Reading the map itself there would kill the process with SIGBUS."""
    whole = matrix(path)
    os.truncate(path, 5000)
    np.testing.assert_array_equal(read_view(whole[0]), np.arange(1000))
    with pytest.raises(UserError, match=r"file: was cut short .*; copy or download it again"):
        read_view(whole[1:3])


def test_the_file_is_closed_with_its_last_view(path):
    """A view keeps the descriptor open; deleting the last one closes it."""
    open_count = len(os.listdir("/proc/self/fd"))
    view = matrix(path)[3]
    assert len(os.listdir("/proc/self/fd")) > open_count
    np.testing.assert_array_equal(read_view(view), view)
    del view
    assert len(os.listdir("/proc/self/fd")) == open_count


def test_a_missing_or_empty_file_cannot_be_mapped(tmp_path):
    """FileNotFoundError and ValueError; neither leaves a descriptor open."""
    open_count = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        MappedFile(tmp_path / "none")
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty"):
        MappedFile(tmp_path / "empty")
    assert len(os.listdir("/proc/self/fd")) == open_count


def test_a_map_at_the_end_of_the_interpreter_is_quiet(path):
    """A map that lives in a module is closed after `os` is gone: nothing is printed."""
    code = f"import sys; from atlas_jax.storage.mapped_file import MappedFile; sys.kept = MappedFile({str(path)!r}); "
    code += "sys.kept.itself = sys.kept; import os; sys.modules['os'].close = None"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
