"""Named arrays in a folder that Orbax restores, written and read a part at a time; only this file knows Orbax.

Orbax itself takes arrays whole, and copies them. So it writes the folder with numbers in their places, and TensorStore,
its file format, puts the arrays there: uncompressed, in chunks that a reader takes singly.
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

from atlas_jax.checkpoints.formats.checksum import Checksum
from atlas_jax.errors import UserError
from atlas_jax.runtime.prefetch import map_in_order
from atlas_jax.runtime.process_group import process_group
from atlas_jax.storage.files import drop_page_cache
from atlas_jax.storage.lazy_array import (
    ArrayLike,
    LazyArray,
    LocalShards,
    Slices,
    chunk_shape,
    parts,
    piece_chunk,
    relative_slices,
    start_indices,
    take,
)

WORKERS = 4  # each reads, adds up and writes a part
CONTEXT = {
    "file_io_concurrency": {"limit": 8},  # each may hold a chunk
    "file_io_sync": True,  # at once, while others are prepared
    "cache_pool": {"total_bytes_limit": 0},
}


Sums = dict[str, list[int]]  # of each array, from which its checksum follows


def create_arrays(folder: Path, arrays: Mapping[str, ArrayLike]) -> None:
    """Makes the folder, without the arrays' bytes. Raises what Orbax and TensorStore raise."""
    with _orbax() as checkpointer:
        checkpointer.save(folder, {name: np.zeros((), array.dtype) for name, array in arrays.items()})
    context = tensorstore.Context(CONTEXT)
    for name, array in arrays.items():
        spec = {
            **_spec(folder, name),
            "metadata": {"shape": array.shape, "chunks": _chunk(array), "compressor": None},
            "dtype": array.dtype.name,
            "store_data_equal_to_fill_value": True,
        }
        tensorstore.open(spec, context=context, create=True, delete_existing=True).result()


def write_arrays(folder: Path, arrays: Mapping[str, ArrayLike], tell: Callable[[int], object]) -> Sums:
    """Writes what there is of the arrays into a folder that `create_arrays` made; `tell` hears of the bytes.

    Several processes may do so at a time, each its own pieces; `combine_checksums` of all their sums are the checksums.
    """
    context = tensorstore.Context(CONTEXT)
    places = {name: tensorstore.open(_spec(folder, name), context=context, open=True).result() for name in arrays}
    checksums = {name: Checksum(array.dtype, array.shape) for name, array in arrays.items()}

    def put(part: Part) -> tuple[str, Checksum]:
        values = take(part.source, part.piece)
        places[part.name][part.place].write(values, can_reference_source_data_indefinitely=True).result()
        added = Checksum(values.dtype, arrays[part.name].shape)
        added.add(start_indices(part.place), values)
        drop_page_cache(*_files(folder / part.name, places[part.name], part.place))
        return part.name, added

    with contextlib.closing(map_in_order(put, _parts(arrays), WORKERS)) as written:
        for name, added in written:
            checksums[name].join(added)
            tell(added.seen * added.dtype.itemsize)
    return {name: checksum.sums.tolist() for name, checksum in checksums.items()}


def combine_checksums(arrays: Mapping[str, ArrayLike], sums: Sequence[Sums]) -> dict[str, str]:
    """The checksum of each array, from the sums of all processes that wrote of it."""
    found = {}
    for name, array in arrays.items():
        whole = Checksum(array.dtype, array.shape)
        for one in sums:
            whole.sums += np.array(one.get(name, (0, 0)), np.uint32)
        found[name] = whole.digits()
    return found


def _chunk(array: ArrayLike) -> tuple[int, ...]:
    if isinstance(array, LocalShards):
        return piece_chunk(array.piece, array.shape, array.dtype.itemsize)
    return array.chunk if isinstance(array, LazyArray) else chunk_shape(array.shape, array.itemsize)


class Part(NamedTuple):
    """A chunk to write: where it belongs in the array of this name, and what it is a part of."""

    name: str
    place: Slices
    source: ArrayLike
    piece: Slices


def _parts(arrays: Mapping[str, ArrayLike]) -> Iterator[Part]:
    for name, array in arrays.items():
        if isinstance(array, LocalShards):
            for place, piece in array.pieces:
                for index in parts(piece.shape, _chunk(array)):
                    yield Part(name, tuple(map(_shifted, place, index)), piece, index)
        else:
            for index in parts(array.shape, _chunk(array)):
                yield Part(name, index, array, index)


def _files(folder: Path, place: Any, index: Slices) -> Iterator[Path]:
    """Those of an array that hold this part of it."""
    chunk = place.chunk_layout.read_chunk.shape or ()  # None of a number
    whole = (*index, *(slice(0, n) for n in place.shape[len(index) :]))
    ranges = [range(i.start // n, -(-i.stop // n)) for i, n in zip(whole, chunk, strict=True)]
    return (folder / (".".join(map(str, numbers)) or "0") for numbers in itertools.product(*ranges))


def _shifted(place: slice, index: slice) -> slice:
    return slice(place.start + index.start, place.start + index.stop)


def open_arrays(folder: Path, checksums: Mapping[str, str]) -> dict[str, "Stored"]:
    """The arrays of a folder, unread; UserError if it is damaged. What is read will be compared with the checksums."""
    context = tensorstore.Context(CONTEXT)
    try:
        with _orbax() as checkpointer:
            names = list(checkpointer.metadata(folder.resolve()).item_metadata)
        found = {name: _open(folder, name, context) for name in names}
    except Exception as error:  # Orbax and TensorStore raise every kind
        raise UserError(f"{folder}: damaged or incomplete ({first_line(error)}); write it again") from None
    for name in sorted(found.keys() ^ checksums.keys()):
        raise damaged_error(f"{folder}: {name}")
    return {name: Stored(folder, name, place, checksums[name]) for name, place in found.items()}


class Stored(LazyArray):
    """An array in such a folder. Parts read in turn are verified when the last has come: UserError if one differs.

    What several processes read as shares, `verify_shards` does.
    """

    def __init__(self, folder: Path, name: str, place: Any, expected: str):
        self.name, self.expected = f"{folder}: {name}", expected
        self.shape, self.dtype = tuple(place.shape), place.dtype.numpy_dtype
        self._place, self._folder = place, folder / name
        self._checksum = Checksum(self.dtype, self.shape)
        self._lock = threading.Lock()  # several threads may read parts
        self.shard_checksum: Checksum | None = None  # of what this process has to verify

    def read(self, index: Slices = ()) -> np.ndarray:
        part = self._read(index)
        added = Checksum(self.dtype, self.shape)
        added.add(start_indices(index), part)
        with self._lock:
            self._checksum.join(added)
            if self._checksum.seen >= self.size:
                found, self._checksum = self._checksum.digits(), Checksum(self.dtype, self.shape)
                if found != self.expected:
                    raise damaged_error(self.name)
        return part

    def take(self, index: Slices = ()) -> np.ndarray:
        part = self.read(index)
        with contextlib.suppress(FileNotFoundError):  # Orbax's own form has other files
            drop_page_cache(*_files(self._folder, self._place, index))
        return part

    def read_shard(self, index: Slices, owned: Sequence[Slices]) -> np.ndarray:
        part = self._read(index)
        self.shard_checksum = Checksum(self.dtype, self.shape)
        for piece in owned:
            self.shard_checksum.add(start_indices(piece), part[relative_slices(piece, index)])
        return part

    def _read(self, index: Slices) -> np.ndarray:
        try:
            part: np.ndarray = self._place[index].read().result()
        except Exception as error:  # TensorStore raises every kind
            folder = self.name.split(": ")[0]
            raise UserError(f"{folder}: damaged or incomplete ({first_line(error)}); write it again") from None
        return part


def verify_shards(arrays: Mapping[str, ArrayLike]) -> None:
    """Compares what all processes have read as shares with what was saved; they come here together.

    UserError on all of them if it differs.
    """
    shared = {name: array for name, array in arrays.items() if isinstance(array, Stored) and array.shard_checksum}
    mine = {name: array.shard_checksum.sums.tolist() for name, array in shared.items() if array.shard_checksum}
    for name, found in combine_checksums(shared, process_group().run_on_all(lambda: mine)).items():
        if found != shared[name].expected:
            raise damaged_error(shared[name].name)


def damaged_error(what: object) -> UserError:
    """What is there is another thing than was written."""
    return UserError(f"{what} is not what was saved; copy the checkpoint again or take an older one")


def first_line(error: Exception) -> str:
    """What the operating system said, or else the first line of others' messages, which may have many."""
    if code := re.search(r"os(?:_error_code='| error )(\d+)", str(error)):  # TensorStore; tokenizers
        return os.strerror(int(code[1]))
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _open(folder: Path, name: str, context: Any) -> Any:
    return tensorstore.open(_spec(folder, name), context=context, open=True, read=True).result()


def _spec(folder: Path, name: str) -> dict[str, Any]:
    path = folder.resolve()
    if (path / "manifest.ocdbt").is_file():  # Orbax's own choice, and ours once
        return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": f"file://{path}/", "path": f"{name}/"}}
    return {"driver": "zarr", "kvstore": {"driver": "file", "path": f"{path / name}/"}}


def _orbax() -> Any:
    """Orbax, silenced: it tells its own life in the log, and after a failure says it again from each of its threads."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    if not isinstance(sys.unraisablehook, _LateCallbacks):
        sys.unraisablehook = _LateCallbacks(sys.unraisablehook)
    alone = ocp.options.MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})
    handler = ocp.StandardCheckpointHandler(use_ocdbt=False, multiprocessing_options=alone)
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


class _LateCallbacks:
    """Drops what TensorStore's threads complain of when the event loop that waited for them has gone: a failed save."""

    def __init__(self, others: Callable[["sys.UnraisableHookArgs"], Any]):
        self._others = others

    def __call__(self, lost: "sys.UnraisableHookArgs") -> None:
        if not (isinstance(lost.exc_value, RuntimeError) and str(lost.exc_value) == "Event loop is closed"):
            self._others(lost)
