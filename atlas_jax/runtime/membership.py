"""Liveness of the processes: a TCP connection from each process to process 0, opened before JAX's and separate from it.

JAX aborts a process, with a stack trace, when another one is missing or dies. Here such a run ends with one line that
names the process: at the start after a time limit; later as soon as a connection closes or sends no heartbeat for too
long, or a process detects that it is stuck itself.
"""

import contextlib
import errno
import json
import logging
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

logger = logging.getLogger(__name__)

EXIT_PEER_LOST = 75  # the exit status when another process is gone: EX_TEMPFAIL, "try again"
ERROR_GRACE = 1.0  # seconds for this process to report an error of its own before it exits because of another's
EXIT_GRACE = 30.0  # seconds that process 0, after asking the others to exit, waits for them to exit first
MIN_SILENCE_TIMEOUT = 10.0  # seconds; busy Python code may delay a heartbeat by some seconds

ProcessInfo = dict[str, Any]  # properties of a process that are compared at the start; `host` is its host name
Compare = Callable[[Sequence[ProcessInfo]], str]  # describes the differences between processes; empty if there are none


class JsonConnection:
    """A socket that carries JSON messages, one a line."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self.last_received = time.monotonic()
        self._buffer = b""  # an incomplete line

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a message; does nothing if the other end is closed."""
        with contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[Any] | None:
        """Returns the messages received, perhaps none; None if the connection is closed or sends anything but JSON."""
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            return None
        if not data:
            return None
        self.last_received = time.monotonic()
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        try:
            return [json.loads(line) for line in lines]
        except ValueError:  # another program
            return None


class Membership:
    """The connected processes of a run, watched by a thread that ends this process when another one is lost.

    `processes` are the properties of all processes; `port` is a free port of process 0's host, for JAX.
    """

    def __init__(
        self,
        index: int,
        connections: dict[int, JsonConnection],
        processes: Sequence[ProcessInfo],
        port: int,
        timeout: float,
    ):
        self.index, self.processes, self.port = index, processes, port
        self._connections, self._silence_timeout = connections, max(timeout, MIN_SILENCE_TIMEOUT)
        self._left_at: dict[int, float] = {}  # `time.monotonic()` at which each process left cleanly, by index
        self._closing = threading.Event()
        threading.Thread(target=self._watch, name="membership", daemon=True).start()

    def name(self, index: int) -> str:
        """Returns the number and host of a process, for messages."""
        return f"process {index} ({self.processes[index]['host']})"

    def leave(self, error: BaseException | None = None) -> None:
        """Announces that this process leaves. After an `Exception` the other processes end at once and print its text.

        After an interruption they have time to save and stop: the silence timeout, counted from the first announcement.
        """
        self._closing.set()
        message: ProcessInfo = {"bye": True}
        if isinstance(error, Exception):
            text = " ".join(f"{error}".split()) or type(error).__name__
            message = {"lost": f"{self.name(self.index)} failed: {text[:500]}"}
        for connection in self._connections.values():
            connection.send(message)
            os.dup(connection.socket.fileno())  # keeps it open until this process has ended; process 0 waits for that
        if not self.index and error is not None:
            self._wait_for_others(EXIT_GRACE + (0.0 if isinstance(error, Exception) else self._silence_timeout))

    def _watch(self) -> None:
        """Sends heartbeats; ends this process when another one is gone or silent, or this one is stuck."""
        watchdog = Watchdog()
        with selectors.DefaultSelector() as selector:
            for index, connection in self._connections.items():
                selector.register(connection.socket, selectors.EVENT_READ, index)
            interval = self._silence_timeout / 5
            last_heartbeat = 0.0
            while not self._closing.is_set():
                now = time.monotonic()
                if now - last_heartbeat > interval:
                    last_heartbeat = now
                    for connection in self._connections.values():
                        connection.send({})
                for key, _ in selector.select(min(interval, 0.5)):
                    index = key.data
                    messages = self._connections[index].receive()
                    if any("bye" in message for message in messages or ()):
                        self._left_at[index] = time.monotonic()
                        selector.unregister(key.fileobj)
                        continue
                    for message in messages or ():
                        if "lost" in message:
                            self._exit(message["lost"], grace=ERROR_GRACE)
                    if messages is None:
                        self._exit(f"{self.name(index)} is gone: it was killed or its host failed", lost=index)
                self._check_silence()
                if (idle := watchdog.idle_seconds()) > self._silence_timeout:
                    self._exit(
                        f"{self.name(self.index)} is stuck: nothing done for {idle:.0f} s in {watchdog.location()}"
                    )

    def _check_silence(self) -> None:
        """Ends this process if another one left or sent its last heartbeat too long ago."""
        now = time.monotonic()
        for index, connection in self._connections.items():
            if index in self._left_at and now - self._left_at[index] > self._silence_timeout:
                self._exit(f"{self.name(index)} left before the end", lost=index)
            if index not in self._left_at and now - connection.last_received > self._silence_timeout:
                self._exit(f"{self.name(index)} has been silent for {self._silence_timeout:.0f} s", lost=index)

    def _exit(self, text: str, lost: int = -1, grace: float = 0.0) -> None:
        """Sends `text` to all processes but `lost` and ends this one, unless it leaves by itself within `grace` s."""
        for index, connection in self._connections.items():
            if index != lost:
                connection.send({"lost": text})
        if self._closing.wait(grace):
            return
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        print(f"atlas: {text}; this process {self.index} ends", file=sys.stderr, flush=True)
        if not self.index:
            self._wait_for_others(EXIT_GRACE, lost)
        os._exit(EXIT_PEER_LOST)

    def _wait_for_others(self, seconds: float, lost: int = -1) -> None:
        """Waits, on process 0, until all other processes but `lost` have ended.

        JAX aborts them when process 0 ends, so they need time to read the reason, or to save.
        """
        end = time.monotonic() + seconds
        for index, connection in self._connections.items():
            connection.socket.settimeout(0.2)
            while index != lost and time.monotonic() < end and connection.receive() is not None:
                pass


def rendezvous(
    coordinator: str,
    count: int,
    index: int,
    info: ProcessInfo,
    timeout: float,
    host_names: Sequence[str],
    compare: Compare,
) -> Membership:
    """Connects the processes of a run. UserError names those missing after `timeout` s, or what `compare` returns.

    `host_names`: of all processes if they are known beforehand, else empty.
    """
    host, _, port = coordinator.rpartition(":")
    host, end = host.strip("[]"), time.monotonic() + timeout
    if why := _unresolved(host):
        logger.warning("%s: %s; trying for %.0f s", host, why, timeout)
    if index == 0:
        return _coordinate(host, int(port), count, info, end, timeout, host_names, compare)
    return _join(host, int(port), index, info | {"index": index, "count": count}, end, timeout)


def _unresolved(host: str) -> str:
    """Why a host name cannot be resolved; empty if it can."""
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        return f"the name cannot be resolved ({error.strerror})"
    except UnicodeError:  # an empty label, or one that is too long
        return "the name cannot be resolved (it is none)"
    return ""


def _listen(port: int) -> socket.socket:
    """Listens on all addresses of this host, those of IPv6 too if it has some."""
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        except OSError as error:
            if error.errno != errno.EADDRNOTAVAIL:  # else IPv6 is switched off
                raise
    return socket.create_server(("", port), backlog=1024)


def _coordinate(
    host: str,
    port: int,
    count: int,
    info: ProcessInfo,
    end: float,
    timeout: float,
    host_names: Sequence[str],
    compare: Compare,
) -> Membership:
    """Process 0: waits for all other processes, compares them, and sends them the properties of all and JAX's port."""
    infos: dict[int, ProcessInfo] = {0: info}
    connections: dict[int, JsonConnection] = {}

    def refuse(text: str) -> UserError:
        for connection in connections.values():
            connection.send({"error": text})
        return UserError(text)

    try:
        server = _listen(port)
    except OSError as error:
        raise UserError(f"port {port} of this host: {error.strerror}; choose another one") from None
    with server:
        while len(infos) < count:
            server.settimeout(max(end - time.monotonic(), 0.01))
            try:
                accepted, _ = server.accept()
            except TimeoutError:
                absent = [index for index in range(count) if index not in infos]
                names = ", ".join(f"process {i}" + (f" ({host_names[i]})" if host_names else "") for i in absent)
                why = f" ({host}: {why})" if (why := _unresolved(host)) else ""
                raise refuse(
                    f"{names} of {count} did not come within {timeout:.0f} s{why}; --host_timeout waits longer"
                ) from None
            connection = JsonConnection(accepted)
            accepted.settimeout(5)
            hello = (connection.receive() or [None])[0]
            if not isinstance(hello, dict) or "index" not in hello:
                accepted.close()
                continue
            index = hello.pop("index")
            connections[index if index not in connections else -index] = connection
            if hello.pop("count") != count or not 0 < index < count or index in infos:
                raise refuse(f"--process_id {index} of {hello['host']}: there are {count} processes, each with its own")
            infos[index] = hello
    processes = [infos[index] for index in range(count)]
    if text := compare(processes):
        raise refuse(text)
    if why := _unresolved(host):  # JAX connects to this address in process 0 too, and aborts if it cannot
        raise refuse(f"{host}: on process 0, whose name it is, {why}; give its address")
    with _listen(0) as free:
        jax_port = free.getsockname()[1]
    for connection in connections.values():
        connection.socket.settimeout(None)
        connection.send({"processes": processes, "port": jax_port})
    return Membership(0, connections, processes, jax_port, timeout)


def _join(host: str, port: int, index: int, info: ProcessInfo, end: float, timeout: float) -> Membership:
    """Other processes: connect once process 0 listens, send their properties, and wait until all have connected."""
    connection = None
    while connection is None:
        try:
            connected = socket.create_connection((host, port), timeout=max(end - time.monotonic(), 0.5))
            connection = JsonConnection(connected)
        except (OSError, UnicodeError):
            if time.monotonic() > end:
                why = f" ({why})" if (why := _unresolved(host)) else ""
                where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
                raise UserError(
                    f"process 0 did not come to {where} within {timeout:.0f} s{why}; --host_timeout waits longer"
                ) from None
            time.sleep(0.2)
    connection.send(info)
    connection.socket.settimeout(timeout + 2 * ERROR_GRACE)
    answers: list[Any] = []
    while not answers:
        messages = connection.receive()
        if not messages:
            raise UserError(f"process 0 ({host}) is gone, before all processes were there")
        answers = messages
    if "error" in answers[0]:
        raise UserError(answers[0]["error"])
    connection.socket.settimeout(None)
    return Membership(index, {0: connection}, answers[0]["processes"], answers[0]["port"], timeout)
