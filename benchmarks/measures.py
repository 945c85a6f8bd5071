"""What is measured, and the goals: each figure is a ratio to the floor's in the same run, or a bound of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec
from floor import Count, Echo
from load import Outcome, percentile

MIB: Final = 1024 * 1024
SMALL: Final = Echo(text="hello", data=b"x" * 64)
LARGE_BYTES: Final = 64 * MIB


@dataclass(frozen=True)
class Driven:
    """A measure that the load takes of the floor and of workers alike. `goal` 0: none is set."""

    name: str
    unit: str
    function: str
    payload: msgspec.Struct
    runs: int
    window: int
    read: Callable[[Outcome], float]
    more_is_better: bool
    goals: dict[str, float]
    """By subject."""


def rate(outcome: Outcome) -> float:
    return outcome.runs / outcome.elapsed


def event_rate(outcome: Outcome) -> float:
    return outcome.events / outcome.elapsed


def latency(share: float) -> Callable[[Outcome], float]:
    return lambda outcome: outcome.percentile(share) * 1e6


def first_event(outcome: Outcome) -> float:
    return percentile(outcome.first_events, 0.5) * 1e6


def both_ways(outcome: Outcome) -> float:
    return outcome.runs * 2 * LARGE_BYTES / MIB / outcome.elapsed


DRIVEN: Final = (
    Driven("small runs, window 64", "runs/s", "echo", SMALL, 8000, 64, rate, True,
           {"grpcio": 0.95, "h2": 3.0, "h2, 4 executors": 3.0, "grpcio, 4 executors": 0.95}),
    Driven("sequential p50", "us", "echo", SMALL, 2000, 1, latency(0.5), False, {"grpcio": 1.25, "h2": 0.85}),
    Driven("sequential p99", "us", "echo", SMALL, 2000, 1, latency(0.99), False, {"grpcio": 1.25, "h2": 1.0}),
    Driven("deltas of 1 stream", "deltas/s", "count", Count(20000, 16), 1, 1, event_rate, True,
           {"grpcio": 0.8, "h2": 5.0}),
    Driven("deltas of 64 streams", "deltas/s", "count", Count(400, 16), 64, 64, event_rate, True,
           {"grpcio": 0.8, "h2": 5.0}),
    Driven("first delta of a stream", "us", "count", Count(50, 16), 200, 1, first_event, False,
           {"grpcio": 1.2, "h2": 1.2}),
    Driven("64 MiB in and out", "MiB/s", "echo", Echo(data=bytes(LARGE_BYTES)), 3, 1, both_ways, True,
           {"grpcio": 0.8, "h2": 2.0}),
)  # fmt: skip
CPU: Final = "CPU of the top process per small run"
