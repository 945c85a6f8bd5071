"""A gRPC server whose one bidirectional method does what a test says; for tests of transports and of the session.

Owns: the server and its log of dials. Messages are bytes, so nothing here knows the protocol.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
from grpc import aio

LIMIT = 300 * 1024 * 1024

_OPTIONS = [
    ("grpc.max_receive_message_length", LIMIT),
    ("grpc.max_send_message_length", LIMIT),
    ("grpc.so_reuseport", 0),
]


@dataclass(eq=False)
class Dial:
    """One stream as the server sees it."""

    context: Any
    metadata: dict[str, str]
    received: list[bytes] = field(default_factory=list)
    half_closed: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def read(self) -> bytes | None:
        """The next message; None after the worker's half-close."""
        message = await self.context.read()
        if message is aio.EOF:
            self.half_closed = True
            return None
        self.received.append(message)
        return bytes(message)

    async def read_all(self) -> None:
        while await self.read() is not None:
            pass

    async def send(self, *messages: bytes) -> None:
        for message in messages:
            await self.context.write(message)

    async def headers(self) -> None:
        await self.context.send_initial_metadata(())

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        await self.context.abort(code, details)


Behave = Callable[[Dial], Awaitable[None]]


class StreamServer(grpc.GenericRpcHandler):  # type: ignore[misc]  # the stubs have it as Any
    """`behave` is run for each stream; the stream ends with OK when it returns."""

    def __init__(self, behave: Behave) -> None:
        self.behave = behave
        self.dials: list[Dial] = []
        self.methods: list[str] = []
        self.address = ""
        self._server: aio.Server | None = None

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        self.methods.append(handler_call_details.method)
        return grpc.stream_stream_rpc_method_handler(self._handle)

    async def start(self, address: str = "127.0.0.1:0", credentials: grpc.ServerCredentials | None = None) -> None:
        self._server = aio.server(options=_OPTIONS)
        self._server.add_generic_rpc_handlers((self,))
        if credentials is None:
            port = self._server.add_insecure_port(address)
        else:
            port = self._server.add_secure_port(address, credentials)
        self.address = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    async def _handle(self, _request: object, context: Any) -> None:
        dial = Dial(context, dict(context.invocation_metadata()))
        self.dials.append(dial)
        try:
            await self.behave(dial)
        finally:
            dial.ended.set()


@contextlib.asynccontextmanager
async def serving(behave: Behave, credentials: grpc.ServerCredentials | None = None) -> AsyncIterator[StreamServer]:
    server = StreamServer(behave)
    await server.start(credentials=credentials)
    try:
        yield server
    finally:
        await server.stop()


async def eventually(condition: Callable[[], object], timeout_s: float = 10.0) -> None:
    """Wait until `condition` holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.002)


async def settled(value: Callable[[], object], quiet_s: float = 0.25) -> None:
    """Wait until `value` has not changed for `quiet_s`: for what must stop without a sign that it did."""
    before = object()
    while (now := value()) != before:
        before = now
        await asyncio.sleep(quiet_s)
