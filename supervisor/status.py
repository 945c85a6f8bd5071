"""What `/status` shows and `gen-worker top` draws: one JSON object, as typed structs.

Owns: the shape. VERSION rises when a field changes its meaning or goes away; fields may be added without that, and a
reader ignores those that it does not know. Bytes are bytes, times are seconds, moments are seconds since the epoch.

There is nothing of a payload, a tenant, a user or a credential in it. What comes from tenant code (the name of a
stage, why modules could not be imported) is cut short and has the log's redaction behind it.
"""

from __future__ import annotations

from typing import Final

import msgspec

VERSION: Final = 1


class WorkerStatus(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    deployment_id: str
    version: str
    """Of gen-worker."""
    pid: int
    started_at: float
    uptime_s: float
    resident_bytes: int
    """Of the supervisor alone."""
    ready: bool
    unready_because: list[str]
    """What /readyz says; empty when ready."""
    draining: bool
    loop_lag_s: float
    """The longest that the event loop was held up within the last seconds."""


class SchedulerStatus(msgspec.Struct, frozen=True, kw_only=True):
    address: str
    """Of the present stream, else what is dialed next."""
    registered: bool
    """A stream is open and the registration went out on it."""
    streams_opened: int
    failed_dials: int
    """In a row, since a stream last stayed up."""


class ExecutorStatus(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    slot: int
    state: str
    """`starting`, `ready`, `draining`, `replaced` (a new one starts soon) or `given_up`."""
    pid: int
    """0: there is no process now."""
    gpu: str
    """UUID; empty on the CPU."""
    runs: int
    starts: int
    """Processes that this slot had so far."""


class SpareStatus(msgspec.Struct, frozen=True, kw_only=True):
    """The executor that waits for a slot (WORKER_WARM_SPARE)."""

    pid: int
    state: str
    """`starting` or `parked`."""
    resident_bytes: int


class GpuStatus(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    """Of the executor's slot."""
    uuid: str
    name: str
    total_bytes: int
    used_bytes: int | None
    """As the driver measures it, for all processes; None when it can't be asked."""
    free_bytes: int | None
    models_bytes: int
    """What the ledger says that loaded models take."""
    reserved_bytes: int
    """What the ledger keeps for loads under way."""
    utilization: float | None
    """0 to 1; None where the driver does not tell, as for MIG and simulated devices."""


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    state: str
    """`hot`, `loading`, `unloading`, `disk` (whole on disk, in no executor) or `downloading` (not whole on disk)."""
    executors: list[str]
    device_bytes: int
    """Over all executors that have it."""
    done_bytes: int = 0
    """Of a download."""
    total_bytes: int = 0
    """Of a download; 0 while that is not known."""


class RunStatus(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    function: str
    state: str
    """`queued`, `waiting_model`, `running` or `canceling`."""
    executor: str
    """Empty while it waits."""
    waited_s: float
    running_s: float
    progress: float | None
    """0 to 1, as the function said last."""
    stage: str


class QueueStatus(msgspec.Struct, frozen=True, kw_only=True):
    runs: dict[str, int]
    """State -> how many runs."""
    outbox_messages: int
    run_bytes: int
    """What runs that wait for an executor take."""
    answer_bytes: int
    """What answers that wait for the stream take."""
    reading: bool
    """False: so much waits that nothing more is read from the scheduler."""


class RateStatus(msgspec.Struct, frozen=True, kw_only=True):
    window_s: float
    """What the rates are an average over; shorter right after the start."""
    runs_per_s: float
    failures_per_s: float
    deltas_per_s: float


class FaultStatus(msgspec.Struct, frozen=True, kw_only=True):
    at: float
    kind: str
    """`run`, `executor`, `model`, `download` or `stream`."""
    subject: str
    message: str


class Status(msgspec.Struct, frozen=True, kw_only=True):
    version: int = VERSION
    at: float
    worker: WorkerStatus
    scheduler: SchedulerStatus
    executors: list[ExecutorStatus]
    spare: SpareStatus | None = None
    """None: there is none now, or none is kept."""
    gpus: list[GpuStatus]
    models: list[ModelStatus]
    runs: list[RunStatus]
    """The oldest 100."""
    queue: QueueStatus
    rates: RateStatus
    outcomes: dict[str, int]
    """How many runs ended in which way since the start."""
    faults: list[FaultStatus]
    """The last 20, newest first."""
