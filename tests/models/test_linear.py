"""Linear maps: values, gradients, and the layouts of the matrix products on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from atlas_jax.models.attention import attend
from atlas_jax.models.linear import Linear, matmul


def normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(len(shape)).normal(size=shape), jnp.float32)


def test_values_and_gradients_are_those_of_a_matrix_product():
    """For an array of any number of axes."""
    kernel = normal(6, 4)
    for x in (normal(3, 6), normal(2, 3, 6), normal(2, 1, 3, 6)):
        np.testing.assert_array_equal(matmul(x, kernel), x @ kernel)
        expected = jax.grad(lambda x, kernel: (jnp.sin(x @ kernel)).sum(), argnums=(0, 1))(x, kernel)
        actual = jax.grad(lambda x, kernel: (jnp.sin(matmul(x, kernel))).sum(), argnums=(0, 1))(x, kernel)
        for left, right in zip(actual, expected, strict=True):
            np.testing.assert_allclose(left, right, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("use_bias", [False, True])
def test_several_axes_in_and_out(use_bias):
    """The kernel has all axes, as the checkpoints have; the result is that of an einsum."""
    linear = Linear(
        (3, 4), (5, 2), kernel_init=nnx.initializers.normal(1.0), dtype=jnp.float32, use_bias=use_bias, rngs=nnx.Rngs(0)
    )
    assert linear.kernel.shape == (3, 4, 5, 2)
    expected = jnp.einsum("bthk,hkij->btij", normal(2, 6, 3, 4), linear.kernel[...])
    if use_bias:
        linear.bias[...] = normal(5, 2)
        expected = expected + normal(5, 2)[None, None]
    np.testing.assert_allclose(linear(normal(2, 6, 3, 4)), expected, rtol=1e-5, atol=1e-6)


def layouts(text: str) -> list[str]:
    """The products of a compiled program that are not of matrices stored row by row."""
    return [
        line.strip()
        for line in text.splitlines()
        if re.search(r" dot\(", line)
        and not re.search(
            r"lhs_contracting_dims=\{(1|3)\}, .*rhs_contracting_dims=\{(0|2)\}", line.replace("batch", "")
        )
    ]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_on_a_cpu_matrices_are_multiplied_row_by_row(dtype):
    """All products of the gradient of a projection and of attention; the counter-case is JAX's own gradient."""

    def compiled(function, *arguments) -> str:
        gradient = jax.grad(lambda *a: function(*a).astype(jnp.float32).sum(), argnums=range(len(arguments)))
        return jax.jit(gradient).lower(*[x.astype(dtype) for x in arguments]).compile().as_text()

    mask = jnp.ones((1, 1, 1, 64), bool)
    heads = [normal(2, 4, 64, 32) + i for i in range(3)]
    assert layouts(compiled(lambda x, w: jnp.tanh(matmul(jnp.tanh(x), w)), normal(2, 64, 128), normal(128, 256))) == []
    assert layouts(compiled(lambda q, k, v: jnp.tanh(attend(q, k, v, None, mask, None, 0.0)), *heads)) == []
    assert layouts(compiled(lambda x, w: jnp.tanh(jnp.tanh(x) @ w), normal(2, 64, 128), normal(128, 256))) != []
