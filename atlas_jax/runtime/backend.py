"""Starts JAX's devices, or says in one line why they do not start."""

import os

from atlas_jax.errors import UserError


def start_backend() -> None:
    """Initializes the devices of this process; UserError if JAX cannot start those that JAX_PLATFORMS asks for."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that a GPU is there
        asked = os.environ.get("JAX_PLATFORMS") or jax.config.values.get("jax_platforms") or "(not set)"
        why = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0] or "no such device is here"
        remedy = "install JAX for it (README), or set JAX_PLATFORMS=cpu"
        raise UserError(f"JAX_PLATFORMS {asked}: JAX cannot start its devices ({why:.200}); {remedy}") from None
