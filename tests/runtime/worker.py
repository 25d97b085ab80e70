"""Server that forks the processes of a run, for tests: forked after the import of JAX, which takes a second.

A request is a line of JSON on stdin. An object starts a process and is answered with its pid; a pid is answered, once
that process has ended, with its exit status.
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


def serve_forks() -> dict:
    """Serves requests until stdin is closed, then exits; returns only in the forked processes, with their request."""
    importlib.import_module("jax")  # once, before the forks
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            print(os.waitstatus_to_exitcode(os.waitpid(request, 0)[1]), flush=True)
        elif pid := os.fork():
            print(pid, flush=True)
        else:
            with open(request["output"], "wb") as output, open(os.devnull) as null:
                for source, standard in ((null, 0), (output, 1), (output, 2)):
                    os.dup2(source.fileno(), standard)
            threading.main_thread()._set_native_id()  # Python 3.11 keeps the parent's
            return request
    os._exit(0)


def run_collectives(group, marker: Path) -> None:
    """Runs every collective of the group and prints the results, for `test_process_group`."""

    def repeat(channel: str) -> None:
        for call in range(20):
            values = group.all_gather(f"{channel} {call} {group.index}".encode() * group.index, channel=channel)
            expected = [f"{channel} {call} {index}".encode() * index for index in range(group.count)]
            if values != expected:
                os._exit(9)

    threads = [threading.Thread(target=repeat, args=(channel,)) for channel in ("a", "b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print("max", group.all_max(group.index, -group.index, 7))
    print("large", [len(value) for value in group.all_gather(bytes(6_000_000 + group.index))])
    print("first", group.run_on_first(lambda: f"is {group.index}"))
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
        print("marked", group.index == 0 or marker.exists())
        time.sleep(0.2 * (group.index == 0))
        marker.touch()
    group.barrier("end")
    remaining = group._client.key_value_dir_get_bytes("atlas/")
    print("keys", sum(key.count("/") for key, _ in remaining) and len(remaining))


def check_rows(path: Path) -> None:
    """Runs `checked_rows`, printing the question of each row that this process checks."""
    from atlas_jax.tasks.qa import QA
    from atlas_jax.tasks.row_checks import checked_rows

    class PrintingQA(QA):
        def check(self, row: dict) -> None:
            print("question", row["question"])
            super().check(row)

    checked_rows(str(path), PrintingQA())


def stay_awake(seconds: float) -> None:
    """Sleeps for `seconds`, waking every 0.1 s so that the watchdog does not report the process as stuck."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(0.1)


def main(mode: str, run: RunConfig, seconds: float, target: int) -> None:
    """Connects to the run and does what the mode says; `target` is the index of the process that fails or is late."""
    with cluster.connect(run) as group:
        index = group.index
        print("up", flush=True)
        try:
            if mode == "collectives":
                run_collectives(group, Path(f"{run.coordinator}.mark"))
            if mode == "rows":
                check_rows(Path("rows.jsonl"))
            if mode == "late" and index != target:
                group.all_gather(b"x", timeout=seconds)
            if mode == "error" and index == target:
                raise UserError("bad.jsonl, line 3: no question")
            if mode == "stuck" and index == target:
                time.sleep(30)
            if mode == "slow" and index == target:
                stay_awake(seconds)
            if mode in ("stuck", "slow"):
                group.barrier()
            if mode in ("late", "sleep", "error"):
                stay_awake(30)
        except Interrupted:
            time.sleep(seconds * (index == target))
            print("saved", flush=True)
            raise
        print("done", flush=True)


if __name__ == "__main__":
    request = serve_forks()
    mode, index = request["mode"], request["run"]["process_id"]
    sys.argv = ["atlas", "train", "--process_id", str(index)]
    os.chdir(Path(request["output"]).parent)
    os.environ.update(request.get("environment", {}))
    sys.stdout.reconfigure(line_buffering=True)
    membership.MIN_SILENCE_TIMEOUT = 1.0
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("jax").setLevel(logging.ERROR)
    if mode == "version" and index == 1:
        cluster.version = lambda package: "9.9" if package == "jax" else "1"
    if mode == "devices" and index == 1:
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
    try:
        with Interrupts():
            main(mode, RunConfig(**request["run"]), request["seconds"], request["target"])
    except Interrupted as stop:  # as `atlas_jax.commands.main` does
        print(f"atlas: {stop}", file=sys.stderr)
        sys.exit(stop.status)
    except UserError as error:
        print(f"atlas: {error}", file=sys.stderr)
        sys.exit(2)
