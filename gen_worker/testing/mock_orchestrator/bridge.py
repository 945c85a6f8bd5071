"""A WebSocket server in front of websocket handlers: a browser, or any WebSocket client, talks to one by its path.

Owns: the listening socket. Each connection to `/<function>` is one realtime session: text and binary frames pass as
they are, in both directions and in order, until either end closes.

What the worker closes with is the close frame's reason, and its code is:

    1000  completed, closed           1009  frame_too_large
    1008  unknown_function            1011  worker_crashed, timeout, error:<ExceptionName>
    1013  slow_consumer, or no worker is connected        1012  the worker's stream ended

A client that reads so slowly that WAITING_BYTES wait for it is closed as slow_consumer, at both ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import unquote, urlsplit

from .errors import ListenError, NoWorkerError, StreamEndedError, UsageError
from .realtime import RealtimeSession
from .server import MockOrchestrator
from .tcp import join_address, split_address, why_not_listen

if TYPE_CHECKING:
    from websockets.asyncio.server import Server, ServerConnection

WAITING_BYTES: Final = 8 * 1024 * 1024
CLOSE_S: Final = 1.0
"""For a client to answer a close."""
_REASON_BYTES: Final = 123
"""RFC 6455 leaves this much of a close frame for the reason."""
_CODES: Final = {
    "completed": 1000,
    "closed": 1000,
    "unknown_function": 1008,
    "frame_too_large": 1009,
    "slow_consumer": 1013,
}
_FAILED: Final = 1011
_STREAM_ENDED: Final = 1012
_TRY_LATER: Final = 1013


class RealtimeBridge:
    """See the module. `async with` listens; the fields go into each session's realtime_open_cmd."""

    def __init__(
        self,
        orchestrator: MockOrchestrator,
        listen: str = "127.0.0.1:0",
        *,
        tenant_id: str = "",
        user_id: str = "",
        timeout_ms: int = 0,
        required_models: Sequence[str] = (),
    ) -> None:
        """Raises UsageError when the package websockets is not installed."""
        try:
            import websockets.asyncio.server  # noqa: PLC0415  (optional)
        except ModuleNotFoundError:
            raise UsageError("WebSockets need the package websockets: pip install 'gen-worker[serve]'") from None
        self._websockets = websockets
        self._orchestrator = orchestrator
        self._host, self._port = split_address(listen)
        self._tenant_id = tenant_id
        self._user_id = user_id
        self._timeout_ms = timeout_ms
        self._required_models = required_models
        self._server: Server | None = None

    @property
    def url(self) -> str:
        """`ws://host:port`, once it listens; a handler's is `<url>/<function>`."""
        return f"ws://{join_address(self._host, self._port)}"

    async def __aenter__(self) -> Self:
        try:
            self._server = await self._websockets.asyncio.server.serve(
                self._serve, self._host, self._port, max_size=None, compression=None, close_timeout=CLOSE_S
            )
        except OSError as error:
            address = join_address(self._host, self._port)
            raise ListenError(f"can't listen on {address}: {why_not_listen(self._host, self._port)}") from error
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, client: ServerConnection) -> None:
        path = client.request.path if client.request is not None else ""
        try:
            session = await self._orchestrator.open_realtime(
                unquote(urlsplit(path).path).strip("/"),
                tenant_id=self._tenant_id,
                user_id=self._user_id,
                timeout_ms=self._timeout_ms,
                required_models=self._required_models,
            )
        except (NoWorkerError, StreamEndedError):
            await client.close(_TRY_LATER, "no worker is connected")
            return
        session.max_waiting_bytes = WAITING_BYTES
        code, reason = await self._talk(client, session)
        await client.close(code, _shortened(reason))

    async def _talk(self, client: ServerConnection, session: RealtimeSession) -> tuple[int, str]:
        """Move frames until one end closes; what the client is told."""
        up = asyncio.create_task(self._to_worker(client, session))
        down = asyncio.create_task(self._to_client(client, session))
        broken = asyncio.create_task(session.broken.wait())
        try:
            await asyncio.wait((up, down, broken), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (up, down, broken):
                task.cancel()
            await asyncio.gather(up, down, broken, return_exceptions=True)
        if session.close_reason is not None:
            return _CODES.get(session.close_reason, _FAILED), session.close_reason
        if session.stream_ended:
            return _STREAM_ENDED, "the worker's stream ended"
        reason = "slow_consumer" if session.overflowed else "closed"
        with contextlib.suppress(StreamEndedError, NoWorkerError):  # the worker is gone, and the session with it
            await session.close(reason)
        return _CODES[reason], reason

    async def _to_worker(self, client: ServerConnection, session: RealtimeSession) -> None:
        # A client that breaks off is one that closes; a worker that is gone ends the session by `broken`.
        with contextlib.suppress(self._websockets.exceptions.ConnectionClosed, StreamEndedError, NoWorkerError):
            async for data in client:
                await session.send(data)

    async def _to_client(self, client: ServerConnection, session: RealtimeSession) -> None:
        with contextlib.suppress(self._websockets.exceptions.ConnectionClosed):
            async for frame in session:
                await client.send(frame.data.decode("utf-8", "replace") if frame.is_text else frame.data)


def _shortened(reason: str) -> str:
    return reason.encode()[:_REASON_BYTES].decode("utf-8", "ignore")
