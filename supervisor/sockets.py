"""Realtime sessions: their frames, and the one close that ends each.

Owns: every session that was opened and has not ended, and the frames that wait for its handler. A session takes its
place on an executor as a run does: it is a Run for the lanes, the executor's handle and the limits.

    OPENING -> OPEN -> CLOSING -> CLOSED        (any state -> CLOSED, once)

which are a run's QUEUED or WAITING_MODEL, RUNNING, CANCELING, and its two ends.

1. `open` refuses what can't be served, or queues the session in the lane of its function and models. Frames that come
   before an executor has it wait, in order.
2. The executor gets a window of bytes; what it has not taken waits here up to QUEUE_BYTES, of all sessions up to
   QUEUES_BYTES. A handler that is slower than that is closed as `slow_consumer`: its peer can't be made to wait, since
   everything else comes on the same stream.
3. Frames of the handler go through the outbox, which takes turns and credits what went out. The executor makes the
   handler wait while its window is used up, and closes it as `slow_consumer` when nothing leaves for too long.
4. The first reason for an end stays (`begin_close`), and the scheduler is told once (`_tell`): at once when the session
   broke a bound, was closed by its handler, or lost its stream; else when its handler has ended.
5. A handler whose session is over sees the end of its frames. It is canceled after the grace time, and after another
   one its executor is killed. A deadline cancels at once.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from gen_worker.pipe.frames import FrameError
from gen_worker.pipe.messages import EVENT_OVERHEAD_BYTES, CancelCause, ErrorType, Failure, FunctionInfo, Result
from supervisor.backlog import Backlog
from supervisor.executor_handle import OUTPUT_CAP_BYTES, ExecutorHandle
from supervisor.lanes import Lanes
from supervisor.outbox import Outbox
from supervisor.residency import ModelRefused, Models, Residency
from supervisor.runs import SAFE_CRASHED, Run, RunState, invalid
from supervisor.wire_codec import encode_realtime_close, encode_realtime_frame

if TYPE_CHECKING:
    from gen_worker.wire import worker_scheduler_pb2 as pb

log = logging.getLogger(__name__)

QUEUE_BYTES: Final = 16 * 1024 * 1024
"""What may wait for one handler, each frame counted with EVENT_OVERHEAD_BYTES: some 60,000 tiny ones. A larger frame is
taken when nothing else waits."""
QUEUES_BYTES: Final = 64 * 1024 * 1024
"""What may wait for all handlers together; past it the session that holds most is closed."""
REMEMBERED: Final = 1024
"""Sessions that are over, or never were: what still comes for them is no news."""

REASON_CHARS: Final = 200
"""Of what an executor says: it holds a name that the tenant chose."""

COMPLETED: Final = "completed"
CLOSED: Final = "closed"
UNKNOWN_FUNCTION: Final = "unknown_function"
FRAME_TOO_LARGE: Final = "frame_too_large"
WORKER_CRASHED: Final = "worker_crashed"
TIMEOUT: Final = "timeout"
SLOW_CONSUMER: Final = "slow_consumer"

_ERRORS: Final[dict[ErrorType, str]] = {
    "validation": "ValidationError",
    "retryable": "RetryableError",
    "resource": "ResourceError",
    "canceled": "CanceledError",
    "fatal": "FatalError",
    "auth": "AuthError",
    "internal": "WorkerError",
}
"""A session that can't be opened closes with the name of the error of gen_worker.errors that a run would fail with."""
_ENDS_HANDLER: Final = frozenset((FRAME_TOO_LARGE, SLOW_CONSUMER))
"""Reasons from an executor that its handler did not ask for."""


class _Frame(NamedTuple):
    data: bytes
    is_text: bool

    @property
    def weight(self) -> int:
        return len(self.data) + EVENT_OVERHEAD_BYTES


@dataclass(frozen=True, slots=True)
class SocketLimits:
    """`grace_s` is the cancel's; `max_frame_bytes` 0 means the transport's limit."""

    grace_s: float
    max_frame_bytes: int

    @property
    def frame_bytes(self) -> int:
        return min(self.max_frame_bytes or OUTPUT_CAP_BYTES, OUTPUT_CAP_BYTES)


class SocketSession(Run):
    """One session; its `run_id` is the session_id, by which its handler's context and events are named too."""

    __slots__ = ("reason", "told", "under_way", "waiting", "waiting_bytes", "window")

    def __init__(
        self, key: int, command: pb.RealtimeOpenCommand, function: str, models: Models, arrived: float
    ) -> None:
        timeout_ms = max(0, command.timeout_ms)
        super().__init__(
            key, command.session_id, function, b"", models, timeout_ms, command.tenant_id, command.user_id, arrived
        )
        self.reason = ""
        """Why it ends; empty while it does not."""
        self.told = False
        """Whether the scheduler's close is on its way: nothing of the session may follow it."""
        self.waiting: deque[_Frame] = deque()
        self.waiting_bytes = 0
        self.under_way = 0
        """Bytes that its executor has and its handler has not taken."""
        self.window = 0

    @property
    def is_opening(self) -> bool:
        return self.state in (RunState.QUEUED, RunState.WAITING_MODEL)

    @property
    def held_bytes(self) -> int:
        return self.waiting_bytes + self.under_way

    def begin_close(self, reason: str) -> bool:
        """OPEN -> CLOSING. The first reason stays."""
        if not self.begin_cancel("canceled"):
            return False
        self.reason = reason
        return True


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
        self._refusal = refusal
        self._ended = ended
        self._loop = asyncio.get_running_loop()
        self._sessions: dict[str, SocketSession] = {}
        self._by_key: dict[int, SocketSession] = {}
        self._held_bytes = 0
        self._over: OrderedDict[str, None] = OrderedDict()

    def __len__(self) -> int:
        """Sessions that have not ended."""
        return len(self._sessions)

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
                models = self._residency.resolve(info, command.required_models, b"")
        except ModelRefused as refused:
            failure = refused.failure
        if failure is not None:
            self._refuse(command, _reason_of(failure), failure.detail or failure.safe_message)
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
        waits = _Frame(frame.data, frame.is_text)
        if session.held_bytes and session.held_bytes + waits.weight > QUEUE_BYTES:
            self._break(session, SLOW_CONSUMER, f"{session.held_bytes} bytes wait for its handler already")
            return
        session.waiting.append(waits)
        session.waiting_bytes += waits.weight
        self._held_bytes += waits.weight
        self._feed(session)
        if self._held_bytes > QUEUES_BYTES:
            self._make_room()

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
        for session in list(self._sessions.values()):
            self._end_softly(session, CLOSED, "its stream ended")
            self._tell(session)

    # -- from the dispatcher ------------------------------------------------------------------

    def start(self, session: SocketSession, handle: ExecutorHandle, window: int) -> None:
        """An executor has room for it."""
        if not session.start(handle, self._loop.time()):
            return
        self._backlog.run_left(0)
        session.window = window
        deadline = 0.0
        if session.timeout_ms:
            deadline = time.time() + session.timeout_ms / 1000 - (session.started - session.arrived)
        try:
            handle.open_socket(session, deadline, window, self._limits.frame_bytes)
        except FrameError as error:
            self._finish(session, _reason_of(invalid("request too large")), f"its open command: {error}")
            return
        self._feed(session)

    def fail(self, session: SocketSession, failure: Failure) -> None:
        """What it waits for can't be had."""
        self._finish(session, _reason_of(failure), failure.detail or failure.safe_message)

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

    def users_of(self, model_id: str) -> int:
        return sum(any(used == model_id for _, used in session.models) for session in self._sessions.values())

    def refuse_waiting(self, failure: Failure) -> None:
        """Close those that no executor has yet."""
        for session in [session for session in self._sessions.values() if session.is_opening]:
            self.fail(session, failure)

    def close_all(self, detail: str) -> None:
        """End all sessions for the scheduler; their handlers see the end of their frames."""
        for session in list(self._sessions.values()):
            self._end_softly(session, CLOSED, detail)
            self._tell(session)

    def abandon(self, detail: str) -> None:
        """Let go of what is left, for a worker that leaves."""
        for session in list(self._sessions.values()):
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
        size = min(size, session.under_way)
        session.under_way -= size
        self._held_bytes -= size
        self._feed(session)

    def handler_closed(self, session: SocketSession, reason: str) -> None:
        """Its handler sends nothing more."""
        if not session.begin_close(reason[:REASON_CHARS] or COMPLETED):
            return
        self._drop_waiting(session)
        self._tell(session)
        if reason in _ENDS_HANDLER:
            self._set_timer(session, self._cancel, "canceled")
        # Else the handler may clean up in its own time, until its deadline.

    def handler_ended(self, session: SocketSession, result: Result) -> None:
        """Its handler returned or failed; that it closed the socket was said before."""
        failure = result.failure
        self._finish(session, COMPLETED if failure is None else _reason_of(failure), failure.detail if failure else "")

    # -- ends ---------------------------------------------------------------------------------

    def _end_softly(self, session: SocketSession, reason: str, detail: str) -> None:
        """The handler sees the end of its frames, after those that wait."""
        if session.is_opening:
            self._finish(session, reason, detail)
            return
        if not session.begin_close(reason) or session.handle is None:
            return
        while session.waiting:
            if not self._hand_over(session):
                return
        session.handle.send_socket_close(session.key, reason)
        self._set_timer(session, self._cancel, "canceled")

    def _break(self, session: SocketSession, reason: str, detail: str) -> None:
        """A bound is broken: the scheduler is told at once, and nothing more reaches the handler."""
        log.info("session of %s is broken off: %s", session.function, detail, extra={"run_id": session.run_id})
        if session.is_opening:
            self._finish(session, reason, detail)
        elif session.begin_close(reason) and session.handle is not None:
            self._drop_waiting(session)
            self._tell(session)
            session.handle.send_socket_close(session.key, reason)
            self._set_timer(session, self._cancel, "canceled")

    def _timed_out(self, session: SocketSession) -> None:
        if session.is_opening:
            self._finish(session, TIMEOUT, f"it was not open within its timeout_ms of {session.timeout_ms}")
            return
        session.begin_close(TIMEOUT)
        self._drop_waiting(session)
        self._cancel(session, "timeout")

    def _cancel(self, session: SocketSession, cause: CancelCause) -> None:
        if session.handle is not None and not session.state.is_terminal:
            session.handle.send_cancel(session.key, cause)
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
        was_opening, handle = session.is_opening, session.handle
        if not session.finish(None):
            return
        if was_opening and handle is None:
            self._backlog.run_left(0)
        session.reason = session.reason or reason
        self._tell(session)
        self._drop_waiting(session)
        self._held_bytes -= session.under_way
        session.under_way = 0
        words = ": " + detail.partition("\n")[0] if detail else ""
        extra = {"run_id": session.run_id, "executor": handle.name if handle else None}
        log.info("session of %s ended %s%s", session.function, session.reason, words, extra=extra)
        del self._sessions[session.run_id], self._by_key[session.key]
        self._lanes.remove(session)
        if handle is not None:
            handle.release(session)
        self._remember(session.run_id)
        self._ended()

    def _tell(self, session: SocketSession) -> None:
        if not session.told:
            session.told = True
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
        """Give its executor what it has room for: a window, and the frame that fills it."""
        while session.waiting and session.state is RunState.RUNNING and session.under_way < session.window:
            if not self._hand_over(session):
                return

    def _hand_over(self, session: SocketSession) -> bool:
        frame, handle = session.waiting.popleft(), session.handle
        session.waiting_bytes -= frame.weight
        session.under_way += frame.weight
        if handle is None:
            raise AssertionError("only a session that was started has frames handed over")
        try:
            handle.send_socket_frame(session.key, frame.data, is_text=frame.is_text)
        except OSError as error:
            failure = Failure("resource", "out of memory", f"no shared memory for a frame: {error}")
            # The handler would go on without the frame, so it must not go on.
            session.reason = session.reason or _reason_of(failure)
            log.error("session of %s is closed: %s", session.function, failure.detail, extra={"run_id": session.run_id})
            session.begin_cancel("canceled")
            self._drop_waiting(session)
            self._tell(session)
            self._cancel(session, "canceled")
            return False
        return True

    def _make_room(self) -> None:
        """Close the session that holds most. One that has a single frame is no slower than its frame is large."""
        slow = [each for each in self._sessions.values() if len(each.waiting) > (0 if each.under_way else 1)]
        if slow:
            largest = max(slow, key=lambda each: each.held_bytes)
            detail = f"{self._held_bytes} bytes wait for all handlers, {largest.held_bytes} of them for this one"
            self._break(largest, SLOW_CONSUMER, detail)

    def _drop_waiting(self, session: SocketSession) -> None:
        self._held_bytes -= session.waiting_bytes
        session.waiting_bytes = 0
        session.waiting.clear()

    # -- sessions that are not here -----------------------------------------------------------

    def _is_unknown(self, session_id: str, words: str) -> None:
        if session_id not in self._over:
            log.warning(words, session_id[:200])
            self._remember(session_id)

    def _remember(self, session_id: str) -> None:
        self._over[session_id] = None
        while len(self._over) > REMEMBERED:
            self._over.popitem(last=False)


def _reason_of(failure: Failure) -> str:
    if failure.safe_message == SAFE_CRASHED:
        return WORKER_CRASHED
    return TIMEOUT if failure.error_type == "timeout" else f"error:{_ERRORS[failure.error_type]}"
