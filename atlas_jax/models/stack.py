"""Layers of one kind, their parameters stacked on a leading axis and scanned over: one layer is compiled, not all."""

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

from atlas_jax import mesh


class StackedLayer(nnx.Module):
    """A layer of many."""

    dtype: Any  # that its matrices are used in


Layer = TypeVar("Layer", bound=StackedLayer)
Module = TypeVar("Module", bound=nnx.Module)
Carry = TypeVar("Carry")


def stack(make_layer: Callable[[nnx.Rngs], Layer], depth: int, *, rngs: nnx.Rngs) -> Layer:
    """`depth` independently initialised layers as one module whose parameters have a leading axis of that size."""
    return nnx.split_rngs(splits=depth)(nnx.vmap(make_layer, in_axes=0, out_axes=0))(rngs)


def unstack(layers: Layer) -> list[Layer]:
    """The stacked layers one by one, each with a copy of its parameters."""
    graph, params = nnx.split(layers)
    return [nnx.merge(graph, jax.tree.map(operator.itemgetter(n), params)) for n in range(_depth(params))]


def gather_module(module: Module, path: str, dtype: Any) -> Module:
    """The module for use on a mesh, with whole parameters; `path` is where it is in the model."""
    graph, params = nnx.split(module)
    return nnx.merge(graph, _gather_params(params, path, dtype))


def _gather_params(params: Any, prefix: str, dtype: Any) -> Any:
    def of(path: tuple[Any, ...], variable: Any) -> Any:
        return variable.replace(mesh.gather_params(prefix + "/".join(map(str, path)), variable[...], dtype))

    return nnx.map_state(of, params)


def scan(
    body: Callable[[Layer, Carry, Any, nnx.Rngs | None], tuple[Carry, Any]],
    layers: Layer | list[Layer],
    carry: Carry,
    xs: Any = None,
    *,
    rngs: nnx.Rngs | None = None,
    remat: bool = False,
) -> tuple[Carry, Any]:
    """Runs `carry, y = body(layer, carry, x, rngs)` through the layers in order; returns (carry, ys).

    Stacked layers take xs stacked and give ys stacked; a list of layers, for inference alone, takes a list and gives
    one. With `rngs`, each layer draws from a key of its own; with `remat`, its activations are computed again in the
    gradient. On a mesh the parameters of one layer at a time are whole, in the gradient again.
    """
    if isinstance(layers, list):
        ys = []
        for layer, x in zip(layers, xs, strict=True):
            carry, y = body(layer, carry, x, None)
            ys.append(y)
        return carry, ys
    graph, params = nnx.split(layers)
    keys = None if rngs is None else jax.random.split(rngs.dropout(), _depth(params))

    def step(carry: Carry, slices: tuple[Any, Any, Any]) -> tuple[Carry, Any]:
        params, key, x = slices
        layer = nnx.merge(graph, _gather_params(params, "", layers.dtype))
        return body(layer, carry, x, None if key is None else nnx.Rngs(dropout=key))

    if remat:
        step = jax.checkpoint(step)
    elif mesh.params_are_sharded():
        step = jax.checkpoint(step, policy=mesh.save_all_but_gathered)
    return jax.lax.scan(step, carry, (params, keys, xs))


def _depth(params: Any) -> int:
    return int(jax.tree.leaves(params)[0].shape[0])
