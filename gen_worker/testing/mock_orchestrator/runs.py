"""One run as its scheduler sees it: what was asked for and everything that came back.

Owns: a run's events and results, whichever streams they came on, and who waits for them.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from gen_worker.wire import worker_scheduler_pb2 as pb

from .connection import WorkerConnection
from .errors import MockOrchestratorError, NoResultError, RunFailedError

DELTA_EVENT = "output.delta"


@dataclass(frozen=True, slots=True)
class RunEvent:
    """One event; `at` is its arrival in monotonic seconds."""

    at: float
    message: pb.WorkerEvent
    connection: WorkerConnection = field(repr=False)

    @property
    def type(self) -> str:
        return self.message.event_type

    @property
    def payload(self) -> Any:
        """The decoded JSON; raises msgspec.DecodeError when it is none."""
        return msgspec.json.decode(self.message.payload_json)


@dataclass(frozen=True, slots=True)
class RunResult:
    """One result; `at` is its arrival in monotonic seconds."""

    at: float
    message: pb.TaskExecutionResult
    connection: WorkerConnection = field(repr=False)


class RunHandle:
    """A run that was sent to a worker.

    run_id, function_name, worker_id, sent_at (monotonic seconds)
    results        every result that ever came for this run_id; more than one is a re-delivery
    events         every event, in order (empty when keep_events is off)
    event_count    how many events came
    """

    __slots__ = (
        "_keep_events",
        "_news",
        "_send",
        "event_count",
        "events",
        "function_name",
        "results",
        "run_id",
        "sent_at",
        "worker_id",
    )

    def __init__(
        self,
        run_id: str,
        function_name: str,
        worker_id: str,
        *,
        send: Callable[[str, pb.WorkerSchedulerMessage], Awaitable[None]],
        keep_events: bool,
    ) -> None:
        self.run_id = run_id
        self.function_name = function_name
        self.worker_id = worker_id
        self.sent_at = time.monotonic()
        self.events: list[RunEvent] = []
        self.results: list[RunResult] = []
        self.event_count = 0
        self._send = send
        self._keep_events = keep_events
        self._news = asyncio.Event()

    def __repr__(self) -> str:
        return (
            f"<RunHandle {self.run_id} {self.function_name} on {self.worker_id or '?'}: "
            f"{self.event_count} events, {len(self.results)} results>"
        )

    @property
    def done(self) -> bool:
        return bool(self.results)

    @property
    def deltas(self) -> list[Any]:
        """The decoded deltas that are here now."""
        return [event.payload for event in self.events if event.type == DELTA_EVENT]

    async def result(self, timeout: float = 30.0) -> pb.TaskExecutionResult:
        """The first result, success or not. Raises NoResultError after `timeout` seconds."""
        if not self.results:
            try:
                async with asyncio.timeout(timeout):
                    while not self.results:
                        await self._next_news()
            except TimeoutError:
                raise NoResultError(f"{self!r}: no result within {timeout:g} s") from None
        return self.results[0].message

    async def output(self, timeout: float = 30.0) -> Any:
        """The decoded output ({} for an incremental run).

        Raises RunFailedError, and NoResultError after `timeout` seconds.
        """
        return decode_output(await self.result(timeout))

    async def cancel(self) -> None:
        """Ask the run's worker to interrupt it, on the stream it has now. Raises StreamEndedError."""
        command = pb.InterruptTaskCommand(run_id=self.run_id)
        await self._send(self.worker_id, pb.WorkerSchedulerMessage(interrupt_run_cmd=command))

    async def __aiter__(self) -> AsyncIterator[Any]:
        """The decoded deltas, from the first one on, until a result is here (which is for `result` to judge)."""
        async for event in self.stream():
            if event.type == DELTA_EVENT:
                yield event.payload

    async def stream(self) -> AsyncIterator[RunEvent]:
        """The events, from the first one on, until a result is here."""
        if not self._keep_events:
            raise MockOrchestratorError(f"{self!r}: its events were not kept; run it with keep_events=True")
        position = 0
        while True:
            while position < len(self.events):
                position += 1
                yield self.events[position - 1]
            if self.results:
                return
            await self._next_news()

    async def _next_news(self) -> None:
        # Several may wait: clearing wakes nobody and loses nothing, since each looks again before it waits.
        self._news.clear()
        await self._news.wait()

    # -- called by the orchestrator -----------------------------------------------------------------

    def take_event(self, message: pb.WorkerEvent, connection: WorkerConnection) -> None:
        self.event_count += 1
        if self.results and self.results[-1].connection is connection:
            connection.violate(f"{message.event_type} of run {self.run_id} came after its result")
        if self._keep_events:
            self.events.append(RunEvent(time.monotonic(), message, connection))
            self._news.set()

    def take_result(self, message: pb.TaskExecutionResult, connection: WorkerConnection) -> None:
        if any(result.connection is connection for result in self.results):
            connection.violate(f"a second result of run {self.run_id} on one stream")
        self.results.append(RunResult(time.monotonic(), message, connection))
        self._news.set()


def decode_output(result: pb.TaskExecutionResult) -> Any:
    """A successful result's output as plain objects. Raises RunFailedError."""
    if not result.success:
        raise RunFailedError(
            result.run_id,
            error_type=result.error_type,
            safe_message=result.safe_message,
            error_message=result.error_message,
            retryable=result.retryable,
        )
    return msgspec.msgpack.decode(result.output_payload) if result.output_payload else {}
