"""What happened, as far as the scheduler and an onlooker of the processes can know it.

Owns: the record that the invariants are checked against. It is filled while the torture runs and judges nothing.
Times are monotonic seconds. Streams are numbered in the order in which the worker opened them, over all schedulers: a
worker has one at a time, so what came on a later stream was sent later.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, NamedTuple

from gen_worker.testing.torture.requests import Request


class What(Enum):
    """The kinds of message that a worker sends for a run."""

    DELTA = "delta"
    COMPLETED = "output.completed"
    ERROR = "output.error"
    OTHER = "event"
    RESULT = "result"


class Outcome(NamedTuple):
    """A result. `output_fits` is False when a success has another output than it must have."""

    kind: str
    """`success`, or the error_type."""
    retryable: bool
    safe_message: str
    error_message: str
    digest: bytes
    """Of the whole message: two results with one digest are one result, sent twice."""
    output_fits: bool


class Arrival(NamedTuple):
    """One message for a run. Appended as they come; on one stream that is the order in which they were sent."""

    stream: int
    at: float
    what: What
    place: int = -1
    """A delta's place in its run; -1: not a delta, or one that is not this run's."""
    outcome: Outcome | None = None
    made_at: float = 0.0
    """When a delta was made, as its function says."""


class Writing(NamedTuple):
    """A run_request that was (or may have been) written: the `position`-th message for runs on that stream."""

    stream: int
    position: int
    at: float


@dataclass(slots=True)
class Run:
    """One run_id: what was asked, how often it was sent, and all that came for it."""

    run_id: str
    request: Request
    timeout_ms: int
    writings: list[Writing] = field(default_factory=list)
    cancels: list[float] = field(default_factory=list)
    """When interrupts for it were sent."""
    arrivals: list[Arrival] = field(default_factory=list)

    @property
    def results(self) -> Iterator[Arrival]:
        return (arrival for arrival in self.arrivals if arrival.what is What.RESULT)


BY_SCHEDULER: Final = "closed by the scheduler"


@dataclass(slots=True)
class Conversation:
    """One realtime session: what was said, heard, and how it ended."""

    session_id: str
    end: str
    """BY_SCHEDULER, or what its handler was told to do (functions.SOCKET_ENDS)."""
    timeout_s: float
    opened_at: float = 0.0
    closed_at: float = 0.0
    sent: int = 0
    heard: int = 0
    reason: str = ""
    """The worker's; empty when no close came."""
    stream_ended: bool = False
    """Whether the stream that it was opened on is over, and with it the session."""
    disorder: str = ""
    """The first frame that was not the next one, in words."""


@dataclass(slots=True)
class StreamRecord:
    """One stream of the worker."""

    opened_at: float
    ended_at: float | None = None


class Interval(NamedTuple):
    start: float
    end: float


@dataclass(slots=True)
class Peaks:
    """The most that was seen, in bytes and counts."""

    supervisor_rss: int = 0
    executor_rss: int = 0
    supervisor_fds: int = 0
    fds_at_start: Counter[str] = field(default_factory=Counter)
    """By kind."""
    fds_at_end: Counter[str] = field(default_factory=Counter)
    """In peace, with as many executors and streams as at the start."""


@dataclass(slots=True)
class History:
    """See the module."""

    runs: dict[str, Run] = field(default_factory=dict)
    conversations: list[Conversation] = field(default_factory=list)
    streams: list[StreamRecord] = field(default_factory=list)
    dark: list[Interval] = field(default_factory=list)
    """When the worker could deliver nothing, by what was done to it; they don't overlap."""
    stalls: list[Interval] = field(default_factory=list)
    """When the torture itself, and its scheduler with it, had no turn for longer than PULSE_S (pulse.py)."""
    strays: list[str] = field(default_factory=list)
    """Messages for runs that were never asked for, in words."""
    offences: list[str] = field(default_factory=list)
    """What the worker did against the protocol of a stream, in words."""
    starts: dict[str, int] = field(default_factory=dict)
    """run_id -> how often its function began, by the functions' own ledger."""
    ends: dict[str, float] = field(default_factory=dict)
    """run_id -> when its function ended, as far as functions say it."""
    kills: list[float] = field(default_factory=list)
    """When the supervisor was killed: what runs had not been answered by then may have gone with it."""
    has_ledger: bool = True
    """False: the functions are a tenant's own, and `starts` says nothing."""
    stopped_at: float | None = None
    """When the worker was told to stop: from then on it may answer `worker busy`."""
    resendings: int = 0
    """How often the worker said that it sends events again."""
    trouble: list[str] = field(default_factory=list)
    """What the onlooker saw go wrong with processes, in words."""
    peaks: Peaks = field(default_factory=Peaks)


class Light:
    """Keeps a history's `dark`: it is dark while there is one reason or more."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._reasons: set[str] = set()
        self._since = 0.0

    @property
    def is_dark(self) -> bool:
        return bool(self._reasons)

    def dim(self, reason: str, now: float) -> None:
        if not self._reasons:
            self._since = now
        self._reasons.add(reason)

    def brighten(self, reason: str, now: float) -> None:
        was_dark = bool(self._reasons)
        self._reasons.discard(reason)
        if was_dark and not self._reasons:
            self._history.dark.append(Interval(self._since, now))

    def close(self, now: float) -> None:
        """The history ends here."""
        for reason in tuple(self._reasons):
            self.brighten(reason, now)
