"""T5's relative position bias (arXiv 1910.10683, section 2.1). Axes: `h` heads, `t` queries, `s` keys."""

import functools

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int


def relative_bucket(
    distance: Int[Array, "..."], *, bidirectional: bool, buckets: int, max_distance: int
) -> Int[Array, "..."]:
    """Returns T5's bucket of a distance (key position minus query position), arXiv 1910.10683 section 2.1.

    Half of the buckets hold one distance each, the others grow logarithmically up to `max_distance`. `bidirectional`:
    half of the buckets are for later keys; otherwise all later keys share bucket 0.
    """
    offset = jnp.zeros_like(distance)
    if bidirectional:
        buckets //= 2
        offset = jnp.where(distance > 0, buckets, 0)
        distance = jnp.abs(distance)
    else:
        distance = jnp.maximum(-distance, 0)
    exact = buckets // 2
    log_ratio = jnp.log(jnp.maximum(distance, 1).astype(jnp.float32) / exact) / jnp.log(max_distance / exact)
    log_bucket = jnp.minimum(exact + (log_ratio * (buckets - exact)).astype(jnp.int32), buckets - 1)
    return offset + jnp.where(distance < exact, distance, log_bucket)


class PositionBias(nnx.Module):
    """Relative position bias, shared by all layers of the encoder or of the decoder."""

    def __init__(
        self, buckets: int, heads: int, *, max_distance: int, bidirectional: bool, scale: float, rngs: nnx.Rngs
    ):
        self.embed = nnx.Embed(buckets, heads, embedding_init=nnx.initializers.normal(scale), rngs=rngs)
        self.bucket = functools.partial(
            relative_bucket, bidirectional=bidirectional, buckets=buckets, max_distance=max_distance
        )

    def __call__(self, queries: Int[Array, " t"], keys: Int[Array, " s"]) -> Float[Array, "1 h t s"]:
        """Returns each head's bias for these positions of queries and keys."""
        bias = self.embed(self.bucket(keys[None, :] - queries[:, None]))
        return bias.transpose(2, 0, 1)[None].astype(jnp.float32)
