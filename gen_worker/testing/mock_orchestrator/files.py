"""A development file store: the file API over one directory, the bytes streamed to and from disk.

Owns: the HTTP server and its connections. The files are FileDirectory's.

    HEAD /api/v1/file/<ref>   headers X-Cozy-SHA256, X-Cozy-Size-Bytes, X-Cozy-Mime-Type
    GET  /api/v1/file/<ref>   the bytes, with the same headers
    PUT  /api/v1/file/<ref>   store (upsert): 200 and {"ref","size_bytes","sha256","mime_type"}
    POST /api/v1/file/<ref>   create: 201 and the same, 409 when it exists
    errors                    {"error": text}: 400 bad ref or body, 401 wrong token, 404, 409, 411, 413, 507 disk full

The standard library's threading server does it: one thread per connection suits blocking disk work, and a development
tool needs no more.
"""

from __future__ import annotations

import errno
import hmac
import json
import logging
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import unquote, urlsplit

from .directory import DEFAULT_MIME_TYPE, FileDirectory, RefusedError
from .errors import ListenError
from .tcp import join_address, split_address

logger = logging.getLogger(__name__)

API_PREFIX = "/api/v1/file/"

_BLOCK_BYTES = 1024 * 1024
_MAX_CHUNK_LINE = 1024
_IDLE_CONNECTION_S = 60.0
_STOP_POLL_S = 0.02
_KEPT_REQUESTS = 1024


@dataclass(frozen=True, slots=True)
class FileRequest:
    """One request as it came; `ref` is decoded, and empty when the path is none of the API's."""

    method: str
    ref: str
    tenant_id: str
    authorization: str


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version = "gen-worker-file-store"
    disable_nagle_algorithm = True
    timeout = _IDLE_CONNECTION_S
    server: _HttpServer

    def do_HEAD(self) -> None:
        self._answer(self._read)

    def do_GET(self) -> None:
        self._answer(self._read)

    def do_PUT(self) -> None:
        self._answer(self._write)

    def do_POST(self) -> None:
        self._answer(self._write)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  (the base class's name for it)
        logger.debug("%s %s", self.address_string(), format % args)

    def _answer(self, act: Callable[[str], None]) -> None:
        self._blocks = self._body_blocks()
        try:
            try:
                act(self._admit())
            except RefusedError as refusal:
                self._refuse(refusal.status, str(refusal))
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG, errno.EACCES):
                    raise
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                status = HTTPStatus.INSUFFICIENT_STORAGE if full else HTTPStatus.BAD_REQUEST
                self._refuse(status, error.strerror or str(error))
        except (ConnectionError, TimeoutError) as error:
            logger.debug("%s went away: %s", self.address_string(), error)
            self.close_connection = True

    def _admit(self) -> str:
        """The request's ref, if it may pass."""
        path = urlsplit(self.path).path
        encoded = path.removeprefix(API_PREFIX)
        known = encoded != path
        # A quoted slash would make one segment two, so it is refused where it is decoded.
        segments = [unquote(segment) for segment in encoded.split("/")] if known else []
        store = self.server.store
        authorization = self.headers.get("Authorization", "")
        request = FileRequest(self.command, "/".join(segments), self.headers.get("X-Cozy-Tenant-Id", ""), authorization)
        store.requests.append(request)
        if (status := store.intercept(request) if store.intercept else None) is not None:
            raise RefusedError(HTTPStatus(status), "refused by the test")
        wanted = f"Bearer {store.token}"
        if store.token and not hmac.compare_digest(authorization.encode(), wanted.encode()):
            raise RefusedError(HTTPStatus.UNAUTHORIZED, "the bearer token is missing or wrong")
        if not known:
            raise RefusedError(HTTPStatus.NOT_FOUND, f"files are under {API_PREFIX}<ref>")
        if any("/" in segment for segment in segments):
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"{encoded!r} is not a ref: a segment holds a quoted slash")
        return request.ref

    def _read(self, ref: str) -> None:
        file, info = self.server.store.directory.open(ref)
        with file:
            self.send_response(HTTPStatus.OK)
            self.send_header("Content-Type", info.mime_type)
            self.send_header("Content-Length", str(info.size_bytes))
            for name, value in info.headers().items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.flush()
                self.connection.sendfile(file, count=info.size_bytes or None)

    def _write(self, ref: str) -> None:
        mime_type = self.headers.get("Content-Type", "").strip()
        if mime_type == DEFAULT_MIME_TYPE:
            mime_type = ""  # what clients say who do not know; the name may tell more
        create = self.command == "POST"
        info = self.server.store.directory.store(ref, self._within_limit(), mime_type, create=create)
        self._send_json(HTTPStatus.CREATED if create else HTTPStatus.OK, info.body())

    def _refuse(self, status: HTTPStatus, message: str) -> None:
        # A body that nobody read would be taken for the next request; and a client that is still sending
        # would see a reset instead of the answer.
        try:
            for _ in self._blocks:
                pass
        except RefusedError:
            self.close_connection = True
        self._send_json(status, {"error": message})

    def _send_json(self, status: HTTPStatus, body: dict[str, object]) -> None:
        data = json.dumps(body, separators=(",", ":")).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def _body_blocks(self) -> Iterator[bytes]:
        """The request's body; a generator, so what one reader left the next one goes on with."""
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            yield from self._chunked()
            return
        length = self.headers.get("Content-Length", "")
        if length.isdecimal():
            yield from self._exactly(int(length))
        elif length:
            self.close_connection = True
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"Content-Length {length!r} is not a number")
        elif self.command in ("PUT", "POST"):
            self.close_connection = True
            raise RefusedError(HTTPStatus.LENGTH_REQUIRED, "give Content-Length or Transfer-Encoding: chunked")

    def _within_limit(self) -> Iterator[bytes]:
        # Apart from _body_blocks, so that a body over the limit can still be read to its end before the answer.
        limit, total = self.server.store.max_bytes, 0
        for block in self._blocks:
            total += len(block)
            if limit and total > limit:
                raise RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the body is over the limit of {limit} bytes")
            yield block

    def _exactly(self, size: int) -> Iterator[bytes]:
        while size:
            block = self.rfile.read(min(size, _BLOCK_BYTES))
            if not block:
                raise ConnectionResetError("the client went away in the middle of its upload")
            size -= len(block)
            yield block

    def _chunked(self) -> Iterator[bytes]:
        while True:
            line = self.rfile.readline(_MAX_CHUNK_LINE)
            digits = line.split(b";")[0].strip()
            try:
                size = int(digits, 16)
            except ValueError:
                self.close_connection = True
                raise RefusedError(HTTPStatus.BAD_REQUEST, "the chunked body is broken") from None
            if size <= 0:
                break
            yield from self._exactly(size)
            self.rfile.readline(_MAX_CHUNK_LINE)
        while self.rfile.readline(_MAX_CHUNK_LINE).strip():
            pass  # trailers


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True
    allow_reuse_port = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], store: FileStoreServer) -> None:
        self.store = store
        self._open_sockets: set[socket.socket] = set()
        self._open_lock = threading.Lock()
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    def process_request(self, request: Any, client_address: Any) -> None:
        with self._open_lock:
            self._open_sockets.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        with self._open_lock:
            self._open_sockets.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002  (the base class's signature)
        error = sys.exception()
        if isinstance(error, ConnectionError):  # between two requests; within one, _answer meets it
            logger.debug("%s went away: %s", client_address, error)
        else:
            logger.error("a request of %s failed", client_address, exc_info=error)

    def cut_connections(self) -> None:
        """End kept-alive connections too: a store that stopped answers nobody."""
        with self._open_lock:
            for connection in self._open_sockets:
                try:
                    connection.shutdown(socket.SHUT_RDWR)
                except OSError as error:
                    logger.debug("a connection was gone already: %s", error)


class FileStoreServer:
    """The store as a server in its own threads; a context manager, for plain and async code alike.

    token       the bearer token to ask for; empty: none is asked for
    max_bytes   of one upload; 0: no limit
    intercept   called (in a server thread) with each request; a status it gives is answered instead
    requests    the last 1024 requests
    """

    def __init__(
        self,
        root: str | Path,
        *,
        listen: str = "127.0.0.1:0",
        token: str = "",
        max_bytes: int = 0,
        intercept: Callable[[FileRequest], int | None] | None = None,
    ) -> None:
        """Serve `root` (made if need be) on `listen` (`host:port`, port 0 for a free one). Raises ListenError."""
        self._host, self._port = split_address(listen)
        self.directory = FileDirectory(Path(root))
        self.token = token
        self.max_bytes = max_bytes
        self.intercept = intercept
        self.requests: deque[FileRequest] = deque(maxlen=_KEPT_REQUESTS)
        self._http: _HttpServer | None = None
        self._thread: threading.Thread | None = None

    @property
    def url(self) -> str:
        """The base URL, without a slash at the end; known after the first start and kept by later ones."""
        if self._port == 0:
            raise ListenError("the port is not known before start()")
        return f"http://{join_address(self._host, self._port)}"

    def start(self) -> None:
        """Listen, on the port of the last time if there was one. Raises ListenError."""
        if self._http is not None:
            raise ListenError(f"already serving files on {self.url}")
        try:
            self._http = _HttpServer((self._host, self._port), self)
        except OSError as error:
            address = f"{self._host}:{self._port}"
            raise ListenError(f"can't serve files on {address}: {error.strerror or error}") from error
        self._port = int(self._http.server_address[1])
        self._thread = threading.Thread(
            target=self._http.serve_forever, args=(_STOP_POLL_S,), name="file-store", daemon=True
        )
        self._thread.start()

    def stop(self) -> None:
        """Stop listening and cut every connection. May be started again."""
        http, self._http = self._http, None
        if http is None or self._thread is None:
            return
        http.shutdown()
        http.cut_connections()
        http.server_close()
        self._thread.join()
        self.directory.clean()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
