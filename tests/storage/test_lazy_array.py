"""Arrays in files: whatever part is read, it is what numpy gives, and the parts make the whole."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from atlas_jax.checkpoints.formats.checksum import first
from atlas_jax.storage import lazy_array
from atlas_jax.storage.lazy_array import (
    StackedViews,
    arrays_equal,
    chunk_shape,
    contiguous,
    copy_into,
    parts,
    start_indices,
)
from atlas_jax.storage.mapped_file import MappedFile


@given(st.lists(st.integers(0, 7), max_size=4), st.integers(1, 400))
def test_parts_cover_an_array_once(shape, limit):
    """Every element is in one part, in C order, and a part is the limit plus at most a row."""
    shape = tuple(shape)
    whole = np.arange(math.prod(shape)).reshape(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy_array, "PART", limit)
        chunk = chunk_shape(shape, whole.itemsize)
    found = list(parts(shape, chunk))
    flat = [np.asarray(whole[index]).reshape(-1) for index in found]
    np.testing.assert_array_equal(np.concatenate([*flat, np.empty(0, int)]), whole.reshape(-1))
    assert [first(start_indices(index), shape) for index in found] == [part[0] for part in flat]
    assert all(part.nbytes < 2 * limit or part.size == 1 for part in flat)
    assert min(chunk, default=1) >= 1


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0), (0, 2, 1)])
def test_transposed_copies(axes, monkeypatch):
    """Tiles that do not divide the axes, in every order of them, with steps too."""
    monkeypatch.setattr(lazy_array, "TILE", (4, 3))
    view = np.arange(7 * 10 * 11, dtype=np.float32).reshape(7, 10, 11).transpose(axes)
    for part in (view, view[1:, 2:5], view[::2, :, ::3], view[0]):
        target = np.zeros(part.shape, np.float32)
        copy_into(target, part)
        np.testing.assert_array_equal(target, part)
        assert contiguous(part).flags.c_contiguous


@pytest.fixture
def mapped(tmp_path):
    """A matrix in a mapped file, larger than a page."""
    (tmp_path / "file").write_bytes(np.arange(6 * 5000, dtype=np.float16).tobytes())
    return np.ndarray((6, 5000), np.float16, MappedFile(tmp_path / "file"))


def test_linked_views_are_one_array(mapped):
    """Layers of a mapped file, transposed and widened: whole, some layers, some rows of one."""
    views = [mapped[:3].T, mapped[3:].T]
    linked = StackedViews(views, np.dtype(np.float32), stacked=True)
    whole = np.stack(views).astype(np.float32)
    assert (linked.shape, linked.size, linked.nbytes) == (whole.shape, whole.size, whole.nbytes)
    for index in ((), (slice(1, 2),), (slice(0, 2), slice(5, 4999))):
        found = linked.read(index)
        np.testing.assert_array_equal(found, whole[index])
        assert (found.dtype, found.flags.c_contiguous, found.flags.writeable) == (np.float32, True, True)
    single = StackedViews([mapped], np.dtype(np.float32), stacked=False)
    np.testing.assert_array_equal(single.read((slice(2, 4),)), mapped[2:4])


def test_chunks_lie_in_the_file_without_gaps(mapped, monkeypatch):
    """A matrix that is transposed is divided along what are its rows in the file; taken, the parts make the whole."""
    monkeypatch.setattr(lazy_array, "PART", 4000)
    for views, stacked in (([mapped[:3].T, mapped[3:].T], True), ([mapped], False), ([mapped.T], False)):
        linked = StackedViews(views, np.dtype(np.float32), stacked=stacked)
        whole = np.stack(views) if stacked else views[0]
        found = np.full(linked.shape, np.nan, np.float32)
        for index in parts(linked.shape, linked.chunk):
            part = whole[index][0] if stacked else whole[index]
            low, high = np.lib.array_utils.byte_bounds(part)
            assert high - low == part.nbytes <= 2 * lazy_array.PART
            found[index] = linked.take(index)
        np.testing.assert_array_equal(found, whole)


def test_same(mapped, monkeypatch):
    """Equal wherever it lies, and one other number anywhere is seen; NaN is as numpy has it, but for the same bytes."""
    monkeypatch.setattr(lazy_array, "PART", 64)
    assert arrays_equal(mapped, mapped)
    assert arrays_equal(mapped.T, mapped.copy().T)
    assert not arrays_equal(mapped, mapped.T)
    for place_on_mesh in (0, 12345, mapped.size - 1):
        other = mapped.copy()
        other.flat[place_on_mesh] = -1
        assert not arrays_equal(mapped, other)
