"""The only file that knows devices: the mesh, and what goes where on it.

Axes: `data` splits the batch; `fsdp` the batch too, and parameters with all that AdamW remembers of them; `passages`
the passages of each query, and parameters like `fsdp`; `model` the heads, the MLP and the vocabulary of the reader.
"""

import contextlib
import contextvars
import logging
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from atlas_jax.errors import UserError
from atlas_jax.storage.lazy_array import LazyArray, relative_slices

logger = logging.getLogger(__name__)

AXES = ("data", "fsdp", "passages", "model")
BATCH_AXES = ("data", "fsdp")  # what splits the queries of a batch
ROW_AXES = (*BATCH_AXES, "passages")  # what splits rows of which each query has one a passage
PARAM_AXES = ("fsdp", "passages")  # what splits parameters
MODEL_AXIS = "model"
WIDTHS = {
    "fsdp": "width",
    "passages": "passages a query",
    MODEL_AXIS: "heads, MLP or vocabulary",
}  # what should be divided

ArrayOrShape = np.ndarray | Array | jax.ShapeDtypeStruct  # an array, or the shape of one that `atlas plan` compiles for
Spec = tuple[Any, ...]  # for each axis of an array: the mesh's axis or axes that split it, or None

_LAYER = r"(?:reader/(?:en|de)coder/layers/)?"  # of the reader, with or without the axis of its layers in front
_ATTENTION = _LAYER + r"(?:self_|cross_)?attn/"
_RETRIEVER = r"(?:retriever/(?:query_|passage_)?encoder/)"
_BERT_LAYER = rf"(?:{_RETRIEVER}layers/)?"
PARAM_SPECS: tuple[tuple[str, Spec], ...] = (  # which axis of a parameter is split over what, counted from the last one
    (_ATTENTION + r"[qkv]/kernel", (PARAM_AXES, MODEL_AXIS, None)),  # d h k
    (_ATTENTION + r"o/kernel", (MODEL_AXIS, None, PARAM_AXES)),  # h k d
    (_LAYER + r"mlp/(?:gate|up)/kernel", (PARAM_AXES, MODEL_AXIS)),  # d f
    (_LAYER + r"mlp/down/kernel", (MODEL_AXIS, PARAM_AXES)),  # f d
    (r"reader/embed/embedding", (MODEL_AXIS, PARAM_AXES)),  # v d
    (r"reader/lm_head/kernel", (PARAM_AXES, MODEL_AXIS)),  # d v
    (_BERT_LAYER + r"[qkv]/kernel", (PARAM_AXES, None, None)),  # d h k
    (_BERT_LAYER + r"o/kernel", (None, None, PARAM_AXES)),  # h k d
    (_BERT_LAYER + r"up/kernel", (PARAM_AXES, None)),  # d f
    (_BERT_LAYER + r"down/kernel", (None, PARAM_AXES)),  # f d
    (_RETRIEVER + r"(?:words|positions)/embedding", (None, PARAM_AXES)),  # v d
    # Whole on every device, because small: norms, biases, position buckets, the two token types
    (r"(?:.*/)?(?:\w+_norm/(?:scale|bias)|[qkvo]/bias|(?:up|down)/bias)", ()),
    (r"reader/(?:en|de)coder/position_bias/embed/embedding", ()),
    (_RETRIEVER + r"token_types/embedding", ()),
)


def make_mesh(
    spec: str = "auto",
    *,
    widths: Mapping[str, Collection[int]] = {},
    nbytes: int = 0,
    described: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh of all devices: `auto`, see `auto_sizes`, or sizes such as `data=4,model=2`.

    With smaller sizes the first devices of a single process do the work. `described` are devices of another machine,
    for which programs are only compiled. Where an axis does not divide its `widths`, that is said. A model that does
    not learn tells its `nbytes`.
    """
    devices = jax.devices() if described is None else described
    memory = 0 if described else (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    if spec == "auto":
        learnt = () if nbytes else widths.get("fsdp", ())
        sizes = auto_sizes(len(devices), memory, widths=learnt, nbytes=nbytes)
    else:
        sizes = check_mesh(spec, described=described)
    _tell_what_stays_whole(spec, sizes, widths)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    used = math.prod(shape)
    if used < len(devices):
        logger.warning("--mesh %s: %d of %d devices are used", spec, used, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:used])


def _tell_what_stays_whole(spec: str, sizes: Mapping[str, int], widths: Mapping[str, Collection[int]]) -> None:
    said, would = [], []
    for axis, size in sizes.items():
        known = widths.get(axis, ())
        if whole := [str(n) for n in sorted(known) if n % size]:
            said.append(f"{axis}={size} does not divide {', '.join(whole)} ({WIDTHS[axis]})")
            would.append(f"{axis}={math.gcd(size, *known)}")
    if said:
        logger.warning(
            "--mesh %s: %s, so what has such a size stays whole on every device; %s would divide all, with the other "
            "devices on data",
            *(spec, " and ".join(said), ",".join(would)),
        )


def check_mesh(spec: str, *, described: Sequence[Any] | None = None) -> dict[str, int]:
    """The sizes that --mesh asks for, none for `auto`; UserError if these devices cannot be such a mesh."""
    sizes = {} if spec == "auto" else _parse(spec)
    used, count = math.prod(sizes.values()), len(jax.devices() if described is None else described)
    if used > count or (sizes and used < count and (described or jax.process_count() > 1)):
        raise UserError(f"--mesh {spec}: {used} devices, but there are {count}; the sizes must multiply to it")
    return sizes


def auto_sizes(count: int, memory: int, *, widths: Collection[int], nbytes: int) -> dict[str, int]:
    """A model that learns, of these widths, on `fsdp` as far as it divides them, and the rest on `data`.

    Else the batch is split, and the model where it is large: while its parameters, `nbytes` in all, would take over a
    third of a device's memory (0: unknown).
    """
    if widths:
        fsdp = math.gcd(count, *widths)
        return {"data": count // fsdp, "fsdp": fsdp}
    model = 1
    while memory and nbytes / model > memory / 3 and count % (2 * model) == 0:
        model *= 2
    return {"data": count // model, "model": model}


def _parse(spec: str) -> dict[str, int]:
    sizes = {}
    for piece in spec.split(","):
        axis, _, size = piece.strip().partition("=")
        if axis in sizes:
            raise UserError(f"--mesh {spec}: {axis} is there twice; give each axis one size")
        if axis not in AXES or not size.isdecimal() or int(size) < 1:
            raise UserError(
                f"--mesh {spec}: {piece!r} is not one of {', '.join(f'{axis}=N' for axis in AXES)}; or say auto"
            )
        sizes[axis] = int(size)
    return sizes


def is_single_cpu(mesh: Mesh) -> bool:
    """Whether inference should care for a CPU's cache."""
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


@contextlib.contextmanager
def in_host_memory() -> Iterator[None]:
    """New arrays are the CPU's, which has room for a whole model; where JAX_PLATFORMS leaves it out, a device's."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(RuntimeError):
            stack.enter_context(jax.default_device(jax.local_devices(backend="cpu")[0]))
        yield


def global_batch_size(mesh: Mesh, per_device: int) -> int:
    """Rows of a batch that gives each device of the batch axes so many."""
    return per_device * math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def local_row_indices(mesh: Mesh, rows: int, axes: tuple[str, ...] = BATCH_AXES) -> np.ndarray:
    """Of so many rows, split over these axes, those that this process's devices work on, and so it makes.

    Alone it makes all; where devices of several processes work on the same rows, each of these does.
    """
    return _own_rows(_sharding(mesh, (rows,), (axes,)), (rows,))


def row_owners(mesh: Mesh, rows: int) -> np.ndarray:
    """The process of each of so many rows that are split over all devices, whose number divides theirs."""
    owners = np.empty(rows, np.int64)
    places: Mapping[Any, Any] = _sharding(mesh, (rows,), (AXES,)).devices_indices_map((rows,))
    for device, index in places.items():
        owners[index] = device.process_index
    return owners


def put_batch(mesh: Mesh, array: ArrayOrShape, rows: int | None = None) -> Any:
    """An array whose first axis is the batch, split over the batch axes.

    Given the number of its `rows`, `array` has only those that are `local_row_indices`; the same for passages.
    """
    return _put(mesh, array, (BATCH_AXES,), rows)


def put_passages(mesh: Mesh, array: ArrayOrShape, rows: int | None = None) -> Any:
    """An array "b n ...", split over the batch axes and, where it can be, over the axis of the passages."""
    return _put(mesh, array, (BATCH_AXES, "passages"), rows)


def put_rows(mesh: Mesh, array: ArrayOrShape, rows: int | None = None) -> Any:
    """An array of rows that have nothing to do with each other, split over all devices.

    Given the number of its `rows`, `array` has only those that are `local_row_indices` of all axes.
    """
    return _put(mesh, array, (AXES,), rows)


def replicate(mesh: Mesh, array: ArrayOrShape) -> Any:
    """An array that every device holds whole."""
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(replicate(mesh, np.asarray(jax.random.key_data(array))))
    return _put(mesh, array, ())


def put_parameter(mesh: Mesh, path: str, array: ArrayOrShape | LazyArray, dtype: Any = None) -> Any:
    """A parameter, or what AdamW remembers of it, where the table says; of a host's array, as `dtype`.

    Of one that is not in memory, each process reads what its devices hold; `checkpoints.orbax_arrays.verify` has to
    follow.
    """
    spec = param_spec(path, len(array.shape))
    if isinstance(array, LazyArray):
        return _read(mesh, array, spec, dtype)
    return _put(mesh, array.astype(dtype) if isinstance(array, np.ndarray) and dtype else array, spec)


def _read(mesh: Mesh, array: LazyArray, spec: Spec, dtype: Any) -> Any:
    sharding = _sharding(mesh, array.shape, spec)
    owners: dict[tuple[tuple[int, int], ...], set[int]] = defaultdict(set)  # of each place, the processes that hold it
    places: Mapping[Any, Any] = sharding.devices_indices_map(array.shape)
    for device, index in places.items():
        bounds = tuple(axis.indices(n)[:2] for axis, n in zip(index, array.shape, strict=True))
        owners[bounds].add(device.process_index)
    here = jax.process_index()
    mine = [place for place, processes in owners.items() if here in processes]
    box = tuple(slice(min(a for a, _ in axis), max(b for _, b in axis)) for axis in zip(*mine, strict=True))
    owned = [tuple(slice(*axis) for axis in place) for place in mine if min(owners[place]) == here]
    part = array.read_shard(box, [box] if len(owned) == len(owners) else owned)
    part = part.astype(dtype or part.dtype, copy=False)

    def piece(index: Any) -> np.ndarray:
        bounds = (slice(*axis.indices(n)[:2]) for axis, n in zip(index, array.shape, strict=True))
        return part[relative_slices(tuple(bounds), box)]

    return jax.make_array_from_callback(array.shape, sharding, piece)


def _put(mesh: Mesh, array: ArrayOrShape, spec: Spec, rows: int | None = None) -> Any:
    shape = array.shape if rows is None else (rows, *array.shape[1:])
    sharding = _sharding(mesh, shape, spec)
    if isinstance(array, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(shape, array.dtype, sharding=sharding)
    if isinstance(array, jax.Array):
        return jax.device_put(array, sharding)
    own = None if rows is None or rows == len(array) else _own_rows(sharding, shape)

    def part(index: Any) -> np.ndarray:
        if own is not None:  # those of a device follow each other, here too
            start, stop, _ = index[0].indices(shape[0])
            first = int(np.searchsorted(own, start))
            index = (slice(first, first + stop - start), *index[1:])
        return np.asarray(array[index])

    return jax.make_array_from_callback(shape, sharding, part)  # unlike `device_put` it asks no other process


def _sharding(mesh: Mesh, shape: tuple[int, ...], spec: Spec) -> NamedSharding:
    return NamedSharding(mesh, _fitting(spec, shape, mesh.shape))


def _own_rows(sharding: NamedSharding, shape: tuple[int, ...]) -> np.ndarray:
    own = np.zeros(shape[0], bool)
    places: Mapping[Any, Any] = sharding.addressable_devices_indices_map(shape)
    for index in places.values():
        own[index[0]] = True
    return np.flatnonzero(own)


def to_host(array: Array) -> np.ndarray:
    """A copy of the whole array in the memory of every process; they ask for it together."""
    if not (array.is_fully_addressable or array.is_fully_replicated):
        assert isinstance(array.sharding, NamedSharding)
        whole = NamedSharding(array.sharding.mesh, PartitionSpec())
        array = jax.jit(lambda x: x, out_shardings=whole)(array)
    return np.array(array)


def local_rows(array: Array) -> np.ndarray:
    """The rows that this process has of an array that is split by rows over all devices."""
    rows = {shard.index[0].indices(len(array))[0]: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(rows[start]) for start in sorted(rows)])


def _fitting(spec: Spec, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    """The spec with as many of a dimension's axes, from the first, as together divide it; with none it is whole."""
    named = zip(spec, shape, strict=False)  # dimensions at the end that the spec does not name are whole too
    return PartitionSpec(*(_dividing(axes, n, sizes) for axes, n in named))


def _dividing(axes: str | tuple[str, ...] | None, n: int, sizes: Mapping[str, int]) -> tuple[str, ...] | None:
    chosen: list[str] = []
    for axis in (axes,) if isinstance(axes, str) else axes or ():
        n, rest = divmod(n, sizes[axis])
        if rest:
            break
        chosen.append(axis)
    return tuple(chosen) or None


def param_spec(path: str, ndim: int) -> Spec:
    """The row of the table for a parameter, with or without the axis of the layers in front."""
    found = [spec for pattern, spec in PARAM_SPECS if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise KeyError(f"{path}: {len(found)} rows of the table fit it, not one")
    return (None,) * (ndim - len(found[0])) + found[0]


def sharded_sizes(shapes: Mapping[str, Any]) -> dict[str, set[int]]:
    """What `fsdp` and `model` should divide: the sizes of all axes that they split, of parameters by path."""
    found = defaultdict(set)
    for path, x in shapes.items():
        for axes, n in zip(param_spec(path, len(x.shape)), x.shape, strict=True):
            if axes:
                found[MODEL_AXIS if axes == MODEL_AXIS else "fsdp"].add(n)
    return dict(found)


# Within a program that runs on a mesh

_gathered_before = contextvars.ContextVar("gathered_before", default=False)


def constrain(x: Array, *spec: Any) -> Array:
    """`x` split so, as far as its shape allows; on no mesh and on one device it is `x`."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return x
    return jax.lax.with_sharding_constraint(x, _fitting(spec, x.shape, mesh.shape))


def gather_params(path: str, x: Array, dtype: Any) -> Array:
    """A parameter for use: no longer split as it is stored, a matrix in `dtype`; its gradient is split again.

    What splits heads, MLP and vocabulary stays, since their products are split too. It is sent in the type it is used
    in, and so are the gradients that come back as their sum.
    """
    if jax.sharding.get_abstract_mesh().size <= 1 or _gathered_before.get():
        return x
    stored = param_spec(path, x.ndim)
    used = tuple(axes if axes == MODEL_AXIS else None for axes in stored)

    def gather(x: Array) -> Array:
        # The barrier keeps XLA from sending what it would convert back again
        x = jax.lax.optimization_barrier(x.astype(dtype) if is_matrix(path) else x)
        return constrain(constrain(x, *stored), *used)  # in two steps: XLA would rather gather earlier

    def scatter(g: Array) -> Array:
        # XLA sums each part of a product where it is stored; what is looked up it would split activations for
        g = constrain(g, *used) if path.endswith("embedding") else g
        return constrain(g, *stored).astype(x.dtype)

    and_back = jax.custom_vjp(gather)
    and_back.defvjp(lambda x: (gather(x), None), lambda _, g: (scatter(g),))
    return and_back(x)


@contextlib.contextmanager
def params_gathered() -> Iterator[None]:
    """What is traced within the block finds its parameters `gathered` already: a loop need not do so in each round."""
    token = _gathered_before.set(True)
    try:
        yield
    finally:
        _gathered_before.reset(token)


def is_matrix(path: str) -> bool:
    """Whether a parameter is computed with in --precision; norms, biases and what embeds are in float32."""
    return path.endswith(("kernel", "reader/embed/embedding"))


def params_are_sharded() -> bool:
    """Whether a program on this mesh has to gather them."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return any(sizes.get(axis, 1) > 1 for axis in PARAM_AXES)


def save_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint` that keeps everything for the gradient but gathered parameters."""
    return bool(primitive.name != "sharding_constraint")
