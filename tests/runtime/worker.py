"""The processes of a run, for the tests of several: forked from this one, which has JAX imported; that takes a second.

A line of JSON on stdin asks for a process, and is answered with its pid; a pid alone is answered with its exit status.
"""

import importlib
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

from atlas_jax.config import RunConfig
from atlas_jax.errors import UserError
from atlas_jax.runtime import cluster, membership
from atlas_jax.runtime.interrupts import Interrupted, Interrupts


def fork_as_asked() -> dict:
    """Returns in each process, with what was asked; in the first one never."""
    importlib.import_module("jax")  # once for all
    for line in sys.stdin:
        asked = json.loads(line)
        if isinstance(asked, int):
            print(os.waitstatus_to_exitcode(os.waitpid(asked, 0)[1]), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            with open(asked["output"], "wb") as output, open(os.devnull) as nothing:
                for own, standard in ((nothing, 0), (output, 1), (output, 2)):
                    os.dup2(own.fileno(), standard)
            threading.main_thread()._set_native_id()  # Python 3.11 keeps the parent's
            return asked
    os._exit(0)


def talk(group, mark: Path) -> None:
    """What the tests of `group` claim, on several channels at once."""

    def repeat(channel: str) -> None:
        for call in range(20):
            values = group.all_gather(f"{channel} {call} {group.index}".encode() * group.index, channel=channel)
            expected = [f"{channel} {call} {one}".encode() * one for one in range(group.count)]
            if values != expected:
                os._exit(9)

    threads = [threading.Thread(target=repeat, args=(channel,)) for channel in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("max", group.all_max(group.index, -group.index, 7))
    print("large", [len(one) for one in group.all_gather(bytes(6_000_000 + group.index))])
    print("led", group.run_on_first(lambda: f"by {group.index}"))
    try:
        group.run_on_all(lambda: 1 // (group.index - 1))
    except (UserError, ZeroDivisionError) as error:
        print("error", error)
    group.stop_signal = lambda: signal.SIGUSR1 * (group.index == 1)
    try:
        group.all_max()
    except Interrupted as stop:
        print("stop", stop.signum)
    with group.process_0_first():
        print("marked", group.index == 0 or mark.exists())
        time.sleep(0.2 * (group.index == 0))
        mark.touch()
    group.barrier("end")
    left = group._client.key_value_dir_get_bytes("atlas/")
    print("keys", sum(key.count("/") for key, _ in left) and len(left))


def check_rows(path: Path) -> None:
    """What the test of `checked_rows` claims."""
    from atlas_jax.tasks.qa import QA
    from atlas_jax.tasks.row_checks import checked_rows

    class Counting(QA):
        def check(self, row: dict) -> None:
            print("question", row["question"])
            super().check(row)

    checked_rows(str(path), Counting())


def busy(seconds: float) -> None:
    """A process that works, if not much."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.1)


def main(mode: str, run: RunConfig, seconds: float, who: int) -> None:
    """What a process does within the run; `seconds` and `who` are the mode's."""
    with cluster.connect(run) as group:
        index = group.index
        print("up", flush=True)
        try:
            if mode == "talk":
                talk(group, Path(f"{run.coordinator}.mark"))
            if mode == "rows":
                check_rows(Path("rows.jsonl"))
            if mode == "late" and index != who:
                group.all_gather(b"x", timeout=seconds)
            if mode == "error" and index == who:
                raise UserError("bad.jsonl, line 3: no question")
            if mode == "stuck" and index == who:
                time.sleep(30)
            if mode == "slow" and index == who:
                busy(seconds)
            if mode in ("stuck", "slow"):
                group.barrier()
            if mode in ("late", "sleep", "error"):
                busy(30)
        except Interrupted:
            time.sleep(seconds * (index == who))
            print("saved", flush=True)
            raise
        print("done", flush=True)


if __name__ == "__main__":
    asked = fork_as_asked()
    mode, index = asked["mode"], asked["run"]["process_id"]
    sys.argv = ["atlas", "train", "--process_id", str(index)]
    os.chdir(Path(asked["output"]).parent)
    sys.stdout.reconfigure(line_buffering=True)
    membership.LEAST_SILENCE = 1.0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("jax").setLevel(logging.ERROR)
    if mode == "version" and index == 1:
        cluster.version = lambda package: "9.9" if package == "jax" else "1"
    if mode == "devices" and index == 1:
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    try:
        with Interrupts():
            main(mode, RunConfig(**asked["run"]), asked["seconds"], asked["who"])
    except Interrupted as stop:  # as `main` does
        print(f"atlas: {stop}", file=sys.stderr)
        sys.exit(stop.status)
    except UserError as error:
        print(f"atlas: {error}", file=sys.stderr)
        sys.exit(2)
