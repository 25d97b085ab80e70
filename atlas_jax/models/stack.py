"""Stacked layers: parameters of equal layers on a leading axis, and a scan over it, so that one layer is compiled."""

import operator
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from flax import nnx

from atlas_jax import mesh


class StackedLayer(nnx.Module):
    """Base class of the layers that `stack` takes."""

    dtype: Any  # dtype of matrix products


Layer = TypeVar("Layer", bound=StackedLayer)
Module = TypeVar("Module", bound=nnx.Module)
Carry = TypeVar("Carry")


def stack(make_layer: Callable[[nnx.Rngs], Layer], depth: int, *, rngs: nnx.Rngs) -> Layer:
    """Returns `depth` independently initialised layers as one module; its parameters have a leading axis `depth`."""
    return nnx.split_rngs(splits=depth)(nnx.vmap(make_layer, in_axes=0, out_axes=0))(rngs)


def unstack(layers: Layer) -> list[Layer]:
    """Splits stacked layers into a list of layers, each with a copy of its parameters."""
    graph, params = nnx.split(layers)
    return [nnx.merge(graph, jax.tree.map(operator.itemgetter(n), params)) for n in range(_depth(params))]


def gather_module(module: Module, path: str, dtype: Any) -> Module:
    """Returns the module with all-gathered parameters (`mesh.gather_params`), whose paths begin with `path`."""
    graph, params = nnx.split(module)
    return nnx.merge(graph, _gather_params(params, path, dtype))


def _gather_params(params: Any, prefix: str, dtype: Any) -> Any:
    def gather(path: tuple[Any, ...], variable: Any) -> Any:
        return variable.replace(mesh.gather_params(prefix + "/".join(map(str, path)), variable[...], dtype))

    return nnx.map_state(gather, params)


def scan(
    body: Callable[[Layer, Carry, Any, nnx.Rngs | None], tuple[Carry, Any]],
    layers: Layer | list[Layer],
    carry: Carry,
    xs: Any = None,
    *,
    rngs: nnx.Rngs | None = None,
    remat: bool = False,
) -> tuple[Carry, Any]:
    """Runs `carry, y = body(layer, carry, x, rngs)` through the layers in order; returns `(carry, ys)`.

    Stacked layers take stacked `xs` and return stacked `ys`; a list of layers, for inference only, takes and returns
    lists. With `rngs`, each layer has a dropout key of its own; with `remat`, the backward pass recomputes a layer's
    activations. On a mesh the parameters of one layer at a time are all-gathered, and again in the backward pass.
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
