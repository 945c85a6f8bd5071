"""Measures of the worker that have no floor: its start, the replacement of an executor, its memory, its loop."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
import psutil
from load import START_S, LoadScheduler, RunFailed, subject
from measures import DRIVEN, SMALL

from supervisor.status import Status

HERE: Final = Path(__file__).resolve().parent
WORKER: Final = (sys.executable, "-m", "gen_worker.entrypoint")


async def until_serving(scheduler: LoadScheduler, executors: int) -> None:
    """Wait until so many executors serve, as the registration says."""
    async with asyncio.timeout(START_S):
        while scheduler.resources.function_concurrency["once"] != executors:
            await asyncio.sleep(0.002)


async def first_registration(env: dict[str, str], cwd: str, executors: int) -> tuple[float, float]:
    """Seconds from the start of the process to its registration, and until all its executors serve."""
    begin = time.monotonic()
    async with subject("worker", WORKER, env, cwd) as worker:
        registered = worker.scheduler.registered_at - begin
        await until_serving(worker.scheduler, executors)
        return registered, time.monotonic() - begin


async def executor_replaced(env: dict[str, str], cwd: str) -> float:
    """Seconds from the kill of the only executor to the first run after it that succeeds; a spare is waited for.

    One that reaches the dead process before the supervisor has noticed is answered `retryable`, and sent again.
    """
    port = free_port()
    async with subject("worker", WORKER, {**env, "WORKER_HTTP_ADDR": f"127.0.0.1:{port}"}, cwd) as worker:
        await worker.scheduler.drive("echo", SMALL, runs=200, window=16)
        status = await _status(port)
        async with asyncio.timeout(START_S):
            while env.get("WORKER_WARM_SPARE") and (status.spare is None or status.spare.state != "parked"):
                await asyncio.sleep(0.05)
                status = await _status(port)
        os.kill(status.executors[0].pid, signal.SIGKILL)
        executor_died = time.monotonic()
        while True:
            with suppress(RunFailed):
                await worker.scheduler.drive("echo", SMALL, runs=1, window=1)
                return time.monotonic() - executor_died


async def _status(port: int) -> Status:
    body = await asyncio.to_thread(read, f"http://127.0.0.1:{port}/status")
    return msgspec.json.decode(body, type=Status)


def read(url: str) -> bytes:
    """What a worker answers over HTTP."""
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310  (our own worker's)
        return bytes(answer.read())


def free_port() -> int:
    """A port of the loopback that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


async def resident(env: dict[str, str], cwd: str, runs: int, steps: int = 10) -> list[int]:
    """Bytes of the supervisor after each tenth of the runs."""
    async with subject("worker", WORKER, env, cwd) as worker:
        process = psutil.Process(worker.process.pid)
        found = []
        for _ in range(steps):
            await worker.scheduler.drive("echo", SMALL, runs=runs // steps, window=64)
            found.append(process.memory_info().rss)
        return found


async def stalls(env: dict[str, str], cwd: str, report: Path) -> tuple[float, float]:
    """How long the supervisor's loop was held up at worst while all the measures ran, and its CPU at a stretch."""
    command = (sys.executable, str(HERE / "watched_worker.py"))
    async with subject(
        "worker", command, {**env, "BENCH_STALLS": str(report), "PYTHONPATH": str(HERE.parent)}, cwd
    ) as worker:
        worker.process.send_signal(signal.SIGUSR1)  # what the start held up is none of this
        for measure in DRIVEN:
            await worker.scheduler.drive(measure.function, measure.payload, runs=measure.runs, window=measure.window)
        worker.process.send_signal(signal.SIGUSR1)
        async with asyncio.timeout(10):
            while not report.exists() or len(lines := report.read_text().splitlines()) < 2:
                await asyncio.sleep(0.05)
    late, busy = map(float, lines[-1].split())
    return late, busy
