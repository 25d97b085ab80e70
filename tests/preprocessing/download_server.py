"""A local HTTP file server that injects the faults of a test."""

import collections
import contextlib
import dataclasses
import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator, Mapping


@dataclasses.dataclass
class Fault:
    """How one response differs from the correct one."""

    status: int = 0  # respond with this status and without a body
    headers: Mapping[str, str | None] = dataclasses.field(default_factory=dict)  # replaced; None removes one
    content: bytes | None = None  # send the bytes of another file
    start: int | None = None  # send from this byte, whatever the request says; 0: the whole file
    stop_after: int | None = None  # send this many bytes of the body, call `action` and close the connection
    action: Callable[[], object] = lambda: None
    before: Callable[[], object] = lambda: None  # called while the client waits for the response


class Server(http.server.ThreadingHTTPServer):
    """Serves `files`; the next responses to a (method, path) have its `faults`, one each."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.faults: dict[tuple[str, str], list[Fault]] = collections.defaultdict(list)
        self.requests: list[tuple[str, str, str | None]] = []  # method, path, range
        self.bytes_sent: dict[str, int] = collections.Counter()  # bytes of the body, by path
        self.lock = threading.Lock()
        self.pending = self.max_pending = 0  # GET requests without a response, now and at most
        self.finished = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def gets(self) -> list[tuple[str, str | None]]:
        """Path and range of each GET."""
        return [(path, byte_range) for method, path, byte_range in self.requests if method == "GET"]

    def stop_listening(self):
        """Closes the listening socket; to be a fault's `action`."""
        self.shutdown()
        self.socket.close()

    def handle_error(self, request, client_address):
        """Ignores errors: a client may close its connection at any time."""


def etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


@contextlib.contextmanager
def run_server() -> Iterator[Server]:
    """Runs a server without files in a thread."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.finished.set()
        server.shutdown()
        thread.join()


class Handler(http.server.BaseHTTPRequestHandler):
    """Responds with files, with ranges and ETags."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_HEAD(self):
        self.respond()

    def do_GET(self):
        with self.server.lock:
            self.server.pending += 1
            self.server.max_pending = max(self.server.max_pending, self.server.pending)
        self.respond()

    def respond(self):
        path, byte_range = self.path.lstrip("/"), self.headers["Range"]
        with self.server.lock:
            self.server.requests.append((self.command, path, byte_range))
            faults = self.server.faults[self.command, path]
            fault = faults.pop(0) if faults else Fault()
        fault.before()
        if self.command == "GET":
            with self.server.lock:
                self.server.pending -= 1
        content = self.server.files.get(path) if fault.content is None else fault.content
        start = int(byte_range.removeprefix("bytes=").removesuffix("-")) if byte_range else 0
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
                self.server.bytes_sent[path] += len(body)
            fault.action()
        self.close_connection = True

    def reply(self, status: int, headers: Mapping[str, str | None]):
        self.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    def log_message(self, format, *args):
        """Logs nothing."""
