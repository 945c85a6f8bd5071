"""One run from its arrival to its one result.

Owns: the states of a run and the moves between them. Only the transition methods move a run; one that has ended
stays ended, whatever else arrives for it.

    QUEUED -> WAITING_MODEL -> RUNNING -> CANCELING -> SUCCEEDED | FAILED
       any state that is not terminal ---------------> FAILED
"""

from __future__ import annotations

import asyncio
import time
from enum import Enum
from typing import TYPE_CHECKING, Final

from gen_worker.pipe.messages import CancelCause, Failure

if TYPE_CHECKING:
    from supervisor.executor_handle import ExecutorHandle
    from supervisor.input_arena import Payload
    from supervisor.wire_codec import DeltaWriter

SAFE_BUSY: Final = "worker busy"
SAFE_CRASHED: Final = "worker process crashed"


class Refused(Exception):
    """What the scheduler asks for is not done; `failure` is the answer."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


class RunState(Enum):
    QUEUED = "queued"
    WAITING_MODEL = "waiting_model"
    RUNNING = "running"
    CANCELING = "canceling"
    SUCCEEDED = "succeeded"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        return self in _TERMINAL


_TERMINAL = frozenset((RunState.SUCCEEDED, RunState.FAILED))


class Run:
    """A run that was accepted. `key` names it on the pipe, `run_id` towards the scheduler."""

    __slots__ = (
        "alone", "arrived", "cause", "deltas", "file_base_url", "file_token", "fingerprint", "function", "handle",
        "key", "model_wait_from", "models", "payload", "progress", "run_id", "started", "state", "stream_ended",
        "tenant_id", "timeout_ms", "timer", "user_id",
    )  # fmt: skip

    def __init__(  # noqa: PLR0913, PLR0917  (the request's fields, filled in at one place)
        self,
        key: int,
        run_id: str,
        function: str,
        payload: Payload,
        models: tuple[tuple[str, str], ...],
        timeout_ms: int,
        tenant_id: str,
        user_id: str,
        arrived: float,
    ) -> None:
        self.key = key
        self.run_id = run_id
        self.function = function
        self.payload = payload
        self.models = models
        self.timeout_ms = timeout_ms
        self.tenant_id = tenant_id
        self.user_id = user_id
        self.arrived = arrived
        """Monotonic seconds, on the event loop's clock."""
        self.model_wait_from = 0.0
        """When it was found that a model is missing, on the same clock; 0: none was."""
        self.started = 0.0
        self.file_base_url = ""
        self.file_token = ""
        """The run's own, for its files; both empty when the request gave none."""
        self.state = RunState.QUEUED
        self.handle: ExecutorHandle | None = None
        self.cause: CancelCause | None = None
        self.fingerprint = b""
        """Names function and payload (quarantine.py)."""
        self.alone = False
        """Whether no other run may be on its executor with it."""
        self.deltas: DeltaWriter | None = None
        """Writes its deltas, once several have come together."""
        self.stream_ended = False
        """Whether an incremental run has said how its output ended."""
        self.progress = b""
        """The last job.progress, as JSON; whoever shows it decodes it."""
        self.timer: asyncio.TimerHandle | None = None
        """The deadline's while the run has one; after a cancel, the grace period's."""

    def wait_for_model(self) -> None:
        """QUEUED -> WAITING_MODEL."""
        if self.state is RunState.QUEUED:
            self.state = RunState.WAITING_MODEL
            self.model_wait_from = time.monotonic()  # which the loop's clock is

    def start(self, handle: ExecutorHandle, now: float) -> bool:
        """QUEUED or WAITING_MODEL -> RUNNING on `handle`."""
        if self.state not in (RunState.QUEUED, RunState.WAITING_MODEL):
            return False
        self.state = RunState.RUNNING
        self.handle = handle
        self.started = now
        self.payload = b""  # the executor has it now
        return True

    def begin_cancel(self, cause: CancelCause) -> bool:
        """RUNNING -> CANCELING. The first cause stays."""
        if self.state is not RunState.RUNNING:
            return False
        self.state = RunState.CANCELING
        self.cause = cause
        return True

    def finish(self, failure: Failure | None) -> bool:
        """Any state -> a terminal one, once; False when the run had ended before."""
        if self.state.is_terminal:
            return False
        self.state = RunState.SUCCEEDED if failure is None else RunState.FAILED
        self.payload = b""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
        return True

    def failure_of_cancel(self, detail: str = "") -> Failure:
        """What a canceled or overdue run is answered with, whatever its function made of it."""
        if self.cause == "timeout":
            return timed_out(self.timeout_ms, detail)
        return canceled(detail)


def canceled(detail: str = "") -> Failure:
    return Failure("canceled", "canceled", detail or "canceled by the scheduler")


def timed_out(timeout_ms: int, detail: str = "") -> Failure:
    message = f"the run did not end within its timeout_ms of {timeout_ms}"
    return Failure("timeout", "deadline exceeded", f"{message}; {detail}" if detail else message)


def busy(detail: str) -> Failure:
    return Failure("retryable", SAFE_BUSY, detail, retryable=True)


def crashed(detail: str) -> Failure:
    return Failure("retryable", SAFE_CRASHED, detail, retryable=True)


def invalid(safe_message: str, detail: str = "") -> Failure:
    return Failure("validation", safe_message, detail or safe_message)


def no_memory(size: int, error: OSError) -> Failure:
    return Failure("resource", "out of memory", f"no shared memory for a payload of {size} bytes: {error}")
