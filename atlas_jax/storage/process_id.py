"""Names of processes in the names of files and folders that they may leave behind, and whether such a process lives."""

import functools
import hashlib
import os
import uuid
from pathlib import Path


def process_id() -> str:
    """Returns `MACHINE-PID` of this process."""
    return f"{machine_id()}-{os.getpid()}"


@functools.cache
def machine_id() -> str:
    """Returns 8 hexadecimal digits that identify the pid namespace of this process.

    They differ between hosts, boots and containers of one host, so that equal pids mean the same process.
    """
    try:
        boot_id, namespace = Path("/proc/sys/kernel/random/boot_id").read_text(), os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux: random, so that no other process's files are taken for leftovers of this machine
        boot_id, namespace = uuid.uuid4().hex, 0
    return hashlib.blake2b(f"{boot_id} {namespace}".encode(), digest_size=4).hexdigest()


def is_alive(process: str) -> bool | None:
    """Whether the process with this `process_id` lives; None if it is of another machine."""
    machine, _, pid = process.partition("-")
    if machine != machine_id() or not pid.isdecimal():
        return None
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except OSError:  # no permission: another user's process
        return True
    return True
