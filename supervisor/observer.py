"""What the supervisor's parts report for those who watch it: counters, the view of `top`, traces.

Owns: the vocabulary. A part is handed an Observer and calls it where something happened; what becomes of it
(telemetry.py) is none of its affair. The base class takes note of nothing, for parts that nobody watches.

Each method is called on the event loop and must cost next to nothing: some are called for every run, and each time that
deltas come.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from gen_worker.pipe.messages import Failure
    from supervisor.child import ExitCause
    from supervisor.executor_handle import ExecutorHandle
    from supervisor.runs import Run
    from supervisor.stream_end import StreamEnd

log = logging.getLogger(__name__)

EvictionReason = Literal["room", "command", "recycled"]
"""Why a model left a device: to make room, because the scheduler said so, or because its executor was recycled."""


class Observer:
    """See the module. `now` is monotonic seconds, on the event loop's clock."""

    # -- runs

    def run_refused(self, function: str, failure: Failure) -> None:
        """A request was answered without becoming a run; `function` is empty when no executor serves it."""

    def run_started(self, run: Run) -> None:
        """An executor has it: `run.arrived`, `run.model_wait_from` and `run.started` say what it waited for."""

    def run_ended(self, run: Run, failure: Failure | None, now: float) -> None:
        """Its one result is on its way."""

    def deltas(self, run: Run, count: int, size: int) -> None:
        """So many deltas of a stream, of so many bytes together."""

    # -- executors

    def executor_started(self, handle: ExecutorHandle) -> None:
        """Its process runs; an incarnation above 0 replaces another one."""

    def executor_died(self, handle: ExecutorHandle, cause: ExitCause) -> None:
        """Its process ended, whoever ended it. Not reported for those that leave with the worker."""

    # -- models

    def load_ended(self, model_id: str, seconds: float, failure: Failure | None) -> None:
        """A model was loaded onto a device, or was not."""

    def model_evicted(self, model_id: str, reason: EvictionReason) -> None:
        """A model was taken off a device."""

    def download_ended(self, model_id: str, size: int, seconds: float, failure: Failure | None) -> None:
        """The files of a model are whole on disk, or are not; `size` is the bytes that came over the network."""

    # -- the scheduler

    def stream_ended(self, end: StreamEnd) -> None:
        """A stream ended, or a dial that made none."""


class Observers(Observer):
    """Several, told one after the other.

    Whoever watches must not stop what is watched: one that raises has a defect, is logged, and is told nothing more.
    """

    def __init__(self, *observers: Observer | None) -> None:
        """None: one that there is not."""
        self._all = tuple(observer for observer in observers if observer is not None)

    def run_refused(self, function: str, failure: Failure) -> None:
        self._tell(lambda observer: observer.run_refused(function, failure))

    def run_started(self, run: Run) -> None:
        self._tell(lambda observer: observer.run_started(run))

    def run_ended(self, run: Run, failure: Failure | None, now: float) -> None:
        self._tell(lambda observer: observer.run_ended(run, failure, now))

    def deltas(self, run: Run, count: int, size: int) -> None:
        self._tell(lambda observer: observer.deltas(run, count, size))

    def executor_started(self, handle: ExecutorHandle) -> None:
        self._tell(lambda observer: observer.executor_started(handle))

    def executor_died(self, handle: ExecutorHandle, cause: ExitCause) -> None:
        self._tell(lambda observer: observer.executor_died(handle, cause))

    def load_ended(self, model_id: str, seconds: float, failure: Failure | None) -> None:
        self._tell(lambda observer: observer.load_ended(model_id, seconds, failure))

    def model_evicted(self, model_id: str, reason: EvictionReason) -> None:
        self._tell(lambda observer: observer.model_evicted(model_id, reason))

    def download_ended(self, model_id: str, size: int, seconds: float, failure: Failure | None) -> None:
        self._tell(lambda observer: observer.download_ended(model_id, size, seconds, failure))

    def stream_ended(self, end: StreamEnd) -> None:
        self._tell(lambda observer: observer.stream_ended(end))

    def _tell(self, report: Callable[[Observer], None]) -> None:
        for observer in self._all:
            try:
                report(observer)
            except Exception:
                log.exception("%s takes note of nothing any more", type(observer).__name__)
                self._all = tuple(other for other in self._all if other is not observer)
