"""A small HTTP/1.1 server on the supervisor's event loop: h11 speaks the protocol, this moves the bytes.

Owns: the listening socket and the connections. h11 alone costs the supervisor 0.3 MiB; uvicorn would be 3.8 of the 60.

1. A request is answered at once, by a call that does not wait; bodies are read and thrown away.
2. A client has IDLE_S for each request, keep-alive included, and MAX_CONNECTIONS have a place: whoever comes when they
   are taken is hung up on. One that does not read its answers is not read from.
3. That it can't listen is a warning, since a worker does its work without being looked at.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from http import HTTPStatus
from typing import Final, cast

import h11

from supervisor.config_parse import split_address
from supervisor.endpoints import Answer, plain

log = logging.getLogger(__name__)

MAX_CONNECTIONS: Final = 64
"""Probes and a scraper are a handful."""
IDLE_S: Final = 75.0
"""Longer than the usual scrape interval, so that a scraper keeps its connection."""

CLOSE_S: Final = 1.0

Respond = Callable[[str, str, str], Answer]
"""Method, path without the query, Accept header."""


class HttpServer:
    """See the module."""

    def __init__(self, address: str, respond: Respond) -> None:
        """`address`: `host:port` as in WORKER_HTTP_ADDR; port 0 takes a free one."""
        self._address = address
        self._respond = respond
        self._connections: set[_Connection] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> str | None:
        """Listen; the URL with the port that was bound, None when it can't."""
        loop = asyncio.get_running_loop()
        try:
            listener = await asyncio.to_thread(listen, self._address)
        except OSError as error:
            log.warning(
                "WORKER_HTTP_ADDR: %s can't be listened on (%s): no health, metrics or status is served; "
                "free the port or set another (empty: off)",
                self._address,
                why_not(error),
            )
            return None
        host, port = listener.getsockname()[:2]
        self._server = await loop.create_server(lambda: _Connection(self._connections, self._respond), sock=listener)
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        log.info("health, metrics and status at %s", url)
        return url

    async def stop(self) -> None:
        """Close everything. What is answered already has CLOSE_S to go out."""
        if self._server is not None:
            self._server.close()
        lost = [connection.lost for connection in self._connections]
        for connection in list(self._connections):
            connection.close()
        if lost:
            await asyncio.wait(lost, timeout=CLOSE_S)
        for connection in list(self._connections):
            connection.abort()
        await asyncio.gather(*lost)


class _Connection(asyncio.Protocol):
    """One client."""

    def __init__(self, all_of_them: set[_Connection], respond: Respond) -> None:
        self._all = all_of_them
        self._respond = respond
        self._h11 = h11.Connection(h11.SERVER)
        self._request: h11.Request | None = None
        self._reads = True
        self.lost = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._timer = asyncio.get_running_loop().call_later(IDLE_S, self.abort)
        if len(self._all) >= MAX_CONNECTIONS:
            log.debug("a client is hung up on: %d are connected", MAX_CONNECTIONS)
            self.close()
        else:
            self._all.add(self)

    def connection_lost(self, error: Exception | None) -> None:  # noqa: ARG002  (a client that is gone is gone)
        self._timer.cancel()
        self._all.discard(self)
        self.lost.set_result(None)

    def data_received(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._h11.receive_data(data)
            self._advance()

    def eof_received(self) -> None:
        self.close()

    def pause_writing(self) -> None:
        self._reads = False
        self._transport.pause_reading()

    def resume_writing(self) -> None:
        self._reads = True
        self._transport.resume_reading()
        self._advance()

    def close(self) -> None:
        self._transport.close()

    def abort(self) -> None:
        """Close, and drop what was not taken."""
        self._transport.abort()

    def _advance(self) -> None:
        """Answer the requests that are here whole."""
        try:
            while self._reads and not self._transport.is_closing():
                event = self._h11.next_event()
                if event in (h11.NEED_DATA, h11.PAUSED):
                    return
                if isinstance(event, h11.Request):
                    self._request = event
                elif isinstance(event, h11.EndOfMessage) and self._request is not None:
                    self._answer(self._request)
                elif isinstance(event, h11.ConnectionClosed):
                    self.close()
        except h11.RemoteProtocolError as error:
            log.debug("a client that speaks no HTTP: %s", error)
            if self._h11.our_state in (h11.IDLE, h11.SEND_RESPONSE):
                self._send(plain(HTTPStatus.BAD_REQUEST, "this is HTTP/1.1\n"), with_body=True)
            self.close()

    def _answer(self, request: h11.Request) -> None:
        method = request.method.decode("ascii")
        path = request.target.decode("ascii").partition("?")[0]
        accept = next((value for name, value in request.headers if name == b"accept"), b"").decode("latin-1")
        try:
            answer = self._respond(method, path, accept)
        except Exception:
            log.exception("%s %s can't be answered", method, path)
            answer = plain(HTTPStatus.INTERNAL_SERVER_ERROR, "a defect in the worker; its log has it\n")
        self._send(answer, with_body=method != "HEAD")
        if self._h11.our_state is h11.MUST_CLOSE:
            self.close()
            return
        self._h11.start_next_cycle()
        self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(IDLE_S, self.abort)

    def _send(self, answer: Answer, *, with_body: bool) -> None:
        headers = {
            "Content-Type": answer.content_type,
            "Content-Length": str(len(answer.body)),
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            **answer.headers,
        }
        events: list[h11.Event] = [h11.Response(status_code=answer.status.value, headers=list(headers.items()))]
        if with_body:
            events.append(h11.Data(data=answer.body))
        events.append(h11.EndOfMessage())
        self._transport.write(b"".join(self._h11.send(event) or b"" for event in events))


def listen(address: str) -> socket.socket:
    """A listening socket; of a name with several addresses an IPv4 one. Blocks while a name is looked up.

    Raises OSError, for which `why_not` has the words.
    """
    host, port = split_address(address)
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, _, _, _, where = min(found, key=lambda entry: entry[0] is not socket.AF_INET)
    return socket.create_server((where[0], port), family=family, backlog=MAX_CONNECTIONS)


def why_not(error: OSError) -> str:
    """Without the address, which socket.create_server puts into the words of some."""
    return str(error.strerror) if isinstance(error, socket.gaierror) else os.strerror(error.errno or 0)
