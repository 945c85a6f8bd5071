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
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gen_worker.pipe.frames import FrameError
from gen_worker.pipe.messages import (
    EVENT_OVERHEAD_BYTES,
    CancelCause,
    Event,
    Failure,
    FunctionInfo,
    ModelLoaded,
    ModelUnloaded,
    Result,
)
from supervisor import runs
from supervisor.backlog import Backlog
from supervisor.child import ExitCause
from supervisor.executor_handle import ExecutorHandle
from supervisor.lanes import Lanes
from supervisor.model_commands import ModelCommands
from supervisor.outbox import Keeper, Outbox
from supervisor.quarantine import STRIKES, Quarantine, fingerprint
from supervisor.residency import ModelKey, ModelRefused, Models, Residency
from supervisor.runs import Run, RunState
from supervisor.wire_codec import encode_event, encode_result

if TYPE_CHECKING:
    from gen_worker.wire import worker_scheduler_pb2 as pb

log = logging.getLogger(__name__)

WINDOW_BYTES: Final = 256 * 1024
"""Event bytes of one run under way between its executor and the stream, while few runs stream."""
WINDOWS_BYTES: Final = 16 * 1024 * 1024
"""All windows together, roughly: when many runs stream, the later ones get smaller ones."""
WINDOW_MIN_BYTES: Final = 16 * 1024
LAST_LINES_CHARS: Final = 4000


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings that bound runs; 0 means no limit in each."""

    max_concurrency: int
    model_concurrency: int
    cancel_grace_s: float
    max_input_bytes: int


class Dispatcher:
    """See the module. `executors` gives the live handles; `changed` is called when the registration may differ."""

    def __init__(
        self,
        *,
        limits: Limits,
        residency: Residency,
        executors: Callable[[], Sequence[ExecutorHandle]],
        changed: Callable[[], None],
        keeper: Keeper | None = None,
    ) -> None:
        self._limits = limits
        self._residency = residency
        self._executors = executors
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self.backlog = Backlog(self._loop.time, lambda: self._loop.call_soon(self.lanes.pump))
        self.outbox = Outbox(self._credit, self._loop.time, self.backlog, keeper)
        self.functions: dict[str, FunctionInfo] = {}
        """What this worker serves, as the executors said when they got ready."""
        self._active: dict[str, Run] = {}
        self._by_key: dict[int, Run] = {}
        self._keys = itertools.count(1)
        self._quarantine = Quarantine(self._loop.time)
        self.lanes = Lanes(
            residency=residency,
            executors=executors,
            model_concurrency=limits.model_concurrency,
            start=self._start,
            held=lambda: self.backlog.holds_runs,
        )
        self.commands = ModelCommands(
            residency=residency,
            outbox=self.outbox,
            executors=executors,
            functions=self.functions,
            users=self._users_of,
        )
        self._draining = False
        self._idle = asyncio.Event()

    # -- from the scheduler -------------------------------------------------------------------

    def submit(self, request: pb.TaskExecutionRequest) -> None:
        """Accept a run, or answer at once why not."""
        run_id = request.run_id
        if run_id in self._active:
            log.warning("run %s is active already: the second request is ignored", run_id, extra={"run_id": run_id})
            return
        info = self.functions.get(request.function_name)
        try:
            failure = self._refusal(request, info)
            models = () if failure or info is None else self._models(info, request)
        except ModelRefused as refused:
            failure = refused.failure
        if failure is not None or info is None:
            self._refuse(run_id, failure or runs.invalid("unknown function"))
            return
        request_print = fingerprint(info.name, request.input_payload)
        failure = self._quarantine.refusal(request_print, info.name)
        if failure is not None:
            self._refuse(run_id, failure)
            return
        run = Run(
            next(self._keys), run_id, info.name, request.input_payload, models,
            max(0, request.timeout_ms), request.tenant_id, request.user_id, self._loop.time(),
        )  # fmt: skip
        self._active[run_id] = run
        self._by_key[run.key] = run
        if run.timeout_ms:
            run.timer = self._loop.call_later(run.timeout_ms / 1000, self._cancel, run, "timeout")
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
        # Realtime handlers are not served by this version, so they are not offered.
        served = {name: info for name, info in handle.functions.items() if info.mode != "websocket"}
        self._learn(served)
        log.info("executor %s is ready: %s", handle.name, ", ".join(sorted(handle.functions)))
        self._changed()
        self.lanes.pump()

    def _learn(self, served: dict[str, FunctionInfo]) -> None:
        """What an executor serves is the latest code: functions that it changed and that no executor has any more."""
        for name, info in served.items():
            if self.functions.get(name, info) != info:
                for run in self.lanes.changed(info):
                    self._finish(run, runs.busy("the models of its function changed while it waited"))
        self.functions.update(served)
        offered = {name for handle in self._executors() for name in handle.functions}
        for name in self.functions.keys() - served.keys() - offered:
            del self.functions[name]
            for run in self.lanes.of(name):
                self._finish(run, runs.invalid("unknown function", f"{name!r} is gone since the code was replaced"))

    def executor_writable(self, handle: ExecutorHandle) -> None:
        log.debug("executor %s reads again", handle.name)
        self.lanes.pump()

    def executor_draining(self, handle: ExecutorHandle) -> None:
        log.debug("executor %s takes no more runs", handle.name)
        self._changed()

    def run_event(self, handle: ExecutorHandle, event: Event) -> None:
        run = self._run_of(handle, event.key)
        if run is None:
            return
        message = encode_event(run.run_id, event.type, event.payload)
        self.outbox.put_event(run.key, message, len(event.payload) + EVENT_OVERHEAD_BYTES)

    def run_result(self, handle: ExecutorHandle, result: Result, output: bytes) -> None:
        run = self._run_of(handle, result.key)
        if run is None:
            return
        if run.state is RunState.CANCELING:
            # What a canceled function made of its cancel is its own affair; the scheduler gets the cause.
            detail = result.failure.detail if result.failure else "its function ended after it was canceled"
            self._finish(run, run.failure_of_cancel(detail))
        elif result.poisoned:
            self._strike(run)
            self._finish(run, result.failure)
        else:
            self._quarantine.clear(run.fingerprint)
            self._finish(run, result.failure, output)
        self.lanes.pump()

    def model_loaded(self, handle: ExecutorHandle, loaded: ModelLoaded) -> None:
        key = (loaded.model_id, loaded.type_name)
        extra = {"executor": handle.name}
        if loaded.failure is None:
            self._residency.loaded(handle, key, loaded.device_bytes)
            size = f"{loaded.device_bytes / 2**30:.2f} GiB on the device"
            log.info("loaded %s as %s in %.2f s, %s", *key, loaded.seconds, size, extra=extra)
        else:
            self._residency.load_failed(handle, key)
            log.error("loading %s as %s failed: %s", *key, loaded.failure.detail, extra=extra)
            self._fail_stranded({key}, loaded.failure)
        self.commands.loaded(handle, loaded.model_id, loaded.failure)
        self._changed()
        self.lanes.pump()

    def model_unloaded(self, handle: ExecutorHandle, unloaded: ModelUnloaded) -> None:
        if unloaded.failure is None:
            self._residency.unloaded(handle, unloaded.model_id)
        else:
            self._residency.unload_failed(handle, unloaded.model_id)
        self.commands.unloaded(unloaded.model_id, unloaded.failure)
        self._changed()
        self.lanes.pump()

    def executor_died(self, handle: ExecutorHandle, cause: ExitCause) -> None:
        loading = self._residency.loading(handle)
        self._residency.forget(handle)
        self.lanes.forget(handle)
        lines = "\n".join(handle.last_lines())[-LAST_LINES_CHARS:]
        ended = f"executor {handle.name} (pid {handle.pid}) {cause}"
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
            self._fail_stranded(loading, runs.crashed(detail))
            for model_id, _ in loading:
                self.commands.load_ended(model_id, runs.crashed(detail))
        self.commands.executor_gone()
        self._changed()
        self.lanes.pump()

    def new_code(self) -> None:
        """Executors are about to be replaced by ones with other code: what killed the old ones says nothing of it."""
        self._quarantine.forgive()

    # -- drain --------------------------------------------------------------------------------

    def drain(self) -> None:
        """Take no more runs; those that wait are handed back for another worker."""
        self._draining = True
        for run in list(self._active.values()):
            if run.state in (RunState.QUEUED, RunState.WAITING_MODEL):
                self._finish(run, runs.busy("the worker is shutting down; the run had not started"))

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether all active runs have ended within timeout_s."""
        if not self._active:
            return True
        self._idle.clear()
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def abandon(self, detail: str) -> None:
        """Answer what still runs `retryable`, for a worker that leaves; what was being canceled stays canceled."""
        for run in list(self._active.values()):
            canceling = run.state is RunState.CANCELING
            self._finish(run, run.failure_of_cancel(detail) if canceling else runs.busy(detail))

    @property
    def active(self) -> int:
        """Runs that were accepted and have no result yet."""
        return len(self._active)

    # -- inside -------------------------------------------------------------------------------

    def _start(self, run: Run, handle: ExecutorHandle) -> None:
        payload = run.payload
        if not run.start(handle, self._loop.time()):
            return
        self.backlog.run_left(len(payload))
        deadline = 0.0
        if run.timeout_ms:
            deadline = time.time() + run.timeout_ms / 1000 - (run.started - run.arrived)
        running = sum(each.load for each in self._executors())
        window = max(WINDOW_MIN_BYTES, min(WINDOW_BYTES, WINDOWS_BYTES // (running + 1)))
        try:
            handle.send_run(run, payload, deadline, window)
        except OSError as error:
            detail = f"no shared memory for a payload of {len(payload)} bytes: {error}"
            self._finish(run, Failure("resource", "out of memory", detail))
        except FrameError as error:
            self._finish(run, runs.invalid("request too large", f"the request without its payload: {error}"))

    # -- ends ---------------------------------------------------------------------------------

    def _cancel(self, run: Run, cause: CancelCause) -> None:
        if run.state in (RunState.QUEUED, RunState.WAITING_MODEL):
            run.cause = cause
            self._finish(run, run.failure_of_cancel("it had not started"))
        elif run.begin_cancel(cause) and run.handle is not None:
            run.handle.send_cancel(run.key, cause)
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

    def _fail_stranded(self, keys: set[ModelKey], failure: Failure) -> None:
        """Runs that wait for a model that can't be loaded end with the reason, unless another executor serves them."""
        for run in self.lanes.stranded(keys):
            self._finish(run, failure)

    def _strike(self, run: Run) -> str:
        """Remember what an executor died under. Returns words for the message."""
        strikes = self._quarantine.strike(run.fingerprint)
        if strikes >= STRIKES:
            log.error(
                "%s is in quarantine: it killed %d executors", run.function, strikes, extra={"run_id": run.run_id}
            )
        return f", for the {strikes}. time with this payload" if strikes > 1 else ""

    def _refuse(self, run_id: str, failure: Failure) -> None:
        """Answer a run that was not accepted."""
        log.info("run refused: %s", failure.detail, extra={"run_id": run_id})
        self.outbox.put_result(0, encode_result(run_id, b"", failure))

    def _finish(self, run: Run, failure: Failure | None, output: bytes = b"") -> None:
        waiting_bytes = len(run.payload)
        if not run.finish(failure):
            return
        if run.handle is None:
            self.backlog.run_left(waiting_bytes)
        self.outbox.put_result(run.key, encode_result(run.run_id, output, failure))
        if failure is not None:
            words = (failure.detail or failure.safe_message).partition("\n")[0]
            log.info(
                "%s ended %s: %s", run.function, failure.error_type, words,
                extra={"run_id": run.run_id, "executor": run.handle.name if run.handle else None},
            )  # fmt: skip
        del self._active[run.run_id], self._by_key[run.key]
        self.lanes.remove(run)
        if run.handle is not None:
            run.handle.release(run)
        if not self._active:
            self._idle.set()

    # -- small questions ----------------------------------------------------------------------

    def _refusal(self, request: pb.TaskExecutionRequest, info: FunctionInfo | None) -> Failure | None:
        if not request.run_id:
            return runs.invalid("run_id is empty")
        if self._draining:
            return runs.busy("the worker is shutting down")
        if info is None:
            known = ", ".join(sorted(self.functions)) or "none"
            return runs.invalid("unknown function", f"unknown function {request.function_name!r}; it serves: {known}")
        limit = self._limits.max_input_bytes
        if limit and len(request.input_payload) > limit:
            size = len(request.input_payload)
            return runs.invalid("input too large", f"input of {size} bytes is over WORKER_MAX_INPUT_BYTES={limit}")
        return self._overload()

    def _overload(self) -> Failure | None:
        if self._limits.max_concurrency and len(self._active) >= self._limits.max_concurrency:
            return runs.busy(f"{len(self._active)} runs are active, WORKER_MAX_CONCURRENCY allows no more")
        if self.backlog.refuses:
            return runs.busy("too much waits already, and none of it gets on")
        return None

    def _models(self, info: FunctionInfo, request: pb.TaskExecutionRequest) -> Models:
        if not info.injections:
            return ()
        return self._residency.resolve(info, request.required_models, request.input_payload)

    def _users_of(self, model_id: str) -> int:
        return sum(any(used == model_id for _, used in run.models) for run in self._active.values())

    def _run_of(self, handle: ExecutorHandle, key: int) -> Run | None:
        """The run that `handle` speaks of, if it still has it."""
        run = handle.runs.get(key)
        if run is None:
            log.debug("executor %s speaks of run key %d, which has ended", handle.name, key)
        return run

    def _credit(self, key: int, size: int) -> None:
        run = self._by_key.get(key)
        if run is not None and run.handle is not None:
            run.handle.send_credit(key, size)


_CAUSES: Final[dict[CancelCause | None, str]] = {"timeout": "deadline", "canceled": "cancel", None: "end"}
