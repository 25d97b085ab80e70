"""What the processes of a run tell each other, without their devices.

It goes through the key-value store of JAX's coordination service. A process that is alone is told everything by itself.
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

SLACK = 5.0  # seconds that others wait for process 0's answer after its own waiting is over
AS_LONG_AS_IT_TAKES = 30 * 86400.0  # seconds; who is lost meanwhile is noticed by `roll_call`


class PeerTimeout(UserError):
    """A process did not take part in time; the message names it."""


class ProcessGroup:
    """What n processes tell each other. Every process calls the same methods in the same order on each channel.

    Threads may use it at once if each has a channel of its own.
    """

    def __init__(self, index: int = 0, names: Sequence[str] = ("this host",), client: Any = None, timeout: float = 300):
        self.index, self.names = index, tuple(names)
        self.stop_signal: Callable[[], int] = lambda: 0  # the signal that this process has got, if any
        self._client, self._timeout = client, timeout
        self._calls: dict[str, Iterator[int]] = defaultdict(itertools.count)
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """The number of processes."""
        return len(self.names)

    def all_gather(self, value: bytes, timeout: float | None = None, channel: str = "main") -> list[bytes]:
        """Every process's value, in order, on every process: they send theirs to process 0, which sends all to all."""
        if self.count == 1:
            return [value]
        seconds = self._timeout if timeout is None else timeout
        with self._lock:
            call = next(self._calls[channel])
        key = f"atlas/{channel}/{call}"
        if self.index:
            self._client.key_value_set_bytes(f"{key}/{self.index}", value)
            answer = self._get(f"{key}/all", seconds + SLACK)
            if answer is None:
                raise PeerTimeout(f"{self._name(0)} did not answer within {seconds:g} s ({channel})")
        else:
            answer = self._collect(key, value, seconds, channel)
            self._client.key_value_set_bytes(f"{key}/all", answer)
            if call:  # all have sent this call's values, so all have read the answer before
                self._client.key_value_delete(f"atlas/{channel}/{call - 1}/all")
        head, _, body = answer.partition(b"\n")
        lengths = json.loads(head)
        if isinstance(lengths, str):
            raise PeerTimeout(lengths)
        ends = list(itertools.accumulate(lengths, initial=0))
        return [body[start:end] for start, end in itertools.pairwise(ends)]

    def _collect(self, key: str, value: bytes, seconds: float, channel: str) -> bytes:
        """On process 0: the lengths of all values in a line of JSON and then the values; or who is missing."""
        end = time.monotonic() + seconds
        values = [value]
        missing = []
        for index in range(1, self.count):
            found = self._get(f"{key}/{index}", max(end - time.monotonic(), 0.05))
            if found is None:
                missing.append(self._name(index))
            values.append(found or b"")
            self._client.key_value_delete(f"{key}/{index}")
        if missing:
            return json.dumps(f"{', '.join(missing)} did not answer within {seconds:g} s ({channel})").encode()
        return json.dumps([len(one) for one in values]).encode() + b"\n" + b"".join(values)

    def _get(self, key: str, seconds: float) -> bytes | None:
        """The value of a key, or None if nobody has set it in time."""
        try:
            found: bytes = self._client.blocking_key_value_get_bytes(key, max(int(seconds * 1000), 1))
        except RuntimeError as error:  # jax's own error is one
            if "DEADLINE_EXCEEDED" not in str(error):
                raise
            return None
        return found

    def _name(self, index: int) -> str:
        return f"process {index} ({self.names[index]})"

    def all_max(self, *values: int) -> list[int]:
        """The largest value of any process, number by number.

        If any was told to stop, all of them stop here, `Interrupted`.
        """
        if self.count == 1:
            return list(values)
        rows = [json.loads(one) for one in self.all_gather(json.dumps([self.stop_signal(), *values]).encode())]
        signum, *largest = (max(column) for column in zip(*rows, strict=True))
        if signum:
            raise Interrupted(signum)
        return largest

    def barrier(self, channel: str = "main") -> None:
        """Returns when every process has come here, however long that takes."""
        self.all_gather(b"", AS_LONG_AS_IT_TAKES, channel)

    def run_on_all(self, work: Callable[[], Any], channel: str = "main") -> list[Any]:
        """Runs `work` on every process: what it gives, which JSON can hold, on all of them in order.

        Where it fails its own error is raised, on the others a `UserError` that names the process.
        """
        error: Exception | None = None
        try:
            said = {"value": work()}
        except Exception as failure:
            error, said = failure, {"error": f"{failure}" or type(failure).__name__}
        answers = [json.loads(one) for one in self.all_gather(json.dumps(said).encode(), AS_LONG_AS_IT_TAKES, channel)]
        if error:
            raise error
        for index, answer in enumerate(answers):
            if "error" in answer:
                raise UserError(f"{self._name(index)}: {answer['error']}")
        return [answer["value"] for answer in answers]

    def run_on_first(self, work: Callable[[], Any], channel: str = "main") -> Any:
        """Runs `work` on process 0 while the others wait; what it gives, or that it failed, is known to all."""
        return self.run_on_all(lambda: None if self.index else work(), channel)[0]

    @contextlib.contextmanager
    def process_0_first(self) -> Iterator[None]:
        """Process 0 runs the block, which leaves something on the disk, and then the others, who find it."""
        if self.index:
            self.barrier()
        yield
        if not self.index:
            self.barrier()


_ours = ProcessGroup()


def process_group() -> ProcessGroup:
    """That of this process, as JAX has one set of devices; alone until `hosts.connect` has found others."""
    return _ours


@contextlib.contextmanager
def use_process_group(group: ProcessGroup) -> Iterator[ProcessGroup]:
    """Within the block, `process_group` is another one."""
    global _ours
    before, _ours = _ours, group
    try:
        yield group
    finally:
        _ours = before
