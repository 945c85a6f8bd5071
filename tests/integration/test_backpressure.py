"""Floods: what a worker holds stays bounded, nothing is lost or reordered, and others get their turn.

Each flood is here at a size for every day, and at its full size as a soak test. Real processes throughout; what they
hold is their resident set as the kernel counts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from gen_worker.testing.mock_orchestrator import RunHandle
from gen_worker.wire import worker_scheduler_pb2 as pb
from supervisor.backlog import RUNS_BYTES
from tests.support.worker_process import Chain, chain

TENANT: dict[str, Any] = {"tenant": "delivery", "modules": "delivery_functions"}
MIB = 1024 * 1024
BOUND = 200 * MIB


class Peaks:
    """The largest resident sets seen."""

    def __init__(self) -> None:
        self.supervisor = 0
        self.executor = 0

    def __str__(self) -> str:
        return f"supervisor {self.supervisor / MIB:.0f} MiB, executor {self.executor / MIB:.0f} MiB"

    async def watch(self, c: Chain) -> None:
        supervisor, executors = psutil.Process(c.worker.pid), c.worker.executors()
        while True:
            self.supervisor = max(self.supervisor, supervisor.memory_info().rss)
            self.executor = max(self.executor, *(executor.memory_info().rss for executor in executors))
            await asyncio.sleep(0.02)


@contextlib.asynccontextmanager
async def measured(bound: int = BOUND, **options: Any) -> AsyncIterator[tuple[Chain, Peaks]]:
    """A chain and its peaks; at the end they must have stayed in bounds."""
    peaks = Peaks()
    async with chain(**{**TENANT, "env": {"WORKER_LOG_LEVEL": "info"}, **options}) as c:
        watching = asyncio.create_task(peaks.watch(c))
        try:
            yield c, peaks
        finally:
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)
            print(peaks)
    assert peaks.supervisor < bound, str(peaks)
    assert peaks.executor < bound, str(peaks)


class Order:
    """Counts the deltas of runs as they arrive, and minds their order; keeps none."""

    def __init__(self) -> None:
        self.next: dict[str, int] = {}
        self.wrong: list[str] = []

    def __call__(self, _connection: object, kind: str, message: pb.WorkerSchedulerMessage) -> None:
        event = message.worker_event
        if kind != "worker_event" or event.event_type != "output.delta":
            return
        index = msgspec.json.decode(event.payload_json)["index"]
        if index != self.next.get(event.run_id, 0):
            self.wrong.append(f"{event.run_id}: {index} came instead of {self.next.get(event.run_id, 0)}")
        self.next[event.run_id] = index + 1


# -- a scheduler that does not read ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("deltas", "stall_s"), [(3000, 2.0), pytest.param(75_000, 8.0, marks=[pytest.mark.soak, pytest.mark.timeout(600)])]
)
async def test_a_scheduler_that_stops_reading(deltas: int, stall_s: float) -> None:
    order = Order()
    async with measured(on_message=order, env={"HEARTBEAT_INTERVAL_SECONDS": "0.5"}, executors=2) as (c, _):
        floods = [
            await c.run(name, {"count": deltas, "size": 4096}, run_id=f"{name}-{number}", keep_events=False)
            for name in ("stream", "astream")
            for number in range(2)
        ]
        await c.orchestrator.wait_until(lambda: all(handle.event_count > 20 for handle in floods))
        connection = c.connection
        connection.pause_reading()
        small = [await c.run("echo", {"data": b"%d" % number}) for number in range(50)]
        await asyncio.sleep(stall_s)
        heartbeats = len(connection.registrations)
        resumed = time.monotonic()
        connection.resume_reading()
        await asyncio.gather(*(handle.output(60) for handle in small))
        drained = [handle.event_count for handle in floods]
        await c.orchestrator.wait_until(lambda: len(connection.registrations) > heartbeats)
        assert max(handle.results[0].at for handle in small) - resumed < 2
        assert all(count < deltas for count in drained), f"the flood was over before the others' turn: {drained}"
        await asyncio.gather(*(handle.output(500) for handle in floods))
        assert order.wrong == []
        assert order.next == {handle.run_id: deltas for handle in floods}
        # Its last registration can be one that came to be while it did not read; then they come at their interval.
        assert connection is c.connection
        assert c.orchestrator.stream_count == 1


async def test_a_scheduler_that_sends_and_does_not_read_is_made_to_wait() -> None:
    """Its answers pile up here, so nothing more is read; once it reads, everything comes."""
    async with measured() as (c, _):
        connection = c.connection
        connection.pause_reading()
        sent: list[RunHandle] = []
        async with asyncio.timeout(30):
            while not c.worker.lines("nothing more is read"):
                sent.append(await c.run("big", {"count": 0, "size": MIB}))
                await asyncio.sleep(0.01)
        more = asyncio.gather(*(c.run("echo", {"data": bytes(MIB)}) for _ in range(40)))
        await asyncio.sleep(0.5)
        assert not more.done(), "40 MiB were read"
        connection.resume_reading()
        for handle in [*sent, *await more]:
            assert len((await handle.output(60))["data"]) == MIB


# -- floods of runs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "size"),
    [
        (300, MIB),
        (4800, 16 * 1024),
        pytest.param(20_000, 4096, marks=[pytest.mark.soak, pytest.mark.timeout(300)]),
        pytest.param(300_000, 64, marks=[pytest.mark.soak, pytest.mark.timeout(600)]),
    ],
)
async def test_a_flood_of_runs_on_a_slow_function(tmp_path: Path, count: int, size: int) -> None:
    go = tmp_path / "go"
    async with measured(env={"HEARTBEAT_INTERVAL_SECONDS": "0.2", "WORKER_LOG_LEVEL": "info"}) as (c, _):
        first = await c.run("one_at_a_time", {"file": str(go)})
        late = await c.run("one_at_a_time", {}, timeout_ms=1000)
        payload = msgspec.msgpack.encode({"data": os.urandom(size)})
        flood: list[RunHandle] = []

        async def send_all() -> None:
            while len(flood) < count:
                flood.append(await c.run("one_at_a_time", payload))

        sending = asyncio.create_task(send_all())
        stops_reading = count * (size + 1024) > 70 * MIB
        if stops_reading:
            await c.worker.wait_for_log("nothing more is read")
        else:
            await sending
        # Meanwhile the rest goes on: a deadline, heartbeats, and what is running.
        assert (await late.result()).error_type == "timeout"
        beats = len(c.connection.registrations)
        await c.orchestrator.wait_until(lambda: len(c.connection.registrations) > beats + 2)
        assert sending.done() is not stops_reading
        go.touch()
        await first.output()
        await sending
        outputs = await asyncio.gather(*(handle.output(500) for handle in flood))
        assert {output["number"] for output in outputs} == {size}


async def test_a_cancel_behind_a_full_backlog_is_seen(tmp_path: Path) -> None:
    """It lies behind what is over the bound, and the run that it is for is the one that holds all up."""
    async with measured() as (c, _):
        stuck = await c.run("one_at_a_time", {"file": str(tmp_path / "never")})
        payload = msgspec.msgpack.encode({"data": os.urandom(MIB)})
        flood = [await c.run("one_at_a_time", payload) for _ in range(RUNS_BYTES // MIB + 2)]
        await c.worker.wait_for_log("nothing more is read")
        await stuck.cancel()
        assert (await stuck.result(60)).error_type == "canceled"
        for handle in flood:
            await handle.output(60)
        assert not c.worker.lines("more are answered `worker busy`"), "it was read only at the standstill"


async def test_large_payloads_and_large_results_together() -> None:
    """What waits to be sent stays in the executor's shared memory until then."""
    async with measured() as (c, _):
        payload = msgspec.msgpack.encode({"data": os.urandom(MIB)})
        handles = [await c.run("echo", payload) for _ in range(200)]
        for handle in handles:
            assert len((await handle.output(60))["data"]) == MIB
            handle.results.clear()


# -- floods of events -----------------------------------------------------------------------------


SOURCES = ("stream", "astream", "talk", "atalk")
"""Sync and async, deltas and log lines."""


@pytest.mark.parametrize("runs", [1, 64])
async def test_a_flood_of_tiny_events_holds_nobody_up(runs: int) -> None:
    await flood_with_events(SOURCES, max(1, runs // len(SOURCES)), 8000 // runs, limit_s=2)


@pytest.mark.soak
@pytest.mark.timeout(600)
@pytest.mark.parametrize("function", SOURCES)
@pytest.mark.parametrize("runs", [1, 64])
async def test_a_large_flood_of_tiny_events_holds_nobody_up(function: str, runs: int) -> None:
    await flood_with_events((function,), runs, 300_000 // runs, limit_s=5)


async def flood_with_events(functions: tuple[str, ...], runs: int, count: int, limit_s: float) -> None:
    order = Order()
    threads = {"WORKER_EXECUTOR_THREADS": "80", "WORKER_LOG_LEVEL": "info"}
    async with measured(on_message=order, env=threads) as (c, _):
        floods = [
            await c.run(function, {"count": count}, keep_events=False) for function in functions for _ in range(runs)
        ]
        await c.orchestrator.wait_until(lambda: any(handle.event_count for handle in floods))
        waits = []
        while not all(handle.done for handle in floods):
            before = time.monotonic()
            await c.call("echo", {"data": b"x"})
            waits.append(time.monotonic() - before)
        print(f"the longest wait of another run: {max(waits):.2f} s")
        assert max(waits) < limit_s, f"others waited {max(waits):.2f} s"
        assert order.wrong == []
        # Incremental runs end with an event of their own.
        assert all(handle.event_count == count + handle.function_name.endswith("stream") for handle in floods)


@pytest.mark.parametrize(("count", "size"), [(300_000, 1), (20_000, 1000)])
async def test_a_flood_of_printed_lines_is_cut_short(count: int, size: int) -> None:
    """Only the log suffers: the function is not slowed down to its pace, nor are others."""
    await print_much(count, size)


@pytest.mark.soak
@pytest.mark.timeout(300)
@pytest.mark.parametrize("size", [19, 1000, 100_000])
async def test_100_mb_of_printed_lines(size: int) -> None:
    await print_much(100_000_000 // (size + 1), size)


async def print_much(count: int, size: int) -> None:
    async with measured() as (c, _):
        handle = await c.run("shout", {"count": count, "size": size})
        waits = []
        while not handle.done:
            before = time.monotonic()
            await c.call("echo", {"data": b"x"})
            waits.append(time.monotonic() - before)
        await handle.output()
        print(f"the longest wait of another run: {max(waits):.2f} s")
        assert max(waits) < 1, f"others waited {max(waits):.2f} s"
        await c.worker.wait_for_log("lines of output were left out")


# -- a supervisor that does not read --------------------------------------------------------------


async def test_a_stopped_supervisor_does_not_fill_its_executor() -> None:
    order = Order()
    count = 4000
    async with measured(on_message=order) as (c, peaks):
        floods = [await c.run(function, {"count": count, "size": 4096}, keep_events=False) for function in SOURCES]
        await c.orchestrator.wait_until(lambda: all(handle.event_count > 20 for handle in floods))
        (executor,) = c.worker.executors()
        c.worker.signal(signal.SIGSTOP)
        await asyncio.sleep(1.0)
        before_s = sum(executor.cpu_times()[:2])
        await asyncio.sleep(0.3)
        assert sum(executor.cpu_times()[:2]) - before_s < 0.05, "it goes on"  # what looks now and then takes a tick
        c.worker.signal(signal.SIGCONT)
        await asyncio.gather(*(handle.output(60) for handle in floods))
        assert order.wrong == []
        assert all(handle.event_count == count + handle.function_name.endswith("stream") for handle in floods)
        assert peaks.executor < 100 * MIB, str(peaks)
