"""No process is left behind, none is left dead, and nothing adds up: with real processes and real signals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from gen_worker.testing.mock_orchestrator import MockOrchestrator
from supervisor.oom import OomCounter, OomWatch
from tests.support.executor_pool import Listener, executor_pool
from tests.support.other_user import unshares
from tests.support.worker_process import (
    PROGRAM,
    WAIT_S,
    Chain,
    WorkerProcess,
    catches,
    eventually,
    is_alive,
)

CONTAINER = ("unshare", "--pid", "--fork", "--mount-proc", "--kill-child=KILL")
GONE_S = 1.0


@contextlib.asynccontextmanager
async def isolation_chain(env: Mapping[str, str] | None = None, **options: object) -> AsyncIterator[Chain]:
    async with (
        MockOrchestrator() as orchestrator,
        WorkerProcess(
            orchestrator.address,
            tenant="isolation",
            modules="isolation_functions",
            env=env,
            **options,  # type: ignore[arg-type]
        ) as worker,
    ):
        await orchestrator.wait_for_worker(timeout=WAIT_S)
        yield Chain(orchestrator, worker)


def zombies_of(pid: int) -> list[int]:
    """The dead children of a process that it has not waited for."""
    return [child.pid for child in psutil.Process(pid).children() if child.is_running() and not is_alive(child.pid)]


async def gone(pids: list[int], what: str, within_s: float = GONE_S) -> None:
    await eventually(lambda: not any(is_alive(pid) for pid in pids), within_s, what)


# -- the supervisor is killed ---------------------------------------------------------------------


async def test_sigkill_of_the_supervisor_leaves_nothing() -> None:
    """Not the executor that holds the interpreter's lock, nor what tenant code started, nor what that detached."""
    async with isolation_chain({"WORKER_EXECUTORS": "1"}) as chain:
        started = (await chain.call("start", {}))["pid"]
        daemon = (await chain.call("daemonize", {"how": "sleep 60"}))["pid"]
        await chain.started("hold_gil", {})
        everyone = [process.pid for process in chain.worker.descendants()]
        assert {started, daemon} <= set(everyone)
        chain.worker.process.kill()
        await gone(everyone, "all that the supervisor and tenant code started")


async def test_what_a_dead_executor_detached_is_killed_and_what_a_live_one_did_is_not() -> None:
    async with isolation_chain({"WORKER_EXECUTORS": "2"}) as chain:
        await eventually(lambda: len(chain.worker.lines("is ready: ")) == 2, what="both executors are ready")
        busy = await chain.started("wait", {})
        theirs = await chain.call("daemonize", {"how": "sleep 60 & sleep 61"})  # at the one that is idle
        await chain.started("wait", {})
        await busy.cancel()
        await busy.result(WAIT_S)
        others = await chain.call("daemonize", {"how": "sleep 60"})
        assert theirs["parent"] != others["parent"]

        family = [theirs["pid"], *(child.pid for child in psutil.Process(theirs["pid"]).children())]
        assert len(family) > 1
        os.kill(theirs["parent"], signal.SIGKILL)
        await gone(family, "the daemon of the dead executor and its child")
        await eventually(lambda: not zombies_of(chain.worker.pid), what="all of it is reaped")
        assert is_alive(others["pid"])
        chain.worker.signal(signal.SIGTERM)
        chain.worker.signal(signal.SIGTERM)
        await chain.worker.exit_code(5.0)
        assert not is_alive(others["pid"])


async def test_a_drain_leaves_no_process() -> None:
    async with isolation_chain() as chain:
        await chain.call("start", {})
        await chain.call("daemonize", {"how": "trap '' TERM HUP; sleep 60"})
        everyone = [process.pid for process in chain.worker.descendants()]
        chain.worker.signal(signal.SIGTERM)
        assert await chain.worker.exit_code() == 0
        assert [pid for pid in everyone if is_alive(pid)] == []


async def test_a_second_signal_leaves_no_process() -> None:
    async with isolation_chain() as chain:
        await chain.call("daemonize", {"how": "sleep 60"})
        await chain.started("hold_gil", {})
        everyone = [process.pid for process in chain.worker.descendants()]
        chain.worker.signal(signal.SIGTERM)
        await chain.worker.wait_for_log("stopping: SIGTERM")
        chain.worker.signal(signal.SIGINT)
        assert await chain.worker.exit_code(5.0) == 6
        assert [pid for pid in everyone if is_alive(pid)] == []


async def test_a_dead_guard_is_reaped() -> None:
    async with isolation_chain() as chain:
        guard = next(
            each for each in psutil.Process(chain.worker.pid).children() if "guard.py" in " ".join(each.cmdline())
        )
        guard.kill()
        await eventually(lambda: not psutil.pid_exists(guard.pid), what="the guard is reaped")
        chain.worker.signal(signal.SIGTERM)
        assert await chain.worker.exit_code() == 0


# -- as PID 1 -------------------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def container() -> AsyncIterator[tuple[Chain, psutil.Process]]:
    """A worker that is PID 1 of a namespace, and its process as it is seen from here."""
    if reason := unshares(*CONTAINER[1:]):
        pytest.skip(reason)
    async with isolation_chain(command=(*CONTAINER, PROGRAM)) as chain:
        (supervisor,) = psutil.Process(chain.worker.pid).children()
        yield chain, supervisor


def strangers(supervisor: psutil.Process) -> list[list[str]]:
    """The command lines of children that are none of the worker's own; a zombie's is empty."""
    lines = [child.cmdline() for child in supervisor.children()]
    return [line for line in lines if not {"executor", "supervisor.transfers"} & set(line)]


async def test_as_pid_1_it_reaps_what_tenant_code_detached() -> None:
    async with container() as (chain, supervisor):
        for _ in range(5):
            # It ends when its parent has: nobody but PID 1 can take its status.
            await chain.call("daemonize", {"how": "exit 3"})
        await chain.call("daemonize", {"how": "sleep 60 & sleep 61"})
        handle = await chain.run("die", {"how": "SIGKILL"})
        assert (await handle.result(WAIT_S)).error_type == "retryable"
        await chain.worker.wait_for_log("executor 0.1 is ready")
        # The new executor and the transfer process: the daemon and its children are dead and reaped.
        await eventually(lambda: strangers(supervisor) == [], GONE_S, "none but the worker's own is left")
        assert (await chain.call("look_around", {}))["parent"] == 1


async def test_as_pid_1_it_drains_by_sigterm() -> None:
    async with container() as (chain, supervisor):
        handle = await chain.started("wait", {})
        supervisor.send_signal(signal.SIGTERM)
        await chain.worker.wait_for_log("stopping: SIGTERM")
        late = await chain.result("look_around", {})
        assert (late.error_type, late.safe_message) == ("retryable", "worker busy")
        await handle.cancel()
        assert (await handle.result(WAIT_S)).error_type == "canceled"
        assert await chain.worker.exit_code() == 0


async def test_as_pid_1_it_can_be_stopped_before_it_serves() -> None:
    """The kernel drops a signal that PID 1 has no handler for."""
    if reason := unshares(*CONTAINER[1:]):
        pytest.skip(reason)
    async with WorkerProcess("127.0.0.1:1", command=(*CONTAINER, PROGRAM)) as worker:
        await eventually(lambda: psutil.Process(worker.pid).children(), what="the supervisor is there")
        (supervisor,) = psutil.Process(worker.pid).children()
        await eventually(lambda: catches(supervisor.pid, signal.SIGTERM), what="it has a handler")
        supervisor.send_signal(signal.SIGTERM)
        assert await worker.exit_code(5.0) == 0


# -- many crashes ---------------------------------------------------------------------------------


async def measured(what: str) -> dict[str, Any]:
    """What a fresh process says of many crashes of its children: pytest's own heap is none of the matter."""
    program = [sys.executable, "-m", "tests.support.crash_figures", what]
    process = await asyncio.create_subprocess_exec(*program, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert process.returncode == 0
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.parametrize(("what", "more_bytes"), [("children", 2**20), ("executors", 4 * 2**20)])
async def test_many_crashes_cost_nothing(what: str, more_bytes: int) -> None:
    """A leak of some KiB by each of 200 deaths shows, as does one of some 100 KiB by each of 20."""
    found = await measured(what)
    before, after = found["before"], found["after"]
    assert set(found["causes"]) == {"killed by SIGKILL"}
    assert after["fds"] == before["fds"]
    assert after["zombies"] == before["zombies"] == 0
    assert after["rss"] - before["rss"] < more_bytes
    assert found.get("left", 0) == 0


async def test_an_executor_that_the_oom_killer_took_is_said_to_be(tmp_path: Path) -> None:
    """The count rises, then comes the SIGKILL; what raises the count here is the test."""
    events = tmp_path / "memory.events"
    events.write_text("oom 0\noom_kill 0\n")
    listener = Listener()
    watch = OomWatch(OomCounter(events, "the cgroup"))
    pool = executor_pool(listener, 1, explain=watch.explain)
    pool.start()
    await eventually(lambda: pool.ready, what="it is ready")
    events.write_text("oom 1\noom_kill 1\n")
    os.kill(pool.ready[0].pid, signal.SIGKILL)
    await eventually(lambda: pool.ready and listener.causes, what="it was replaced")
    os.kill(pool.ready[0].pid, signal.SIGKILL)
    await eventually(lambda: len(listener.causes) == 2, what="the next one died")
    await pool.stop("the test ends", 0)
    assert listener.causes[:2] == [
        "killed by SIGKILL (the kernel's OOM killer: the cgroup ran out of memory)",
        "killed by SIGKILL",
    ]
