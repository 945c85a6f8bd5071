"""Realtime sessions: opened, fed, and closed once each.

Owns: every session that was opened and has not ended, and what the scheduler is told of it.

1. `open` refuses what can't be served, or queues the session in the lane of its function and models. Frames that come
   before an executor has it wait, in order; socket_room.py bounds what waits, and says which handler is too slow.
2. Frames of the handler go through the outbox, which takes turns and credits what went out. The executor makes the
   handler wait while its window is used up, and closes it as `slow_consumer` when nothing leaves for too long.
3. The first reason for an end stays (`begin_close`), and the scheduler is told once (`_tell`): at once when the session
   broke a bound, was closed by its handler, or lost its stream; else when its handler has ended.
4. A handler whose session is over sees the end of its frames. It is canceled after the grace time, and after another
   one its executor is killed. A deadline cancels at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gen_worker.pipe.frames import FrameError
from gen_worker.pipe.messages import EVENT_OVERHEAD_BYTES, CancelCause, Failure, FunctionInfo, Result
from supervisor.backlog import Backlog
from supervisor.executor_handle import OUTPUT_CAP_BYTES, ExecutorHandle
from supervisor.lanes import Lanes
from supervisor.model_names import Models
from supervisor.outbox import Outbox
from supervisor.residency import Residency
from supervisor.run_files import RunFiles
from supervisor.runs import Refused, RunState, invalid
from supervisor.socket_room import SocketRoom
from supervisor.socket_session import (
    CLOSED,
    COMPLETED,
    FRAME_TOO_LARGE,
    SLOW_CONSUMER,
    TIMEOUT,
    UNKNOWN_FUNCTION,
    WORKER_CRASHED,
    SocketSession,
    WaitingFrame,
    reason_of,
)
from supervisor.wire_codec import encode_realtime_close, encode_realtime_frame

if TYPE_CHECKING:
    from gen_worker.wire import worker_scheduler_pb2 as pb

log = logging.getLogger(__name__)

REMEMBERED: Final = 1024
"""Sessions that are over, or never were: what still comes for them is no news."""
REASON_CHARS: Final = 200
"""Of what an executor says: it holds a name that the tenant chose."""
_ENDS_HANDLER: Final = frozenset((FRAME_TOO_LARGE, SLOW_CONSUMER))
"""Reasons from an executor that its handler did not ask for."""


@dataclass(frozen=True, slots=True)
class SocketLimits:
    """`grace_s` is the cancel's; `max_frame_bytes` 0 means the transport's limit."""

    grace_s: float
    max_frame_bytes: int

    @property
    def frame_bytes(self) -> int:
        return min(self.max_frame_bytes or OUTPUT_CAP_BYTES, OUTPUT_CAP_BYTES)


class Sockets:
    """See the module. `ended` is called when a session has ended and its place is free."""

    def __init__(  # noqa: PLR0913  (keyword-only, the parts that it connects)
        self,
        *,
        limits: SocketLimits,
        functions: Mapping[str, FunctionInfo],
        keys: Iterator[int],
        lanes: Lanes,
        residency: Residency,
        outbox: Outbox,
        backlog: Backlog,
        files: RunFiles,
        refusal: Callable[[], Failure | None],
        ended: Callable[[], None],
    ) -> None:
        """`refusal` says why no work is taken now, if so."""
        self._limits = limits
        self._functions = functions
        self._keys = keys
        self._lanes = lanes
        self._residency = residency
        self._outbox = outbox
        self._backlog = backlog
        self._files = files
        self._refusal = refusal
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self.room = SocketRoom(self._loop.time, lambda session, detail: self._break(session, SLOW_CONSUMER, detail))
        self._by_key: dict[int, SocketSession] = {}
        self._sessions: dict[str, SocketSession] = {}
        """Those that the scheduler was not told the end of: an id may be used again from then on."""
        self._over: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        """Sessions that have not ended."""
        return len(self._by_key)

    # -- from the scheduler -------------------------------------------------------------------

    def open(self, command: pb.RealtimeOpenCommand) -> None:
        """Take a session, or close it at once with the reason."""
        session_id = command.session_id
        if session_id in self._sessions:
            log.warning("session %s is open already: the second request is ignored", session_id)
            return
        info = self._functions.get(command.function_name)
        if info is None or info.mode != "websocket":
            self._refuse(command, UNKNOWN_FUNCTION, f"no websocket handler is called {command.function_name!r}")
            return
        models: Models = ()
        failure = self._refusal() if session_id else invalid("session_id is empty")
        try:
            if info.injections and failure is None:
                models = self._residency.names.resolve(info, command.required_models, b"")
        except Refused as refused:
            failure = refused.failure
        if failure is not None:
            self._refuse(command, reason_of(failure), failure.detail or failure.safe_message)
            return
        session = SocketSession(next(self._keys), command, info.name, models, self._loop.time())
        self._sessions[session_id] = session
        self._by_key[session.key] = session
        self._over.pop(session_id, None)
        if session.timeout_ms:
            session.timer = self._loop.call_later(session.timeout_ms / 1000, self._timed_out, session)
        self._backlog.run_waits(0)
        self._lanes.add(session, info)

    def take_frame(self, frame: pb.RealtimeFrame) -> None:
        """A frame for a handler."""
        session = self._sessions.get(frame.session_id)
        if session is None:
            self._is_unknown(frame.session_id, "frames of session %s are dropped: it is not open")
            return
        if session.reason:
            return  # sent before the scheduler knew of the end
        limit = self._limits.frame_bytes
        if len(frame.data) > limit:
            self._break(session, FRAME_TOO_LARGE, f"a frame of {len(frame.data)} bytes came, the limit is {limit}")
            return
        self.room.add(session, WaitingFrame(frame.data, frame.is_text))
        self._feed(session)

    def close(self, command: pb.RealtimeCloseCommand) -> None:
        """The scheduler ends a session. What it sent before is still handed to the handler."""
        session = self._sessions.get(command.session_id)
        if session is None:
            self._is_unknown(command.session_id, "a close of session %s is dropped: it is not open")
            return
        log.debug("the scheduler closes session %s: %s", session.run_id, command.reason)
        self._end_softly(session, CLOSED, "closed by the scheduler before it was open")

    def stream_closed(self) -> None:
        """The stream that all sessions were opened on is gone, and maybe frames with it: none of them can go on."""
        self.close_all("its stream ended")

    # -- from the dispatcher ------------------------------------------------------------------

    def start(self, session: SocketSession, handle: ExecutorHandle, window: int) -> None:
        """An executor has room for it."""
        if not session.start(handle, self._loop.time()):
            return
        self._residency.acquire(handle, session.models)
        self._backlog.run_left(0)
        session.window = window
        deadline = 0.0
        if session.timeout_ms:
            deadline = time.time() + session.timeout_ms / 1000 - (session.started - session.arrived)
        try:
            handle.open_socket(session, deadline, window, self._limits.frame_bytes)
        except FrameError as error:
            self._finish(session, reason_of(invalid("request too large")), f"its open command: {error}")
            return
        self._feed(session)

    def fail(self, session: SocketSession, failure: Failure) -> None:
        """What it waits for can't be had."""
        self._finish(session, reason_of(failure), failure.detail or failure.safe_message)

    def executor_died(self, handle: ExecutorHandle, detail: str) -> None:
        """Its sessions are over."""
        for session in [run for run in handle.runs.values() if isinstance(run, SocketSession)]:
            self._finish(session, WORKER_CRASHED, detail)

    def credit(self, key: int, size: int) -> bool:
        """`size` bytes of a session went out to the scheduler; False when `key` is none of a session."""
        session = self._by_key.get(key)
        if session is None:
            return False
        if session.handle is not None:
            session.handle.send_socket_credit(key, size)
        return True

    def refuse_waiting(self, failure: Failure) -> None:
        """Close those that no executor has yet."""
        for session in [session for session in self._by_key.values() if session.is_opening]:
            self.fail(session, failure)

    def close_all(self, detail: str) -> None:
        """End all sessions for the scheduler; their handlers see the end of their frames."""
        for session in list(self._by_key.values()):
            self._end_softly(session, CLOSED, detail)
            self._tell(session)

    def abandon(self, detail: str) -> None:
        """Let go of what is left, for a worker that leaves."""
        for session in list(self._by_key.values()):
            self._finish(session, CLOSED, detail)

    # -- from the executors -------------------------------------------------------------------

    def handler_sent(self, session: SocketSession, data: bytes, *, is_text: bool) -> None:
        """A frame of a handler."""
        if session.reason:
            return
        limit = self._limits.frame_bytes
        if len(data) > limit:
            self._break(session, FRAME_TOO_LARGE, f"its handler sent {len(data)} bytes, the limit is {limit}")
            return
        message = encode_realtime_frame(session.run_id, data, is_text=is_text)
        self._outbox.put_event(session.key, message, len(data) + EVENT_OVERHEAD_BYTES, transient=True)

    def handler_took(self, session: SocketSession, size: int) -> None:
        """Its handler took `size` bytes of frames."""
        self.room.took(session, size)
        self._feed(session)

    def handler_closed(self, session: SocketSession, reason: str) -> None:
        """Its handler sends nothing more."""
        if not session.begin_close(reason[:REASON_CHARS] or COMPLETED):
            return
        self.room.drop_waiting(session)
        self._tell(session)
        if reason in _ENDS_HANDLER:
            self._set_timer(session, self._cancel, "canceled")
        # Else the handler may clean up in its own time, until its deadline.

    def handler_ended(self, session: SocketSession, result: Result) -> None:
        """Its handler returned or failed; that it closed the socket was said before."""
        failure = result.failure
        self._finish(session, COMPLETED if failure is None else reason_of(failure), failure.detail if failure else "")

    # -- ends ---------------------------------------------------------------------------------

    def _end_softly(self, session: SocketSession, reason: str, detail: str) -> None:
        """The handler sees the end of its frames, after those that wait."""
        if session.is_opening:
            self._finish(session, reason, detail)
        elif session.begin_close(reason) and self._hand_over(session, windowed=False):
            self._say_closed(session)

    def _break(self, session: SocketSession, reason: str, detail: str) -> None:
        """A bound is broken: the scheduler is told at once, and nothing more reaches the handler."""
        log.info("session of %s is broken off: %s", session.function, detail, extra={"run_id": session.run_id})
        if session.is_opening:
            self._finish(session, reason, detail)
        elif session.begin_close(reason):
            self.room.drop_waiting(session)
            self._tell(session)
            self._say_closed(session)

    def _say_closed(self, session: SocketSession) -> None:
        if session.handle is not None:
            session.handle.send_socket_close(session.key, session.reason)
            self._set_timer(session, self._cancel, "canceled")

    def _timed_out(self, session: SocketSession) -> None:
        if session.is_opening:
            self._finish(session, TIMEOUT, f"it was not open within its timeout_ms of {session.timeout_ms}")
            return
        session.begin_close(TIMEOUT)
        self.room.drop_waiting(session)
        self._cancel(session, "timeout")

    def _cancel(self, session: SocketSession, cause: CancelCause) -> None:
        if session.handle is not None and not session.state.is_terminal:
            session.handle.send_cancel(session.key, cause)
            self._files.cancel(session)
            self._set_timer(session, self._grace_over)

    def _grace_over(self, session: SocketSession) -> None:
        handle = session.handle
        if session.state.is_terminal or handle is None:
            return
        reason = f"the handler {session.function} of session {session.run_id} did not end by a cancel"
        log.error("killing executor %s: %s", handle.name, reason, extra={"run_id": session.run_id})
        handle.kill(reason)
        self._finish(session, session.reason, "its executor was killed")

    def _finish(self, session: SocketSession, reason: str, detail: str) -> None:
        """Any state -> CLOSED, once."""
        handle = session.handle
        if not session.finish(None):
            return
        if handle is None:
            self._backlog.run_left(0)
        session.reason = session.reason or reason
        self._tell(session)
        self.room.drop_waiting(session)
        words = ": " + detail.partition("\n")[0] if detail else ""
        extra = {"run_id": session.run_id, "executor": handle.name if handle else None}
        log.info("session of %s ended %s%s", session.function, session.reason, words, extra=extra)
        del self._by_key[session.key]
        self._lanes.remove(session)
        self._files.end(session)
        if handle is not None:
            handle.release(session)
            self._residency.release(handle, session.models)
        self._ended()

    def _tell(self, session: SocketSession) -> None:
        if not session.told:
            session.told = True
            del self._sessions[session.run_id]
            self._remember(session.run_id)
            self._outbox.put_close(session.key, encode_realtime_close(session.run_id, session.reason))

    def _refuse(self, command: pb.RealtimeOpenCommand, reason: str, detail: str) -> None:
        log.info("session refused as %s: %s", reason, detail, extra={"run_id": command.session_id})
        self._outbox.put_control(encode_realtime_close(command.session_id, reason))
        self._remember(command.session_id)

    def _set_timer(self, session: SocketSession, then: Callable[..., None], *arguments: object) -> None:
        if session.timer is not None:
            session.timer.cancel()
        session.timer = self._loop.call_later(self._limits.grace_s, then, session, *arguments)

    # -- frames -------------------------------------------------------------------------------

    def _feed(self, session: SocketSession) -> None:
        if session.state is RunState.RUNNING:
            self._hand_over(session)

    def _hand_over(self, session: SocketSession, *, windowed: bool = True) -> bool:
        """Give its executor the frames that it has room for, or all; False when that ended the session."""
        while (frame := self.room.next_frame(session, windowed=windowed)) is not None and session.handle is not None:
            try:
                session.handle.send_socket_frame(session.key, frame.data, is_text=frame.is_text)
            except OSError as error:
                self._end_without_memory(session, error)
                return False
        return True

    def _end_without_memory(self, session: SocketSession, error: OSError) -> None:
        """A frame is lost, and the handler must not go on without it."""
        failure = Failure("resource", "out of memory", f"no shared memory for a frame: {error}")
        log.error("session of %s is closed: %s", session.function, failure.detail, extra={"run_id": session.run_id})
        session.begin_close(reason_of(failure))
        self.room.drop_waiting(session)
        self._tell(session)
        self._cancel(session, "canceled")

    # -- sessions that are not here -----------------------------------------------------------

    def _is_unknown(self, session_id: str, words: str) -> None:
        if session_id not in self._over:
            log.warning(words, session_id[:200])
            self._remember(session_id)

    def _remember(self, session_id: str) -> None:
        self._over[session_id] = None
        while len(self._over) > REMEMBERED:
            self._over.popitem(last=False)
