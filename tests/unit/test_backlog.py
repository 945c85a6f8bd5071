"""When the scheduler is read no further, and when its runs are refused instead."""

from __future__ import annotations

import asyncio

import pytest

from supervisor import backlog as module
from supervisor.backlog import ANSWERS_BYTES, RUNS_BYTES, Backlog
from tests.support.rig import Rig, function, use_recording_children

HALF = RUNS_BYTES // 2


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


@pytest.fixture
def backlog(time: Time) -> Backlog:
    return Backlog(time)


async def is_waiting(task: asyncio.Future[None]) -> bool:
    for _ in range(5):
        await asyncio.sleep(0)
    return not task.done()


async def test_runs_that_wait_stop_the_reading_until_one_leaves(backlog: Backlog) -> None:
    backlog.run_waits(HALF)
    assert not backlog.full
    await backlog.room()
    backlog.run_waits(HALF)
    assert backlog.full
    room = asyncio.ensure_future(backlog.room())
    assert await is_waiting(room)
    backlog.run_left(HALF)
    await asyncio.wait_for(room, 5)
    assert not backlog.full


def test_tiny_runs_count_too(backlog: Backlog) -> None:
    for _ in range(RUNS_BYTES // module.RUN_OVERHEAD_BYTES + 1):
        backlog.run_waits(0)
    assert backlog.full


async def test_answers_that_wait_stop_the_reading(backlog: Backlog) -> None:
    backlog.answer_waits(ANSWERS_BYTES + 1)
    backlog.run_waits(3 * HALF)
    room, more = asyncio.ensure_future(backlog.room()), asyncio.ensure_future(backlog.room_for_answers())
    assert await is_waiting(room)
    assert await is_waiting(more)
    backlog.run_left(3 * HALF)
    assert await is_waiting(room)
    backlog.answer_left(1)
    await asyncio.wait_for(room, 5)
    await asyncio.wait_for(more, 5)
    assert not backlog.full


async def test_at_a_standstill_of_answers_one_more_batch_is_read(
    backlog: Backlog, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream may have ended: its status then lies behind what is not read."""
    monkeypatch.setattr(module, "STALL_S", 0.5)
    backlog.answer_waits(ANSWERS_BYTES + 1)
    for _ in range(2):
        room = asyncio.ensure_future(backlog.room())
        assert await is_waiting(room)
        await asyncio.wait_for(room, 5)
        assert backlog.full
        assert backlog.holds_runs
        assert not backlog.refuses
    backlog.run_waits(3 * HALF)
    await asyncio.wait_for(backlog.room(), 5)
    assert backlog.refuses, "what is read is bounded too"


async def test_answers_that_leave_are_no_standstill(
    backlog: Backlog, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.5)
    backlog.answer_waits(ANSWERS_BYTES + 1000)
    room = asyncio.ensure_future(backlog.room())
    for _ in range(20):
        time.now += 0.05
        backlog.answer_left(1)
        await asyncio.sleep(0.003)
    assert not room.done()
    room.cancel()


async def test_a_standstill_ends_in_refusals_not_in_silence(
    backlog: Backlog, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.5)
    backlog.run_waits(HALF)
    backlog.run_waits(HALF)
    time.now += 5  # nobody waited for room: this does not count
    room = asyncio.ensure_future(backlog.room())
    assert await is_waiting(room)
    await asyncio.wait_for(room, 5)
    assert backlog.refuses
    assert not backlog.full
    backlog.run_left(HALF)
    assert not backlog.refuses
    backlog.run_waits(HALF)
    assert backlog.full, "and it begins anew"


async def test_progress_is_no_standstill(backlog: Backlog, time: Time, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STALL_S", 0.5)
    backlog.run_waits(3 * HALF)
    room = asyncio.ensure_future(backlog.room())
    for _ in range(20):
        time.now += 0.05
        backlog.run_left(0)
        backlog.run_waits(0)
        await asyncio.sleep(0.003)
    assert not room.done()
    assert not backlog.refuses
    room.cancel()


async def test_a_little_more_is_read_in_case_it_is_a_cancel(
    backlog: Backlog, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GLANCE_S", 0.01)
    backlog.run_waits(2 * HALF)
    for _ in range(2):
        await asyncio.wait_for(backlog.room(), 5)
        assert backlog.full
        assert not backlog.refuses
        time.now += module.STALL_S / 4
        backlog.run_waits(module.GLANCE_BYTES // 2)
    room = asyncio.ensure_future(backlog.room())
    assert await is_waiting(room)
    time.now += module.STALL_S / 4
    await asyncio.sleep(0.05)
    assert not room.done(), "what is read so is bounded"
    backlog.run_left(2 * HALF)
    await asyncio.wait_for(room, 5)


async def test_a_look_ahead_does_not_put_off_the_standstill(
    backlog: Backlog, time: Time, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GLANCE_S", 0.01)
    backlog.run_waits(2 * HALF)
    for _ in range(4):
        await asyncio.wait_for(backlog.room(), 5)
        assert not backlog.refuses
        time.now += module.STALL_S / 4
    await asyncio.wait_for(backlog.room(), 5)
    assert backlog.refuses


# -- in the dispatcher --------------------------------------------------------------------------


@pytest.fixture
def _children(monkeypatch: pytest.MonkeyPatch) -> None:
    use_recording_children(monkeypatch.setattr)


@pytest.mark.usefixtures("_children")
async def test_the_dispatcher_counts_what_waits_and_nothing_else() -> None:
    rig = Rig([function("f", limit=1)])
    backlog = rig.dispatcher.backlog
    for number in range(4):
        rig.submit(f"r{number}", payload=b"x" * 1000)
    assert backlog._runs_bytes == 3 * (1000 + module.RUN_OVERHEAD_BYTES)
    rig.executors[0].succeed("r0")
    assert backlog._runs_bytes == 2 * (1000 + module.RUN_OVERHEAD_BYTES)
    rig.dispatcher.cancel("r3")
    rig.dispatcher.cancel("r1")
    assert backlog._runs_bytes == 1000 + module.RUN_OVERHEAD_BYTES
    rig.executors[0].die()
    rig.dispatcher.drain()
    assert backlog._runs_bytes == 0
    assert backlog._answers_bytes > 0
    rig.messages()
    assert backlog._answers_bytes == 0
    rig.dispatcher.outbox.stream_closed()
    assert backlog._answers_bytes > 0
    rig.messages()
    assert backlog._answers_bytes == 0
    rig.close()


@pytest.mark.usefixtures("_children")
async def test_while_nothing_moves_further_runs_are_answered_busy() -> None:
    rig = Rig([function("f", limit=1)])
    rig.submit("running")
    rig.submit("waits")
    rig.dispatcher.backlog._refuse()
    rig.submit("one too many")
    assert rig.results()["one too many"].safe_message == "worker busy"
    assert rig.executors[0].runs == ["running"]
    rig.executors[0].succeed("running")
    rig.submit("welcome")
    assert set(rig.results()) == {"running"}
    rig.close()


@pytest.mark.usefixtures("_children")
async def test_no_run_is_started_while_too_many_answers_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ANSWERS_BYTES", 5000)
    rig = Rig([function("f")])
    rig.submit("first")
    rig.executors[0].succeed("first", b"x" * 6000)
    rig.submit("held")
    assert rig.executors[0].runs == ["first"]
    rig.dispatcher.cancel("held")
    rig.submit("held too")
    assert set(rig.results()) == {"first", "held"}
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert rig.executors[0].runs == ["first", "held too"]
    rig.close()
