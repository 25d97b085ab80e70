"""Layers of one kind, their parameters stacked on a leading axis and scanned over: one layer is compiled, not all."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

Layer = TypeVar("Layer", bound=nnx.Module)
Carry = TypeVar("Carry")


def stack(make_layer: Callable[[nnx.Rngs], Layer], depth: int, *, rngs: nnx.Rngs) -> Layer:
    """`depth` independently initialised layers as one module whose parameters have a leading axis of that size."""
    return nnx.split_rngs(splits=depth)(nnx.vmap(make_layer, in_axes=0, out_axes=0))(rngs)


def scan(
    body: Callable[[Layer, Carry, Any, nnx.Rngs | None], tuple[Carry, Any]],
    layers: Layer,
    carry: Carry,
    xs: Any = None,
    *,
    rngs: nnx.Rngs | None = None,
    remat: bool = False,
) -> tuple[Carry, Any]:
    """Runs `carry, y = body(layer, carry, x, rngs)` through the stacked layers in order; returns (carry, stacked ys).

    With `rngs`, each layer draws from a key of its own; with `remat`, its activations are recomputed in the gradient.
    """
    graph, params = nnx.split(layers)
    depth = jax.tree.leaves(params)[0].shape[0]
    keys = None if rngs is None else jax.random.split(rngs.dropout(), depth)

    def step(carry: Carry, slices: tuple[Any, Any, Any]) -> tuple[Carry, Any]:
        params, key, x = slices
        return body(nnx.merge(graph, params), carry, x, None if key is None else nnx.Rngs(dropout=key))

    return jax.lax.scan(jax.checkpoint(step) if remat else step, carry, (params, keys, xs))
