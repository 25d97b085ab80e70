"""Sharding inside jitted functions: constraints on activations, and parameters gathered just before they are used."""

import contextlib
import contextvars
from collections.abc import Iterator
from typing import Any

import jax
from jaxtyping import Array

from atlas_jax.mesh.param_specs import MODEL_AXIS, PARAM_AXES, fit_spec, param_spec, uses_compute_dtype

_params_gathered = contextvars.ContextVar("params_gathered", default=False)


def constrain(x: Array, *spec: Any) -> Array:
    """`x` with its axes sharded over these mesh axes, as far as they divide its shape; unchanged on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size <= 1:
        return x
    return jax.lax.with_sharding_constraint(x, fit_spec(spec, x.shape, mesh.shape))


def gather_params(path: str, x: Array, dtype: Any) -> Array:
    """A parameter gathered over PARAM_AXES for use, a matrix in `dtype`; its gradient is sharded again.

    The `model` axis stays sharded, as the products that use the parameter are. The parameter is sent in the type it is
    used in, and so are the gradients that are summed over devices.
    """
    if jax.sharding.get_abstract_mesh().size <= 1 or _params_gathered.get():
        return x
    stored = param_spec(path, x.ndim)
    used = tuple(axes if axes == MODEL_AXIS else None for axes in stored)

    def gather(x: Array) -> Array:
        # The barrier keeps XLA from converting after the all-gather, which would send float32
        x = jax.lax.optimization_barrier(x.astype(dtype) if uses_compute_dtype(path) else x)
        return constrain(constrain(x, *stored), *used)  # in two steps: XLA would otherwise gather earlier

    def scatter(g: Array) -> Array:
        # A matrix: XLA reduce-scatters each product where it is stored. An embedding: XLA would shard activations
        g = constrain(g, *used) if path.endswith("embedding") else g
        return constrain(g, *stored).astype(x.dtype)

    gather_with_scatter = jax.custom_vjp(gather)
    gather_with_scatter.defvjp(lambda x: (gather(x), None), lambda _, g: (scatter(g),))
    return gather_with_scatter(x)


@contextlib.contextmanager
def params_gathered() -> Iterator[None]:
    """Makes `gather_params` the identity in what is traced within the block, where parameters were gathered before.

    So a loop, such as that of generation, gathers once and not in each iteration.
    """
    token = _params_gathered.set(True)
    try:
        yield
    finally:
        _params_gathered.reset(token)


def params_are_sharded() -> bool:
    """Whether the mesh of the function that is traced shards parameters over PARAM_AXES."""
    sizes = jax.sharding.get_abstract_mesh().shape
    return any(sizes.get(axis, 1) > 1 for axis in PARAM_AXES)


def save_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """A policy for `jax.checkpoint`: saves all residuals but gathered parameters, which are gathered again."""
    return bool(primitive.name != "sharding_constraint")
