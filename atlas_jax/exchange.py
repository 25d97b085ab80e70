"""Bytes between hosts without their devices, through the key-value store of JAX's coordination service."""

import itertools
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from atlas_jax.errors import UserError

SLACK = 5.0  # seconds that others wait for process 0's answer after its own waiting is over


class NoAnswer(UserError):
    """A process did not take part in time; the message names it."""


class Exchange:
    """What n processes tell each other. Every process calls the same methods in the same order on each channel.

    Threads may use it at once if each has a channel of its own.
    """

    def __init__(self, index: int = 0, names: Sequence[str] = ("this host",), client: Any = None, timeout: float = 300):
        self.index, self.names = index, tuple(names)
        self._client, self._timeout = client, timeout
        self._calls: dict[str, Iterator[int]] = defaultdict(itertools.count)
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """The number of processes."""
        return len(self.names)

    def gather(self, value: bytes, timeout: float | None = None, channel: str = "main") -> list[bytes]:
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
                raise NoAnswer(f"{self._name(0)} did not answer within {seconds:.0f} s ({channel})")
        else:
            answer = self._collect(key, value, seconds, channel)
            self._client.key_value_set_bytes(f"{key}/all", answer)
            if call:  # all have sent this call's values, so all have read the answer before
                self._client.key_value_delete(f"atlas/{channel}/{call - 1}/all")
        head, _, body = answer.partition(b"\n")
        lengths = json.loads(head)
        if isinstance(lengths, str):
            raise NoAnswer(lengths)
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
            return json.dumps(f"{', '.join(missing)} did not answer within {seconds:.0f} s ({channel})").encode()
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

    def agree_max(self, values: Sequence[int], timeout: float | None = None, channel: str = "main") -> list[int]:
        """The largest value of any process, number by number."""
        rows = [json.loads(one) for one in self.gather(json.dumps(list(values)).encode(), timeout, channel)]
        return [max(column) for column in zip(*rows, strict=True)]

    def barrier(self, name: str, timeout: float | None = None) -> None:
        """Returns when every process has come here."""
        self.gather(b"", timeout, f"barrier {name}")
