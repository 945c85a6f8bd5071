"""An executor that dies: what its runs are answered, how soon, and that nothing else is hurt."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from gen_worker.testing.mock_orchestrator import RunHandle
from gen_worker.wire import worker_scheduler_pb2 as pb
from tests.support.worker_process import (
    WAIT_S,
    Chain,
    all_of,
    chain,
    eventually,
    freeze,
    is_alive,
    wait_for_executors,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT_S = 1.0
"""How soon after a death its runs must be answered, and how soon nothing may be left of a dead supervisor."""


@pytest_asyncio.fixture(loop_scope="module")
async def two() -> AsyncIterator[Chain]:
    """Two executors, new for each test: one that died twice comes back late."""
    async with chain(executors=2) as found:
        yield found


def assert_crashed(result: pb.TaskExecutionResult, *words: str) -> None:
    assert not result.success
    assert (result.error_type, result.retryable) == ("retryable", True)
    assert result.safe_message == "worker process crashed"
    for word in words:
        assert word in result.error_message


async def pid_of(worker: Chain, handle: RunHandle) -> int:
    return int((await worker.event(handle, "started"))["pid"])


# -- the ways to die ------------------------------------------------------------------------------

DEATHS = [
    ("die", "SIGSEGV", "killed by SIGSEGV"),
    ("die", "SIGKILL", "killed by SIGKILL"),
    ("die", "SIGABRT", "killed by SIGABRT"),
    ("die", "null", "killed by SIGSEGV"),
    ("die", "exit", "exited with code 7"),
    ("die", "sys_exit", "exited with code 9"),
    ("adie", "exit", "exited with code 7"),
    ("adie", "sys_exit", "exited with code 9"),
    ("die", "garbage", "it sent garbage on its pipe"),
    ("die", "nonsense", "it sent a message that is not one"),
    ("die", "close_pipe", "exited with code 4"),
    ("die", "shut_pipe", "exited with code 4"),
]


@pytest.mark.parametrize(("function", "how", "cause"), DEATHS)
async def test_each_death_is_answered_at_once_and_costs_no_other(
    two: Chain, function: str, how: str, cause: str
) -> None:
    before = {executor.pid for executor in two.worker.executors()}
    sibling = await two.started("wait", {"seconds": 30})
    sibling_pid = await pid_of(two, sibling)
    (victim_pid,) = before - {sibling_pid}

    died_at = time.monotonic()
    handle = await two.run(function, {"how": how})  # goes to the executor that is idle
    assert_crashed(await handle.result(), cause, f"pid {victim_pid}", "executor ", function, f"last words before {how}")
    assert handle.results[0].at - died_at < PROMPT_S

    await wait_for_executors(two.orchestrator, 2, since=died_at)  # the replacement serves
    after = {executor.pid for executor in two.worker.executors()}
    assert sibling_pid in after
    assert victim_pid not in after
    assert len(after) == 2
    other = await two.started("wait", {"seconds": 30})
    assert await pid_of(two, other) == (after - {sibling_pid}).pop()

    assert not sibling.done
    for running in (sibling, other):
        await running.cancel()
        assert (await running.result()).error_type == "canceled"
    assert two.orchestrator.stream_count == 1


async def test_a_death_from_outside_is_answered_too(two: Chain) -> None:
    handles = [await two.started("wait", {"seconds": 30}) for _ in range(4)]
    victim = await pid_of(two, handles[0])
    killed_at = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    for handle in handles:
        if await pid_of(two, handle) == victim:
            assert_crashed(await handle.result(), "killed by SIGKILL", "wait", f"pid {victim}")
            assert handle.results[0].at - killed_at < PROMPT_S
        else:
            assert not handle.done
            await handle.cancel()
            assert (await handle.result()).error_type == "canceled"


async def test_every_run_of_the_dead_has_one_answer_and_those_that_waited_go_on(two: Chain) -> None:
    first, second = [await two.started("one_at_a_time", {"seconds": 30}) for _ in range(2)]
    waiting = [await two.run("one_at_a_time", {"seconds": 0}) for _ in range(3)]
    many = [await two.run("asleep", {"seconds": 30}) for _ in range(50)]
    await all_of(*(two.event(handle, "started") for handle in many))
    victim = await pid_of(two, first)
    lost = [first, *(handle for handle in many if handle.events[0].payload["pid"] == victim)]
    assert len(lost) > 10
    died_at = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    for handle in lost:
        assert_crashed(await handle.result(), "killed by SIGKILL")
    await wait_for_executors(two.orchestrator, 2, since=died_at)
    for handle in waiting:
        assert (await handle.output())["number"] == 1
    survivors = [second, *(handle for handle in many if handle not in lost)]
    assert not any(handle.done for handle in survivors)
    for handle in survivors:
        await handle.cancel()
        await handle.result()
    assert all(len(handle.results) == 1 for handle in (first, second, *waiting, *many))


async def test_a_stream_that_is_cut_keeps_what_it_had(two: Chain) -> None:
    stream = await two.run("ticks", {"seconds": 30})
    await two.orchestrator.wait_until(lambda: len(stream.deltas) > 5)
    for executor in two.worker.executors():
        executor.kill()
    assert_crashed(await stream.result(), "ticks")
    deltas = [delta["index"] for delta in stream.deltas]
    assert deltas == list(range(len(deltas)))
    assert [event.type for event in stream.events] == ["output.delta"] * len(deltas) + ["output.error"]
    assert stream.events[-1].payload == {"error_type": "retryable", "message": "worker process crashed"}


async def test_the_last_lines_survive_many_threads() -> None:
    """A crash dump of all threads must not push the tenant's last words out of the message."""
    async with chain() as worker:
        await all_of(*(worker.call("sleep", {"seconds": 0.3}) for _ in range(64)))
        result = await worker.result("die", {"how": "null"})
        assert_crashed(result, "last words before null", "Segmentation fault", "basic_functions.py", "_die")


async def test_answers_given_before_the_death_are_delivered(tmp_path: Path) -> None:
    """The supervisor is stopped while its executor answers and dies, and finds both when it goes on."""
    signal_file = tmp_path / "go"
    async with chain() as worker:
        (executor,) = worker.worker.executors()
        answered = [await worker.started("wait_for_file", {"how": str(signal_file)}) for _ in range(20)]
        lost = await worker.started("die_after_others", {"how": str(signal_file)})
        await freeze(worker.worker.pid)
        try:
            signal_file.touch()
            await eventually(lambda: not is_alive(executor.pid), what="the executor's death")
        finally:
            worker.worker.signal(signal.SIGCONT)
        assert_crashed(await lost.result(), "killed by SIGKILL")
        for handle in answered:
            assert (await handle.output())["text"] == "seen"


# -- what dies with it ----------------------------------------------------------------------------


async def test_what_a_function_started_dies_with_its_executor(two: Chain) -> None:
    child = (await two.call("spawn_child", {"seconds": 600}))["pid"]
    assert is_alive(child)
    owner = psutil.Process(child).ppid()
    died_at = time.monotonic()
    os.kill(owner, signal.SIGKILL)
    await eventually(lambda: not is_alive(child), PROMPT_S, what="the end of what the function started")
    assert time.monotonic() - died_at < PROMPT_S


@pytest.mark.parametrize("busy_with", ["nothing", "wait", "hold_gil", "ablock"])
async def test_a_killed_supervisor_leaves_no_executor(busy_with: str) -> None:
    async with chain(executors=2) as worker:
        executors = [executor.pid for executor in worker.worker.executors()]
        if busy_with != "nothing":
            for _ in executors:
                await worker.started(busy_with, {"seconds": 20})
        worker.worker.signal(signal.SIGKILL)
        await worker.worker.process.wait()
        await eventually(lambda: not any(map(is_alive, executors)), PROMPT_S, what="the executors' end")


# -- and comes back -------------------------------------------------------------------------------


async def test_the_replacement_comes_at_once_the_first_time(two: Chain) -> None:
    died_at = time.monotonic()
    await two.result("die", {"how": "SIGKILL"})
    await wait_for_executors(two.orchestrator, 2, since=died_at)
    ready_at = time.monotonic()
    (line,) = two.worker.lines("replaced in 0 s")
    assert "killed by SIGKILL" in line
    assert ready_at - died_at < WAIT_S


async def test_a_second_death_soon_after_is_followed_by_a_pause() -> None:
    async with chain() as worker:
        for how in ("SIGKILL", "SIGABRT"):
            died_at = time.monotonic()
            assert_crashed(await worker.result("die", {"how": how}), how)
            await wait_for_executors(worker.orchestrator, 1, since=died_at)
        assert len(worker.worker.lines("replaced in 0 s")) == 1
        assert len(worker.worker.lines("replaced in 1 s")) == 1
        assert (await worker.call("echo", {"text": "still here"}))["text"] == "still here"


async def test_a_request_that_kills_three_executors_is_refused_from_then_on() -> None:
    """A scheduler sends a `retryable` run again; one such request must not take executor after executor with it."""
    async with chain(executors=3) as worker:
        for _ in range(3):  # each on another executor, so that none is waited for
            assert_crashed(await worker.result("die", {"how": "SIGABRT"}), "killed by SIGABRT")
        result = await worker.result("die", {"how": "SIGABRT"})
        assert (result.error_type, result.retryable) == ("fatal", False)
        assert "3" in result.error_message
        await wait_for_executors(worker.orchestrator, 3)
        # Another payload of the same function is another request.
        assert_crashed(await worker.result("die", {"how": "SIGKILL"}), "killed by SIGKILL")
