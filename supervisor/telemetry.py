"""What becomes of the parts' reports: counts, the last faults, and rates over the last minute.

Owns: the last faults and the samples that rates are made of; the metrics themselves are metrics.py's.

1. A report moves a counter, whose labels were looked up the first time that a function was met.
2. What an operator should look at is kept as a fault, FAULTS of them. A run's fault has its safe message only: what a
   function said to operators may quote a payload, and is in the log.
3. `tick`, once a second or so, takes a sample of the totals; the difference to the oldest one gives the rates.
"""

from __future__ import annotations

import signal
import time
from collections import Counter as Tally
from collections import deque
from collections.abc import Callable
from typing import Final, NamedTuple

from gen_worker.pipe.messages import Failure
from gen_worker.wire import NOT_LEADER_PREFIX
from supervisor.child import ExitCause
from supervisor.executor_handle import ExecutorHandle
from supervisor.metrics import UNKNOWN, Metrics
from supervisor.observer import EvictionReason, Observer
from supervisor.runs import SAFE_BUSY, SAFE_CRASHED, Run
from supervisor.status import FaultStatus, RateStatus
from supervisor.stream_end import StreamEnd, shown
from supervisor.transport import StatusCode

FAULTS: Final = 20
FAULT_CHARS: Final = 300
WINDOW_S: Final = 60.0
SUCCESS: Final = "success"
_QUIET: Final = frozenset({SUCCESS, "busy", "canceled", "validation"})
"""Outcomes that tell nothing about this worker's health: the caller's doing, or load."""
_CALM_ENDS: Final = (StatusCode.OK, StatusCode.CANCELLED)


class _Sample(NamedTuple):
    at: float
    runs: int
    failures: int
    deltas: int


class _FunctionCounters:
    """The children of one function's labels: looking them up anew would be most of what a report costs."""

    __slots__ = ("delta_bytes", "deltas", "outcomes", "seconds")

    def __init__(self, metrics: Metrics, function: str) -> None:
        label = metrics.function_label(function)
        self.seconds = metrics.run_seconds.labels(label).observe
        self.deltas = metrics.deltas.labels(label).inc
        self.delta_bytes = metrics.delta_bytes.labels(label).inc
        self.outcomes: dict[str, Callable[[], None]] = {}


class Telemetry(Observer):
    """See the module. `redact` takes secrets out of text; the clocks are of epoch and of monotonic seconds."""

    def __init__(
        self,
        redact: Callable[[str], str] = lambda text: text,
        now: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = Metrics()
        self._redact = redact
        self._now = now
        self._monotonic = monotonic
        self._functions: dict[str, _FunctionCounters] = {}
        self.outcomes: Tally[str] = Tally()
        """How many runs ended in which way, refused requests included."""
        self._failures = 0
        self._deltas = 0
        self._faults: deque[FaultStatus] = deque(maxlen=FAULTS)
        self._samples: deque[_Sample] = deque([self._sample()])

    # -- what is asked for --------------------------------------------------------------------

    @property
    def faults(self) -> list[FaultStatus]:
        """The newest first."""
        return list(reversed(self._faults))

    def tick(self) -> None:
        """Take a sample of the totals."""
        sample = self._sample()
        self._samples.append(sample)
        while len(self._samples) > 2 and sample.at - self._samples[1].at >= WINDOW_S:  # noqa: PLR2004  (one to compare)
            self._samples.popleft()

    def rates(self) -> RateStatus:
        first, last = self._samples[0], self._sample()
        window = max(last.at - first.at, 1e-3)
        return RateStatus(
            window_s=window,
            runs_per_s=(last.runs - first.runs) / window,
            failures_per_s=(last.failures - first.failures) / window,
            deltas_per_s=(last.deltas - first.deltas) / window,
        )

    # -- reports ------------------------------------------------------------------------------

    def run_refused(self, function: str, failure: Failure) -> None:
        self._count(function or UNKNOWN, _outcome(failure))

    def run_started(self, run: Run) -> None:
        self.metrics.queue_seconds.observe(run.started - run.arrived)
        if run.model_wait_from:
            self.metrics.model_wait_seconds.observe(max(0.0, run.started - run.model_wait_from))

    def run_ended(self, run: Run, failure: Failure | None, now: float) -> None:
        outcome = SUCCESS if failure is None else _outcome(failure)
        self._of(run.function).seconds(now - run.arrived)
        self._count(run.function, outcome)
        if failure is not None and outcome not in _QUIET:
            self._fault("run", f"{run.function} {run.run_id}", f"{outcome}: {failure.safe_message}")

    def deltas(self, run: Run, count: int, size: int) -> None:
        counters = self._of(run.function)
        counters.deltas(count)
        counters.delta_bytes(size)
        self._deltas += count

    def executor_started(self, handle: ExecutorHandle) -> None:
        if handle.incarnation:
            self.metrics.executor_restarts.inc()

    def executor_died(self, handle: ExecutorHandle, cause: ExitCause) -> None:
        self.metrics.executor_deaths.labels(_cause(handle, cause)).inc()
        words = f"{handle.fatal.message} ({cause})" if handle.fatal else str(cause)
        self._fault("executor", handle.name, words)

    def load_ended(self, model_id: str, seconds: float, failure: Failure | None) -> None:
        self.metrics.loads.labels(_simple_outcome(failure)).inc()
        if failure is None:
            self.metrics.load_seconds.observe(seconds)
        else:
            self._fault("model", model_id, failure.safe_message)

    def model_evicted(self, model_id: str, reason: EvictionReason) -> None:  # noqa: ARG002  (models are no labels)
        self.metrics.evictions.labels(reason).inc()

    def download_ended(self, model_id: str, size: int, seconds: float, failure: Failure | None) -> None:  # noqa: ARG002
        self.metrics.downloads.labels(_simple_outcome(failure)).inc()
        self.metrics.download_bytes.inc(size)
        if failure is not None:
            self._fault("download", model_id, failure.safe_message)

    def stream_ended(self, end: StreamEnd) -> None:
        self.metrics.stream_ends.labels(end.status.code.name).inc()
        is_redirect = end.status.details.startswith(NOT_LEADER_PREFIX)
        if end.status.code not in _CALM_ENDS and not is_redirect:
            self._fault("stream", end.target, shown(end.status))

    # -- inside -------------------------------------------------------------------------------

    def _sample(self) -> _Sample:
        return _Sample(self._monotonic(), self.outcomes.total(), self._failures, self._deltas)

    def _of(self, function: str) -> _FunctionCounters:
        counters = self._functions.get(function)
        if counters is None:
            counters = self._functions[function] = _FunctionCounters(self.metrics, function)
        return counters

    def _count(self, function: str, outcome: str) -> None:
        outcomes = self._of(function).outcomes
        count = outcomes.get(outcome)
        if count is None:
            label = self.metrics.function_label(function)
            count = outcomes[outcome] = self.metrics.runs.labels(label, outcome).inc
        count()
        self.outcomes[outcome] += 1
        self._failures += outcome not in _QUIET

    def _fault(self, kind: str, subject: str, message: str) -> None:
        words = " ".join(self._redact(message).split())[:FAULT_CHARS]
        self._faults.append(
            FaultStatus(at=self._now(), kind=kind, subject=self._redact(subject)[:FAULT_CHARS], message=words)
        )


def _outcome(failure: Failure) -> str:
    """The error type, but for two that say `retryable` of very different things."""
    if failure.safe_message in (SAFE_BUSY, SAFE_CRASHED) and failure.retryable:
        return "busy" if failure.safe_message == SAFE_BUSY else "crashed"
    return failure.error_type


def _simple_outcome(failure: Failure | None) -> str:
    return SUCCESS if failure is None else "failure"


def _cause(handle: ExecutorHandle, cause: ExitCause) -> str:
    if handle.was_killed:
        return "stopped"
    if handle.poisoned:
        return "device"
    if not handle.functions:
        return "boot"
    if cause.out_of_memory:
        return "oom"
    return "exit" if cause.returncode >= 0 else _signal_name(-cause.returncode)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "signal"  # a real-time signal has no name
