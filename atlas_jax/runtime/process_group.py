"""Collectives over JAX's key-value store: gather, reduce and barrier among the processes of a run, without devices.

The store is that of JAX's coordination service. In a run of a single process every collective returns at once.
"""

import contextlib
import itertools
import json
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from atlas_jax.errors import UserError
from atlas_jax.runtime.interrupts import Interrupted

SLACK = 5.0  # seconds that the other processes wait for process 0's answer, beyond the timeout of process 0
NO_TIMEOUT = 30 * 86400.0  # seconds; `membership` detects a process that is lost meanwhile


class PeerTimeout(UserError):
    """Another process did not take part in a collective in time; the message names it."""


class ProcessGroup:
    """Collectives among the processes of a run. On each channel every process calls the same methods in the same order.

    Threads may use a group at the same time, each on a channel of its own.
    """

    def __init__(
        self, index: int = 0, host_names: Sequence[str] = ("this host",), client: Any = None, timeout: float = 300
    ):
        self.index, self.host_names = index, tuple(host_names)
        self.stop_signal: Callable[[], int] = lambda: 0  # returns the signal this process has received, or 0
        self._client, self._timeout = client, timeout
        self._call_numbers: dict[str, Iterator[int]] = defaultdict(itertools.count)
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """Number of processes."""
        return len(self.host_names)

    def all_gather(self, value: bytes, timeout: float | None = None, channel: str = "main") -> list[bytes]:
        """Returns the values of all processes, in process order, on every process.

        Process 0 collects the values and publishes all of them under one key. Raises `PeerTimeout` if a process does
        not call this within `timeout` seconds (default: the timeout of the group).
        """
        if self.count == 1:
            return [value]
        seconds = self._timeout if timeout is None else timeout
        with self._lock:
            call = next(self._call_numbers[channel])
        key = f"atlas/{channel}/{call}"
        if self.index:
            self._client.key_value_set_bytes(f"{key}/{self.index}", value)
            answer = self._get(f"{key}/all", seconds + SLACK)
            if answer is None:
                raise PeerTimeout(f"{self._name(0)} did not answer within {seconds:g} s ({channel})")
        else:
            answer = self._collect(key, value, seconds, channel)
            self._client.key_value_set_bytes(f"{key}/all", answer)
            if call:  # all processes have sent this call's value, hence have read the previous answer
                self._client.key_value_delete(f"atlas/{channel}/{call - 1}/all")
        head, _, body = answer.partition(b"\n")
        lengths = json.loads(head)
        if isinstance(lengths, str):
            raise PeerTimeout(lengths)
        ends = list(itertools.accumulate(lengths, initial=0))
        return [body[start:end] for start, end in itertools.pairwise(ends)]

    def _collect(self, key: str, value: bytes, seconds: float, channel: str) -> bytes:
        """Collects all values on process 0; returns the message that it publishes: a line of their lengths, the values.

        If a process is missing, the message is instead a JSON string that names it.
        """
        end = time.monotonic() + seconds
        values = [value]
        missing = []
        for index in range(1, self.count):
            received = self._get(f"{key}/{index}", max(end - time.monotonic(), 0.05))
            if received is None:
                missing.append(self._name(index))
            values.append(received or b"")
            self._client.key_value_delete(f"{key}/{index}")
        if missing:
            return json.dumps(f"{', '.join(missing)} did not answer within {seconds:g} s ({channel})").encode()
        return json.dumps([len(v) for v in values]).encode() + b"\n" + b"".join(values)

    def _get(self, key: str, seconds: float) -> bytes | None:
        """Returns the value of a key, or None if it is not set within `seconds`."""
        try:
            value: bytes = self._client.blocking_key_value_get_bytes(key, max(int(seconds * 1000), 1))
        except RuntimeError as error:  # the base class of JAX's own error
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            return None
        return value

    def _name(self, index: int) -> str:
        return f"process {index} ({self.host_names[index]})"

    def all_max(self, *values: int) -> list[int]:
        """Returns the elementwise maximum of `values` over all processes.

        If any process has received a stop signal, raises `Interrupted` on all of them.
        """
        if self.count == 1:
            return list(values)
        rows = [json.loads(row) for row in self.all_gather(json.dumps([self.stop_signal(), *values]).encode())]
        signum, *largest = (max(column) for column in zip(*rows, strict=True))
        if signum:
            raise Interrupted(signum)
        return largest

    def barrier(self, channel: str = "main") -> None:
        """Waits until every process has called this, without a timeout."""
        self.all_gather(b"", NO_TIMEOUT, channel)

    def run_on_all(self, work: Callable[[], Any], channel: str = "main") -> list[Any]:
        """Runs `work` on every process; returns the results of all, which must be JSON values, in process order.

        If `work` fails, its process raises the error itself, the others raise a `UserError` that names the process.
        """
        error: Exception | None = None
        try:
            own = {"value": work()}
        except Exception as failure:
            error, own = failure, {"error": f"{failure}" or type(failure).__name__}
        outcomes = [json.loads(o) for o in self.all_gather(json.dumps(own).encode(), NO_TIMEOUT, channel)]
        if error:
            raise error
        for index, outcome in enumerate(outcomes):
            if "error" in outcome:
                raise UserError(f"{self._name(index)}: {outcome['error']}")
        return [outcome["value"] for outcome in outcomes]

    def run_on_first(self, work: Callable[[], Any], channel: str = "main") -> Any:
        """Runs `work` on process 0 while the others wait; all return its result, or raise if it failed."""
        return self.run_on_all(lambda: None if self.index else work(), channel)[0]

    @contextlib.contextmanager
    def process_0_first(self) -> Iterator[None]:
        """Process 0 runs the block before all others, who can then use the files that it has written."""
        if self.index:
            self.barrier()
        yield
        if not self.index:
            self.barrier()


_process_group = ProcessGroup()


def process_group() -> ProcessGroup:
    """Returns the group of this process: a group of one until `cluster.connect` has connected to the others."""
    return _process_group


@contextlib.contextmanager
def use_process_group(group: ProcessGroup) -> Iterator[ProcessGroup]:
    """Within the block, `process_group()` returns `group`."""
    global _process_group
    previous, _process_group = _process_group, group
    try:
        yield group
    finally:
        _process_group = previous
