"""Many runs at once: who takes them, how many of them, and what a full worker answers."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import psutil
import pytest
import pytest_asyncio

from gen_worker.testing.mock_orchestrator import RunHandle
from tests.support.worker_process import WAIT_S, Chain, all_of, chain

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX_THREADS = 100


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def one(worker_transport: str) -> AsyncIterator[Chain]:
    async with chain(executors=1) as found:
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two(worker_transport: str) -> AsyncIterator[Chain]:
    """Two executors with two threads each."""
    async with chain(executors=2, env={"WORKER_EXECUTOR_THREADS": "2"}) as found:
        yield found


async def end(*handles: RunHandle) -> None:
    for handle in handles:
        await handle.cancel()
    for handle in handles:
        await handle.result()


# -- a thousand at once ---------------------------------------------------------------------------


async def thread_peak(worker: Chain, running: asyncio.Future[Any]) -> int:
    """The most threads that any process of the worker had while `running` was not done."""
    processes = [psutil.Process(worker.worker.pid), *worker.worker.executors()]
    peak = 0
    while not running.done():
        peak = max(peak, *(process.num_threads() for process in processes))
        await asyncio.sleep(0.02)
    return peak


@pytest.mark.parametrize(("function", "least_s"), [("sleep", 0.2 * 1000 / 64), ("asleep", 0.2)])
async def test_a_thousand_runs_at_once_are_all_answered_by_few_threads(
    one: Chain, function: str, least_s: float
) -> None:
    started = time.monotonic()
    handles = [await one.run(function, {"seconds": 0.2}, keep_events=False) for _ in range(1000)]
    answers = asyncio.ensure_future(all_of(*(handle.result(WAIT_S) for handle in handles)))
    peak = await thread_peak(one, answers)
    assert all(result.success for result in answers.result())
    assert peak <= MAX_THREADS
    assert time.monotonic() - started >= least_s
    assert all(len(handle.results) == 1 for handle in handles)


async def test_async_runs_need_no_threads_and_have_no_limit(one: Chain) -> None:
    """Far more than the threads of an executor are inside at the same moment."""
    handles = [await one.run("asleep", {"seconds": 30}) for _ in range(500)]
    await all_of(*(one.event(handle, "started") for handle in handles))
    (executor,) = one.worker.executors()
    assert executor.num_threads() <= MAX_THREADS
    assert not any(handle.done for handle in handles)
    assert (await one.call("echo", {"text": "not kept waiting"}))["text"] == "not kept waiting"
    await end(*handles)


async def test_waiting_runs_start_in_their_order(one: Chain) -> None:
    first = await one.started("one_at_a_time", {"seconds": 30})
    others = [await one.run("one_at_a_time", {"seconds": 0}) for _ in range(10)]
    await end(first)
    await all_of(*(handle.result() for handle in others))
    ends = [handle.results[0].at for handle in others]
    assert ends == sorted(ends)


# -- limits of a function -------------------------------------------------------------------------


async def test_max_concurrency_holds_on_each_executor(two: Chain) -> None:
    """The function itself counts how many of it are inside of its process."""
    outputs = await all_of(*(two.call("one_at_a_time", {"seconds": 0.02}) for _ in range(20)))
    assert [output["number"] for output in outputs] == [1] * 20
    assert len({output["pid"] for output in outputs}) == 2


async def test_max_concurrency_is_reported_as_the_sum_over_executors(one: Chain, two: Chain) -> None:
    assert one.resources.function_concurrency["one_at_a_time"] == 1
    assert two.resources.function_concurrency["one_at_a_time"] == 2
    assert "echo" not in two.resources.function_concurrency  # it has no limit


async def test_a_limited_function_lets_others_pass(two: Chain) -> None:
    both = [await two.started("one_at_a_time", {"seconds": 30}) for _ in range(2)]
    third = await two.run("one_at_a_time", {"seconds": 0})
    assert (await two.call("echo", {"text": "passes"}))["text"] == "passes"
    assert third.events == []
    assert not third.done
    await end(both[0])
    assert (await third.output())["number"] == 1
    await end(both[1])


# -- two executors --------------------------------------------------------------------------------


async def test_two_executors_share_the_load(two: Chain) -> None:
    handles = [await two.started("wait", {"seconds": 30}) for _ in range(4)]
    pids = Counter(handle.events[0].payload["pid"] for handle in handles)
    assert sorted(pids.values()) == [2, 2]
    assert set(pids) == {executor.pid for executor in two.worker.executors()}
    await end(*handles)


async def test_an_idle_executor_never_waits(two: Chain) -> None:
    """A run that came first and can't go on holds up neither executor for those behind it."""
    busy = [await two.started("wait", {"seconds": 30}) for _ in range(4)]  # all four threads
    waiting = await two.run("sleep", {"seconds": 0})
    # Async functions need no thread.
    assert (await two.call("aecho", {"text": "no thread"}))["text"] == "no thread"
    assert not waiting.done
    await end(busy[0])
    assert (await waiting.output())["pid"] == busy[0].events[0].payload["pid"]  # the one with room
    await end(*busy[1:])


async def test_runs_of_uneven_length_leave_no_executor_idle(two: Chain) -> None:
    """One executor is full of long runs; the short ones behind them all go through the other."""
    limited = [await two.started("one_at_a_time", {"seconds": 30})]
    long_pid = limited[0].events[0].payload["pid"]
    outputs = await all_of(*(two.call("one_at_a_time", {"seconds": 0}) for _ in range(10)))
    assert {output["pid"] for output in outputs} == {e.pid for e in two.worker.executors()} - {long_pid}
    await end(*limited)


# -- a full worker --------------------------------------------------------------------------------


async def test_past_worker_max_concurrency_the_answer_is_worker_busy() -> None:
    async with chain(executors=2, env={"WORKER_MAX_CONCURRENCY": "3"}) as worker:
        assert worker.resources.max_concurrency == 3
        active = [await worker.started("wait", {"seconds": 30}) for _ in range(3)]
        for function in ("echo", "aecho", "count"):
            result = await worker.result(function, {"count": 1})
            assert (result.error_type, result.retryable, result.safe_message) == ("retryable", True, "worker busy")
            assert "WORKER_MAX_CONCURRENCY" in result.error_message
        await end(active[0])
        assert (await worker.call("echo", {"text": "room again"}))["text"] == "room again"
        await end(*active[1:])


async def test_waiting_runs_count_as_runs_of_the_worker() -> None:
    async with chain(executors=1, env={"WORKER_MAX_CONCURRENCY": "2"}) as worker:
        first = await worker.started("one_at_a_time", {"seconds": 30})
        second = await worker.run("one_at_a_time", {"seconds": 0})
        third = await worker.result("one_at_a_time", {"seconds": 0})
        assert third.safe_message == "worker busy"
        await end(first)
        assert (await second.output())["number"] == 1


async def test_without_worker_max_concurrency_none_is_refused(one: Chain) -> None:
    assert one.resources.max_concurrency == 0
    handles = [await one.run("echo", {"text": str(number)}) for number in range(2000)]
    outputs = await all_of(*(handle.output(WAIT_S) for handle in handles))
    assert [output["text"] for output in outputs] == [str(number) for number in range(2000)]
