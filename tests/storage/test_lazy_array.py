"""Lazy arrays: any part that is read equals what NumPy gives, and the chunks make up the whole array."""

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
    chunk_slices,
    contiguous,
    copy_into,
    start_indices,
)
from atlas_jax.storage.mapped_file import MappedFile


@given(st.lists(st.integers(0, 7), max_size=4), st.integers(1, 400))
def test_chunks_cover_an_array_once(shape, limit):
    """Each element is in one chunk, chunks come in C order and have less than twice CHUNK_BYTES, or one element."""
    shape = tuple(shape)
    whole = np.arange(math.prod(shape)).reshape(shape)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy_array, "CHUNK_BYTES", limit)
        chunk = chunk_shape(shape, whole.itemsize)
    indices = list(chunk_slices(shape, chunk))
    flat = [np.asarray(whole[index]).reshape(-1) for index in indices]
    np.testing.assert_array_equal(np.concatenate([*flat, np.empty(0, int)]), whole.reshape(-1))
    assert [first(start_indices(index), shape) for index in indices] == [part[0] for part in flat]
    assert all(part.nbytes < 2 * limit or part.size == 1 for part in flat)
    assert min(chunk, default=1) >= 1


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (2, 1, 0), (0, 2, 1)])
def test_transposed_views_are_copied_exactly(axes, monkeypatch):
    """`copy_into` equals assignment for every order of the axes, tiles that do not divide them, and steps above 1."""
    monkeypatch.setattr(lazy_array, "TILE", (4, 3))
    view = np.arange(7 * 10 * 11, dtype=np.float32).reshape(7, 10, 11).transpose(axes)
    for part in (view, view[1:, 2:5], view[::2, :, ::3], view[0]):
        target = np.zeros(part.shape, np.float32)
        copy_into(target, part)
        np.testing.assert_array_equal(target, part)
        assert contiguous(part).flags.c_contiguous


@pytest.fixture
def mapped(tmp_path):
    """A float16 matrix in a mapped file, larger than a page."""
    (tmp_path / "file").write_bytes(np.arange(6 * 5000, dtype=np.float16).tobytes())
    return np.ndarray((6, 5000), np.float16, MappedFile(tmp_path / "file"))


def test_stacked_views_read_like_one_array(mapped):
    """Layers of a mapped file, transposed and cast to float32: all of them, some layers, some rows of two layers."""
    views = [mapped[:3].T, mapped[3:].T]
    stacked = StackedViews(views, np.dtype(np.float32), stacked=True)
    whole = np.stack(views).astype(np.float32)
    assert (stacked.shape, stacked.size, stacked.nbytes) == (whole.shape, whole.size, whole.nbytes)
    for index in ((), (slice(1, 2),), (slice(0, 2), slice(5, 4999))):
        part = stacked.read(index)
        np.testing.assert_array_equal(part, whole[index])
        assert (part.dtype, part.flags.c_contiguous, part.flags.writeable) == (np.float32, True, True)
    single = StackedViews([mapped], np.dtype(np.float32), stacked=False)
    np.testing.assert_array_equal(single.read((slice(2, 4),)), mapped[2:4])


def test_chunks_of_stacked_views_are_contiguous_in_the_file(mapped, monkeypatch):
    """A transposed matrix is divided along what are its rows in the file; `read_once` of all chunks gives the whole."""
    monkeypatch.setattr(lazy_array, "CHUNK_BYTES", 4000)
    for views, is_stacked in (([mapped[:3].T, mapped[3:].T], True), ([mapped], False), ([mapped.T], False)):
        stacked = StackedViews(views, np.dtype(np.float32), stacked=is_stacked)
        whole = np.stack(views) if is_stacked else views[0]
        result = np.full(stacked.shape, np.nan, np.float32)
        for index in chunk_slices(stacked.shape, stacked.chunk):
            part = whole[index][0] if is_stacked else whole[index]
            low, high = np.lib.array_utils.byte_bounds(part)
            assert high - low == part.nbytes <= 2 * lazy_array.CHUNK_BYTES
            result[index] = stacked.read_once(index)
        np.testing.assert_array_equal(result, whole)


def test_arrays_equal_sees_one_changed_element(mapped, monkeypatch):
    """Equal arrays compare equal in any memory layout; arrays that differ in one element, or transposed, do not."""
    monkeypatch.setattr(lazy_array, "CHUNK_BYTES", 64)
    assert arrays_equal(mapped, mapped)
    assert arrays_equal(mapped.T, mapped.copy().T)
    assert not arrays_equal(mapped, mapped.T)
    for position in (0, 12345, mapped.size - 1):
        other = mapped.copy()
        other.flat[position] = -1
        assert not arrays_equal(mapped, other)
