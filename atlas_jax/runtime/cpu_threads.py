"""Enough XLA threads for a process with several virtual CPU devices, as used to try a mesh on a laptop."""

import os
import re

DEVICE_COUNT = r"--xla_force_host_platform_device_count=(\d+)"
THREADS_PER_DEVICE = 8


def set_cpu_threads() -> None:
    """Sets NPROC, the number of threads of XLA's CPU client, unless it is set. Call before JAX starts the client.

    By default XLA has as many threads as devices, and a program could deadlock: a device that waits for others in a
    collective blocks a thread, and may be in several collectives at once. Seen with jax 0.12 and a train step that came
    from the compilation cache.
    """
    devices = max(map(int, re.findall(DEVICE_COUNT, os.environ.get("XLA_FLAGS", ""))), default=1)
    if devices > 1:
        os.environ.setdefault("NPROC", str(THREADS_PER_DEVICE * devices))
