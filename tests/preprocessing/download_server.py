"""A file server on this machine that goes wrong as a test tells it to."""

import collections
import contextlib
import dataclasses
import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator, Mapping


@dataclasses.dataclass
class Fault:
    """How one answer differs from the right one."""

    status: int = 0  # without a body, instead of the file
    headers: Mapping[str, str | None] = dataclasses.field(default_factory=dict)  # None: left out
    content: bytes | None = None  # another file
    start: int | None = None  # from another byte than asked for; 0: the whole file
    stop_after: int | None = None  # bytes of the body, then `action` and the connection ends
    action: Callable[[], object] = lambda: None
    before: Callable[[], object] = lambda: None  # called while the client waits for an answer


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; what is in `faults` for a method and path happens to its next requests, one each."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[tuple[str, str], list[Fault]] = collections.defaultdict(list)
        self.asked: list[tuple[str, str, str | None]] = []  # method, path, range
        self.sent: dict[str, int] = collections.Counter()  # bytes of each file
        self.lock = threading.Lock()
        self.waiting = self.most_waiting = 0  # GETs without an answer
        self.over = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self) -> list[tuple[str, str | None]]:
        """Path and range of each GET."""
        return [(path, wanted) for method, path, wanted in self.asked if method == "GET"]

    def vanish(self):
        """From now on nobody listens; for an `action`."""
        self.shutdown()
        self.socket.close()

    def handle_error(self, request, client_address):
        """A client that has gone is none."""


def etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


@contextlib.contextmanager
def running() -> Iterator[Server]:
    """A server without files yet."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.over.set()
        server.shutdown()
        thread.join()


class Handler(http.server.BaseHTTPRequestHandler):
    """Files with ranges and ETags."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        with self.server.lock:
            self.server.waiting += 1
            self.server.most_waiting = max(self.server.most_waiting, self.server.waiting)
        self.answer()

    def answer(self):
        path, wanted = self.path.lstrip("/"), self.headers["Range"]
        with self.server.lock:
            self.server.asked.append((self.command, path, wanted))
            faults = self.server.faults[self.command, path]
            fault = faults.pop(0) if faults else Fault()
        fault.before()
        if self.command == "GET":
            with self.server.lock:
                self.server.waiting -= 1
        content = self.server.files.get(path) if fault.content is None else fault.content
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        start = start if fault.start is None else fault.start
        if fault.status or content is None or start > len(content):
            self.reply(fault.status or (404 if content is None else 416), {"Content-Length": "0", **fault.headers})
            return
        body = content[start:]
        headers = {"Content-Length": str(len(body)), "ETag": etag(content)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self.reply(206 if start else 200, headers | fault.headers)
        if self.command == "GET":
            body = body[: fault.stop_after]
            self.wfile.write(body)
            with self.server.lock:
                self.server.sent[path] += len(body)
            fault.action()
        self.close_connection = True

    def reply(self, status: int, headers: Mapping[str, str | None]):
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    def log_message(self, format, *args):
        """Nothing."""
