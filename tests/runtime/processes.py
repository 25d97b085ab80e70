"""Starts the processes of a run on this machine, for tests of several processes."""

import itertools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

PROGRAM = Path(__file__).parent / "worker.py"


class Processes:
    """Starts processes by requests to `worker.py`, which forks them."""

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(PROGRAM.parents[2]), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
        self.numbers = itertools.count()
        self.folder = tempfile.TemporaryDirectory()
        command = [sys.executable, "-W", "ignore", PROGRAM]
        self._parent = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *error: object) -> None:
        with self._parent:
            self._parent.kill()
        self.folder.cleanup()

    def request(self, message: object, timeout: float = 40) -> int:
        """Sends a request to `worker.py` and returns its answer: a pid or an exit status."""
        assert self._parent.stdin
        assert self._parent.stdout
        print(json.dumps(message), file=self._parent.stdin, flush=True)
        if not select.select([self._parent.stdout], [], [], timeout)[0]:
            raise TimeoutError(message)
        return int(self._parent.stdout.readline())

    def start(
        self,
        mode: str,
        indices: Iterable[int],
        count: int,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        timeout: int = 2,
        **options: object,
    ) -> "dict[int, Process]":
        """Starts the processes `indices` of a run of `count`; `options` are those of the mode, see `worker.main`.

        The coordinator listens on `port`, or on a free one. The option `environment` holds more variables.
        """
        run = {"coordinator": f"{host}:{port or free_port()}", "num_processes": count, "host_timeout": timeout}
        request = {"mode": mode, "seconds": 0.5, "target": 1} | options
        return {index: Process(self, request | {"run": run | {"process_id": index}}) for index in indices}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


class Process:
    """A started process of a run."""

    def __init__(self, processes: Processes, request: dict):
        run = request["run"]
        self._processes = processes
        self._output = Path(processes.folder.name, f"{next(processes.numbers)} {run['process_id']}")
        self.pid = processes.request(request | {"output": str(self._output)})

    def until(self, line: str) -> None:
        """Waits until the process has printed this line."""
        end = time.monotonic() + 40
        while not self._output.exists() or line not in self._output.read_text().splitlines():
            assert time.monotonic() < end
            time.sleep(0.02)

    def signal(self, signum: signal.Signals) -> None:
        os.kill(self.pid, signum)

    def end(self) -> tuple[int, list[str]]:
        """Waits for the process; returns its exit status, negative for a signal, and the lines that it has printed."""
        try:
            status = self._processes.request(self.pid)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            raise
        return status, self._output.read_text().splitlines()


def exit_lines(processes: dict[int, Process]) -> dict[int, tuple[int, str]]:
    """Waits for all processes; returns the exit status and the last line of each, by index."""
    results = {index: process.end() for index, process in processes.items()}
    return {index: (status, lines[-1]) for index, (status, lines) in results.items()}
