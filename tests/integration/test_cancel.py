"""Cancels and deadlines: asked first, interrupted then, killed at last; and what that costs the others."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gen_worker.testing.mock_orchestrator import RunHandle
from gen_worker.wire import worker_scheduler_pb2 as pb
from tests.integration.test_models import artifacts
from tests.support.worker_process import WAIT_S, Chain, chain, wait_for_executors

pytestmark = pytest.mark.asyncio(loop_scope="module")

GRACE_S = 0.5
"""WORKER_CANCEL_GRACE_SECONDS where an executor is killed (tests/support/worker_process.py)."""
LONG_GRACE_S = 10.0
"""The same where none must be: far longer than it takes to end."""
SLACK_S = 3.0
"""What may pass beyond the grace time until the result is here, on a loaded machine."""
CANCELED = ("canceled", False, "canceled")
TIMED_OUT = ("timeout", False, "deadline exceeded")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(worker_transport: str) -> AsyncIterator[Chain]:
    """For the tests that cost no executor."""
    async with chain(env={"WORKER_CANCEL_GRACE_SECONDS": str(LONG_GRACE_S)}) as found:
        yield found


def answer(result: pb.TaskExecutionResult) -> tuple[str, bool, str]:
    assert not result.success
    return result.error_type, result.retryable, result.safe_message


async def executor_pid(worker: Chain) -> int:
    return int((await worker.call("sleep", {"seconds": 0}))["pid"])


async def started(worker: Chain, function: str, **fields: Any) -> RunHandle:
    """Start a run and wait until it surely runs."""
    handle = await worker.run(function, {"seconds": 30}, **fields)
    await worker.event(handle, "output.delta" if function.endswith("ticks") else "started")
    return handle


# -- those that end when asked, or when interrupted -----------------------------------------------

COOPERATIVE = ["wait", "asleep", "ticks", "aticks"]


@pytest.mark.parametrize("function", COOPERATIVE)
async def test_a_function_that_can_end_does_so_without_the_grace_time(worker: Chain, function: str) -> None:
    pid = await executor_pid(worker)
    handle = await started(worker, function)
    canceled_at = time.monotonic()
    await handle.cancel()
    assert answer(await handle.result()) == CANCELED
    assert handle.results[0].at - canceled_at < LONG_GRACE_S / 2, "it was not asked, but interrupted"
    assert await executor_pid(worker) == pid


async def test_pure_python_that_never_looks_is_interrupted_half_way_through_the_grace_time() -> None:
    async with chain(env={"WORKER_CANCEL_GRACE_SECONDS": "2"}) as worker:
        pid = await executor_pid(worker)
        overdue = await worker.started("spin", {"seconds": 30}, timeout_ms=500)
        canceled = await worker.started("spin", {"seconds": 30})
        canceled_at = time.monotonic()
        await canceled.cancel()
        assert answer(await canceled.result()) == CANCELED
        assert canceled.results[0].at - canceled_at >= 1
        assert answer(await overdue.result()) == TIMED_OUT
        assert overdue.results[0].at - overdue.sent_at >= 0.5 + 1
        assert await executor_pid(worker) == pid, "the executor went on"


@pytest.mark.parametrize("function", ["ticks", "aticks"])
async def test_a_canceled_stream_ends_with_an_error_event(worker: Chain, function: str) -> None:
    handle = await started(worker, function)
    await handle.cancel()
    await handle.result()
    types = [event.type for event in handle.events]
    assert types == ["output.delta"] * (len(types) - 1) + ["output.error"]
    assert handle.events[-1].payload == {"error_type": "canceled", "message": "canceled"}
    assert [delta["index"] for delta in handle.deltas] == list(range(len(handle.deltas)))


async def test_a_waiting_run_is_canceled_at_once_and_never_starts(worker: Chain) -> None:
    first = await started(worker, "one_at_a_time")
    second, third = [await worker.run("one_at_a_time", {"seconds": 0}) for _ in range(2)]
    canceled_at = time.monotonic()
    await second.cancel()
    assert answer(await second.result()) == CANCELED
    assert second.results[0].at - canceled_at < LONG_GRACE_S / 2
    assert not first.done
    await first.cancel()
    assert answer(await first.result()) == CANCELED
    assert (await third.output())["number"] == 1
    assert second.events == []


async def test_a_run_that_waits_for_its_model_is_canceled_at_once(tmp_path: Path) -> None:
    env = {"WORKER_MODEL_ARTIFACTS_JSON": artifacts(tmp_path, small={"seconds": "0.7"})}
    async with chain(env=env) as worker:
        canceled = await worker.run("use_thing", {"seconds": 0})
        overdue = await worker.run("use_thing", {"seconds": 0}, timeout_ms=100)
        other = await worker.run("use_thing", {"seconds": 0})
        await worker.worker.wait_for_log("loading small")
        await canceled.cancel()
        assert answer(await canceled.result()) == CANCELED
        assert answer(await overdue.result()) == TIMED_OUT
        assert not other.done
        assert (await other.output())["loads"] == 1


async def test_a_second_cancel_and_one_after_the_end_change_nothing(worker: Chain) -> None:
    handle = await started(worker, "wait")
    await handle.cancel()
    await handle.cancel()
    assert answer(await handle.result()) == CANCELED
    await handle.cancel()
    done = await worker.run("echo", {"text": "done"})
    await done.output()
    await done.cancel()
    await worker.call("echo")
    assert (len(handle.results), len(done.results)) == (1, 1)


async def test_a_cancel_ends_its_own_run_alone(worker: Chain) -> None:
    handles = [await started(worker, function) for function in ("wait", "asleep", "wait", "asleep")]
    for handle in handles[:2]:
        await handle.cancel()
        assert answer(await handle.result()) == CANCELED
    assert not any(handle.done for handle in handles[2:])
    for handle in handles[2:]:
        await handle.cancel()
        await handle.result()


async def test_no_cancel_hits_a_later_run_on_the_same_thread(worker: Chain) -> None:
    """What is meant for one run must not show up in the next that its thread takes."""
    for number in range(30):
        handle = await worker.run("spin", {"seconds": 0.02})
        if number % 2:
            await worker.event(handle, "started")
        await handle.cancel()
        after = [await worker.run("spin", {"seconds": 0.01}) for _ in range(2)]
        await handle.result()
        assert [(await run.result()).success for run in after] == [True, True]


# -- those that do not ----------------------------------------------------------------------------


STUBBORN = ["block", "hold_gil", "swallow", "aswallow", "ablock"]


async def test_functions_that_do_not_end_cost_their_executors() -> None:
    """Each has an executor of its own here, so none can be another's fault."""
    async with chain(executors=len(STUBBORN)) as worker:
        handles = [await started(worker, function) for function in STUBBORN]
        pids = {handle.events[0].payload["pid"] for handle in handles}
        assert len(pids) == len(STUBBORN)
        canceled_at = time.monotonic()
        for handle in handles:
            await handle.cancel()
        for handle in handles:
            result = await handle.result()
            assert answer(result) == CANCELED
            assert "its executor was killed" in result.error_message
            assert GRACE_S <= handle.results[0].at - canceled_at < GRACE_S + SLACK_S
        await wait_for_executors(worker.orchestrator, len(STUBBORN), since=canceled_at)
        assert pids.isdisjoint(executor.pid for executor in worker.worker.executors())
        assert [len(handle.results) for handle in handles] == [1] * len(STUBBORN)


@pytest.mark.parametrize("function", ["hold_gil", "swallow"])
async def test_siblings_of_a_killed_run_are_retryable_and_other_executors_unhurt(function: str) -> None:
    async with chain(executors=2) as worker:
        stubborn = await started(worker, function)
        pid = stubborn.events[0].payload["pid"]
        # Sent while the executor may not even read: some go there, the others to the other one.
        siblings = [await worker.run("wait", {"seconds": 30}) for _ in range(6)]
        await stubborn.cancel()
        assert answer(await stubborn.result()) == CANCELED

        def is_decided(sibling: RunHandle) -> bool:
            return sibling.done or (bool(sibling.events) and sibling.events[0].payload["pid"] != pid)

        await worker.orchestrator.wait_until(lambda: all(map(is_decided, siblings)), WAIT_S)
        lost = [handle for handle in siblings if handle.done]
        kept = [handle for handle in siblings if not handle.done]
        assert lost
        assert kept
        for handle in lost:
            result = await handle.result()
            assert answer(result) == ("retryable", True, "worker process crashed")
            assert stubborn.run_id in result.error_message  # who is to blame
        for handle in kept:
            await handle.cancel()
            assert answer(await handle.result()) == CANCELED


# -- deadlines ------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", COOPERATIVE)
async def test_a_deadline_ends_a_run_as_a_cancel_does(worker: Chain, function: str) -> None:
    pid = await executor_pid(worker)
    sent_at = time.monotonic()
    handle = await worker.run(function, {"seconds": 30}, timeout_ms=200)
    result = await handle.result()
    assert answer(result) == TIMED_OUT
    assert "timeout_ms of 200" in result.error_message
    assert 0.2 <= handle.results[0].at - sent_at < 0.2 + LONG_GRACE_S / 2
    assert await executor_pid(worker) == pid
    if function.endswith("ticks"):
        assert handle.events[-1].type == "output.error"
        assert handle.events[-1].payload["error_type"] == "timeout"


async def test_a_deadline_holds_for_what_does_not_end() -> None:
    async with chain(executors=len(STUBBORN)) as worker:
        handles = [await worker.run(function, {"seconds": 30}, timeout_ms=200) for function in STUBBORN]
        for handle in handles:
            assert answer(await handle.result()) == TIMED_OUT
            assert 0.2 + GRACE_S <= handle.results[0].at - handle.sent_at < 0.2 + GRACE_S + SLACK_S
        assert (await worker.call("echo", {"text": "after"}))["text"] == "after"


async def test_a_deadline_counts_from_the_arrival_also_while_a_run_waits(worker: Chain) -> None:
    first = await started(worker, "one_at_a_time")
    sent_at = time.monotonic()
    waiting = await worker.run("one_at_a_time", {"seconds": 0}, timeout_ms=150)
    assert answer(await waiting.result()) == TIMED_OUT
    assert 0.15 <= waiting.results[0].at - sent_at < 0.15 + SLACK_S
    assert not first.done
    late = await worker.run("one_at_a_time", {"seconds": 30}, timeout_ms=600)
    await first.cancel()
    await worker.event(late, "started")
    assert answer(await late.result()) == TIMED_OUT  # what it waited is part of its 600 ms
    assert late.results[0].at - late.sent_at < 0.6 + GRACE_S + SLACK_S
    assert waiting.events == []


async def test_a_run_that_ends_in_time_knows_no_deadline(worker: Chain) -> None:
    assert (await worker.call("wait", {"seconds": 0.05}, timeout_ms=20_000))["text"] == "waited"


async def test_a_cancel_before_the_deadline_is_a_cancel(worker: Chain) -> None:
    handle = await started(worker, "wait", timeout_ms=10_000)
    await handle.cancel()
    assert answer(await handle.result()) == CANCELED


@pytest.mark.parametrize("timeout_ms", [0, -5, 2**62])
async def test_odd_timeouts_do_not_end_a_run(worker: Chain, timeout_ms: int) -> None:
    assert (await worker.call("wait", {"seconds": 0.05}, timeout_ms=timeout_ms))["text"] == "waited"
