"""Several processes of one run on this machine, for tests."""

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
    """Starts processes by the program that forks them."""

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

    def ask(self, question: object, timeout: float = 40) -> int:
        """The number that the program answers."""
        assert self._parent.stdin
        assert self._parent.stdout
        print(json.dumps(question), file=self._parent.stdin, flush=True)
        if not select.select([self._parent.stdout], [], [], timeout)[0]:
            raise TimeoutError(question)
        return int(self._parent.stdout.readline())

    def start(
        self, mode: str, indices: Iterable[int], count: int, *, port: int = 0, timeout: int = 2, **more: float
    ) -> "dict[int, Process]":
        """Processes of one run, if it matters on this port; `more` is the mode's."""
        run = {"coordinator": f"127.0.0.1:{port or free_port()}", "num_processes": count, "host_timeout": timeout}
        asked = {"mode": mode, "seconds": 0.5, "who": 1} | more
        return {index: Process(self, asked | {"run": run | {"process_id": index}}) for index in indices}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port: int = free.getsockname()[1]
    return port


class Process:
    """One of them."""

    def __init__(self, processes: Processes, asked: dict):
        run = asked["run"]
        self._processes = processes
        self._output = Path(processes.folder.name, f"{next(processes.numbers)} {run['process_id']}")
        self.pid = processes.ask(asked | {"output": str(self._output)})

    def until(self, line: str) -> None:
        """Waits until it has printed this line."""
        end = time.monotonic() + 40
        while not self._output.exists() or line not in self._output.read_text().splitlines():
            assert time.monotonic() < end
            time.sleep(0.02)

    def signal(self, signum: signal.Signals) -> None:
        os.kill(self.pid, signum)

    def end(self) -> tuple[int, list[str]]:
        """Its exit status, negative for a signal, and the lines that it has printed."""
        try:
            status = self._processes.ask(self.pid)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            raise
        return status, self._output.read_text().splitlines()


def ends(processes: dict[int, Process]) -> dict[int, tuple[int, str]]:
    """The status and the last line of each."""
    ended = {index: process.end() for index, process in processes.items()}
    return {index: (status, lines[-1]) for index, (status, lines) in ended.items()}
