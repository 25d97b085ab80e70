"""Threads for several CPU devices of one process, as a laptop has them that tries a mesh."""

import os
import re

COUNT = r"--xla_force_host_platform_device_count=(\d+)"
EACH = 8  # threads of a device


def set_cpu_threads() -> None:
    """Before JAX starts them: XLA would have as many threads as devices, and a program could wait for ever.

    A thread that waits for other devices in a collective is held, and a device may be in several at once: seen with
    jax 0.12 and a train step that came from the cache of compiled programs. NPROC tells XLA how many threads to have.
    """
    devices = max(map(int, re.findall(COUNT, os.environ.get("XLA_FLAGS", ""))), default=1)
    if devices > 1:
        os.environ.setdefault("NPROC", str(EACH * devices))
