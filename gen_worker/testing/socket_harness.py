"""Talks to one websocket handler in this process, as a client would.

    async with open_socket(echo) as client:
        await client.send("hello")
        assert await client.receive() == "hello"
        await client.close()
        assert await client.wait_closed() == "closed"

Owns: one session in memory: the frames both ways, and the reason with which it closed, which is the worker's. As in a
worker the handler waits when SENT_FRAMES of its frames were not received. What needs processes is not here: a deadline
shows in the context and ends nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Final

from gen_worker.context import ActionContext
from gen_worker.errors import CanceledError, RunCanceled, ValidationError, WorkerError
from gen_worker.failures import failure_of
from gen_worker.realtime import Frame, RealtimeSocket
from gen_worker.testing.harness import MemoryHost, SocketOutcome, check_models, inspect_as

SENT_FRAMES: Final = 1024
END_S: Final = 5.0
"""For a handler to end when its session is over, as WORKER_CANCEL_GRACE_SECONDS is by default."""


class SocketClosedError(WorkerError):
    """The session is over, so no frame comes any more; `reason` says how."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"the session is closed: {reason}")
        self.reason = reason


class SocketClient:
    """The other end of a handler's socket; made by `open_socket`."""

    def __init__(self, outcome: SocketOutcome, max_frame_bytes: int) -> None:
        self.outcome = outcome
        """What the handler left so far: events, saved files, frames, and its failure when it failed."""
        self.reason = ""
        """Why the session is over, as the scheduler would be told; empty while it is not."""
        self._limit = max_frame_bytes
        self._to_handler: asyncio.Queue[Frame | None] = asyncio.Queue()
        self._from_handler: asyncio.Queue[bytes | str] = asyncio.Queue(SENT_FRAMES)
        self._over = asyncio.Event()
        self._input_ended = False
        self._changed = asyncio.Event()
        """Set when a handler that waits to send should look again."""

    async def send(self, data: bytes | str) -> None:
        """One frame for the handler; a str is a text frame. Raises SocketClosedError."""
        if self._over.is_set():
            raise SocketClosedError(self.reason)
        raw = data.encode() if isinstance(data, str) else data
        if self._limit and len(raw) > self._limit:
            self.end("frame_too_large")
        else:
            self._to_handler.put_nowait(Frame(raw, isinstance(data, str)))

    async def receive(self, timeout: float = END_S) -> bytes | str:
        """The handler's next frame, a str when it is text. Raises SocketClosedError, TimeoutError."""
        frame = asyncio.ensure_future(self._from_handler.get())
        over = asyncio.ensure_future(self._over.wait())
        try:
            await asyncio.wait((frame, over), timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
            if frame.done():
                self._changed.set()
                return frame.result()
            if over.done():
                raise SocketClosedError(self.reason)
            raise TimeoutError(f"the handler sent nothing within {timeout:g} s")
        finally:
            frame.cancel()
            over.cancel()

    async def close(self) -> None:
        """Close from this side: the handler sees the end of its frames, after those that were sent."""
        self._input_ended = True
        self._changed.set()
        self._to_handler.put_nowait(None)

    async def wait_closed(self, timeout: float = END_S) -> str:
        """The reason, once the session is over. Raises TimeoutError."""
        try:
            async with asyncio.timeout(timeout):
                await self._over.wait()
        except TimeoutError:
            raise TimeoutError(f"the handler did not end within {timeout:g} s") from None
        return self.reason

    # -- called by open_socket and by the handler's side ----------------------------------------

    def end(self, reason: str) -> None:
        """The session is over. The first reason stays."""
        if not self._over.is_set():
            self.reason = "closed" if self._input_ended and reason == "completed" else reason
            self._over.set()
            self._changed.set()
            self._to_handler.put_nowait(None)

    async def from_handler(self, data: bytes, *, is_text: bool) -> None:
        if self._limit and len(data) > self._limit and not self._over.is_set():
            self.end("frame_too_large")
            raise ValidationError(f"a frame of {len(data)} bytes is over the limit of {self._limit} bytes")
        frame = data.decode() if is_text else data
        while True:
            if self._over.is_set() or self._input_ended:
                raise CanceledError(f"the realtime session is over: {self.reason or 'closed'}")
            if not self._from_handler.full():
                break
            self._changed.clear()
            await self._changed.wait()
        self._from_handler.put_nowait(frame)
        self.outcome.sent.append(frame)

    async def to_handler(self) -> Frame | None:
        frame = await self._to_handler.get()
        if frame is None:
            self._to_handler.put_nowait(None)  # whoever asks next gets it too
        return frame


class _MemorySocket:
    """SocketHost over a SocketClient."""

    def __init__(self, client: SocketClient) -> None:
        self._client = client

    async def send(self, data: bytes, *, is_text: bool) -> None:
        await self._client.from_handler(data, is_text=is_text)

    async def receive(self) -> Frame | None:
        return await self._client.to_handler()

    async def close(self) -> None:
        self._client.outcome.closed = True
        self._client.end("closed")


@contextlib.asynccontextmanager
async def open_socket(  # noqa: PLR0913  (keyword-only, each with a default)
    func: Callable[..., Any],
    *,
    models: Mapping[str, object] | None = None,
    session_id: str = "test-session",
    tenant_id: str = "",
    user_id: str = "",
    timeout_ms: int | None = None,
    device: str = "cpu",
    max_frame_bytes: int = 0,
) -> AsyncIterator[SocketClient]:
    """Open a session with a websocket handler; at the end of the block it is closed and the handler has ended.

    `models` are the injected values by parameter, `max_frame_bytes` is WORKER_MAX_WS_FRAME_BYTES. Raises SignatureError
    for a handler that breaks the rules, TypeError for `models` that do not fit it, and TimeoutError when the handler
    does not end within END_S of the end of its session.
    """
    spec = inspect_as(func, is_websocket=True)
    outcome = SocketOutcome()
    client = SocketClient(outcome, max_frame_bytes)
    context = ActionContext(
        run_id=session_id,
        host=MemoryHost(outcome),
        tenant_id=tenant_id,
        user_id=user_id,
        timeout_ms=timeout_ms,
        device=device,
    )
    arguments = {**check_models(spec, models), spec.socket_param: RealtimeSocket(_MemorySocket(client))}
    task = asyncio.create_task(_handle(func(context, **arguments), client))
    try:
        yield client
        await client.close()
        await asyncio.wait((task,), timeout=END_S)
        if not task.done():
            raise TimeoutError(f"{spec.qualified_name} did not end within {END_S:g} s of the end of its session")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _handle(handler: Any, client: SocketClient) -> None:
    try:
        await handler
    except (Exception, RunCanceled) as error:  # noqa: BLE001  (kept in the outcome)
        client.outcome.exception = error
        client.outcome.failure = failure_of(error)
        client.end(f"error:{type(error).__name__}")
    else:
        client.end("completed")
