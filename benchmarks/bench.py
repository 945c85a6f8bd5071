"""`make bench`: the worker beside the floor, in one run, as ratios.

Both are driven by the same load over loopback. Rounds alternate between them, so that what else the machine does hits
both; each figure is the median of the rounds. Prints a table and writes benchmarks/out/bench.json.

    python benchmarks/bench.py [--rounds N]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec
import psutil
from floor import Count, Echo
from load import LoadScheduler, subject
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
OUT = HERE / "out"
MIB = 1024 * 1024

SMALL = Echo(text="hello", data=b"x" * 64)


@dataclass(frozen=True)
class Measure:
    """One figure: how it is taken, and which ratio to the floor is aimed at."""

    name: str
    unit: str
    function: str
    payload: msgspec.Struct
    runs: int
    window: int
    read: Callable[[list[float], float, int], float]
    more_is_better: bool
    goal: float


def _percentile(share: float) -> Callable[[list[float], float, int], float]:
    def read(latencies: list[float], _elapsed: float, _events: int) -> float:
        ordered = sorted(latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))] * 1e6

    return read


def _rate(latencies: list[float], elapsed: float, _events: int) -> float:
    return len(latencies) / elapsed


def _event_rate(_latencies: list[float], elapsed: float, events: int) -> float:
    return events / elapsed


def _bytes_rate(latencies: list[float], elapsed: float, _events: int) -> float:
    return len(latencies) * 2 * 64 / elapsed


MEASURES = [
    Measure("small runs, window 64", "runs/s", "echo", SMALL, 6000, 64, _rate, True, 0.8),
    Measure("sequential latency p50", "us", "echo", SMALL, 1500, 1, _percentile(0.5), False, 1.25),
    Measure("sequential latency p99", "us", "echo", SMALL, 1500, 1, _percentile(0.99), False, 1.25),
    Measure("deltas of one stream", "deltas/s", "count", Count(20000, 16), 1, 1, _event_rate, True, 0.8),
    Measure("deltas of 64 streams", "deltas/s", "count", Count(300, 16), 64, 64, _event_rate, True, 0.8),
    Measure("64 MiB in and out", "MiB/s", "echo", Echo(data=bytes(64 * MIB)), 4, 1, _bytes_rate, True, 0.8),
]


async def take(scheduler: LoadScheduler, measure: Measure) -> float:
    outcome = await scheduler.drive(measure.function, measure.payload, runs=measure.runs, window=measure.window)
    return measure.read(outcome.latencies, outcome.elapsed, outcome.events)


async def compare(rounds: int, only: str) -> list[dict[str, object]]:
    env = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    worker_env = {
        **env,
        "SCHEDULER_ADDR": "{address}",
        "USER_MODULES": "bench_functions",
        "WORKER_HTTP_ADDR": "",
        "WORKER_LOG_LEVEL": "warning",
        **{name: value for name, value in os.environ.items() if name.startswith("WORKER_")},
    }
    floor_command = [sys.executable, str(HERE / "floor.py"), "{address}"]
    worker_command = [sys.executable, "-m", "gen_worker.entrypoint"]
    rows: list[dict[str, object]] = []
    async with (
        subject(floor_command, env, str(HERE)) as (floor, floor_pid),
        subject(worker_command, worker_env, str(HERE)) as (worker, worker_pid),
    ):
        for scheduler in (floor, worker):
            await scheduler.drive("echo", SMALL, runs=500, window=16)
        for measure in (measure for measure in MEASURES if only in measure.name):
            pairs = [(await take(floor, measure), await take(worker, measure)) for _ in range(rounds)]
            floor_figure, figure = (statistics.median(values) for values in zip(*pairs, strict=True))
            ratio = statistics.median(mine / base for base, mine in pairs)
            good = ratio >= measure.goal if measure.more_is_better else ratio <= measure.goal
            rows.append({
                "measure": measure.name, "unit": measure.unit, "floor": floor_figure, "worker": figure,
                "ratio": ratio, "goal": measure.goal, "more_is_better": measure.more_is_better, "reached": good,
            })  # fmt: skip
        for name, pid in (("floor", floor_pid), ("worker", worker_pid)):
            process = psutil.Process(pid)
            seconds = sum(process.cpu_times()[:2])
            print(
                f"{name}: {process.memory_info().rss / MIB:.0f} MiB resident, {seconds:.1f} s of CPU in its top process"
            )
    return rows


def show(rows: list[dict[str, object]]) -> None:
    table = Table(title=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    for column in ("measure", "floor", "worker", "ratio", "goal", ""):
        table.add_column(column, justify="left" if column in ("measure", "") else "right")
    for row in rows:
        sign = ">=" if row["more_is_better"] else "<="
        figures = (f"{row['floor']:,.0f} {row['unit']}", f"{row['worker']:,.0f} {row['unit']}", f"{row['ratio']:.2f}")
        table.add_row(str(row["measure"]), *figures, f"{sign} {row['goal']}", "ok" if row["reached"] else "missed")
    Console(width=110).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="only measures whose name holds this")
    arguments = parser.parse_args()
    rows = asyncio.run(compare(arguments.rounds, arguments.only))
    OUT.mkdir(exist_ok=True)
    (OUT / "bench.json").write_text(json.dumps(rows, indent=1) + "\n")
    show(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
