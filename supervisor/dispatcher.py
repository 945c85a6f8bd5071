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
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from gen_worker.pipe.frames import FrameError
from gen_worker.pipe.messages import CancelCause, Event, Failure, FunctionInfo, ModelLoaded, ModelUnloaded, Result
from supervisor import runs
from supervisor.child import ExitCause
from supervisor.executor_handle import ExecutorHandle
from supervisor.outbox import Outbox
from supervisor.residency import ModelKey, ModelRefused, Models, Residence, Residency
from supervisor.runs import Run, RunState
from supervisor.wire_codec import encode_event, encode_load_result, encode_result, encode_unload_result

if TYPE_CHECKING:
    from gen_worker.wire import worker_scheduler_pb2 as pb

log = logging.getLogger(__name__)

WINDOW_BYTES: Final = 256 * 1024
"""Event bytes of one run under way between its executor and the stream, while few runs stream."""
WINDOWS_BYTES: Final = 16 * 1024 * 1024
"""All windows of one executor together, roughly: many runs get smaller ones."""
WINDOW_MIN_BYTES: Final = 16 * 1024
EVENT_OVERHEAD_BYTES: Final = 64
"""What an event weighs beyond its payload; the executor counts the same."""
LAST_LINES_CHARS: Final = 4000


@dataclass(frozen=True, slots=True)
class Limits:
    """The settings that bound runs; 0 means no limit in each."""

    max_concurrency: int
    model_concurrency: int
    cancel_grace_s: float
    max_input_bytes: int


class _Lane:
    """The waiting runs of one function with the same models, in order."""

    __slots__ = ("info", "keys", "limit", "waiting")

    def __init__(self, info: FunctionInfo, keys: list[ModelKey], limit: int) -> None:
        self.info = info
        self.keys = keys
        self.limit = limit
        self.waiting: OrderedDict[int, Run] = OrderedDict()
        """By key; a run that ends while it waits leaves at once, so that none is counted or looked at in vain."""


class Dispatcher:
    """See the module. `executors` gives the live handles; `changed` is called when the registration may differ."""

    def __init__(
        self,
        *,
        limits: Limits,
        residency: Residency,
        executors: Callable[[], Sequence[ExecutorHandle]],
        changed: Callable[[], None],
    ) -> None:
        self._limits = limits
        self._residency = residency
        self._executors = executors
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self.outbox = Outbox(self._credit, self._loop.time)
        self.functions: dict[str, FunctionInfo] = {}
        """What this worker serves, as the executors said when they got ready."""
        self._active: dict[str, Run] = {}
        self._by_key: dict[int, Run] = {}
        self._lanes: dict[tuple[str, Models], _Lane] = {}
        self._keys = itertools.count(1)
        self._loads: dict[str, list[str]] = {}
        """Model id -> the names by which load_model_cmds asked for it; likewise for unloads."""
        self._unloads: dict[str, list[str]] = {}
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
            failure = failure or runs.invalid("unknown function")
            log.info("run refused: %s", failure.detail, extra={"run_id": run_id})
            self.outbox.put_result(0, encode_result(run_id, b"", failure))
            return
        run = Run(
            next(self._keys), run_id, info.name, request.input_payload, models,
            max(0, request.timeout_ms), request.tenant_id, request.user_id, self._loop.time(),
        )  # fmt: skip
        self._active[run_id] = run
        self._by_key[run.key] = run
        if run.timeout_ms:
            run.timer = self._loop.call_later(run.timeout_ms / 1000, self._cancel, run, "timeout")
        lane = self._lane(info, models)
        lane.waiting[run.key] = run
        self._pump_lane(lane)

    def cancel(self, run_id: str) -> None:
        """The scheduler's interrupt; a run that is not here (any more) needs none."""
        run = self._active.get(run_id)
        if run is None:
            log.info("cancel of a run that is not active: ignored", extra={"run_id": run_id})
            return
        self._cancel(run, "canceled")

    def load_model(self, name: str) -> None:
        """load_model_cmd: answered when the least loaded executor has it."""
        handles = self._executors()
        try:
            model_id = self._residency.model_id(name)
        except ModelRefused as refused:
            self.outbox.put_control(encode_load_result(name, refused.failure.detail))
            return
        types = self._residency.types_of(model_id, self.functions)
        if not handles or not types:
            reason = "no function of this worker takes a model" if handles else "no executor is ready"
            self.outbox.put_control(encode_load_result(name, reason))
            return
        keys = [(model_id, type_name) for type_name in sorted(types)]
        states = {self._residency.state(handle, keys) for handle in handles}
        if Residence.HOT in states:
            self.outbox.put_control(encode_load_result(name, ""))
            return
        self._loads.setdefault(model_id, []).append(name)
        if Residence.LOADING not in states:
            self._residency.load(min(handles, key=_load), keys)

    def unload_model(self, name: str) -> None:
        """unload_model_cmd: answered when no executor holds it any more; refused while a run uses it."""
        try:
            model_id = self._residency.model_id(name)
        except ModelRefused as refused:
            self.outbox.put_control(encode_unload_result(name, refused.failure.detail))
            return
        users = [run for run in self._active.values() if any(model == model_id for _, model in run.models)]
        if users:
            self.outbox.put_control(encode_unload_result(name, f"in use by {len(users)} runs"))
            return
        if self._residency.is_loading(model_id):
            self.outbox.put_control(encode_unload_result(name, "it is being loaded"))
            return
        holders = self._residency.holders(model_id)
        if not holders:
            self.outbox.put_control(encode_unload_result(name, ""))
            return
        self._unloads.setdefault(model_id, []).append(name)
        for handle in holders:
            self._residency.unload(handle, model_id)

    # -- from the executors (HandleEvents) ----------------------------------------------------

    def executor_ready(self, handle: ExecutorHandle) -> None:
        self.functions.update(handle.functions)
        log.info("executor %s is ready: %s", handle.name, ", ".join(sorted(handle.functions)))
        self._changed()
        self.pump()

    def executor_writable(self, handle: ExecutorHandle) -> None:
        log.debug("executor %s reads again", handle.name)
        self.pump()

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
        else:
            self._finish(run, result.failure, output)
        self.pump()

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
            self._fail_waiting({key}, loaded.failure)
        still_loading = any(model_id == loaded.model_id for model_id, _ in self._residency.loading(handle))
        if loaded.failure is not None or not still_loading:
            self._answer_load(loaded.model_id, loaded.failure)
        self._changed()
        self.pump()

    def model_unloaded(self, handle: ExecutorHandle, unloaded: ModelUnloaded) -> None:
        if unloaded.failure is None:
            self._residency.unloaded(handle, unloaded.model_id)
        else:
            self._residency.unload_failed(handle, unloaded.model_id)
        self._answer_unload(unloaded.model_id, unloaded.failure)
        for name in self._loads.pop(unloaded.model_id, ()):
            self.load_model(name)  # it had to wait for this
        self._changed()
        self.pump()

    def executor_died(self, handle: ExecutorHandle, cause: ExitCause) -> None:
        loading = self._residency.loading(handle)
        self._residency.forget(handle)
        lines = "\n".join(handle.last_lines())[-LAST_LINES_CHARS:]
        ended = f"executor {handle.name} (pid {handle.pid}) {cause}"
        for run in list(handle.runs.values()):
            detail = f"{ended} while it ran {run.function}; last lines:\n{lines}"
            failure = run.failure_of_cancel(ended) if run.state is RunState.CANCELING else runs.crashed(detail)
            self._finish(run, failure)
        if loading:
            detail = f"{ended} while it loaded {', '.join(sorted(key[0] for key in loading))}; last lines:\n{lines}"
            self._fail_waiting(loading, runs.crashed(detail))
            for model_id, _ in loading:
                self._answer_load(model_id, runs.crashed(detail))
        for model_id in list(self._unloads):
            self._answer_unload(model_id, None)
        self._changed()
        self.pump()

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

    # -- giving runs to executors -------------------------------------------------------------

    def pump(self) -> None:
        """Give waiting runs to executors until none can take one."""
        lanes = [lane for lane in self._lanes.values() if lane.waiting]
        lanes.sort(key=lambda lane: next(iter(lane.waiting)))
        for lane in lanes:
            self._pump_lane(lane)

    def _pump_lane(self, lane: _Lane) -> None:
        while lane.waiting:
            handle = self._choose(lane)
            if handle is None:
                return
            _key, run = lane.waiting.popitem(last=False)
            self._start(run, handle)

    def _choose(self, lane: _Lane) -> ExecutorHandle | None:
        """The executor for the lane's next run; None: it waits (and what it waits for is under way)."""
        able = [handle for handle in self._executors() if handle.can_take(lane.info.name, lane.limit)]
        if not lane.keys:
            return min(able, key=_load, default=None)
        hot = [handle for handle in able if self._residency.state(handle, lane.keys) is Residence.HOT]
        if hot:
            return min(hot, key=_load)
        self._load_for(lane, able)
        return None

    def _load_for(self, lane: _Lane, able: Sequence[ExecutorHandle]) -> None:
        """Start a load when the executors that have or load the models can't serve all who wait."""
        states = {handle: self._residency.state(handle, lane.keys) for handle in self._executors()}
        serving = sum(state is not None for state in states.values())
        cold = [
            handle
            for handle in able
            if states.get(handle) is None and not (serving and self._residency.has_failed(handle, lane.keys))
        ]
        for run in reversed(lane.waiting.values()):
            if run.state is not RunState.QUEUED:
                break  # nor are those before it: this was here for them
            run.wait_for_model()
        if not cold or (serving and len(lane.waiting) <= serving * (lane.limit or len(lane.waiting))):
            return
        idle = [handle for handle in cold if not serving or not handle.load]
        if idle:
            self._residency.load(min(idle, key=_load), lane.keys)

    def _start(self, run: Run, handle: ExecutorHandle) -> None:
        payload = run.payload
        if not run.start(handle, self._loop.time()):
            return
        deadline = 0.0
        if run.timeout_ms:
            deadline = time.time() + run.timeout_ms / 1000 - (run.started - run.arrived)
        window = max(WINDOW_MIN_BYTES, min(WINDOW_BYTES, WINDOWS_BYTES // (handle.load + 1)))
        try:
            handle.send_run(run, payload, deadline, window)
        except OSError as error:
            detail = f"no shared memory for a payload of {len(payload)} bytes: {error}"
            self._finish(run, Failure("resource", "out of memory", detail))
        except FrameError as error:
            self._finish(run, runs.invalid("request too large", f"the request without its payload: {error}"))

    def _lane(self, info: FunctionInfo, models: Models) -> _Lane:
        lane = self._lanes.get((info.name, models))
        if lane is None:
            lane = _Lane(info, self._residency.keys(info, models), self.limit_of(info))
            self._lanes[info.name, models] = lane
        return lane

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

    def _fail_waiting(self, keys: set[ModelKey], failure: Failure) -> None:
        """Runs that wait for a model that can't be loaded end with the reason, unless another executor serves them."""
        for lane in self._lanes.values():
            if keys.isdisjoint(lane.keys):
                continue
            if any(self._residency.state(handle, lane.keys) for handle in self._executors()):
                continue
            for run in list(lane.waiting.values()):
                self._finish(run, failure)

    def _finish(self, run: Run, failure: Failure | None, output: bytes = b"") -> None:
        if not run.finish(failure):
            return
        self.outbox.put_result(run.key, encode_result(run.run_id, output, failure))
        if failure is not None:
            log.info(
                "%s ended %s: %s", run.function, failure.error_type, failure.detail or failure.safe_message,
                extra={"run_id": run.run_id, "executor": run.handle.name if run.handle else None},
            )  # fmt: skip
        del self._active[run.run_id], self._by_key[run.key]
        if run.handle is not None:
            run.handle.release(run)
        else:
            self._lanes[run.function, run.models].waiting.pop(run.key, None)
        if not self._active:
            self._idle.set()

    def limit_of(self, info: FunctionInfo) -> int:
        """How often the function may run at once on one executor; 0: as often as it comes."""
        return info.max_concurrency or (self._limits.model_concurrency if info.injections else 0)

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
        if self._limits.max_concurrency and len(self._active) >= self._limits.max_concurrency:
            return runs.busy(f"{len(self._active)} runs are active, WORKER_MAX_CONCURRENCY allows no more")
        return None

    def _models(self, info: FunctionInfo, request: pb.TaskExecutionRequest) -> Models:
        if not info.injections:
            return ()
        return self._residency.resolve(info, request.required_models, request.input_payload)

    def _answer_load(self, model_id: str, failure: Failure | None) -> None:
        for name in self._loads.pop(model_id, ()):
            self.outbox.put_control(encode_load_result(name, _reason(failure)))

    def _answer_unload(self, model_id: str, failure: Failure | None) -> None:
        if failure is None and self._residency.holders(model_id):
            return  # another executor still has it
        for name in self._unloads.pop(model_id, ()):
            self.outbox.put_control(encode_unload_result(name, _reason(failure)))

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


def _reason(failure: Failure | None) -> str:
    """For a command's answer, where "" says that it succeeded."""
    return "" if failure is None else failure.detail or failure.safe_message or failure.error_type


def _load(handle: ExecutorHandle) -> tuple[int, int]:
    return handle.load, handle.slot
