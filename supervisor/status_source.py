"""A Status from the parts that own what is in it.

Owns: nothing; each call reads the owners anew, on the event loop. It is also what decides whether the worker is ready.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final, Protocol

import msgspec
import psutil

from gen_worker._version import __version__
from supervisor.devices import Device, DeviceError, DeviceMemory, DeviceProbe
from supervisor.dispatcher import Dispatcher
from supervisor.executor_handle import ExecutorHandle
from supervisor.model_source import FetchProgress
from supervisor.pool import SlotView
from supervisor.residency import HeldModel
from supervisor.runs import Run
from supervisor.settings import Settings
from supervisor.spare import SpareView
from supervisor.status import (
    ExecutorStatus,
    FaultStatus,
    GpuStatus,
    ModelStatus,
    QueueStatus,
    RateStatus,
    RunStatus,
    SchedulerStatus,
    SpareStatus,
    Status,
    WorkerStatus,
)

log = logging.getLogger(__name__)

MAX_RUNS: Final = 100
STAGE_CHARS: Final = 80


class Connection(Protocol):
    """The session."""

    @property
    def registered(self) -> bool: ...
    @property
    def target(self) -> str: ...
    @property
    def epoch(self) -> int: ...
    @property
    def failed_dials(self) -> int: ...


class Slots(Protocol):
    """The pool."""

    @property
    def slots(self) -> Sequence[SlotView]: ...
    @property
    def ready(self) -> Sequence[object]: ...
    @property
    def spare(self) -> SpareView | None: ...


class Ledger(Protocol):
    """Which models are where: residency."""

    def held(self) -> Iterable[HeldModel]: ...
    def disk_models(self) -> Sequence[str]: ...
    def fetching(self) -> Mapping[str, FetchProgress]: ...
    def model_bytes(self, handle: ExecutorHandle, model_id: str) -> int: ...
    def bytes_on(self, device: Device) -> int: ...
    def reserved_on(self, device: Device) -> int: ...


class Record(Protocol):
    """What happened so far: telemetry."""

    outcomes: Counter[str]

    @property
    def faults(self) -> list[FaultStatus]: ...
    def rates(self) -> RateStatus: ...


class _Progress(msgspec.Struct):
    """The part of job.progress that is shown."""

    progress: float | None = None
    stage: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusSource:
    """See the module. `loop_lag` gives the worst of the last seconds; `now` is the event loop's clock."""

    settings: Settings
    pool: Slots
    dispatcher: Dispatcher
    session: Connection
    ledger: Ledger
    probe: DeviceProbe
    record: Record
    loop_lag: Callable[[], float]
    redact: Callable[[str], str]
    now: Callable[[], float]
    started: float
    """On that clock."""

    def unready(self) -> list[str]:
        """Why no run should be sent here; empty when the worker is ready. That many runs wait is no reason."""
        reasons = []
        if self.dispatcher.draining:
            reasons.append("draining: the worker was told to stop")
        if not self.session.registered:
            reasons.append(f"not registered at a scheduler; {self.session.target} is dialed")
        if not self.pool.ready:
            reasons.append("no executor is ready")
        return reasons

    def status(self) -> Status:
        return Status(
            at=time.time(),
            worker=self._worker(),
            scheduler=SchedulerStatus(
                address=self.session.target,
                registered=self.session.registered,
                streams_opened=self.session.epoch,
                failed_dials=self.session.failed_dials,
            ),
            executors=[_executor(slot) for slot in self.pool.slots],
            spare=_spare(self.pool.spare),
            gpus=[self._gpu(slot) for slot in self.pool.slots if slot.device.is_gpu],
            models=self._models(),
            runs=[self._run(run) for run in islice(self.dispatcher.active_runs, MAX_RUNS)],
            queue=self._queue(),
            rates=self.record.rates(),
            outcomes=dict(self.record.outcomes),
            faults=self.record.faults,
        )

    def _worker(self) -> WorkerStatus:
        unready = self.unready()
        uptime_s = self.now() - self.started
        return WorkerStatus(
            id=self.settings.worker_id,
            deployment_id=self.settings.deployment_id,
            version=__version__,
            pid=os.getpid(),
            started_at=time.time() - uptime_s,
            uptime_s=uptime_s,
            resident_bytes=int(psutil.Process().memory_info().rss),
            ready=not unready,
            unready_because=unready,
            draining=self.dispatcher.draining,
            loop_lag_s=self.loop_lag(),
        )

    def _gpu(self, slot: SlotView) -> GpuStatus:
        device = slot.device
        memory = self._memory(device)
        return GpuStatus(
            index=slot.number,
            uuid=device.uuid,
            name=device.name,
            total_bytes=device.memory_bytes,
            used_bytes=None if memory is None else memory.used_bytes,
            free_bytes=None if memory is None else memory.free_bytes,
            models_bytes=self.ledger.bytes_on(device),
            reserved_bytes=self.ledger.reserved_on(device),
            utilization=self.probe.utilization(device),
        )

    def _memory(self, device: Device) -> DeviceMemory | None:
        try:
            return self.probe.memory(device)
        except DeviceError as error:
            log.debug("%s", error)  # the registration, which needs it more, says so aloud
            return None

    def _models(self) -> list[ModelStatus]:
        """By id; of several states the one nearest to serving counts."""
        nearest = ("hot", "loading", "unloading")
        held: dict[str, list[HeldModel]] = defaultdict(list)
        for model in self.ledger.held():
            held[model.model_id].append(model)
        models = [
            ModelStatus(
                id=model_id,
                state=min((model.state.value for model in found), key=nearest.index),
                executors=sorted(handle.name for handle in {model.handle for model in found}),
                device_bytes=sum(
                    self.ledger.model_bytes(handle, model_id) for handle in {each.handle for each in found}
                ),
            )
            for model_id, found in held.items()
        ]
        models += [
            ModelStatus(id=model_id, state="disk", executors=[], device_bytes=0)
            for model_id in self.ledger.disk_models()
            if model_id not in held
        ]
        here = {model.id for model in models}
        models += [
            ModelStatus(
                id=model_id,
                state="downloading",
                executors=[],
                device_bytes=0,
                done_bytes=progress.done_bytes,
                total_bytes=progress.total_bytes,
            )
            for model_id, progress in self.ledger.fetching().items()
            if model_id not in here
        ]
        return sorted(models, key=lambda model: model.id)

    def _run(self, run: Run) -> RunStatus:
        now = self.now()
        progress, stage = _decoded(run.progress)
        return RunStatus(
            id=run.run_id,
            function=run.function,
            state=run.state.value,
            executor=run.handle.name if run.handle else "",
            waited_s=(run.started or now) - run.arrived,
            running_s=now - run.started if run.started else 0.0,
            progress=progress,
            stage=self.redact(stage)[:STAGE_CHARS],
        )

    def _queue(self) -> QueueStatus:
        backlog = self.dispatcher.backlog
        return QueueStatus(
            runs=dict(Counter(run.state.value for run in self.dispatcher.active_runs)),
            outbox_messages=self.dispatcher.outbox.depth,
            run_bytes=backlog.runs_bytes,
            answer_bytes=backlog.answers_bytes,
            reading=not backlog.full,
        )


def _executor(slot: SlotView) -> ExecutorStatus:
    handle = slot.handle
    return ExecutorStatus(
        name=handle.name if handle else str(slot.number),
        slot=slot.number,
        state=handle.state.value if handle else "given_up" if slot.closed else "replaced",
        pid=handle.pid if handle else 0,
        gpu=slot.device.uuid,
        runs=handle.load if handle else 0,
        starts=slot.starts,
    )


def _spare(view: SpareView | None) -> SpareStatus | None:
    if view is None:
        return None
    try:
        resident = int(psutil.Process(view.pid).memory_info().rss)
    except psutil.NoSuchProcess:
        return None  # its death is about to be noticed
    return SpareStatus(pid=view.pid, state="parked" if view.parked else "starting", resident_bytes=resident)


def _decoded(progress: bytes) -> tuple[float | None, str]:
    """What a function said of its progress; it may have said anything."""
    if not progress:
        return None, ""
    try:
        found = msgspec.json.decode(progress, type=_Progress)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None, ""
    share = found.progress
    return None if share is None else min(max(share, 0.0), 1.0), found.stage or ""
