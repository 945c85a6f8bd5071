"""The runs of the development server: what is under way, and what was lately.

Owns: one record per run, from its request to its end, and the handles of those under way.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

import msgspec

from gen_worker.serve.changes import Changes
from gen_worker.serve.functions import Function
from gen_worker.serve.local_worker import LocalWorker
from gen_worker.testing.mock_orchestrator import (
    MockOrchestratorError,
    RunEvent,
    RunFailedError,
    RunHandle,
    decode_output,
)

_log = logging.getLogger(__name__)

KEPT_RUNS: Final = 50
KEPT_BYTES: Final = 64 * 1024
"""A larger payload or output is not kept with the recent runs."""
TOO_LARGE: Final = "too large to be kept"

State = Literal["running", "succeeded", "failed"]


class WorkerGoneError(Exception):
    """The worker ended while the run was under way; the message says why."""


@dataclass(slots=True)
class RunRecord:
    """One run as the page lists it; `started_at` in epoch seconds."""

    run_id: str
    function: str
    started_at: float
    payload: Any
    state: State = "running"
    seconds: float | None = None
    progress: float | None = None
    stage: str = ""
    fetches: str = ""
    """The model that is downloaded for it, while it waits for that."""
    deltas: int = 0
    error: dict[str, Any] | None = None
    output: Any = None


class Call:
    """One run, for whoever asked for it: `events` once, then `output`, and `close` in any case."""

    def __init__(self, handle: RunHandle, record: RunRecord, function: Function, runs: Runs) -> None:
        self._handle = handle
        self._runs = runs
        self._deltas: list[Any] = []
        self.record = record
        self.function = function

    async def events(self) -> AsyncGenerator[RunEvent, None]:
        """The run's events, until its result is here. Raises WorkerGoneError."""
        stream = self._handle.stream()
        gone = asyncio.ensure_future(self._runs.worker_gone())
        try:
            while True:
                following = asyncio.ensure_future(_next(stream))
                try:
                    await asyncio.wait((following, gone), return_when=asyncio.FIRST_COMPLETED)
                    if not following.done():
                        raise WorkerGoneError(gone.result())
                    event = following.result()
                finally:
                    following.cancel()
                if event is None:
                    return
                self._note(event)
                yield event
        finally:
            gone.cancel()

    def output(self) -> Any:
        """The output; of a streaming function the list of its deltas. Raises RunFailedError."""
        output = decode_output(self._handle.results[0].message)
        return self._deltas if self.function.incremental else output

    def close(self) -> None:
        """Nobody follows the run any more: one that has no result yet is canceled. Does nothing the second time."""
        if self.record.state == "running":
            self._runs.ended(self._handle, self.record, self.output)

    def _note(self, event: RunEvent) -> None:
        if event.type == "job.progress" and isinstance(event.payload, dict):
            self.record.progress = float(event.payload.get("progress", 0))
            self.record.stage = str(event.payload.get("stage") or "")
            is_fetched = self.record.stage == "download" and self.record.progress < 1
            self.record.fetches = str(event.payload.get("model") or "") if is_fetched else ""
            self._runs.changes.tell()
        elif event.type == "output.delta":
            self.record.deltas += 1
            self._deltas.append(event.payload)


class Runs:
    """See the module."""

    def __init__(self, worker: LocalWorker, changes: Changes) -> None:
        self._worker = worker
        self._records: OrderedDict[str, RunRecord] = OrderedDict()
        self._handles: dict[str, RunHandle] = {}
        self._canceling: set[asyncio.Task[None]] = set()
        self.changes = changes

    @property
    def recent(self) -> list[RunRecord]:
        """The latest first."""
        return list(reversed(self._records.values()))

    async def start(self, function: Function, payload: Any, plain: Any, timeout_ms: int) -> Call:
        """Send a run; `plain` is the payload as JSON has it. Raises NoWorkerError and StreamEndedError."""
        handle = await self._worker.call(function.name, payload, timeout_ms=timeout_ms)
        record = RunRecord(handle.run_id, function.name, time.time(), _kept(plain))
        self._records[record.run_id] = record
        self._handles[record.run_id] = handle
        ended = [key for key, each in self._records.items() if each.state != "running"]
        for key in ended[: max(0, len(self._records) - KEPT_RUNS)]:
            del self._records[key]
        self.changes.tell()
        return Call(handle, record, function, self)

    def cancel(self, run_id: str) -> bool:
        """Ask for a run's end; whether there is such a run under way."""
        handle = self._handles.get(run_id)
        if handle is None:
            return False
        # A task of its own: who asks may be canceled itself, as the handler of a client that went away is.
        task = asyncio.ensure_future(_cancel(handle))
        self._canceling.add(task)
        task.add_done_callback(self._canceling.discard)
        return True

    async def worker_gone(self) -> str:
        """Why the worker ended, once it has."""
        code = await self._worker.wait_gone()
        return f"the worker ended with exit code {code}: {self._worker.last_error()}"

    def ended(self, handle: RunHandle, record: RunRecord, outcome: Callable[[], Any]) -> None:
        """Nobody follows the run any more: it has its result, or its client or the worker is gone."""
        record.seconds = time.monotonic() - handle.sent_at
        record.state = "failed"
        record.error = {"type": "canceled", "message": "the client or the worker went away", "retryable": False}
        if handle.done:
            try:
                record.output = _kept(outcome())
                record.state, record.error = "succeeded", None
            except RunFailedError as error:
                record.error = error_body(error)
        else:
            self.cancel(record.run_id)
        self._handles.pop(record.run_id, None)
        self._worker.orchestrator.forget(handle)
        self.changes.tell()


def error_body(error: RunFailedError) -> dict[str, Any]:
    """A failed run as clients get it. `detail` is what an operator would see: the developer is one."""
    return {
        "type": error.error_type,
        "message": error.safe_message,
        "retryable": error.retryable,
        "detail": error.error_message,
        "run_id": error.run_id,
    }


async def _next(stream: AsyncIterator[RunEvent]) -> RunEvent | None:
    return await anext(stream, None)


async def _cancel(handle: RunHandle) -> None:
    try:
        await handle.cancel()
    except MockOrchestratorError as error:
        _log.info("run %s can't be canceled: %s", handle.run_id, error)


def _kept(value: Any) -> Any:
    try:
        size = len(msgspec.json.encode(value, enc_hook=repr))
    except (TypeError, ValueError) as error:
        return repr(error)
    return value if size <= KEPT_BYTES else TOO_LARGE
