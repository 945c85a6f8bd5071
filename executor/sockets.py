"""Realtime sessions inside of an executor.

Owns: the open sessions, and of each the frames that its handler has not taken, how it ended, and that its end is said
once.

1. The reader hands over what came for sessions in one go; everything else here runs on the event loop, but for the
   context's cancel flag and the credit of the window.
2. A frame that the handler takes is credited, half a window at a time; until then it counts against the window that
   the supervisor keeps to. A large one stays in the arena for that long.
3. `send` waits while the window upwards is used up. When nothing of it left for STALL_S the peer is too slow, and
   the session ends.
4. The session is over for the handler (`_over`) when either side closed; the handler then sees the end of its frames,
   and can't send. A SocketClose says so upwards, unless the supervisor had said it; a Result says that the handler
   itself has ended.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Final

from executor.blobs import Blobs
from executor.events import LOOP_WINDOWS, EventStream, StalledError
from executor.files import RunFiles, StoreSettings
from executor.striker import Striker
from executor.tracebacks import drop_frames
from gen_worker.context import ActionContext
from gen_worker.errors import CanceledError, FatalError, ResourceError, RunCanceled, ValidationError
from gen_worker.failures import failure_of
from gen_worker.pipe.messages import (
    EVENT_OVERHEAD_BYTES,
    Cancel,
    CancelCause,
    Failure,
    FileReply,
    Payload,
    Result,
    SocketClose,
    SocketCredit,
    SocketFrame,
    SocketOpen,
    Upward,
)
from gen_worker.realtime import Frame
from gen_worker.signature import FunctionSpec
from gen_worker.types import Asset

STALL_S: Final = 5.0
"""For the scheduler to take anything of a session whose window is used up."""
TURN_FRAMES: Final = 16
"""A handler that never waits for anything still lets others have the event loop after so many frames."""
NAME_CHARS: Final = 100
"""Of an exception's name in a close reason."""


class ActiveSession:
    """One session: RunHost of its ActionContext, SocketHost of its RealtimeSocket."""

    def __init__(
        self,
        message: SocketOpen,
        spec: FunctionSpec,
        *,
        send: Callable[[Upward], None],
        blobs: Blobs,
        forget: Callable[[int, None], object],
        loop_thread: int,
        store: StoreSettings,
    ) -> None:
        """`forget(key, None)` is called when the handler has ended."""
        self.message = message
        self.spec = spec
        self.cause: CancelCause | None = None
        self.context: ActionContext | None = None
        self.events = EventStream(message.key, message.window, send)
        self.files = RunFiles(message.key, store, send)
        self.task: asyncio.Task[None] | None = None
        self._send = send
        self._blobs = blobs
        self._forget = forget
        self._loop_thread = loop_thread
        self._incoming: deque[SocketFrame] = deque()
        self._news = asyncio.Event()
        self._taken_bytes = 0
        """Taken by the handler and not credited yet."""
        self._turns = 0
        self._started = False
        self._over = ""
        """Why the session is over, empty while it is not."""
        self._said = False
        """Whether the supervisor knows that it is."""

    # -- its life -----------------------------------------------------------------------------

    def begin(self, context: ActionContext) -> None:
        """The handler is about to be called. Raises RunCanceled when a cancel was faster."""
        self._started = True
        self.context = context
        if self.cause is not None:
            context.cancel(self.cause)
            raise RunCanceled

    def cancel(self, cause: CancelCause) -> None:
        """Set the flag and end the waits for the scheduler; from any thread. The first cause stays."""
        if self.cause is None:
            self.cause = cause
        # `begin` stores the context and then looks at the cause, this the other way round: one of them sees both.
        if self.context is not None:
            self.context.cancel(self.cause)
        self.events.cancel()
        self.files.cancel()

    def interrupt(self) -> None:
        """Cancel the handler's task, if it has begun; one that has not finds the flag."""
        self.end_input("canceled")
        if self.task is not None and self._started:
            self.task.cancel()

    def end_input(self, reason: str) -> None:
        """The other end closed: what it sent before is still received, nothing can be sent."""
        self._over = self._over or reason
        self._said = True
        self.events.cancel()
        self._news.set()

    def finish(self, error: BaseException | None = None, *, poisoned: bool = False) -> Failure | None:
        """The handler has ended."""
        failure = None
        if error is not None:
            failure = failure_of(error, cancel_cause=self.cause)
            drop_frames(error)
        self._close("completed" if error is None else f"error:{type(error).__name__[:NAME_CHARS]}")
        self.events.close()
        for frame in self._incoming:
            self._blobs.discard(frame.data)
        self._incoming.clear()
        self._forget(self.message.key, None)
        self._send(Result(self.message.key, b"", failure, poisoned))
        return failure

    def deliver(self, frame: SocketFrame) -> None:
        """A frame for the handler."""
        self._incoming.append(frame)
        self._news.set()

    def _close(self, reason: str) -> None:
        self._over = self._over or reason
        if not self._said:
            self._said = True
            self._send(SocketClose(self.message.key, reason))
        self._news.set()

    # -- SocketHost ---------------------------------------------------------------------------

    async def send(self, data: bytes, *, is_text: bool) -> None:
        limit = self.message.max_frame_bytes
        if len(data) > limit and not self._over:
            self._close("frame_too_large")
            raise ValidationError(f"a frame of {len(data)} bytes is over the limit of {limit} bytes")
        try:
            self._check_open()
            await self.events.room(len(data) + EVENT_OVERHEAD_BYTES, STALL_S)
        except RunCanceled:
            self._over = self._over or "canceled"
        except StalledError:
            self._close("slow_consumer")
        self._check_open()
        try:
            payload = self._blobs.store(data)
        except OSError as error:
            self.events.credit(len(data) + EVENT_OVERHEAD_BYTES)
            raise ResourceError(f"no shared memory for a frame of {len(data)} bytes: {error}") from error
        self._send(SocketFrame(self.message.key, payload, is_text))
        await self._let_others()

    async def receive(self) -> Frame | None:
        while not self._incoming:
            if self._over:
                return None
            self._news.clear()
            await self._news.wait()
        frame = self._incoming.popleft()
        self._took(_size_of(frame.data) + EVENT_OVERHEAD_BYTES)
        received = Frame(self._blobs.decode(frame.data, bytes, bytes), frame.is_text)
        await self._let_others()
        return received

    async def close(self) -> None:
        self._close("closed")

    def _check_open(self) -> None:
        if self._over:
            raise CanceledError(f"the realtime session is over: {self._over}")

    def _took(self, size: int) -> None:
        self._taken_bytes += size
        if self._taken_bytes >= self.message.window // 2 and not self._said:
            self._send(SocketCredit(self.message.key, self._taken_bytes))
            self._taken_bytes = 0

    async def _let_others(self) -> None:
        self._turns += 1
        if not self._turns % TURN_FRAMES:
            await asyncio.sleep(0)

    # -- RunHost ------------------------------------------------------------------------------

    def emit(self, event_type: str, payload_json: bytes) -> None:
        windows = LOOP_WINDOWS if threading.get_ident() == self._loop_thread else 1
        self.events.put(event_type, payload_json, windows=windows)

    def store(self, ref: str, source: bytes | Path, *, create: bool) -> Asset:
        asset = self.files.store(ref, source, create=create)
        asset.tenant_id = self.message.tenant_id or None
        return asset


class Sockets:
    """The sessions of this process. Fed by the reader; `start` runs a session's handler on the event loop."""

    def __init__(  # noqa: PLR0913  (keyword-only, the parts that it connects)
        self,
        specs: Mapping[str, FunctionSpec],
        *,
        send: Callable[[Upward], None],
        blobs: Blobs,
        start: Callable[[ActiveSession], asyncio.Task[None]],
        strike_after_s: float,
        loop: asyncio.AbstractEventLoop,
        loop_thread: int,
        store: StoreSettings,
    ) -> None:
        """`strike_after_s`: a cancel is repeated from then on, for handlers that swallow it."""
        self._specs = specs
        self._send = send
        self._blobs = blobs
        self._start = start
        self._strike_after_s = strike_after_s
        self._striker = Striker()
        self._loop = loop
        self._loop_thread = loop_thread
        self._store = store
        self._sessions: dict[int, ActiveSession] = {}
        self._for_loop: list[Callable[[], object]] = []

    # -- the reader's -------------------------------------------------------------------------

    def open(self, message: SocketOpen) -> None:
        spec = self._specs.get(message.function)
        if spec is None or spec.mode != "websocket":
            error = FatalError(f"this executor has no websocket handler {message.function!r}")
            self._send(SocketClose(message.key, "unknown_function"))
            self._send(Result(message.key, b"", failure_of(error)))
            return
        session = ActiveSession(
            message,
            spec,
            send=self._send,
            blobs=self._blobs,
            forget=self._sessions.pop,
            loop_thread=self._loop_thread,
            store=self._store,
        )
        self._sessions[message.key] = session
        self._for_loop.append(partial(self._begin, session))

    def frame(self, message: SocketFrame) -> None:
        self._for_loop.append(partial(self._deliver, message))

    def close(self, message: SocketClose) -> None:
        self._for_loop.append(partial(self._end_input, message))

    def credit(self, message: SocketCredit) -> None:
        session = self._sessions.get(message.key)
        if session is not None:
            session.events.credit(message.size)

    def file_reply(self, message: FileReply) -> None:
        session = self._sessions.get(message.key)
        if session is not None:
            session.files.replied(message)

    def cancel(self, message: Cancel) -> None:
        session = self._sessions.get(message.key)
        if session is not None:
            session.cancel(message.cause)
            self._for_loop.append(session.interrupt)
            self._striker.watch(partial(self._interrupt_again, session), self._strike_after_s)

    def flush(self) -> None:
        """Hand what came since the last time to the event loop."""
        if self._for_loop:
            self._loop.call_soon_threadsafe(_do_all, self._for_loop)
            self._for_loop = []

    # -- the event loop's ---------------------------------------------------------------------

    def _begin(self, session: ActiveSession) -> None:
        session.task = self._start(session)

    def _deliver(self, message: SocketFrame) -> None:
        session = self._sessions.get(message.key)
        if session is None:
            self._blobs.discard(message.data)
        else:
            session.deliver(message)

    def _end_input(self, message: SocketClose) -> None:
        session = self._sessions.get(message.key)
        if session is not None:
            session.end_input(message.reason)

    def _interrupt_again(self, session: ActiveSession) -> bool:
        """For the striker; False when the handler has ended."""
        if session.message.key not in self._sessions:
            return False
        self._loop.call_soon_threadsafe(session.interrupt)
        return True


def _do_all(work: list[Callable[[], object]]) -> None:
    for each in work:
        each()


def _size_of(payload: Payload) -> int:
    return len(payload) if isinstance(payload, bytes) else payload.size
