"""Puts arrays on the mesh and reads them back; with several processes, each handles the shards of its own devices."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from atlas_jax.mesh.param_specs import AXES, BATCH_AXES, Spec, fit_spec, param_spec
from atlas_jax.storage.lazy_array import LazyArray, relative_slices

ArrayOrShape = np.ndarray | Array | jax.ShapeDtypeStruct  # `atlas plan` compiles for shapes without arrays


def global_batch_size(mesh: Mesh, per_device: int) -> int:
    """Rows of a batch with `per_device` rows for each device of the batch axes."""
    return per_device * math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def local_row_indices(mesh: Mesh, rows: int, axes: tuple[str, ...] = BATCH_AXES) -> np.ndarray:
    """Indices of the rows, out of `rows` sharded over `axes`, that this process's devices hold.

    A row replicated over several processes is in the result of each of them.
    """
    return _local_row_indices(_sharding(mesh, (rows,), (axes,)), (rows,))


def row_owners(mesh: Mesh, rows: int) -> np.ndarray:
    """The process index of each of `rows` rows sharded over all devices; the number of devices must divide `rows`."""
    owners = np.empty(rows, np.int64)
    slices: Mapping[Any, Any] = _sharding(mesh, (rows,), (AXES,)).devices_indices_map((rows,))
    for device, index in slices.items():
        owners[index] = device.process_index
    return owners


def put_batch(mesh: Mesh, array: ArrayOrShape, rows: int | None = None) -> Any:
    """Puts an array "b ..." on the mesh, sharded over the batch axes.

    With `rows`, the global number of rows, `array` holds only this process's `local_row_indices`.
    """
    return _put(mesh, array, (BATCH_AXES,), rows)


def put_passages(mesh: Mesh, array: ArrayOrShape, rows: int | None = None) -> Any:
    """Puts an array "b n ..." on the mesh: b over the batch axes, n over `passages` if that divides it.

    `rows` as in `put_batch`.
    """
    return _put(mesh, array, (BATCH_AXES, "passages"), rows)


def put_rows(mesh: Mesh, array: ArrayOrShape, rows: int | None = None) -> Any:
    """Puts an array of independent rows on the mesh, sharded over all devices.

    With `rows`, the global number of rows, `array` holds only this process's `local_row_indices` over all axes.
    """
    return _put(mesh, array, (AXES,), rows)


def replicate(mesh: Mesh, array: ArrayOrShape) -> Any:
    """Puts a copy of the array on every device."""
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(replicate(mesh, np.asarray(jax.random.key_data(array))))
    return _put(mesh, array, ())


def put_parameter(mesh: Mesh, path: str, array: ArrayOrShape | LazyArray, dtype: Any = None) -> Any:
    """Puts a parameter, or an array of its shape such as an AdamW moment, on the mesh as PARAM_SPECS says.

    A NumPy array is converted to `dtype`, if given. From a LazyArray each process reads the shards of its own devices;
    call `checkpoints.formats.orbax_arrays.verify_shards` when all are read.
    """
    spec = param_spec(path, len(array.shape))
    if isinstance(array, LazyArray):
        return _read_shards(mesh, array, spec, dtype)
    return _put(mesh, array.astype(dtype) if isinstance(array, np.ndarray) and dtype else array, spec)


def to_host(array: Array) -> np.ndarray:
    """A copy of the whole array in the memory of every process; all processes must call this together."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        assert isinstance(array.sharding, NamedSharding)
        replicated = NamedSharding(array.sharding.mesh, PartitionSpec())
        array = jax.jit(lambda x: x, out_shardings=replicated)(array)
    return np.array(array)


def local_rows(array: Array) -> np.ndarray:
    """The rows that this process's devices hold of an array that is sharded by rows over all devices."""
    rows = {shard.index[0].indices(len(array))[0]: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(rows[start]) for start in sorted(rows)])


@contextlib.contextmanager
def in_host_memory() -> Iterator[None]:
    """Allocates new arrays on the CPU, which has room for a whole model, unless JAX_PLATFORMS excludes the CPU."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):
            stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        yield


def _read_shards(mesh: Mesh, array: LazyArray, spec: Spec, dtype: Any) -> Any:
    """Reads the bounding box of this process's shards once, and puts each shard on its device."""
    sharding = _sharding(mesh, array.shape, spec)
    owners: dict[tuple[tuple[int, int], ...], set[int]] = defaultdict(set)  # bounds of a shard -> processes with it
    slices: Mapping[Any, Any] = sharding.devices_indices_map(array.shape)
    for device, index in slices.items():
        bounds = tuple(axis.indices(n)[:2] for axis, n in zip(index, array.shape, strict=True))
        owners[bounds].add(device.process_index)
    process = jax.process_index()
    local = [bounds for bounds, processes in owners.items() if process in processes]
    box = tuple(slice(min(a for a, _ in axis), max(b for _, b in axis)) for axis in zip(*local, strict=True))
    # Each shard is checksummed by exactly one process
    verified = [tuple(slice(*axis) for axis in bounds) for bounds in local if min(owners[bounds]) == process]
    part = array.read_shard(box, [box] if len(verified) == len(owners) else verified)
    part = part.astype(dtype or part.dtype, copy=False)

    def shard(index: Any) -> np.ndarray:
        bounds = (slice(*axis.indices(n)[:2]) for axis, n in zip(index, array.shape, strict=True))
        return part[relative_slices(tuple(bounds), box)]

    return jax.make_array_from_callback(array.shape, sharding, shard)


def _put(mesh: Mesh, array: ArrayOrShape, spec: Spec, rows: int | None = None) -> Any:
    shape = array.shape if rows is None else (rows, *array.shape[1:])
    sharding = _sharding(mesh, shape, spec)
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding)
    if isinstance(array, jax.Array):
        return jax.device_put(array, sharding)
    local = None if rows is None or rows == len(array) else _local_row_indices(sharding, shape)

    def shard(index: Any) -> np.ndarray:
        if local is not None:  # the rows of a device are adjacent in the global array, and so in the local one
            start, stop, _ = index[0].indices(shape[0])
            first = int(np.searchsorted(local, start))
            index = (slice(first, first + stop - start), *index[1:])
        return np.asarray(array[index])

    # Unlike `device_put` this needs no communication with other processes
    return jax.make_array_from_callback(shape, sharding, shard)


def _sharding(mesh: Mesh, shape: tuple[int, ...], spec: Spec) -> NamedSharding:
    return NamedSharding(mesh, fit_spec(spec, shape, mesh.shape))


def _local_row_indices(sharding: NamedSharding, shape: tuple[int, ...]) -> np.ndarray:
    local = np.zeros(shape[0], bool)
    slices: Mapping[Any, Any] = sharding.addressable_devices_indices_map(shape)
    for index in slices.values():
        local[index[0]] = True
    return np.flatnonzero(local)
