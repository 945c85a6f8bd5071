"""The scheduler of the torture: two addresses, of which one leads, and one worker.

Owns: the two MockOrchestrators, what a new stream meets, the queue of what is to be sent, and everything in the history
that the wire tells. What goes wrong on streams is injected by faults.py.

1. `send` and `cancel` only queue. One task writes, in order, on the stream that the worker has at that moment; while
   there is none, or one that must not be used, it waits.
2. Every stream gets its number when it opens; every message that arrives becomes an Arrival.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final, Self

import grpc
import msgspec

from gen_worker.testing.mock_orchestrator import (
    MockOrchestrator,
    RealtimeSession,
    StreamEndedError,
    WaitTimeoutError,
    WorkerConnection,
)
from gen_worker.testing.torture.history import Arrival, History, Light, Outcome, Run, StreamRecord, What, Writing
from gen_worker.testing.torture.requests import SUCCESS, OwnFunction, Request
from gen_worker.wire import NOT_LEADER_PREFIX
from gen_worker.wire import worker_scheduler_pb2 as pb

log = logging.getLogger(__name__)

_NO_STREAM: Final = "there is no stream"


class _Index(msgspec.Struct):
    """Of a delta: its place, whose it is, and when it was made."""

    index: int
    nonce: str
    made_at: float = 0.0


Meet = Callable[[WorkerConnection], Awaitable[None] | None]
"""What happens to a stream that opens."""

_decode_index: Final = msgspec.json.Decoder(_Index).decode


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """A request to write, or, without one, an interrupt."""

    run: Run
    request: pb.TaskExecutionRequest | None


class Scheduler:
    """See the module. `async with` serves."""

    def __init__(self, history: History, light: Light) -> None:
        self._history = history
        self._light = light
        self._schedulers = [self._orchestrator(), self._orchestrator()]
        self._leader = 0
        self._numbers: dict[WorkerConnection, int] = {}
        self._positions: dict[int, int] = {}
        self._meet: list[Meet] = []
        """What the next streams meet; empty: they are taken."""
        self._unusable: set[WorkerConnection] = set()
        self._queue: asyncio.Queue[_Outgoing] = asyncio.Queue()
        self._writer: asyncio.Task[None] | None = None
        light.dim(_NO_STREAM, time.monotonic())

    def _orchestrator(self) -> MockOrchestrator:
        return MockOrchestrator(on_connect=self._policy, on_message=self._received, on_end=self._ended)

    async def __aenter__(self) -> Self:
        for scheduler in self._schedulers:
            await scheduler.start()
        self._follow()
        self._writer = asyncio.create_task(self._write())
        return self

    async def __aexit__(self, *_exc: object) -> None:
        if self._writer is not None:
            self._writer.cancel()
            await asyncio.wait([self._writer])
        for scheduler in self._schedulers:
            await scheduler.stop()

    @property
    def addresses(self) -> Sequence[str]:
        return [scheduler.address for scheduler in self._schedulers]

    @property
    def backlog(self) -> int:
        """Messages that wait to be written."""
        return self._queue.qsize()

    # -- requests -----------------------------------------------------------------------------------

    def send(self, run_id: str, request: Request, timeout_ms: int, copies: int = 1) -> Run:
        """Queue a run_request, `copies` times in a row."""
        run = Run(run_id, request, timeout_ms)
        self._history.runs[run_id] = run
        message = pb.TaskExecutionRequest(
            run_id=run_id,
            function_name=request.function,
            input_payload=request.payload,
            timeout_ms=timeout_ms,
            tenant_id="torture",
        )
        for _ in range(copies):
            self._queue.put_nowait(_Outgoing(run, message))
        return run

    def cancel(self, run: Run) -> None:
        """Queue an interrupt of the run."""
        self._queue.put_nowait(_Outgoing(run, None))

    async def command_model(self, command: str, model_id: str, wait_s: float) -> str:
        """Have a model loaded or unloaded; returns why it was not, or ""."""
        connection = await self.usable()
        do = self.leader.load_model if command == "load" else self.leader.unload_model
        try:
            answer = await do(model_id, wait_s, worker=connection)
        except (WaitTimeoutError, StreamEndedError) as error:
            return str(error)
        return "" if answer.success else answer.error_message or "no reason is given"

    async def open_session(self, function: str, session_id: str, timeout_ms: int) -> RealtimeSession:
        """Open a realtime session on the worker's stream, as soon as it has one. Raises StreamEndedError."""
        connection = await self.usable()
        owner = next(scheduler for scheduler in self._schedulers if connection in scheduler.connections)
        return await owner.open_realtime(
            function, session_id=session_id, timeout_ms=timeout_ms, tenant_id="torture", worker=connection
        )

    async def _write(self) -> None:
        while True:
            outgoing = await self._queue.get()
            connection = await self.usable()
            try:
                await self._write_on(connection, outgoing)
            except StreamEndedError as error:
                log.debug("a message may have been lost with its stream: %s", error)

    async def _write_on(self, connection: WorkerConnection, outgoing: _Outgoing) -> None:
        run, request = outgoing.run, outgoing.request
        if request is None:
            run.cancels.append(time.monotonic())
            interrupt = pb.InterruptTaskCommand(run_id=run.run_id)
            await connection.send(pb.WorkerSchedulerMessage(interrupt_run_cmd=interrupt))
            return
        stream = self.number(connection)
        position = self._positions[stream] = self._positions.get(stream, -1) + 1
        run.writings.append(Writing(stream, position, time.monotonic()))
        await connection.send(pb.WorkerSchedulerMessage(run_request=request))

    # -- the worker's stream ------------------------------------------------------------------------

    def current(self) -> WorkerConnection | None:
        """The stream that the worker has and that may be used."""
        for scheduler in self._schedulers:
            for connection in scheduler.workers.values():
                if connection.live and connection not in self._unusable:
                    return connection
        return None

    async def functions(self, wait_s: float) -> list[OwnFunction]:
        """What the worker registered, once it has functions. Raises TimeoutError."""
        async with asyncio.timeout(wait_s):
            while True:
                connection = await self.usable()
                schemas = connection.resources.function_schemas if connection.resources else ()
                if schemas:
                    decode = msgspec.json.decode
                    return [
                        OwnFunction(schema.name, decode(schema.input_schema_json), schema.incremental_output)
                        for schema in schemas
                        if schema.input_schema_json
                    ]
                await asyncio.sleep(0.05)

    async def usable(self) -> WorkerConnection:
        """`current`, as soon as there is one."""
        while (connection := self.current()) is None:
            # Either scheduler may be the one that it comes to.
            waits = [asyncio.ensure_future(scheduler.wait_until(self.current, 3600)) for scheduler in self._schedulers]
            try:
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for wait in waits:
                    wait.cancel()
        return connection

    async def _policy(self, connection: WorkerConnection) -> None:
        self.number(connection)
        if not self._meet:
            return
        answer = self._meet.pop(0)(connection)
        if answer is not None:
            await answer

    def number(self, connection: WorkerConnection) -> int:
        """Of the stream, in the history."""
        number = self._numbers.get(connection)
        if number is None:
            number = self._numbers[connection] = len(self._history.streams)
            self._history.streams.append(StreamRecord(connection.opened_at))
        return number

    def _ended(self, connection: WorkerConnection) -> None:
        self._history.streams[self.number(connection)].ended_at = time.monotonic()
        self._history.offences += [f"stream {self.number(connection)}: {text}" for text in connection.violations]
        self._unusable.discard(connection)
        self._look()

    def _look(self) -> None:
        """It is dark while the worker has no stream on which it may deliver."""
        if self.current() is None:
            self._light.dim(_NO_STREAM, time.monotonic())
        else:
            self._light.brighten(_NO_STREAM, time.monotonic())

    # -- for the faults -----------------------------------------------------------------------------

    @property
    def leader(self) -> MockOrchestrator:
        """The scheduler that takes streams."""
        return self._schedulers[self._leader]

    @property
    def _follower(self) -> MockOrchestrator:
        """The scheduler that does not lead: it redirects whoever comes."""
        return self._schedulers[1 - self._leader]

    def move_leader(self) -> None:
        """The other one leads: the worker's stream is ended with a redirect to it."""
        self._leader = 1 - self._leader
        self.leader.on_connect = self._policy
        self._follow()
        details = f"{NOT_LEADER_PREFIX}{self.leader.address}"
        for connection in tuple(self._follower.connections):
            connection.close(grpc.StatusCode.FAILED_PRECONDITION, details)

    def _follow(self) -> None:
        address = self.leader.address

        def redirect(connection: WorkerConnection) -> None:
            self.number(connection)
            connection.close(grpc.StatusCode.FAILED_PRECONDITION, f"{NOT_LEADER_PREFIX}{address}")

        self._follower.on_connect = redirect

    def meet(self, *policies: Meet) -> None:
        """What the next streams meet, instead of what was planned for them before."""
        self._meet = list(policies)

    def set_aside(self, connection: WorkerConnection) -> None:
        """Nothing is sent on it, though it lives."""
        self._unusable.add(connection)

    def use(self, connection: WorkerConnection) -> None:
        """Undo `set_aside`."""
        self._unusable.discard(connection)
        self._look()
        for scheduler in self._schedulers:
            scheduler.changed()

    # -- what arrives -------------------------------------------------------------------------------

    def _received(self, connection: WorkerConnection, kind: str, message: pb.WorkerSchedulerMessage) -> None:
        if kind == "worker_registration":
            # The orchestrator takes note of it right after this; then the stream may be used.
            asyncio.get_running_loop().call_soon(self._look)
        elif kind == "run_result":
            result = message.run_result
            self._arrived(result.run_id, self._result(connection, result), "a result")
        elif kind == "worker_event":
            event = message.worker_event
            self._arrived(event.run_id, self._event(connection, event), event.event_type)

    def _arrived(self, run_id: str, arrival: Arrival, what: str) -> None:
        run = self._history.runs.get(run_id)
        if run is None:
            self._history.strays.append(f"{what} for run {run_id!r}, which was never sent")
        else:
            run.arrivals.append(arrival)

    def _result(self, connection: WorkerConnection, result: pb.TaskExecutionResult) -> Arrival:
        run = self._history.runs.get(result.run_id)
        wanted = run.request.output if run is not None else None
        outcome = Outcome(
            SUCCESS if result.success else result.error_type,
            result.retryable,
            result.safe_message,
            result.error_message,
            hashlib.blake2b(result.SerializeToString(deterministic=True), digest_size=16).digest(),
            not result.success or wanted is None or result.output_payload == wanted,
        )
        return Arrival(self.number(connection), time.monotonic(), What.RESULT, outcome=outcome)

    def _event(self, connection: WorkerConnection, event: pb.WorkerEvent) -> Arrival:
        stream, now = self.number(connection), time.monotonic()
        match event.event_type:
            case "output.completed":
                return Arrival(stream, now, What.COMPLETED)
            case "output.error":
                return Arrival(stream, now, What.ERROR)
            case "output.delta":
                place, made_at = self._delta(event)
                return Arrival(stream, now, What.DELTA, place, made_at=made_at)
        return Arrival(stream, now, What.OTHER)

    def _delta(self, event: pb.WorkerEvent) -> tuple[int, float]:
        """Its place and when it was made."""
        run = self._history.runs.get(event.run_id)
        if run is None or run.request.deltas is None:
            return -1, 0.0
        delta = _decode_index(event.payload_json)
        return (delta.index if delta.nonce == event.run_id else -1), delta.made_at
