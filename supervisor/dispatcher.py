"""Runs: which executor takes which, when, and what the scheduler is told of each.

Owns: every active run from its request to its one result.

1. `submit` answers what can't run at once, and queues the rest in a lane: the runs of one function with the same
   models.
2. `pump` gives waiting runs to executors: one that has the models hot, else one that has room, the least loaded first.
   Within a lane runs keep their order; lanes pass each other.
3. Events and the result of a run go to the outbox; the result frees its place, and `pump` goes on.
4. A deadline or a cancel asks the executor first (CANCELING); when it has not ended within the grace time, the
   executor is killed. An executor is never killed for being busy.
5. When an executor dies, each of its runs is answered, once.
6. What waits is counted in `backlog`, which bounds it.
7. Realtime sessions wait in the same lanes and count for the same limits; what is theirs alone is in sockets.py.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from gen_worker.pipe.frames import FrameError
from gen_worker.pipe.messages import (
    EVENT_OVERHEAD_BYTES,
    CancelCause,
    Deltas,
    Event,
    Failure,
    FetchFile,
    FunctionInfo,
    Result,
    SocketClose,
    SocketCredit,
    SocketFrame,
    StoreFile,
)
from supervisor import runs
from supervisor.admission import Admission
from supervisor.backlog import Backlog
from supervisor.child import ExitCause
from supervisor.executor_handle import ExecutorHandle
from supervisor.held_output import HeldOutput, LargeResult
from supervisor.input_arena import Input, Payload
from supervisor.lanes import Lanes
from supervisor.model_commands import ModelCommands
from supervisor.model_names import Models
from supervisor.model_news import ModelNews
from supervisor.observer import Observer
from supervisor.outbox import Keeper, Outbox
from supervisor.quarantine import STRIKES, Quarantine, fingerprint
from supervisor.residency import Residency
from supervisor.run_files import RunFiles, Store, Transfers
from supervisor.runs import Refused, Run, RunState
from supervisor.socket_session import SocketSession
from supervisor.sockets import SocketLimits, Sockets
from supervisor.wire_codec import DeltaWriter, encode_event, encode_result

if TYPE_CHECKING:
    from gen_worker.wire import worker_scheduler_pb2 as pb

log = logging.getLogger(__name__)

WINDOW_BYTES: Final = 256 * 1024
"""Event bytes of one run under way between its executor and the stream, while few runs stream."""
WINDOWS_BYTES: Final = 16 * 1024 * 1024
"""All windows together, roughly: when many runs stream, the later ones get smaller ones."""
WINDOW_MIN_BYTES: Final = 16 * 1024
LAST_LINES_CHARS: Final = 4000
PROGRESS_BYTES: Final = 4096
"""A longer job.progress is sent like any other, and not kept for who looks at the run here."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings that bound runs; 0 means no limit in each."""

    max_concurrency: int
    model_concurrency: int
    cancel_grace_s: float
    max_input_bytes: int
    max_ws_frame_bytes: int = 0


@dataclass(frozen=True, slots=True)
class FileService:
    """Who moves the files of runs, and this worker's own stores (run_files.py)."""

    transfers: Transfers
    stores: tuple[Store, ...] = ()
    reserved: frozenset[str] = frozenset()


class Dispatcher:
    """See the module. `executors` gives the live handles; `changed` is called when the registration may differ."""

    def __init__(
        self,
        *,
        limits: Limits,
        residency: Residency,
        executors: Callable[[], Sequence[ExecutorHandle]],
        changed: Callable[[], None],
        files: FileService,
        keeper: Keeper | None = None,
        observer: Observer | None = None,
    ) -> None:
        self._limits = limits
        self._residency = residency
        self._executors = executors
        self._changed = changed
        self._observer = observer or Observer()
        self._loop = asyncio.get_running_loop()
        self.backlog = Backlog(self._loop.time, lambda: self._loop.call_soon(self._pump))
        # A loop's own clock is too coarse for it.
        self.outbox = Outbox(self._credit, time.monotonic, self.backlog, keeper, self._loop.call_soon)
        self.functions: dict[str, FunctionInfo] = {}
        """What this worker serves, as the executors said when they got ready."""
        self._admission = Admission(
            functions=self.functions,
            backlog=self.backlog,
            active=lambda: self.active,
            max_concurrency=limits.max_concurrency,
            max_input_bytes=limits.max_input_bytes,
        )
        self._active: dict[str, Run] = {}
        self._by_key: dict[int, Run] = {}
        self._keys = itertools.count(1)
        self._less = asyncio.Event()
        """Set when a run or a session has ended."""
        self._quarantine = Quarantine(self._loop.time)
        self.lanes = Lanes(
            residency=residency,
            executors=executors,
            model_concurrency=limits.model_concurrency,
            start=self._start,
            fail=self._end,
            held=lambda: self.backlog.holds_runs,
        )
        self.files = RunFiles(files.transfers, files.stores, self.lanes.go_on, files.reserved)
        self.commands = ModelCommands(
            residency=residency,
            outbox=self.outbox,
            executors=executors,
            functions=self.functions,
        )
        self.sockets = Sockets(
            limits=SocketLimits(limits.cancel_grace_s, limits.max_ws_frame_bytes),
            functions=self.functions,
            keys=self._keys,
            lanes=self.lanes,
            residency=residency,
            outbox=self.outbox,
            backlog=self.backlog,
            files=self.files,
            refusal=self._admission.refusal,
            ended=self._less.set,
        )
        self.news = ModelNews(
            residency=residency,
            lanes=self.lanes,
            commands=self.commands,
            outbox=self.outbox,
            end=self._end,
            moved=self._models_moved,
            clock=self._loop.time,
            observer=self._observer,
        )
        self.model_loaded = self.news.model_loaded
        self.model_unloaded = self.news.model_unloaded

    # -- from the scheduler -------------------------------------------------------------------

    def submit(self, request: pb.TaskExecutionRequest, large: Input | None = None) -> None:
        """Accept a run, or answer at once why not. A payload that is `large` is not in the request."""
        run_id = request.run_id
        payload = request.input_payload if large is None else large
        if run_id in self._active:
            log.warning("run %s is active already: the second request is ignored", run_id, extra={"run_id": run_id})
            return
        try:
            info = self._admission.function_of(request, payload)
            models = self._models(info, request, payload)
        except Refused as refused:
            self._refuse(request, refused.failure)
            return
        request_print = fingerprint(info.name, payload)
        failure = self._quarantine.refusal(request_print, info.name)
        if failure is not None:
            self._refuse(request, failure)
            return
        run = Run(
            next(self._keys), run_id, info.name, payload, models,
            max(0, request.timeout_ms), request.tenant_id, request.user_id, self._loop.time(),
        )  # fmt: skip
        self._active[run_id] = run
        self._by_key[run.key] = run
        if run.timeout_ms:
            run.timer = self._loop.call_later(run.timeout_ms / 1000, self._cancel, run, "timeout")
        run.file_base_url, run.file_token = request.file_base_url, request.file_token
        run.fingerprint = request_print
        run.alone = self._quarantine.is_suspect(request_print)
        self.backlog.run_waits(len(run.payload))
        self.lanes.add(run, info)

    def cancel(self, run_id: str) -> None:
        """The scheduler's interrupt; a run that is not here (any more) needs none."""
        run = self._active.get(run_id)
        if run is None:
            log.info("cancel of a run that is not active: ignored", extra={"run_id": run_id})
            return
        self._cancel(run, "canceled")

    # -- from the executors (HandleEvents) ----------------------------------------------------

    def executor_ready(self, handle: ExecutorHandle) -> None:
        self._learn(handle.functions)
        self._residency.executor_ready(handle)
        log.info("executor %s is ready: %s", handle.name, ", ".join(sorted(handle.functions)))
        self._changed()
        self._pump()

    def _learn(self, served: dict[str, FunctionInfo]) -> None:
        """What an executor serves is the latest code: functions that it changed and that no executor has any more."""
        for name, info in served.items():
            if self.functions.get(name, info) != info:
                for run in self.lanes.changed(info):
                    self._end(run, runs.busy("the models of its function changed while it waited"))
        self.functions.update(served)
        offered = {name for handle in self._executors() for name in handle.functions}
        for name in self.functions.keys() - served.keys() - offered:
            del self.functions[name]
            for run in self.lanes.waiting_of(name):
                self._end(run, runs.invalid("unknown function", f"{name!r} is gone since the code was replaced"))

    def executor_writable(self, handle: ExecutorHandle) -> None:
        log.debug("executor %s has read enough to be given more", handle.name)
        self._pump()

    def executor_draining(self, handle: ExecutorHandle) -> None:
        log.debug("executor %s takes no more runs", handle.name)
        self._changed()

    def run_event(self, handle: ExecutorHandle, event: Event | Deltas) -> None:
        run = self._run_of(handle, event.key)
        if run is None:
            return
        if isinstance(event, Deltas):
            self._deltas(run, event)
            return
        message, weight = encode_event(run.run_id, event.type, event.payload), len(event.payload) + EVENT_OVERHEAD_BYTES
        if not isinstance(run, SocketSession):
            self._note(run, event)
            self.outbox.put_event(run.key, message, weight)
        elif not run.told:
            self.outbox.put_event(run.key, message, weight, transient=True)

    def run_file(self, handle: ExecutorHandle, request: FetchFile | StoreFile) -> None:
        run = self._run_of(handle, request.key)
        # A session that is closing has a handler that may still have something to store.
        if run is not None and (run.state is RunState.RUNNING or isinstance(run, SocketSession)):
            if isinstance(request, StoreFile):
                self.files.store(run, handle, request)
            else:
                self.files.fetch(run, handle, request)
                self.lanes.pump()  # its place is free

    def run_result(self, handle: ExecutorHandle, result: Result, output: bytes | HeldOutput) -> None:
        run = self._run_of(handle, result.key)
        succeeds = run is not None and run.state is RunState.RUNNING and result.failure is None
        if isinstance(output, HeldOutput) and not succeeds:
            output.release()
            output = b""
        if run is None:
            return
        if isinstance(run, SocketSession):
            self.sockets.handler_ended(run, result)
        elif run.state is RunState.CANCELING:
            # What a canceled function made of its cancel is its own affair; the scheduler gets the cause.
            detail = result.failure.detail if result.failure else "its function ended after it was canceled"
            self._finish(run, run.failure_of_cancel(detail))
        elif result.poisoned:
            self._strike(run)
            self._finish(run, result.failure)
        else:
            self._quarantine.clear(run.fingerprint)
            if result.failure is None:
                self.lanes.tiny[run.function] = result.tiny
            self._finish(run, result.failure, output)
        self._pump()

    def socket_frame(self, handle: ExecutorHandle, frame: SocketFrame, data: bytes) -> None:
        session = self._run_of(handle, frame.key)
        if isinstance(session, SocketSession):
            self.sockets.handler_sent(session, data, is_text=frame.is_text)

    def socket_close(self, handle: ExecutorHandle, close: SocketClose) -> None:
        session = self._run_of(handle, close.key)
        if isinstance(session, SocketSession):
            self.sockets.handler_closed(session, close.reason)

    def socket_credit(self, handle: ExecutorHandle, credit: SocketCredit) -> None:
        session = self._run_of(handle, credit.key)
        if isinstance(session, SocketSession):
            self.sockets.handler_took(session, credit.size)

    def executor_died(self, handle: ExecutorHandle, cause: ExitCause) -> None:
        loading = self._residency.loading(handle)
        self.news.executor_died(handle)
        self._residency.forget(handle)
        self.lanes.forget(handle)
        lines = "\n".join(handle.last_lines())[-LAST_LINES_CHARS:]
        ended = f"executor {handle.name} (pid {handle.pid}) {cause}"
        self.sockets.executor_died(handle, ended)
        for run in list(handle.runs.values()):
            if run.state is RunState.CANCELING:
                self._finish(run, run.failure_of_cancel(ended))
                continue
            # An end that this supervisor made proves nothing, and a poisoned device was another run's doing.
            proof = "" if handle.was_killed or handle.poisoned else self._strike(run)
            detail = f"{ended} while it ran {run.function}{proof}; last lines:\n{lines}"
            self._finish(run, runs.crashed(detail))
        if loading:
            detail = f"{ended} while it loaded {', '.join(sorted(key[0] for key in loading))}; last lines:\n{lines}"
            self.news.failed(loading, runs.crashed(detail))
            for model_id, _ in loading:
                self._observer.load_ended(model_id, 0.0, runs.crashed(detail))
        self._models_moved()

    def new_code(self) -> None:
        """Executors are about to be replaced by ones with other code: what killed the old ones says nothing of it."""
        self._quarantine.forgive()

    # -- drain --------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take no more runs; those that wait are handed back for another worker."""
        self._admission.closed = True
        for run in list(self._active.values()):
            if run.state in (RunState.QUEUED, RunState.WAITING_MODEL):
                self._finish(run, runs.busy("the worker is shutting down; the run had not started"))
        self.sockets.refuse_waiting(runs.busy("the worker is shutting down; the session was not open"))

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether all active runs and sessions have ended within timeout_s."""
        return await self._wait(lambda: not self.active, timeout_s)

    async def wait_sockets(self, timeout_s: float) -> bool:
        """Whether all sessions have ended within timeout_s."""
        return await self._wait(lambda: not self.sockets, timeout_s)

    async def _wait(self, check: Callable[[], bool], timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while not check():
                    self._less.clear()
                    await self._less.wait()
        except TimeoutError:
            return False
        return True

    def abandon(self, detail: str) -> None:
        """Answer what still runs `retryable`, for a worker that leaves; what was being canceled stays canceled."""
        for run in list(self._active.values()):
            canceling = run.state is RunState.CANCELING
            self._finish(run, run.failure_of_cancel(detail) if canceling else runs.busy(detail))
        self.sockets.abandon(detail)

    @property
    def active(self) -> int:
        """Runs that were accepted and have no result yet, and sessions that have not ended."""
        return len(self._active) + len(self.sockets)

    @property
    def active_runs(self) -> Collection[Run]:
        """Those runs, the oldest first."""
        return self._active.values()

    @property
    def draining(self) -> bool:
        """No run is taken any more."""
        return self._admission.closed

    # -- inside -------------------------------------------------------------------------------

    def _start(self, run: Run, handle: ExecutorHandle) -> None:
        window = WINDOW_BYTES
        if self.active > WINDOWS_BYTES // WINDOW_BYTES:
            running = sum(each.load for each in self._executors())
            window = max(WINDOW_MIN_BYTES, min(WINDOW_BYTES, WINDOWS_BYTES // (running + 1)))
        if isinstance(run, SocketSession):
            self.sockets.start(run, handle, window)
            return
        payload = run.payload
        if not run.start(handle, self._loop.time()):
            return
        run.progress = b""  # that of its model is over
        self.backlog.run_left(len(payload))
        self._residency.acquire(handle, run.models)
        deadline = 0.0
        if run.timeout_ms:
            deadline = time.time() + run.timeout_ms / 1000 - (run.started - run.arrived)
        try:
            handle.send_run(run, payload, deadline, window)
        except OSError as error:
            self._finish(run, runs.no_memory(len(payload), error))
        except FrameError as error:
            self._finish(run, runs.invalid("request too large", f"the request without its payload: {error}"))
        else:
            self._observer.run_started(run)

    def _pump(self) -> None:
        """Give waiting runs to executors, and go on with commands that wait."""
        self.commands.settle()
        self.lanes.pump()
        self.commands.advance()

    def _models_moved(self) -> None:
        self._changed()
        self._pump()

    # -- ends ---------------------------------------------------------------------------------

    def _cancel(self, run: Run, cause: CancelCause) -> None:
        if run.state in (RunState.QUEUED, RunState.WAITING_MODEL):
            run.cause = cause
            self._finish(run, run.failure_of_cancel("it had not started"))
        elif run.begin_cancel(cause) and run.handle is not None:
            run.handle.send_cancel(run.key, cause)
            self.files.cancel(run)
            if run.timer is not None:
                run.timer.cancel()
            run.timer = self._loop.call_later(self._limits.cancel_grace_s, self._grace_over, run)

    def _grace_over(self, run: Run) -> None:
        handle = run.handle
        if run.state is not RunState.CANCELING or handle is None:
            return
        grace = self._limits.cancel_grace_s
        reason = f"run {run.run_id} of {run.function} did not end within {grace:g} s of its {_CAUSES[run.cause]}"
        log.error("killing executor %s: %s", handle.name, reason, extra={"run_id": run.run_id})
        handle.kill(reason)
        self._finish(run, run.failure_of_cancel(f"its executor was killed: it did not end within {grace:g} s"))

    def _end(self, run: Run, failure: Failure) -> None:
        """End what has not started, a run or a session."""
        if isinstance(run, SocketSession):
            self.sockets.fail(run, failure)
        else:
            self._finish(run, failure)

    def _strike(self, run: Run) -> str:
        """Remember what an executor died under. Returns words for the message."""
        strikes = self._quarantine.strike(run.fingerprint)
        if strikes >= STRIKES:
            log.error(
                "%s is in quarantine: it killed %d executors", run.function, strikes, extra={"run_id": run.run_id}
            )
        return f", for the {strikes}. time with this payload" if strikes > 1 else ""

    def _refuse(self, request: pb.TaskExecutionRequest, failure: Failure) -> None:
        """Answer a run that was not accepted."""
        run_id, function = request.run_id, request.function_name
        log.info("run refused: %s", failure.detail, extra={"run_id": run_id})
        self.outbox.put_result(0, encode_result(run_id, b"", failure))
        self._observer.run_refused(function if function in self.functions else "", failure)

    def _finish(self, run: Run, failure: Failure | None, output: bytes | HeldOutput = b"") -> None:
        waiting_bytes = len(run.payload)
        if not run.finish(failure):
            return
        if run.handle is None:
            self.backlog.run_left(waiting_bytes)
        if failure is not None and not run.stream_ended and self._streams(run.function):
            # Its executor can't say it (any more).
            said = {"error_type": failure.error_type, "message": failure.safe_message}
            message = encode_event(run.run_id, "output.error", msgspec.json.encode(said))
            self.outbox.put_event(run.key, message, 0)
        if isinstance(output, HeldOutput):
            self.outbox.put_result(run.key, LargeResult(run.run_id, output))
        else:
            self.outbox.put_result(run.key, encode_result(run.run_id, output, failure))
        if failure is not None:
            words = (failure.detail or failure.safe_message).partition("\n")[0]
            log.info(
                "%s ended %s: %s", run.function, failure.error_type, words,
                extra={"run_id": run.run_id, "executor": run.handle.name if run.handle else None},
            )  # fmt: skip
        del self._active[run.run_id], self._by_key[run.key]
        self.lanes.remove(run)
        self.files.end(run)
        if run.handle is not None:
            run.handle.release(run)
            self._residency.release(run.handle, run.models)
        self._less.set()
        self._observer.run_ended(run, failure, self._loop.time())

    # -- small questions ----------------------------------------------------------------------

    def _deltas(self, run: Run, deltas: Deltas) -> None:
        if isinstance(run, SocketSession):
            log.debug("session %s sent deltas, which none has: they are dropped", run.run_id)
            return
        if run.deltas is None:
            run.deltas = DeltaWriter(run.run_id)
        count, size = len(deltas.payloads), sum(map(len, deltas.payloads))
        self._observer.deltas(run, count, size)
        self.outbox.put_event(run.key, run.deltas.join(deltas.payloads), size + count * EVENT_OVERHEAD_BYTES)

    def _note(self, run: Run, event: Event) -> None:
        """What an event says beyond what the scheduler makes of it."""
        if event.type == "output.delta":
            self._observer.deltas(run, 1, len(event.payload))
        elif event.type == "job.progress":
            if len(event.payload) <= PROGRESS_BYTES:
                run.progress = event.payload
        elif event.type in _STREAM_ENDS:
            run.stream_ended = True

    def _models(self, info: FunctionInfo, request: pb.TaskExecutionRequest, payload: Payload) -> Models:
        if not info.injections:
            return ()
        data = payload if isinstance(payload, bytes) else payload.view()
        return self._residency.names.resolve(info, request.required_models, data)

    def _streams(self, function: str) -> bool:
        info = self.functions.get(function)
        return info is not None and info.mode in ("generator", "async_generator")

    def _run_of(self, handle: ExecutorHandle, key: int) -> Run | None:
        """The run that `handle` speaks of, if it still has it."""
        run = handle.runs.get(key)
        if run is None:
            log.debug("executor %s speaks of run key %d, which has ended", handle.name, key)
        return run

    def _credit(self, key: int, size: int) -> None:
        if self.sockets.credit(key, size):
            return
        run = self._by_key.get(key)
        if run is not None and run.handle is not None:
            run.handle.send_credit(key, size)


_STREAM_ENDS: Final = frozenset(("output.completed", "output.error"))
"""The last event of an incremental run."""
_CAUSES: Final[dict[CancelCause | None, str]] = {"timeout": "deadline", "canceled": "cancel", None: "end"}
