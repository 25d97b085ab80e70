"""Starts JAX's devices, or says in one line why they do not start."""

import os
import re
import subprocess
import sys

from atlas_jax.errors import UserError

DEVICE_COUNT_FLAGS = r"(\s*--xla_force_host_platform_device_count=[1-9]\d*)*\s*"  # known to be right
PARSE_FLAGS = "from jaxlib import xla_client; xla_client.make_cpu_client()"


def start_backend() -> None:
    """Initializes the devices of this process; UserError if JAX cannot start those that JAX_PLATFORMS asks for."""
    import jax

    _check_xla_flags(os.environ.get("XLA_FLAGS", ""))
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts that a GPU is there
        asked = os.environ.get("JAX_PLATFORMS") or jax.config.values.get("jax_platforms") or "(not set)"
        why = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0] or "no such device is here"
        remedy = "install JAX for it (README), or set JAX_PLATFORMS=cpu"
        raise UserError(f"JAX_PLATFORMS {asked}: JAX cannot start its devices ({why:.200}); {remedy}") from None


def _check_xla_flags(flags: str) -> None:
    """UserError if XLA does not take the flags. A process of its own tries them, as XLA ends it if they are wrong."""
    if re.fullmatch(DEVICE_COUNT_FLAGS, flags):
        return
    command = [sys.executable, "-c", PARSE_FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    why = re.search(r"^[EF]\d{4} .*?\] (.*)", done.stderr, re.MULTILINE)  # XLA's log lines of errors and fatal errors
    if done.returncode and why:
        raise UserError(f"XLA_FLAGS {flags:.200}: {why[1]:.200}; correct the variable, or unset it")
