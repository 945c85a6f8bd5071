"""`make soak`: steady load for half an hour with an executor killed every 5 s. Nothing may be lost, and nothing grow.

    python benchmarks/soak.py [--minutes N] [--rate RUNS_A_SECOND] [--executors N] [--transport h2|grpcio]

Each slot's turn to be killed comes after more than a minute, when its executor counts as having lived: one that keeps
dying is replaced later and later, and the load would measure that pause. A run that was on a killed executor is
answered `retryable` and is sent again as a new run. Every 5 s the memory, descriptors and threads of the supervisor and
of the executors are read, and /metrics. Prints a verdict, exits with 1 when it is not kept, and writes
benchmarks/out/soak.json, which charts.py draws.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import statistics
import sys
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil
import uvloop
from alone import WORKER, free_port, read, until_serving
from bench import OUT, environment
from floor import Count, Echo
from load import Channel, LoadScheduler, Subject, percentile, subject
from measures import MIB

from gen_worker.wire import worker_scheduler_pb2 as pb

HERE: Final = Path(__file__).resolve().parent
SAMPLE_S: Final = 5.0
KILL_S: Final = 5.0
TICK_S: Final = 0.05
SETTLE_S: Final = 60.0
"""For the last runs to be answered. What is still missing then is lost."""
GROWTH_MIB: Final = 3.0
"""By so much the median memory of a process in the last third may be over that of the first: what a longer run would
make more of shows beyond it, and the allocator's own coming and going does not."""
DELTAS: Final = 20
LATER: Final = ("retryable", "resource")


@dataclass(frozen=True)
class Kind:
    """A kind of run: how often among 100, and how many deltas each sends."""

    function: str
    payload: bytes
    share: int
    deltas: int = 0


def _kind(function: str, payload: msgspec.Struct, share: int, deltas: int = 0) -> Kind:
    return Kind(function, msgspec.msgpack.encode(payload), share, deltas)


KINDS: Final = (
    _kind("echo", Echo(text="hello", data=b"x" * 64), 74),
    _kind("count", Count(DELTAS, 64), 15, DELTAS),
    _kind("hold", Echo(text="half a second"), 8),
    _kind("echo", Echo(data=bytes(64 * 1024)), 2),
    _kind("echo", Echo(data=bytes(2 * MIB)), 1),  # through the arena
)


@dataclass
class Sample:
    """What one look at the processes found. Seconds, bytes."""

    at_s: float
    supervisor_bytes: int
    supervisor_own_bytes: int
    """Of those what is no shared memory: payloads of a MiB and more lie in arenas that executors map too."""
    supervisor_files: int
    supervisor_threads: int
    executors: int
    executor_bytes: int
    executor_files: int
    executor_threads: int
    runs_s: float
    p50_s: float
    p99_s: float
    killed: int
    retried: int


class SoakScheduler(LoadScheduler):
    """Sends runs at a steady rate, whatever comes back, and keeps account of each."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)
        self._deck: list[Kind] = []
        """What comes next of each 100 runs, which have exactly their shares: what is kept of large ones, until it is
        known to have arrived, must not differ by chance."""
        self._under_way: dict[str, tuple[Kind, float, int]] = {}
        """Run id -> what it is, when it was sent, deltas that came."""
        self._again: deque[Kind] = deque()
        self._answered: set[str] = set()
        self.latencies: list[float] = []
        """Of the runs that succeeded since somebody emptied it."""
        self.sent = self.succeeded = self.retried = self.deltas = 0
        self.wrong: Counter[str] = Counter()
        """What must not happen, and how often it did."""

    @property
    def waiting(self) -> int:
        return len(self._under_way) + len(self._again)

    def send_new(self, count: int) -> None:
        self._send([*self._again, *(self._deal() for _ in range(count))])
        self._again.clear()

    def _deal(self) -> Kind:
        if not self._deck:
            self._deck = [kind for kind in KINDS for _ in range(kind.share)]
            self._random.shuffle(self._deck)
        return self._deck.pop()

    def send_again(self) -> None:
        self._send(self._again)
        self._again.clear()

    def _send(self, kinds: Sequence[Kind] | deque[Kind]) -> None:
        wire: Channel | None = self._wire
        if wire is None:
            self.wrong["the stream was lost"] += 1
            return
        for kind in kinds:
            run_id = f"run-{next(self._numbers)}"
            request = pb.TaskExecutionRequest(
                run_id=run_id, function_name=kind.function, input_payload=kind.payload, timeout_ms=60_000
            )
            self._under_way[run_id] = (kind, time.perf_counter(), 0)
            wire.send(pb.WorkerSchedulerMessage(run_request=request).SerializeToString())
            self.sent += 1
        wire.flush()

    def _on_event(self, event: pb.WorkerEvent, now: float) -> None:  # noqa: ARG002  (what is overridden)
        if event.event_type != "output.delta":
            return
        found = self._under_way.get(event.run_id)
        if found is None:
            self.wrong["a delta after the result"] += 1
            return
        kind, since, count = found
        if json.loads(event.payload_json)["index"] != count:
            self.wrong["a delta out of order"] += 1
        self._under_way[event.run_id] = (kind, since, count + 1)
        self.deltas += 1

    def _on_result(self, result: pb.TaskExecutionResult, now: float) -> None:
        found = self._under_way.pop(result.run_id, None)
        if found is None:
            self.wrong["two results" if result.run_id in self._answered else "a result of no run"] += 1
            return
        self._answered.add(result.run_id)
        kind, since, deltas = found
        if result.success:
            self.succeeded += 1
            self.latencies.append(now - since)
            if deltas != kind.deltas:
                self.wrong["deltas missing"] += 1
            if kind.function == "echo" and result.output_payload != kind.payload:
                self.wrong["another output than its input"] += 1
        elif result.error_type in LATER:
            self.retried += 1
            self._again.append(kind)
        else:
            self.wrong[f"{result.error_type}: {result.error_message}"] += 1


class Soak:
    """One soak of one worker."""

    def __init__(self, worker: Subject, scheduler: SoakScheduler, executors: int, metrics_url: str) -> None:
        self._scheduler = scheduler
        self._supervisor = psutil.Process(worker.process.pid)
        self._slots = executors
        self._metrics_url = metrics_url
        self.killed = 0
        self.samples: list[Sample] = []

    def executors(self) -> list[psutil.Process]:
        """The executors that live, the oldest first."""
        found = []
        for child in self._supervisor.children():
            try:
                if "executor" in child.cmdline():
                    found.append(child)
            except psutil.NoSuchProcess:
                continue
        return sorted(found, key=lambda process: (process.create_time(), process.pid))

    async def run(self, minutes: float, rate: float) -> None:
        begin = time.monotonic()
        end = begin + minutes * 60
        # Halfway between two samples, so that each sees the executors as they are once one was replaced.
        kill_at, sample_at, sent = begin + KILL_S / 2, begin + SAMPLE_S, 0
        while (now := time.monotonic()) < end:
            due = int((now - begin) * rate) - sent
            self._scheduler.send_new(due)
            sent += due
            if now >= kill_at:
                kill_at += KILL_S
                self._kill_oldest()
            if now >= sample_at:
                sample_at += SAMPLE_S
                await self._sample(now - begin)
            await asyncio.sleep(TICK_S)
        async with asyncio.timeout(SETTLE_S):
            while self._scheduler.waiting:
                self._scheduler.send_again()
                await asyncio.sleep(TICK_S)

    def _kill_oldest(self) -> None:
        if living := self.executors():
            living[0].send_signal(signal.SIGKILL)
            self.killed += 1

    async def _sample(self, at_s: float) -> None:
        await asyncio.to_thread(read, self._metrics_url)
        latencies, self._scheduler.latencies = self._scheduler.latencies or [0.0], []
        of_executors = [found for process in self.executors() if (found := _look(process))]
        with self._supervisor.oneshot():
            self.samples.append(
                Sample(
                    at_s=round(at_s, 1),
                    supervisor_bytes=self._supervisor.memory_info().rss,
                    supervisor_own_bytes=_anonymous_bytes(self._supervisor.pid),
                    supervisor_files=self._supervisor.num_fds(),
                    supervisor_threads=self._supervisor.num_threads(),
                    executors=len(of_executors),
                    executor_bytes=sum(found[0] for found in of_executors),
                    executor_files=max((found[1] for found in of_executors), default=0),
                    executor_threads=max((found[2] for found in of_executors), default=0),
                    runs_s=round(len(latencies) / SAMPLE_S, 1),
                    p50_s=percentile(latencies, 0.5),
                    p99_s=percentile(latencies, 0.99),
                    killed=self.killed,
                    retried=self._scheduler.retried,
                )
            )

    def grown(self) -> dict[str, str]:
        """What is not flat, and how: the last third beside the first."""
        first, last = thirds(self.samples, self._slots)

        def both(read: str, of: Any) -> tuple[float, float]:
            return of(getattr(sample, read) for sample in first), of(getattr(sample, read) for sample in last)

        found = {}
        for name, processes in (
            ("supervisor_own_bytes", 1), ("supervisor_bytes", self._slots), ("executor_bytes", self._slots),
        ):  # fmt: skip
            before, after = both(name, statistics.median)
            if after - before > GROWTH_MIB * MIB * processes:
                found[name] = f"{before / MIB:.1f} -> {after / MIB:.1f} MiB"
        # Not the executors' threads: they are as many as runs happened to meet on one, and no executor lives for long.
        for name in ("supervisor_files", "supervisor_threads", "executor_files"):
            before, after = both(name, statistics.median)
            if after > before:
                found[name] = f"{before:g} -> {after:g}"
        return found


def thirds(samples: Sequence[Sample], slots: int) -> tuple[Sequence[Sample], Sequence[Sample]]:
    """The first third and the last, once every executor was replaced: until then each is as fresh as its start."""
    warm = [sample for sample in samples if sample.killed > slots] or samples
    third = max(1, len(warm) // 3)
    return warm[:third], warm[-third:]


def _anonymous_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text("utf-8").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this kernel does not tell RssAnon")


def _look(process: psutil.Process) -> tuple[int, int, int] | None:
    try:
        with process.oneshot():
            return process.memory_info().rss, process.num_fds(), process.num_threads()
    except psutil.NoSuchProcess:
        return None


async def soak(arguments: argparse.Namespace) -> dict[str, Any]:
    scheduler = SoakScheduler(arguments.seed)
    port = free_port()
    env = environment(
        WORKER_GRPC_TRANSPORT=arguments.transport,
        WORKER_EXECUTORS=str(arguments.executors),
        WORKER_HTTP_ADDR=f"127.0.0.1:{port}",
        WORKER_LOG_LEVEL="critical",
    )
    begin = time.monotonic()
    async with subject("worker", WORKER, env, str(HERE), scheduler) as worker:
        await until_serving(scheduler, arguments.executors)
        made = Soak(worker, scheduler, arguments.executors, f"http://127.0.0.1:{port}/metrics")
        ended_well = True
        try:
            await made.run(arguments.minutes, arguments.rate)
        except TimeoutError:
            ended_well = False
        family = psutil.Process(worker.process.pid).children(recursive=True)
    _, left = psutil.wait_procs(family, timeout=5)
    first, last = thirds(made.samples, arguments.executors)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "minutes": arguments.minutes,
        "seconds": round(time.monotonic() - begin, 1),
        "rate": arguments.rate,
        "executors": arguments.executors,
        "transport": arguments.transport,
        "sent": scheduler.sent,
        "succeeded": scheduler.succeeded,
        "retried": scheduler.retried,
        "deltas": scheduler.deltas,
        "killed": made.killed,
        "lost": 0 if ended_well else scheduler.waiting,
        "wrong": dict(scheduler.wrong),
        "grown": made.grown(),
        "processes_left": len(left),
        "exit_code": worker.process.returncode,
        "median_first_third": _medians(first),
        "median_last_third": _medians(last),
        "samples": [asdict(sample) for sample in made.samples],
    }


def _medians(samples: Sequence[Sample]) -> dict[str, float]:
    return {name: statistics.median(asdict(sample)[name] for sample in samples) for name in asdict(samples[0])}


def show(found: dict[str, Any]) -> bool:
    """Print the verdict; whether it was kept."""
    print(
        f"{found['minutes']:g} minutes on {found['transport']}, {found['executors']} executors: {found['sent']:,} runs "
        f"sent, {found['succeeded']:,} succeeded, {found['retried']:,} sent again, {found['killed']} executors killed"
    )
    print(f"lost: {found['lost']}; wrong: {found['wrong'] or 'nothing'}; processes left: {found['processes_left']}")
    for name, first in found["median_first_third"].items():
        size, unit = (
            (MIB, " MiB") if name.endswith("bytes") else (1e-3, " ms") if name in {"p50_s", "p99_s"} else (1, "")
        )
        print(f"{name}: {first / size:.1f} -> {found['median_last_third'][name] / size:.1f}{unit}")
    print(f"grown: {found['grown'] or 'nothing'}; exit code {found['exit_code']}")
    kept = found["sent"] == found["succeeded"] + found["retried"]
    return kept and not any(found[name] for name in ("lost", "wrong", "grown", "processes_left", "exit_code"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=60.0, help="runs a second (default: %(default)s)")
    parser.add_argument("--executors", type=int, default=14, help="how many there are (default: %(default)s)")
    parser.add_argument("--transport", choices=("h2", "grpcio"), default="grpcio")
    parser.add_argument("--seed", type=int, default=1, help="of what is sent when")
    arguments = parser.parse_args()
    found = uvloop.run(soak(arguments))
    OUT.mkdir(exist_ok=True)
    (OUT / "soak.json").write_text(json.dumps(found, indent=1) + "\n")
    return 0 if show(found) else 1


if __name__ == "__main__":
    sys.exit(main())
