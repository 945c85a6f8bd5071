"""What is done when: a sequence of actions that follows from the seed alone.

Owns: how often what happens. Pure. Tracks run side by side: requests, realtime sessions, faults of the stream, and
faults of processes.

Executors are lost in storms with calm between them. A worker replaces an executor at once, then after 1, 2, 4 ... 60 s
when it keeps dying, and forgives one that lived for 60 s; killing them all the time would only show that it waits. In a
storm each slot loses a few; in the calm that follows the rest of the torture goes on, and all are forgiven.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import Final


class StreamFault(StrEnum):
    """What a scheduler or the network does to a stream."""

    DROP = "connection cut"
    ABORT = "stream aborted"
    HALF_CLOSE = "stream half-closed"
    LEADER_MOVES = "leader moved"
    REDIRECT_TO_SELF = "redirect to itself"
    REDIRECT_NOWHERE = "malformed redirect"
    GARBAGE = "garbage"
    EMPTY = "empty message"
    UNKNOWN = "unknown message"
    WRONG_WAY = "message of a worker"
    CANCEL_UNKNOWN = "cancel of an unknown run"
    UNREAD = "stopped reading"
    UNREAD_CUT = "stopped reading, then cut"
    MODEL_COMMANDS = "model commands"
    RESTART = "scheduler restarted"
    REFUSE = "refused at connect"
    REFUSE_TOKEN = "token refused"  # noqa: S105  (a fault's name)
    SILENT = "accepted in silence"
    GARBAGE_AT_CONNECT = "garbage at connect"
    FLAP = "cut at connect"


class ProcessFault(StrEnum):
    """What happens to a process of the worker."""

    KILL = "executor SIGKILL"
    SEGV = "executor SIGSEGV"
    ABRT = "executor SIGABRT"
    FREEZE_EXECUTOR = "executor stopped"
    FREEZE_SUPERVISOR = "supervisor stopped"
    KILL_SUPERVISOR = "supervisor SIGKILL"

    @property
    def is_lethal(self) -> bool:
        return self in _LETHAL


_LETHAL: Final = frozenset((ProcessFault.KILL, ProcessFault.SEGV, ProcessFault.ABRT))


@dataclass(frozen=True, slots=True)
class Send:
    """One request. What it asks for follows from its own `seed`; times are in seconds from the start."""

    at_s: float
    seed: int
    lethal: bool
    timeout_ms: int
    cancel_after_s: float | None
    copies: int
    """How often it is sent; the worker must ignore all but the first."""


@dataclass(frozen=True, slots=True)
class HurtStream:
    at_s: float
    fault: StreamFault
    seconds: float
    times: int
    """How many dials are refused, how many messages are sent."""
    seed: int


@dataclass(frozen=True, slots=True)
class HurtProcess:
    at_s: float
    fault: ProcessFault
    seconds: float
    pick: int
    """Which executor: modulo how many there are."""


@dataclass(frozen=True, slots=True)
class Converse:
    """One realtime session. What is said in it follows from its own `seed`."""

    at_s: float
    seed: int


Action = Send | Converse | HurtStream | HurtProcess


@dataclass(frozen=True, slots=True)
class Plan:
    seed: int
    seconds: float
    actions: tuple[Action, ...]
    """By time."""


LONG_TIMEOUT_MS: Final = 30_000
STORM_S: Final = 24.0
CALM_S: Final = 70.0
"""More than an executor has to live to be forgiven (60 s)."""
LETHAL_GAP_S: Final = (1.5, 3.5)
"""Between two lost executors of a storm: with three slots some three losses of each."""

_QUIET_START_S: Final = 0.5
_STREAM_GAP_S: Final = (0.3, 2.0)
_SESSION_GAP_S: Final = (0.1, 0.8)
_FREEZE_GAP_S: Final = (3.0, 8.0)
_END_GAP_S: Final = (25.0, 55.0)
_PAUSE_S: Final = (0.02, 0.25)
_BURSTS: Final[Mapping[int, int]] = {1: 70, 3: 20, 10: 8, 80: 1}
"""How many requests are sent at one moment, and how often that is."""

_STREAM_FAULTS: Final[Mapping[StreamFault, int]] = {
    StreamFault.DROP: 5, StreamFault.ABORT: 4, StreamFault.HALF_CLOSE: 4, StreamFault.LEADER_MOVES: 4,
    StreamFault.REDIRECT_TO_SELF: 2, StreamFault.REDIRECT_NOWHERE: 2, StreamFault.GARBAGE: 3, StreamFault.EMPTY: 2,
    StreamFault.UNKNOWN: 2, StreamFault.WRONG_WAY: 2, StreamFault.CANCEL_UNKNOWN: 2, StreamFault.UNREAD: 4,
    StreamFault.RESTART: 3, StreamFault.REFUSE: 3, StreamFault.REFUSE_TOKEN: 1, StreamFault.SILENT: 3,
    StreamFault.GARBAGE_AT_CONNECT: 2, StreamFault.FLAP: 3, StreamFault.UNREAD_CUT: 1, StreamFault.MODEL_COMMANDS: 4,
}  # fmt: skip
_LASTING: Final = frozenset((StreamFault.UNREAD, StreamFault.RESTART, StreamFault.SILENT))
_MORTAL: Final = (ProcessFault.KILL, ProcessFault.KILL, ProcessFault.SEGV, ProcessFault.ABRT)
_FREEZES: Final = (ProcessFault.FREEZE_EXECUTOR, ProcessFault.FREEZE_EXECUTOR, ProcessFault.FREEZE_SUPERVISOR)


def make_plan(seed: int, seconds: float) -> Plan:
    """The plan for `seconds` of torture. Of two plans from one seed the shorter is the beginning of the longer."""
    # Each track has a generator of its own, so that none of them depends on where another one ends.
    tracks = (_requests(_rng(seed, "requests")), _streams(_rng(seed, "streams")), _freezes(_rng(seed, "freezes")))
    actions: list[Action] = []
    for track in (*tracks, _losses(_rng(seed, "losses")), _ends(_rng(seed, "ends")), _sessions(_rng(seed, "sessions"))):
        for action in track:
            if action.at_s >= seconds:
                break
            actions.append(action)
    actions.sort(key=lambda action: action.at_s)
    return Plan(seed, seconds, tuple(actions))


def _rng(seed: int, track: str) -> Random:
    return Random(f"{seed}/{track}")  # noqa: S311  (a plan to reproduce, no secret)


def _requests(rng: Random) -> Iterator[Send]:
    at = _QUIET_START_S
    while True:
        for _ in range(rng.choices(list(_BURSTS), list(_BURSTS.values()))[0]):
            yield _send(rng, at, lethal=False)
        at += rng.uniform(*_PAUSE_S)


def _send(rng: Random, at_s: float, *, lethal: bool) -> Send:
    hasty, canceled, repeated = rng.random() < 0.15, rng.random() < 0.12, rng.random() < 0.05  # noqa: PLR2004
    return Send(
        at_s=at_s,
        seed=rng.getrandbits(64),
        lethal=lethal,
        timeout_ms=rng.randint(30, 600) if hasty else LONG_TIMEOUT_MS,
        cancel_after_s=rng.choice((0.0, rng.uniform(0, 0.05), rng.uniform(0, 1))) if canceled else None,
        copies=rng.randint(2, 4) if repeated else 1,
    )


def _sessions(rng: Random) -> Iterator[Converse]:
    at = _QUIET_START_S
    while True:
        at += rng.uniform(*_SESSION_GAP_S)
        yield Converse(at, rng.getrandbits(64))


def _streams(rng: Random) -> Iterator[HurtStream]:
    at = _QUIET_START_S
    while True:
        at += rng.uniform(*_STREAM_GAP_S)
        fault = rng.choices(list(_STREAM_FAULTS), list(_STREAM_FAULTS.values()))[0]
        seconds = rng.uniform(0.2, 2.5) if fault in _LASTING else 0.0
        yield HurtStream(at, fault, seconds, rng.randint(1, 4), rng.getrandbits(64))
        at += seconds


def _freezes(rng: Random) -> Iterator[HurtProcess]:
    at = _QUIET_START_S
    while True:
        at += rng.uniform(*_FREEZE_GAP_S)
        seconds = rng.uniform(0.1, 1.5)
        yield HurtProcess(at, rng.choice(_FREEZES), seconds, rng.getrandbits(16))
        at += seconds


def _ends(rng: Random) -> Iterator[HurtProcess]:
    """The supervisor is killed, and another one takes over."""
    at = 0.0
    while True:
        at += rng.uniform(*_END_GAP_S)
        yield HurtProcess(at, ProcessFault.KILL_SUPERVISOR, 0.0, rng.getrandbits(16))


def _losses(rng: Random) -> Iterator[Send | HurtProcess]:
    """Executors that die: by a signal from outside, or by a request."""
    at = _QUIET_START_S
    storm_ends = at + STORM_S
    while True:
        at += rng.uniform(*LETHAL_GAP_S)
        if at >= storm_ends:
            at += CALM_S
            storm_ends = at + STORM_S
        if rng.random() < 0.5:  # noqa: PLR2004  (a coin)
            yield HurtProcess(at, rng.choice(_MORTAL), 0.0, rng.getrandbits(16))
        else:
            yield _send(rng, at, lethal=True)
