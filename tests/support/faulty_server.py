"""An HTTP server on loopback that does what it should, or what a test orders.

Owns: the server, its connections and the record of what was asked. `on_request` sees each request first and may answer
it in its own way; a subclass answers the others in `serve`.
"""

from __future__ import annotations

import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Self


@dataclass(frozen=True)
class Asked:
    """One request as it came; `number` counts those of the same method and path, from 1."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    number: int

    @property
    def is_store(self) -> bool:
        return self.path.startswith("/store/")


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int | None = None
    """The connection is closed after so many bytes of the body, whatever Content-Length says."""
    hang: bool = False
    """Nothing is said until the server ends."""
    stall: bool = False
    """After cut_at bytes nothing more is said, and the connection stays."""


class FaultyServer:
    """Used by `with`."""

    def __init__(self) -> None:
        self.on_request: Callable[[Asked], Answer | None] = lambda _: None
        self.asked: list[Asked] = []
        self._counts: Counter[tuple[str, str]] = Counter()
        self._over = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.owner = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def requests(self, part: str = "", method: str = "") -> list[Asked]:
        """Those so far whose path holds `part`."""
        return [each for each in list(self.asked) if part in each.path and method in ("", each.method)]

    def serve(self, asked: Asked) -> Answer:
        raise NotImplementedError

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        with self._lock:
            self._counts[method, path] += 1
            asked = Asked(method, path, headers, body, self._counts[method, path])
            self.asked.append(asked)
        own = self.on_request(asked)
        return self.serve(asked) if own is None else own

    def wait_over(self) -> None:
        self._over.wait()


def ranged(data: bytes, wanted: str) -> Answer:
    """The answer of a store that knows ranges."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
    if not found:
        return Answer(200, data)
    start, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
    if start >= len(data):
        return Answer(416, headers={"Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(data)}"})


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    owner: FaultyServer

    def handle_error(self, *_: object) -> None:
        """A client that went away in the midst is what many tests are about."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the base class's name)
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.server.owner.answer(self.command, self.path, dict(self.headers.items()), body)
        if answer.hang:
            self.server.owner.wait_over()
            self.close_connection = True
            return
        try:
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body[: answer.cut_at])
            if answer.stall:
                self.wfile.flush()
                self.server.owner.wait_over()
        except ConnectionError:
            self.close_connection = True
        if answer.cut_at is not None:
            self.close_connection = True
