"""Named arrays in an Orbax checkpoint folder, written and read a chunk at a time. Only this file uses Orbax.

Orbax itself takes whole arrays, and copies them. So Orbax writes the folder with a scalar in place of each array, and
TensorStore, whose zarr format Orbax uses, writes the arrays: uncompressed, in chunks that can be read one by one.
"""

import contextlib
import itertools
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from orbax.checkpoint._src.serialization import tensorstore_utils

from atlas_jax.checkpoints.formats.checksum import Checksum
from atlas_jax.errors import UserError
from atlas_jax.runtime.prefetch import map_in_order
from atlas_jax.runtime.process_group import process_group
from atlas_jax.storage.files import can_sync_folders, drop_page_cache, fsync
from atlas_jax.storage.lazy_array import (
    ArrayLike,
    LazyArray,
    LocalShards,
    Slices,
    chunk_shape,
    chunk_slices,
    read_once,
    relative_slices,
    shard_chunk_shape,
    start_indices,
)

# Orbax's context has no setter; what it writes is synced with the whole checkpoint, and locks are needed as little
tensorstore_utils._BASE_TS_CONTEXT.update({"file_io_sync": False, "file_io_locking": {"mode": "none"}})

WORKERS = 4  # threads, each of which reads, checksums and writes a chunk
CONTEXT = {
    "file_io_concurrency": {"limit": 8},  # file operations, each of which may hold a chunk
    "file_io_locking": {"mode": "none"},  # not on every file system, and each file has one writer
    "cache_pool": {"total_bytes_limit": 0},
}

PartialSums = dict[str, list[int]]  # by array: the `Checksum.sums` of what one process wrote or read


def create_arrays(folder: Path, arrays: Mapping[str, ArrayLike]) -> None:
    """Creates the folder and the metadata of the arrays, but no chunks. Raises whatever Orbax and TensorStore raise."""
    with _make_checkpointer() as checkpointer:
        checkpointer.save(folder, {name: np.zeros((), array.dtype) for name, array in arrays.items()})
    context = _write_context(folder)
    for name, array in arrays.items():
        spec = {
            **_store_spec(folder, name),
            "metadata": {"shape": array.shape, "chunks": _chunk_shape(array), "compressor": None},
            "dtype": array.dtype.name,
            "store_data_equal_to_fill_value": True,
        }
        tensorstore.open(spec, context=context, create=True, delete_existing=True).result()


def write_arrays(folder: Path, arrays: Mapping[str, ArrayLike], on_bytes: Callable[[int], object]) -> PartialSums:
    """Writes arrays into a folder that `create_arrays` made; calls `on_bytes(count)` after each chunk.

    Several processes may write at the same time: of `LocalShards`, each writes only its own shards.
    `combine_checksums` makes the checksums from the sums that all processes return.
    """
    context = _write_context(folder)
    syncs = can_sync_folders(folder)
    stores = {name: tensorstore.open(_store_spec(folder, name), context=context, open=True).result() for name in arrays}
    checksums = {name: Checksum(array.dtype, array.shape) for name, array in arrays.items()}

    def write_chunk(chunk: ChunkWrite) -> tuple[str, Checksum]:
        values = read_once(chunk.source, chunk.source_index)
        stores[chunk.name][chunk.target].write(values, can_reference_source_data_indefinitely=True).result()
        added = Checksum(values.dtype, arrays[chunk.name].shape)
        added.add(start_indices(chunk.target), values)
        files = list(_chunk_files(folder / chunk.name, stores[chunk.name], chunk.target))
        if not syncs:
            fsync(*files)
        drop_page_cache(*files)
        return chunk.name, added

    with contextlib.closing(map_in_order(write_chunk, _chunk_writes(arrays), WORKERS)) as written:
        for name, added in written:
            checksums[name].merge(added)
            on_bytes(added.element_count * added.dtype.itemsize)
    return {name: checksum.sums.tolist() for name, checksum in checksums.items()}


def _write_context(folder: Path) -> Any:
    """Makes a context that syncs each file when it is written, where TensorStore can, while others are prepared."""
    return tensorstore.Context(CONTEXT | {"file_io_sync": can_sync_folders(folder)})


def combine_checksums(arrays: Mapping[str, ArrayLike], partial_sums: Sequence[PartialSums]) -> dict[str, str]:
    """Returns each array's checksum, from the sums of all processes that wrote or read parts of it."""
    result = {}
    for name, array in arrays.items():
        checksum = Checksum(array.dtype, array.shape)
        for partial in partial_sums:
            checksum.sums += np.array(partial.get(name, (0, 0)), np.uint32)
        result[name] = checksum.hexdigest()
    return result


def _chunk_shape(array: ArrayLike) -> tuple[int, ...]:
    if isinstance(array, LocalShards):
        return shard_chunk_shape(array.shard_shape, array.shape, array.dtype.itemsize)
    return array.chunk if isinstance(array, LazyArray) else chunk_shape(array.shape, array.itemsize)


class ChunkWrite(NamedTuple):
    """A chunk to write: the index `target` of the array `name` gets the values `source[source_index]`."""

    name: str
    target: Slices
    source: ArrayLike
    source_index: Slices


def _chunk_writes(arrays: Mapping[str, ArrayLike]) -> Iterator[ChunkWrite]:
    for name, array in arrays.items():
        if isinstance(array, LocalShards):
            for target, piece in array.shards:
                for index in chunk_slices(piece.shape, _chunk_shape(array)):
                    yield ChunkWrite(name, tuple(map(_add_offset, target, index)), piece, index)
        else:
            for index in chunk_slices(array.shape, _chunk_shape(array)):
                yield ChunkWrite(name, index, array, index)


def _chunk_files(folder: Path, store: Any, index: Slices) -> Iterator[Path]:
    """Returns the files of the chunks that cover this part of an array."""
    chunk = store.chunk_layout.read_chunk.shape or ()  # None for a scalar
    full_index = (*index, *(slice(0, n) for n in store.shape[len(index) :]))
    ranges = [range(i.start // n, -(-i.stop // n)) for i, n in zip(full_index, chunk, strict=True)]
    return (folder / (".".join(map(str, numbers)) or "0") for numbers in itertools.product(*ranges))


def _add_offset(base: slice, index: slice) -> slice:
    return slice(base.start + index.start, base.start + index.stop)


def open_arrays(folder: Path, checksums: Mapping[str, str]) -> dict[str, "StoredArray"]:
    """Opens the arrays of a folder without reading them; UserError if the folder is damaged.

    Values that are read later are compared with `checksums`.
    """
    context = tensorstore.Context(CONTEXT)
    try:
        with _make_checkpointer() as checkpointer:
            names = list(checkpointer.metadata(folder.resolve()).item_metadata)
        stores = {name: _open_store(folder, name, context) for name in names}
    except Exception as error:  # Orbax and TensorStore raise every kind
        raise UserError(f"{folder}: damaged or incomplete ({first_line(error)}); write it again") from None
    for name in sorted(stores.keys() ^ checksums.keys()):
        raise damaged_error(f"{folder}: {name}")
    return {name: StoredArray(folder, name, store, checksums[name]) for name, store in stores.items()}


class StoredArray(LazyArray):
    """An array in an Orbax folder, verified once `read` has returned all of its elements: UserError if one differs.

    What several processes read with `read_shard` is verified by `verify_shards`.
    """

    def __init__(self, folder: Path, name: str, store: Any, expected: str):
        self.name, self.expected = f"{folder}: {name}", expected
        self.shape, self.dtype = tuple(store.shape), store.dtype.numpy_dtype
        self._store, self._folder = store, folder / name
        self._checksum = Checksum(self.dtype, self.shape)
        self._lock = threading.Lock()  # several threads may read parts
        self.shard_checksum: Checksum | None = None  # checksum of the elements that this process verifies

    def read(self, index: Slices = ()) -> np.ndarray:
        part = self._read(index)
        added = Checksum(self.dtype, self.shape)
        added.add(start_indices(index), part)
        with self._lock:
            self._checksum.merge(added)
            if self._checksum.element_count >= self.size:
                found, self._checksum = self._checksum.hexdigest(), Checksum(self.dtype, self.shape)
                if found != self.expected:
                    raise damaged_error(self.name)
        return part

    def read_once(self, index: Slices = ()) -> np.ndarray:
        part = self.read(index)
        with contextlib.suppress(FileNotFoundError):  # OCDBT folders, Orbax's default, have other files
            drop_page_cache(*_chunk_files(self._folder, self._store, index))
        return part

    def read_shard(self, index: Slices, to_verify: Sequence[Slices]) -> np.ndarray:
        part = self._read(index)
        self.shard_checksum = Checksum(self.dtype, self.shape)
        for piece in to_verify:
            self.shard_checksum.add(start_indices(piece), part[relative_slices(piece, index)])
        return part

    def _read(self, index: Slices) -> np.ndarray:
        try:
            part: np.ndarray = self._store[index].read().result()
        except Exception as error:  # TensorStore raises every kind
            folder = self.name.split(": ")[0]
            raise UserError(f"{folder}: damaged or incomplete ({first_line(error)}); write it again") from None
        return part


def verify_shards(arrays: Mapping[str, ArrayLike]) -> None:
    """Compares what the processes have read with `read_shard` with what was saved. A collective call.

    UserError on every process if an array differs.
    """
    sharded = {name: array for name, array in arrays.items() if isinstance(array, StoredArray) and array.shard_checksum}
    local_sums = {name: array.shard_checksum.sums.tolist() for name, array in sharded.items() if array.shard_checksum}
    for name, found in combine_checksums(sharded, process_group().run_on_all(lambda: local_sums)).items():
        if found != sharded[name].expected:
            raise damaged_error(sharded[name].name)


def damaged_error(what: object) -> UserError:
    """Returns the UserError for stored data that differs from what was saved."""
    return UserError(f"{what} is not what was saved; copy the checkpoint again or take an older one")


def first_line(error: Exception) -> str:
    """Returns the operating system's message, or else the first line of the error's, which may have many."""
    if code := re.search(r"os(?:_error_code='| error )(\d+)", str(error)):  # TensorStore; tokenizers
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _open_store(folder: Path, name: str, context: Any) -> Any:
    return tensorstore.open(_store_spec(folder, name), context=context, open=True, read=True).result()


def _store_spec(folder: Path, name: str) -> dict[str, Any]:
    path = folder.resolve()
    if (path / "manifest.ocdbt").is_file():  # OCDBT is Orbax's default; our early checkpoints used it
        return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{name}/"}}
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path / name}/"}}


def _make_checkpointer() -> Any:
    """Makes an Orbax checkpointer for this process alone and silences its logging.

    Orbax logs each of its steps, and after a failure every one of its threads logs the error again.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not isinstance(sys.unraisablehook, _IgnoreClosedLoop):
        sys.unraisablehook = _IgnoreClosedLoop(sys.unraisablehook)
    this_process = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    handler = ocp.StandardCheckpointHandler(use_ocdbt=False, multiprocessing_options=this_process)
    return ocp.Checkpointer(handler, multiprocessing_options=this_process)


class _IgnoreClosedLoop:
    """Unraisable hook that drops errors of TensorStore's threads whose event loop closed after a failed save."""

    def __init__(self, next_hook: Callable[["sys.UnraisableHookArgs"], Any]):
        self._next_hook = next_hook

    def __call__(self, unraisable: "sys.UnraisableHookArgs") -> None:
        if not (isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed"):
            self._next_hook(unraisable)
