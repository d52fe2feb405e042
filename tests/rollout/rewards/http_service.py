"""A real HTTP server that misbehaves as a test tells it, on a thread of its own."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Handler", Any], None]


class Handler(BaseHTTPRequestHandler):
    """Hands each POST to the service's `answer`."""

    protocol_version = "HTTP/1.1"
    service: "Service"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        with self.service.lock:
            self.service.asked.append((self.path, dict(self.headers), body))
            self.service.busy += 1
            self.service.most = max(self.service.most, self.service.busy)
        try:
            self.service.answer(self, body)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True
        finally:
            with self.service.lock:
                self.service.busy -= 1

    def reply(self, content: Any, status: int = 200, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""


class Service:
    """What was asked, how many at once, and how it answers."""

    def __init__(self, answer: Answer) -> None:
        self.answer, self.lock, self.over = answer, threading.Lock(), threading.Event()
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.busy = self.most = 0
        self.url = ""


class _Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that left is what some tests are about."""


@contextmanager
def serving(answer: Answer) -> Iterator[Service]:
    """A server on a free port of 127.0.0.1."""
    service = Service(answer)
    server = _Server(("127.0.0.1", 0), type("Bound", (Handler,), {"service": service}))
    service.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield service
    finally:
        service.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
