"""One worker's stream, seen from the scheduler.

Owns: the stream's life at this end (its verdict: how we ended it, if we did), what arrived on it, and the one
writer's lock. It does not know what runs are: parsed messages go to the listener.

    1. `serve` starts reading and, at the same time, lets the orchestrator open the stream (token, policy, headers).
    2. The stream lives until the first of: the worker half-closes, the worker is lost, `close`, `half_close` or
       `drop` is called here, the server stops.
    3. `serve` gives gRPC the status, `ended` says what happened, and nothing can be sent any more.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

import grpc
from google.protobuf.message import DecodeError

from gen_worker.wire import worker_scheduler_pb2 as pb

from .errors import StreamEndedError, WaitTimeoutError
from .tcp import cut_connection

logger = logging.getLogger(__name__)

_KEPT_REGISTRATIONS = 1024
"""Past this the oldest but the first go: three hours of heartbeats."""

_KEPT_ODDITIES = 256
"""Of violations and of unparseable messages each."""

_LOSS_NOTICE_S = 0.01
"""gRPC reports a lost peer as the end of its messages and, right after, as a cancellation."""

FROM_WORKER = frozenset(
    (
        "worker_registration",
        "run_result",
        "spawn_tasks",
        "load_model_result",
        "unload_model_result",
        "worker_event",
        "realtime_frame",
        "realtime_close_cmd",
    )
)
"""The members of the oneof that a worker may send."""


def _look_at(write: asyncio.Future[None]) -> None:
    """Whoever waited was told how it went; if nobody did, asyncio need not complain."""
    if not write.cancelled():
        write.exception()


class EndedBy(Enum):
    """Who ended a stream."""

    WORKER = "worker"
    """It half-closed."""
    LOST = "lost"
    """It cancelled the stream, or its connection went away."""
    SCHEDULER = "scheduler"
    """We did."""


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """How and when (monotonic seconds) a stream ended; `code` is None when no status could be sent."""

    by: EndedBy
    code: grpc.StatusCode | None
    details: str
    at: float


@dataclass(frozen=True, slots=True)
class Registration:
    """One registration or heartbeat; `at` is its arrival in monotonic seconds."""

    at: float
    message: pb.WorkerRegistration
    connection: WorkerConnection = field(repr=False)

    @property
    def resources(self) -> pb.WorkerResources:
        return self.message.resources

    @property
    def is_heartbeat(self) -> bool:
        return self.message.is_heartbeat

    @property
    def worker_id(self) -> str:
        return self.message.resources.worker_id


@dataclass(frozen=True, slots=True)
class Received:
    """One message as it arrived (`at`: monotonic seconds); `message` is None when it does not parse."""

    at: float
    data: bytes
    message: pb.WorkerSchedulerMessage | None


class ConnectionListener(Protocol):
    """What a connection tells its owner; all are called on the event loop and must not block."""

    def received(self, connection: WorkerConnection, kind: str, message: pb.WorkerSchedulerMessage) -> None:
        """A message arrived; `kind` is the oneof's member, empty when none is set."""

    def changed(self) -> None:
        """Something else that someone may wait for has happened."""

    def ended(self, connection: WorkerConnection) -> None:
        """The stream is over."""


class WorkerConnection:
    """One stream of one worker. Made by the orchestrator; all methods belong to its event loop.

    index            how many streams this orchestrator had before
    peer             as gRPC names it, `ipv4:127.0.0.1:1234`
    metadata         the call's metadata
    opened_at        monotonic seconds
    registrations    in order, the first included (bounded to 1024; the first always stays)
    received_count   messages that arrived
    log              everything that arrived, when the orchestrator records; else empty
    unparseable      bytes that are no WorkerSchedulerMessage (the last 256)
    violations       what the worker did against the protocol (the last 256)
    ended            None while the stream lives
    headers_held     set by a policy: headers go out with the first message only
    """

    def __init__(
        self,
        context: grpc.aio.ServicerContext[bytes, bytes],
        *,
        index: int,
        local_port: int,
        listener: ConnectionListener,
        record: bool,
    ) -> None:
        self.index = index
        self.peer = context.peer()
        self.metadata: tuple[tuple[str, str | bytes], ...] = tuple(
            (str(key), value) for key, value in context.invocation_metadata() or ()
        )
        self.opened_at = time.monotonic()
        self.registrations: list[Registration] = []
        self.received_count = 0
        self.log: list[Received] = []
        self.unparseable: deque[bytes] = deque(maxlen=_KEPT_ODDITIES)
        self.violations: deque[str] = deque(maxlen=_KEPT_ODDITIES)
        self.ended: StreamEnd | None = None
        self.headers_held = False

        self._context: grpc.aio.ServicerContext[bytes, bytes] | None = context
        self._local_port = local_port
        self._listener = listener
        self._record = record
        self._headers: asyncio.Future[None] | None = None
        self._under_way: asyncio.Future[None] | None = None
        self._writing = asyncio.Lock()
        self._reading = asyncio.Event()
        self._reading.set()
        self._verdict: asyncio.Future[tuple[EndedBy, grpc.StatusCode, str]] = asyncio.get_running_loop().create_future()
        self._dropped = False
        self._cut_reason = ""
        self._over = asyncio.Event()

    def __repr__(self) -> str:
        state = f"ended by {self.ended.by.value}" if self.ended else "live"
        return f"<WorkerConnection {self.index} {self.worker_id or 'unregistered'} {self.peer} {state}>"

    # -- what is known of the worker ----------------------------------------------------------------

    @property
    def live(self) -> bool:
        """False as soon as the end is decided, by whichever side."""
        return self.ended is None and not self._verdict.done() and not self._dropped

    @property
    def worker_id(self) -> str:
        """Empty before the registration."""
        return self.registrations[-1].worker_id if self.registrations else ""

    @property
    def resources(self) -> pb.WorkerResources | None:
        """Of the latest registration or heartbeat."""
        return self.registrations[-1].resources if self.registrations else None

    @property
    def authorization(self) -> str:
        """The metadata's `authorization`, empty when there is none."""
        for key, value in self.metadata:
            if key == "authorization" and isinstance(value, str):
                return value
        return ""

    # -- to the worker ------------------------------------------------------------------------------

    async def send(self, message: pb.WorkerSchedulerMessage) -> None:
        """Send one message; waits while the worker does not read. Raises StreamEndedError."""
        await self.send_raw(message.SerializeToString())

    async def send_raw(self, data: bytes) -> None:
        """Send these bytes as one gRPC message, whatever they are. Raises StreamEndedError."""
        async with self._writing:
            context = self._context
            if context is None or not self.live:
                raise StreamEndedError(f"{self!r}: nothing can be sent on it")
            await self._write_headers(context)
            if self._under_way is not None:
                await asyncio.wait((self._under_way,))
            await self._write(context.write(data))

    async def send_headers(self) -> None:
        """Answer the call with headers (gRPC's initial metadata), if that has not happened yet."""
        async with self._writing:
            if self._context is not None and self.live:
                await self._write_headers(self._context)

    async def _write_headers(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        if self._headers is None:
            self._headers = asyncio.ensure_future(context.send_initial_metadata(()))
            await self._write(self._headers)

    async def _write(self, operation: Awaitable[None]) -> None:
        # gRPC takes one write at a time and has no way to call one back. So a caller who is cancelled leaves his
        # behind, and the next one waits for it before it makes its own.
        self._under_way = asyncio.ensure_future(operation)
        self._under_way.add_done_callback(_look_at)
        try:
            await asyncio.shield(self._under_way)
        except grpc.aio.BaseError as error:
            raise StreamEndedError(f"{self!r}: it ended while something was being sent") from error
        self._under_way = None

    def pause_reading(self) -> None:
        """Stop taking messages from the stream, so that HTTP/2's windows fill and the worker can't send.

        At most one more message is taken from gRPC; it is handled after `resume_reading`.
        """
        self._reading.clear()

    def resume_reading(self) -> None:
        self._reading.set()

    # -- the end ------------------------------------------------------------------------------------

    def close(self, code: grpc.StatusCode = grpc.StatusCode.UNAVAILABLE, details: str = "") -> None:
        """End the stream with this status. Returns at once; see `wait_ended`."""
        self._decide(EndedBy.SCHEDULER, code, details)

    def half_close(self) -> None:
        """End the stream with OK, as a scheduler does whose handler returns. Returns at once."""
        self.close(grpc.StatusCode.OK)

    def drop(self) -> None:
        """Cut the TCP connection under the stream, without any goodbye: the worker sees it vanish.

        Streams that share the connection (gRPC channels of one process may) go with it.
        Raises StreamEndedError when there is no such connection.
        """
        if not cut_connection(self.peer, self._local_port):
            raise StreamEndedError(f"{self!r}: its connection is gone already")
        self._dropped = True
        self.expect_cut("dropped")

    async def wait_ended(self, timeout: float = 10.0) -> StreamEnd:
        """Wait until the stream is over at this end. Raises WaitTimeoutError after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._over.wait()
        except TimeoutError:
            raise WaitTimeoutError(f"{self!r} did not end within {timeout:g} s") from None
        if self.ended is None:
            raise AssertionError("a stream is over and has no end")
        return self.ended

    def _decide(self, by: EndedBy, code: grpc.StatusCode, details: str) -> None:
        if not self._verdict.done():
            self._verdict.set_result((by, code, details))

    # -- called by the orchestrator and its runs ----------------------------------------------

    def violate(self, text: str) -> None:
        """Note that the worker broke the protocol."""
        self.violations.append(text)
        logger.warning("%r broke the protocol: %s", self, text)

    def expect_cut(self, reason: str) -> None:
        """If the stream is lost from now on, that was our doing."""
        self._cut_reason = self._cut_reason or reason

    async def serve(self, open_stream: Callable[[WorkerConnection], Awaitable[None]]) -> None:
        """Live through the stream; returns (status OK) or raises what makes gRPC send another one."""
        context = self._context
        if context is None:
            raise AssertionError("a stream is served once")
        tasks = (
            asyncio.create_task(self._read(context), name=f"read {self.peer}"),
            asyncio.create_task(self._open(open_stream), name=f"open {self.peer}"),
        )
        by, code, details = EndedBy.LOST, grpc.StatusCode.CANCELLED, ""
        try:
            verdict = await self._verdict
            if verdict[0] is EndedBy.WORKER:
                await asyncio.sleep(_LOSS_NOTICE_S)
            by, code, details = verdict
        finally:  # also when gRPC cancels this task: the worker is lost, or the server stops
            for task in tasks:
                task.cancel()
            # gRPC takes no status while headers are on their way.
            await asyncio.gather(*tasks, *([self._headers] if self._headers else []), return_exceptions=True)
            self._finish(by, code, details)
        if code is not grpc.StatusCode.OK:
            await context.abort(code, details)

    def _finish(self, by: EndedBy, code: grpc.StatusCode, details: str) -> None:
        status: grpc.StatusCode | None = code
        if self._dropped or by is EndedBy.LOST:
            by = EndedBy.SCHEDULER if self._cut_reason else EndedBy.LOST
            status, details = None, self._cut_reason
        self.ended = StreamEnd(by, status, details, time.monotonic())
        self._verdict.cancel()
        self._context = None
        self._over.set()
        self._listener.ended(self)

    async def _open(self, open_stream: Callable[[WorkerConnection], Awaitable[None]]) -> None:
        try:
            await open_stream(self)
        except StreamEndedError as error:
            logger.info("the stream ended while its policy ran: %s", error)
        except Exception as error:
            logger.exception("the policy for %r failed", self)
            self.close(grpc.StatusCode.INTERNAL, f"the scheduler's policy failed: {type(error).__name__}")

    async def _read(self, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        try:
            while isinstance(data := await context.read(), bytes):
                if not self._reading.is_set():
                    await self._reading.wait()
                self._take(data)
        except grpc.aio.BaseError as error:
            logger.debug("reading from %r ended: %s", self, error)
        except Exception as error:
            logger.exception("handling a message of %r failed", self)
            self.close(grpc.StatusCode.INTERNAL, f"the scheduler failed: {type(error).__name__}")
        self._decide(EndedBy.WORKER, grpc.StatusCode.OK, "")

    def _take(self, data: bytes) -> None:
        self.received_count += 1
        try:
            message = pb.WorkerSchedulerMessage.FromString(data)
        except DecodeError:
            message = None
        if self._record:
            self.log.append(Received(time.monotonic(), data, message))
        if message is None:
            self.unparseable.append(data)
            self.violate(f"{len(data)} bytes that are no WorkerSchedulerMessage")
            self._listener.changed()
            return
        kind = message.WhichOneof("msg") or ""
        if kind == "worker_registration":
            self._register(message.worker_registration)
        elif kind not in FROM_WORKER:
            self.violate(f"a worker may not send {kind or 'an empty or unknown message'}")
        elif not self.registrations:
            self.violate(f"{kind} came before the registration")
        self._listener.received(self, kind, message)

    def _register(self, message: pb.WorkerRegistration) -> None:
        if not message.resources.worker_id:
            self.violate("a registration without a worker_id")
        if bool(self.registrations) != message.is_heartbeat:
            wanted = "true" if self.registrations else "false"
            self.violate(f"registration {len(self.registrations)} of a stream has is_heartbeat not {wanted}")
        self.registrations.append(Registration(time.monotonic(), message, self))
        if len(self.registrations) > _KEPT_REGISTRATIONS:
            del self.registrations[1 : _KEPT_REGISTRATIONS // 2]
