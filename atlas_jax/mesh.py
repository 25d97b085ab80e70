"""The only file that knows devices: the mesh, and what goes where on it."""

import logging

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from atlas_jax.errors import UserError

logger = logging.getLogger(__name__)

AXES = ("data", "fsdp", "model")  # of the batch; of parameters, optimizer and batch; of heads, MLP and vocabulary
BATCH = ("data", "fsdp")  # the axes that the batch is split over


def make_mesh(spec: str = "auto") -> Mesh:
    """A mesh of all devices: `auto`, which splits the batch, or sizes such as `data=4,model=2`."""
    count = len(jax.devices())
    sizes = {"data": count} if spec == "auto" else _parse(spec)
    shape = tuple(sizes.get(axis, 1) for axis in AXES)
    if int(np.prod(shape)) != count:
        raise UserError(
            f"--mesh {spec}: {int(np.prod(shape))} devices, but there are {count}; the sizes must multiply to it"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES))


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


def is_one_cpu(mesh: Mesh) -> bool:
    """Whether inference should care for a CPU's cache."""
    return mesh.size == 1 and mesh.devices.flat[0].platform == "cpu"


def batch_rows(mesh: Mesh, per_device: int) -> int:
    """Rows of a batch that gives each device of the batch axes so many."""
    return per_device * int(np.prod([mesh.shape[axis] for axis in BATCH]))


def put_batch(mesh: Mesh, array: np.ndarray) -> Array:
    """An array whose first axis is the batch, split over the batch axes."""
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec(BATCH)))


def replicate(mesh: Mesh, array: np.ndarray | Array) -> Array:
    """An array that every device holds whole."""
    return jax.device_put(array, NamedSharding(mesh, PartitionSpec()))
