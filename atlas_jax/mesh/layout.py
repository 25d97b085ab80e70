"""Makes the device mesh that --mesh asks for."""

import logging
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from atlas_jax.errors import UserError
from atlas_jax.mesh.param_specs import AXES, MODEL_AXIS

logger = logging.getLogger(__name__)

DIVIDED = {  # what an axis divides, for the warning
    "fsdp": "width",
    "passages": "passages a query",
    MODEL_AXIS: "heads, MLP or vocabulary",
}


def make_mesh(
    spec: str = "auto",
    *,
    widths: Mapping[str, Collection[int]] = {},
    nbytes: int = 0,
    described: Sequence[Any] | None = None,
) -> Mesh:
    """A mesh over all devices: `auto` (see `auto_sizes`) or sizes such as `data=4,model=2`.

    Sizes whose product is below the number of devices use the first devices of a single process. `described` are
    devices of another machine, for which programs are only compiled. A warning names `widths`, by mesh axis, that an
    axis does not divide. For inference `nbytes` is the size of the model's parameters; for training it is 0.
    """
    devices = jax.devices() if described is None else described
    memory = 0 if described else (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit", 0)
    if spec == "auto":
        trained = () if nbytes else widths.get("fsdp", ())
        sizes = auto_sizes(len(devices), memory, widths=trained, nbytes=nbytes)
    else:
        sizes = check_mesh(spec, described=described)
    _warn_of_undivided(spec, sizes, widths)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    used = math.prod(shape)
    if used < len(devices):
        logger.warning("--mesh %s: %d of %d devices are used", spec, used, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:used])


def _warn_of_undivided(spec: str, sizes: Mapping[str, int], widths: Mapping[str, Collection[int]]) -> None:
    """Warns of widths that an axis does not divide, and names sizes that would."""
    undivided, dividing = [], []
    for axis, size in sizes.items():
        known = widths.get(axis, ())
        if whole := [str(n) for n in sorted(known) if n % size]:
            undivided.append(f"{axis}={size} does not divide {', '.join(whole)} ({DIVIDED[axis]})")
            dividing.append(f"{axis}={math.gcd(size, *known)}")
    if undivided:
        logger.warning(
            "--mesh %s: %s, so what has such a size stays whole on every device; %s would divide all, with the other "
            "devices on data",
            *(spec, " and ".join(undivided), ",".join(dividing)),
        )


def check_mesh(spec: str, *, described: Sequence[Any] | None = None) -> dict[str, int]:
    """The sizes by axis that --mesh names, none for `auto`; UserError if they do not fit the number of devices."""
    sizes = {} if spec == "auto" else _parse_sizes(spec)
    used, count = math.prod(sizes.values()), len(jax.devices() if described is None else described)
    if used > count or (sizes and used < count and (described or jax.process_count() > 1)):
        raise UserError(f"--mesh {spec}: {used} devices, but there are {count}; the sizes must multiply to it")
    return sizes


def auto_sizes(count: int, memory: int, *, widths: Collection[int], nbytes: int) -> dict[str, int]:
    """The sizes that `--mesh auto` means on `count` devices of `memory` bytes (0: unknown).

    Training, which names its parameters' `widths`: `fsdp` as far as it divides them, the rest on `data`. Inference: the
    batch is sharded, and the model too while its parameters, `nbytes` in all, would fill over a third of a device.
    """
    if widths:
        fsdp = math.gcd(count, *widths)
        return {"data": count // fsdp, "fsdp": fsdp}
    model = 1
    while memory and nbytes / model > memory / 3 and count % (2 * model) == 0:
        model *= 2
    return {"data": count // model, "model": model}


def is_single_cpu(mesh: Mesh) -> bool:
    """Whether the mesh is one CPU device, for which inference runs row by row to stay in the cache."""
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def _parse_sizes(spec: str) -> dict[str, int]:
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
