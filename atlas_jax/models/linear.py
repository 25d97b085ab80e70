"""Linear maps whose gradient keeps every matrix product in the layout that CPUs are fast at.

XLA's CPU backend multiplies matrices stored row by row (`[m, k]` times `[k, n]`) up to ten times as fast as transposed
ones in bfloat16, so transposed operands are copied first; the copies are small beside the products.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array, Float


def row_major(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Returns `x` stored with its last axis contiguous on one CPU device, and as it is elsewhere."""
    if jax.sharding.get_abstract_mesh().size > 1:  # where jax 0.10 gathers an array whose layout is set
        return x
    return jax.lax.platform_dependent(x, cpu=_with_last_axis_contiguous, default=lambda x: x)


def transpose(x: Float[Array, "*shape"], axes: Sequence[int]) -> Float[Array, "*transposed"]:
    """Returns `x` with its axes in this order, on one CPU device as a copy with the last of them contiguous.

    The copy is of the finished `x`: what computes `x` is not done along the new axes, which would be slow.
    """

    def copy(x: Array) -> Array:
        return _with_last_axis_contiguous(jax.lax.optimization_barrier(x).transpose(axes))

    if jax.sharding.get_abstract_mesh().size > 1:
        return x.transpose(axes)
    return jax.lax.platform_dependent(x, cpu=copy, default=lambda x: x.transpose(axes))


def _with_last_axis_contiguous(x: Array) -> Array:
    return with_layout_constraint(x, Layout(tuple(range(x.ndim))))


@jax.custom_vjp
def matmul(x: Float[Array, "*batch m"], kernel: Float[Array, "m n"]) -> Float[Array, "*batch n"]:
    """Returns `x @ kernel`."""
    return x @ kernel


def _matmul_forward(x: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return matmul(x, kernel), (x, kernel)


def _matmul_backward(residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    transposed = transpose(x, (x.ndim - 1, *range(x.ndim - 1)))
    return gradient @ transpose(kernel, (1, 0)), jnp.tensordot(transposed, gradient, x.ndim - 1)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nnx.Module):
    """A linear map between arrays of several trailing axes: `inputs` to `outputs`, with a bias if `use_bias`."""

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        kernel_init: Callable[..., Array],
        dtype: Any,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(kernel_init(rngs.params(), (*inputs, *outputs), jnp.float32))
        self.bias = nnx.Param(jnp.zeros(outputs)) if use_bias else None
        self.inputs, self.outputs, self.dtype = inputs, outputs, dtype

    def __call__(self, x: Float[Array, "*batch_and_inputs"]) -> Float[Array, "*batch_and_outputs"]:
        batch = x.shape[: x.ndim - len(self.inputs)]
        kernel = self.kernel[...].astype(self.dtype).reshape(np.prod(self.inputs), np.prod(self.outputs))
        y = matmul(x.astype(self.dtype).reshape(*batch, -1), kernel).reshape(*batch, *self.outputs)
        if self.bias is None:
            return y
        return y + self.bias[...].astype(self.dtype).reshape(*[1] * len(batch), *self.outputs)
