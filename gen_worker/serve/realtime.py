"""A browser's WebSocket and a realtime session of the worker, tied to each other.

Owns: how their ends are told: the session's reason is the socket's, and a client that goes away closes the session.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from gen_worker.testing.mock_orchestrator import MockOrchestratorError, RealtimeSession

if TYPE_CHECKING:
    from gen_worker.serve.state import DevState

# RFC 6455, 7.4.1
NORMAL: Final = 1000
POLICY: Final = 1008
TOO_LARGE: Final = 1009
FAILED: Final = 1011
TRY_AGAIN: Final = 1013
_CODES: Final = {"completed": NORMAL, "closed": NORMAL, "unknown_function": POLICY, "frame_too_large": TOO_LARGE}
"""The worker's reason -> the socket's code; any other reason is FAILED."""
_REASON_BYTES: Final = 123


def realtime_route(state: DevState) -> Callable[[WebSocket], Awaitable[None]]:
    """The route's endpoint."""

    async def endpoint(socket: WebSocket) -> None:
        await socket.accept()
        try:
            session = await state.worker.open_realtime(socket.path_params["name"])
        except MockOrchestratorError as error:
            await _close(socket, TRY_AGAIN, str(error))
            return
        await _tie(socket, session, state)

    return endpoint


async def _tie(socket: WebSocket, session: RealtimeSession, state: DevState) -> None:
    gone = asyncio.ensure_future(state.worker.wait_gone())
    inward = asyncio.ensure_future(_to_worker(socket, session))
    outward = asyncio.ensure_future(_to_client(socket, session))
    try:
        await asyncio.wait((inward, outward, gone), return_when=asyncio.FIRST_COMPLETED)
        if outward.done():
            outward.result()
            reason = session.close_reason or "closed"
            await _close(socket, _CODES.get(reason, FAILED), reason)
        elif gone.done():
            await _close(socket, TRY_AGAIN, "the worker ended")
    finally:
        for task in (inward, outward, gone):
            task.cancel()
        await asyncio.gather(inward, outward, gone, return_exceptions=True)
        if session.close_reason is None:
            await _end(session)


async def _to_worker(socket: WebSocket, session: RealtimeSession) -> None:
    """Until the client goes away."""
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        data = message.get("bytes")
        await session.send(message["text"] if data is None else data)


async def _to_client(socket: WebSocket, session: RealtimeSession) -> None:
    """Until the worker closes."""
    try:
        async for frame in session:
            if frame.is_text:
                await socket.send_text(frame.data.decode(errors="replace"))
            else:
                await socket.send_bytes(frame.data)
    except WebSocketDisconnect:
        return


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    if socket.client_state is WebSocketState.CONNECTED:
        await socket.close(code, reason.encode()[:_REASON_BYTES].decode(errors="ignore"))


async def _end(session: RealtimeSession) -> None:
    try:
        await session.close()
    except MockOrchestratorError:
        return  # the worker is gone, and the session with it
