"""Who is there, and who is gone: a TCP connection of each process to process 0, before and beside JAX's own.

JAX aborts the whole process, with a stack trace, when another one is missing or dies. Here such a run ends with one
line that names the process: at the start within a time limit, later as soon as a connection closes or falls silent, or
a process finds itself stuck.
"""

import contextlib
import json
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from atlas_jax.errors import UserError
from atlas_jax.runtime.watchdog import Watchdog

LOST = 75  # the exit status when another process is gone: try again
GRACE = 1.0  # seconds for an error of this process to go before that of another
ENDING = 30.0  # seconds that process 0 leaves the others, who have been told, to end before it
LEAST_SILENCE = 10.0  # seconds; Python may be busy for some

ProcessInfo = dict[str, Any]  # what a process says of itself; `host` is its name
Differs = Callable[[Sequence[ProcessInfo]], str]  # who differs from process 0, and in what; empty if nobody does


class JsonConnection:
    """A connection that carries JSON, a line each."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self.heard = time.monotonic()
        self._rest = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends, unless the other end is gone."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Any] | None:
        """The messages that have come; None at the end of the connection."""
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError:  # somebody else's program
            return None


class Membership:
    """The processes of a run. `cards` are what they said of themselves, `port` is a free one of process 0's host."""

    def __init__(
        self, index: int, lines: dict[int, JsonConnection], cards: Sequence[ProcessInfo], port: int, timeout: float
    ):
        self.index, self.cards, self.port = index, cards, port
        self._lines, self._silence = lines, max(timeout, LEAST_SILENCE)
        self._left: dict[int, float] = {}
        self._closing = threading.Event()
        threading.Thread(target=self._watch, name="roll call", daemon=True).start()

    def name(self, index: int) -> str:
        """A process, for a person."""
        return f"process {index} ({self.cards[index]['host']})"

    def leave(self, error: BaseException | None = None) -> None:
        """Says goodbye; an `Exception` ends all other processes, an interruption leaves them time to save and stop.

        That is as long as a silence may last, counted from the first that goes.
        """
        self._closing.set()
        told: ProcessInfo = {"bye": True}
        if isinstance(error, Exception):
            text = " ".join(f"{error}".split()) or type(error).__name__
            told = {"lost": f"{self.name(self.index)} failed: {text[:500]}"}
        for line in self._lines.values():
            line.send(told)
            os.dup(line.socket.fileno())  # open until this process has ended: so long does process 0 live
        if not self.index and error is not None:
            self._wait_for_the_others(ENDING + (0.0 if isinstance(error, Exception) else self._silence))

    def _watch(self) -> None:
        """Beats, and ends this process when another one is gone, or this one is stuck."""
        watchdog = Watchdog()
        with selectors.DefaultSelector() as selector:
            for index, line in self._lines.items():
                selector.register(line.socket, selectors.EVENT_READ, index)
            beat = self._silence / 5
            beaten = 0.0
            while not self._closing.is_set():
                now = time.monotonic()
                if now - beaten > beat:
                    beaten = now
                    for line in self._lines.values():
                        line.send({})
                for key, _ in selector.select(min(beat, 0.5)):
                    index = key.data
                    messages = self._lines[index].receive()
                    if any("bye" in message for message in messages or ()):
                        self._left[index] = time.monotonic()
                        selector.unregister(key.fileobj)
                        continue
                    for message in messages or ():
                        if "lost" in message:
                            self._end(message["lost"], grace=GRACE)
                    if messages is None:
                        self._end(f"{self.name(index)} is gone: it was killed or its host failed", but=index)
                self._check_silence()
                if (idle := watchdog.idle_seconds()) > self._silence:
                    self._end(
                        f"{self.name(self.index)} is stuck: nothing done for {idle:.0f} s in {watchdog.location()}"
                    )

    def _check_silence(self) -> None:
        now = time.monotonic()
        for index, line in self._lines.items():
            if index in self._left and now - self._left[index] > self._silence:
                self._end(f"{self.name(index)} left before the end", but=index)
            if index not in self._left and now - line.heard > self._silence:
                self._end(f"{self.name(index)} has been silent for {self._silence:.0f} s", but=index)

    def _end(self, text: str, but: int = -1, grace: float = 0.0) -> None:
        """Tells the others and ends this process, unless it is ending by itself."""
        for index, line in self._lines.items():
            if index != but:
                line.send({"lost": text})
        if self._closing.wait(grace):
            return
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        print(f"atlas: {text}; this process {self.index} ends", file=sys.stderr, flush=True)
        if not self.index:
            self._wait_for_the_others(ENDING, but)
        os._exit(LOST)

    def _wait_for_the_others(self, seconds: float, but: int = -1) -> None:
        """JAX aborts the other processes when process 0 ends, so it lets them read why, or save, and go first."""
        end = time.monotonic() + seconds
        for index, line in self._lines.items():
            line.socket.settimeout(0.2)
            while index != but and time.monotonic() < end and line.receive() is not None:
                pass


def rendezvous(
    coordinator: str, count: int, index: int, card: ProcessInfo, timeout: float, names: Sequence[str], differs: Differs
) -> Membership:
    """Meets the other processes; UserError that names who has not come in time, or, by `differs`, who is different.

    `names` are the host names of the processes where they are known, and else empty.
    """
    host, _, port = coordinator.rpartition(":")
    end = time.monotonic() + timeout
    if index == 0:
        return _coordinate(int(port), count, card, end, timeout, names, differs)
    return _join(host.strip("[]"), int(port), index, card | {"index": index, "count": count}, end, timeout)


def _coordinate(
    port: int, count: int, card: ProcessInfo, end: float, timeout: float, names: Sequence[str], differs: Differs
) -> Membership:
    """Process 0: waits for all the others, compares them and tells them what they need."""
    cards: dict[int, ProcessInfo] = {0: card}
    lines: dict[int, JsonConnection] = {}

    def refuse(text: str) -> UserError:
        for line in lines.values():
            line.send({"error": text})
        return UserError(text)

    try:
        server = socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise UserError(f"port {port} of this host: {error.strerror}; choose another one") from None
    with server:
        while len(cards) < count:
            server.settimeout(max(end - time.monotonic(), 0.01))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                absent = [one for one in range(count) if one not in cards]
                who = ", ".join(f"process {one}" + (f" ({names[one]})" if names else "") for one in absent)
                raise refuse(
                    f"{who} of {count} did not come within {timeout:.0f} s; --host_timeout waits longer"
                ) from None
            line = JsonConnection(connection)
            connection.settimeout(5)
            hello = (line.receive() or [None])[0]
            if not isinstance(hello, dict) or "index" not in hello:
                connection.close()
                continue
            other = hello.pop("index")
            lines[other if other not in lines else -other] = line
            if hello.pop("count") != count or not 0 < other < count or other in cards:
                raise refuse(f"--process_id {other} of {hello['host']}: there are {count} processes, each with its own")
            cards[other] = hello
    everyone = [cards[one] for one in range(count)]
    if text := differs(everyone):
        raise refuse(text)
    with socket.create_server(("", 0)) as free:
        jax_port = free.getsockname()[1]
    for line in lines.values():
        line.socket.settimeout(None)
        line.send({"cards": everyone, "port": jax_port})
    return Membership(0, lines, everyone, jax_port, timeout)


def _join(host: str, port: int, index: int, card: ProcessInfo, end: float, timeout: float) -> Membership:
    """Any other process: says who it is as soon as process 0 listens, and waits until all are there."""
    line = None
    while line is None:
        try:
            connection = socket.create_connection((host, port), timeout=max(end - time.monotonic(), 0.5))
            line = JsonConnection(connection)
        except OSError:
            if time.monotonic() > end:
                raise UserError(
                    f"process 0 did not come to {host}:{port} within {timeout:.0f} s; --host_timeout waits longer"
                ) from None
            time.sleep(0.2)
    line.send(card)
    line.socket.settimeout(timeout + 2 * GRACE)
    answers: list[Any] = []
    while not answers:
        messages = line.receive()
        if not messages:
            raise UserError(f"process 0 ({host}) is gone, before all processes were there")
        answers = messages
    if "error" in answers[0]:
        raise UserError(answers[0]["error"])
    line.socket.settimeout(None)
    return Membership(index, {0: line}, answers[0]["cards"], answers[0]["port"], timeout)
