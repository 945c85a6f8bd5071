"""`make bench`: the worker, with each transport, beside the floor, in one run, as ratios.

All are driven by the same load over loopback (load.py). Rounds alternate between them, so that what else the machine
does hits all; each figure is the median of the rounds, and each ratio the median of the rounds' ratios. Prints a table
and writes benchmarks/out/bench.json; charts.py makes the charts of docs/benchmarks.md from that (the `bench` extra).

    python benchmarks/bench.py [--rounds N] [--only WORDS] [--quick] [--peer h2|grpcio]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

import psutil
import uvloop
from alone import executor_replaced, first_registration, resident, stalls, until_serving
from load import LoadScheduler, Subject, keep_memory, subject
from load_grpcio import GrpcioLoadScheduler
from measures import CPU, DRIVEN, MIB, SMALL, Driven
from rich.console import Console
from rich.table import Table

HERE: Final = Path(__file__).resolve().parent
OUT: Final = HERE / "out"
FLOOR: Final = "floor"
SUBJECTS: Final = {
    "grpcio": {"WORKER_GRPC_TRANSPORT": "grpcio"},
    "h2": {"WORKER_GRPC_TRANSPORT": "h2"},
    "grpcio, 4 executors": {"WORKER_GRPC_TRANSPORT": "grpcio", "WORKER_EXECUTORS": "4"},
    "h2, 4 executors": {"WORKER_GRPC_TRANSPORT": "h2", "WORKER_EXECUTORS": "4"},
}
CPU_GOALS: Final = {"h2": 0.4}
PEERS: Final[dict[str, type[LoadScheduler]]] = {"h2": LoadScheduler, "grpcio": GrpcioLoadScheduler}


@dataclass
class Row:
    """One line of the table. `ratio` is to the floor; None where the figure stands for itself."""

    measure: str
    subject: str
    unit: str
    figure: float
    floor: float | None = None
    ratio: float | None = None
    goal: float | None = None
    more_is_better: bool = False
    rounds: list[float] = field(default_factory=list)

    @property
    def reached(self) -> bool | None:
        if self.goal is None:
            return None
        judged = self.figure if self.ratio is None else self.ratio
        return judged >= self.goal if self.more_is_better else judged <= self.goal


def environment(address: str = "{address}", **more: str) -> dict[str, str]:
    """Of a floor or a worker; WORKER_ variables of ours go to the worker too."""
    return {
        **{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ},
        "SCHEDULER_ADDR": address,
        "USER_MODULES": "bench_functions",
        "WORKER_HTTP_ADDR": "",
        "WORKER_LOG_LEVEL": "warning",
        "RECONNECT_DELAY": "0.2",
        **{name: value for name, value in os.environ.items() if name.startswith("WORKER_")},
        **more,
    }


async def one(subject_: Subject, measure: Driven) -> tuple[float, float]:
    """The figure, and CPU seconds of the top process per run."""
    process = psutil.Process(subject_.process.pid)
    before = sum(process.cpu_times()[:2])
    outcome = await subject_.scheduler.drive(
        measure.function, measure.payload, runs=measure.runs, window=measure.window
    )
    cpu = sum(process.cpu_times()[:2]) - before
    return measure.read(outcome), cpu / outcome.runs


async def compared(rounds: int, only: str, peer: type[LoadScheduler]) -> list[Row]:
    """Everything that the floor can do too."""
    rows: list[Row] = []
    async with AsyncExitStack() as stack:
        command = [sys.executable, str(HERE / "floor.py"), "{address}"]
        floor = await stack.enter_async_context(subject(FLOOR, command, environment(), str(HERE), peer()))
        workers = {}
        for name, settings in SUBJECTS.items():
            command = [sys.executable, "-m", "gen_worker.entrypoint"]
            started = subject(name, command, environment(**settings), str(HERE), peer())
            workers[name] = await stack.enter_async_context(started)
            await until_serving(workers[name].scheduler, int(settings.get("WORKER_EXECUTORS", "1")))
        for each in (floor, *workers.values()):
            await each.scheduler.drive("echo", SMALL, runs=1500, window=64)
        for measure in (measure for measure in DRIVEN if only in measure.name):
            taking = [floor, *(workers[name] for name in measure.goals)]
            figures: dict[str, list[float]] = defaultdict(list)
            cpu: dict[str, list[float]] = defaultdict(list)
            for _ in range(rounds):
                for each in taking:
                    figure, seconds = await one(each, measure)
                    figures[each.name].append(figure)
                    cpu[each.name].append(seconds * 1e6)
            for name, goal in measure.goals.items():
                rows.append(_row(measure.name, name, measure.unit, figures, goal, better=measure.more_is_better))
            if measure is DRIVEN[0]:
                rows += [_row(CPU, name, "us", cpu, CPU_GOALS.get(name)) for name in measure.goals]
    return rows


def _row(
    measure: str, name: str, unit: str, figures: dict[str, list[float]], goal: float | None, *, better: bool = False
) -> Row:
    mine, base = figures[name], figures[FLOOR]
    ratio = statistics.median(a / b for a, b in zip(mine, base, strict=True) if b)
    return Row(measure, name, unit, statistics.median(mine), statistics.median(base), ratio, goal, better, mine)


async def by_themselves(rounds: int, only: str, *, quick: bool) -> list[Row]:
    """What has a bound of its own."""
    rows: list[Row] = []

    def add(measure: str, name: str, unit: str, rounds_: list[float], goal: float | None) -> None:
        rows.append(Row(measure, name, unit, statistics.median(rounds_), goal=goal, rounds=rounds_))

    if only in "executor killed to next run served, torch":
        env = environment(**SUBJECTS["grpcio"], USER_MODULES="bench_functions,bench_torch")
        for what, more, goal in (("", {}, None), (" and a spare", {"WORKER_WARM_SPARE": "1"}, 0.5)):
            figures_ = [await executor_replaced({**env, **more}, str(HERE)) for _ in range(rounds)]
            add(f"executor killed to next run served, torch{what}", "grpcio", "s", figures_, goal)
    for name in ("grpcio", "h2"):
        settings = SUBJECTS[name]
        for count, goal in ((1, 0.8), (8, 2.0)):
            if only in "process start to registered":
                env = environment(**settings, WORKER_EXECUTORS=str(count))
                figures = [await first_registration(env, str(HERE), count) for _ in range(rounds)]
                add(f"start to registered, {count} executor(s)", name, "s", [first for first, _ in figures], goal)
                add(f"start to all ready, {count} executor(s)", name, "s", [last for _, last in figures], None)
        if only in "executor killed to next run":
            figures_ = [await executor_replaced(environment(**settings), str(HERE)) for _ in range(rounds)]
            add("executor killed to next run served", name, "s", figures_, 0.5)
        if only in "supervisor resident":
            steps = await resident(environment(**settings), str(HERE), 5000 if quick else 100_000)
            add("supervisor after all runs", name, "MiB", [steps[-1] / MIB], 60.0)
            add("growth over the second half of them", name, "MiB", [(steps[-1] - steps[len(steps) // 2]) / MIB], 1.0)
        if only in "event loop, worst stall":
            with tempfile.TemporaryDirectory() as folder:
                late, busy = await stalls(environment(**settings), str(HERE), Path(folder) / "stalls")
            add("event loop, worst stall", name, "ms", [late * 1e3], 20.0)
            add("event loop, longest CPU at a stretch", name, "ms", [busy * 1e3], 20.0)
    return rows


def show(rows: list[Row], about: dict[str, object]) -> None:
    table = Table(title=f"{about['machine']}; load {about['load_before']} to {about['load_after']}")
    for column in ("measure", "subject", "floor", "worker", "ratio", "goal", ""):
        table.add_column(column, justify="left" if column in ("measure", "subject", "") else "right")
    for row in rows:
        goal = "" if row.goal is None else f"{'>=' if row.more_is_better else '<='} {row.goal:g}"
        digits = 0 if row.figure >= 100 else 2
        floor = "" if row.floor is None else f"{row.floor:,.{digits}f}"
        verdict = {True: "ok", False: "missed", None: ""}[row.reached]
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(row.measure, row.subject, floor, f"{row.figure:,.{digits}f} {row.unit}", ratio, goal, verdict)
    Console(width=140).print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="only measures whose name holds this")
    parser.add_argument("--quick", action="store_true", help="fewer runs where there are very many")
    parser.add_argument("--peer", choices=PEERS, default="h2", help="what the scheduler that drives them is built on")
    arguments = parser.parse_args()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    about: dict[str, object] = {
        "machine": machine,
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "rounds": arguments.rounds,
        "peer": arguments.peer,
        "load_before": f"{os.getloadavg()[0]:.1f}",
    }
    keep_memory()
    rows = uvloop.run(compared(arguments.rounds, arguments.only, PEERS[arguments.peer]))
    rows += uvloop.run(by_themselves(arguments.rounds, arguments.only, quick=arguments.quick))
    about["load_after"] = f"{os.getloadavg()[0]:.1f}"
    OUT.mkdir(exist_ok=True)
    found = {**about, "rows": [{**asdict(row), "reached": row.reached} for row in rows]}
    (OUT / "bench.json").write_text(json.dumps(found, indent=1) + "\n")
    show(rows, about)
    return 0


if __name__ == "__main__":
    sys.exit(main())
