"""The credit window: who waits, who wakes, and that nothing follows the end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from executor.events import DELTA, EVENT_CAP_BYTES, EventStream
from gen_worker.errors import RunCanceled, ValidationError, WorkerError
from gen_worker.pipe.messages import DELTAS_BYTES, EVENT_OVERHEAD_BYTES, Deltas, Event, Upward

PAYLOAD = b"x" * 36
WEIGHT = len(PAYLOAD) + EVENT_OVERHEAD_BYTES


def stream(window: int) -> tuple[EventStream, list[Upward]]:
    sent: list[Upward] = []
    return EventStream(1, window, sent.append), sent


def test_events_go_while_there_is_room() -> None:
    events, sent = stream(2 * WEIGHT)
    events.put("a", PAYLOAD)
    events.put("b", PAYLOAD)
    assert sent == [Event(1, "a", PAYLOAD), Event(1, "b", PAYLOAD)]


def test_a_thread_waits_for_credit() -> None:
    events, sent = stream(WEIGHT)
    events.put("a", PAYLOAD)
    thread = threading.Thread(target=events.put, args=("b", PAYLOAD))
    thread.start()
    thread.join(0.02)
    assert thread.is_alive()
    events.credit(WEIGHT - 1)
    thread.join(0.02)
    assert thread.is_alive(), "one byte is still under way"
    events.credit(1)
    thread.join(10)
    assert len(sent) == 2


def test_a_large_event_goes_alone() -> None:
    events, sent = stream(10)
    events.put("a", b"x" * 1000)
    assert len(sent) == 1


def test_cancel_ends_a_threads_wait_but_not_what_has_room() -> None:
    events, sent = stream(WEIGHT)
    events.put("a", PAYLOAD)
    raised: list[BaseException] = []

    def put() -> None:
        try:
            events.put("b", PAYLOAD)
        except RunCanceled as error:
            raised.append(error)

    thread = threading.Thread(target=put)
    thread.start()
    events.cancel()
    thread.join(10)
    assert len(raised) == 1
    events.credit(WEIGHT)
    events.put("c", PAYLOAD)
    assert len(sent) == 2


async def test_a_coroutine_awaits_credit() -> None:
    events, sent = stream(WEIGHT)
    await events.put_async("a", PAYLOAD)
    task = asyncio.create_task(events.put_async("b", PAYLOAD))
    await asyncio.sleep(0)
    assert not task.done()
    await asyncio.to_thread(events.credit, WEIGHT)
    await asyncio.wait_for(task, 10)
    assert len(sent) == 2


async def test_cancel_ends_a_coroutines_wait() -> None:
    events, _ = stream(WEIGHT)
    await events.put_async("a", PAYLOAD)
    task = asyncio.create_task(events.put_async("b", PAYLOAD))
    await asyncio.sleep(0)
    events.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, 10)


async def test_a_waiter_that_was_canceled_itself_is_skipped() -> None:
    events, _ = stream(WEIGHT)
    await events.put_async("a", PAYLOAD)
    task = asyncio.create_task(events.put_async("b", PAYLOAD))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    events.credit(WEIGHT)
    await asyncio.wait_for(events.put_async("c", PAYLOAD), 10)


def test_the_last_events_need_no_room_and_end_it() -> None:
    events, sent = stream(1)
    events.put("a", PAYLOAD)
    events.close(("output.completed", b"{}"))
    assert sent[-1] == Event(1, "output.completed", b"{}")
    with pytest.raises(WorkerError, match="after the end"):
        events.put("late", PAYLOAD)


def test_an_event_over_the_cap_is_refused() -> None:
    events, sent = stream(1)
    with pytest.raises(ValidationError, match="at most"):
        events.put("a", b"x" * (EVENT_CAP_BYTES + 1))
    assert sent == []


# -- deltas ------------------------------------------------------------------------------------------


def test_a_delta_that_follows_when_the_last_one_left_goes_at_once() -> None:
    events, sent = stream(10 * WEIGHT)
    for count in range(1, 4):
        events.put(DELTA, PAYLOAD)
        assert sent == [Event(1, DELTA, PAYLOAD)] * count
        events.credit(WEIGHT)


def test_deltas_that_follow_one_under_way_go_together_at_a_credit() -> None:
    events, sent = stream(10 * WEIGHT)
    for number in range(4):
        events.put(DELTA, b"%d" % number)
    assert sent == [Event(1, DELTA, b"0")]
    events.credit(1 + EVENT_OVERHEAD_BYTES)
    assert sent[1:] == [Deltas(1, (b"1", b"2", b"3"))]


def test_deltas_go_when_they_weigh_enough_and_never_more() -> None:
    events, sent = stream(2**20)
    sizes = [0, 10, 0, 12_000, 3_000, 3_000, 50_000, *[0] * 200]
    for size in sizes:
        events.put(DELTA, bytes(size))
    events.close()
    went = [[m.payload] if isinstance(m, Event) else m.payloads for m in sent if isinstance(m, Event | Deltas)]
    assert [len(payload) for payloads in went for payload in payloads] == sizes
    assert all(
        sum(map(len, payloads)) + EVENT_OVERHEAD_BYTES * len(payloads) <= DELTAS_BYTES
        for payloads in went
        if len(payloads) > 1
    )
    assert len(went) < 12


def test_other_events_are_not_held_and_keep_their_place() -> None:
    events, sent = stream(10 * WEIGHT)
    for event_type in (DELTA, DELTA, "job.log", DELTA):
        events.put(event_type, PAYLOAD)
    assert sent == [Event(1, DELTA, PAYLOAD), Event(1, DELTA, PAYLOAD), Event(1, "job.log", PAYLOAD)]
    events.close(("output.completed", b"{}"))
    assert sent[3:] == [Event(1, DELTA, PAYLOAD), Event(1, "output.completed", b"{}")]


def test_a_thread_that_waits_for_room_holds_nothing() -> None:
    events, sent = stream(2 * WEIGHT)
    events.put(DELTA, PAYLOAD)
    events.put(DELTA, PAYLOAD)
    assert len(sent) == 1
    thread = threading.Thread(target=events.put, args=(DELTA, PAYLOAD))
    thread.start()
    thread.join(0.02)
    assert thread.is_alive()
    assert len(sent) == 2
    events.credit(2 * WEIGHT)
    thread.join(10)
    assert len(sent) == 3


async def test_a_coroutine_that_waits_for_room_holds_nothing() -> None:
    events, sent = stream(2 * WEIGHT)
    await events.put_async(DELTA, PAYLOAD)
    await events.put_async(DELTA, PAYLOAD)
    task = asyncio.create_task(events.put_async(DELTA, PAYLOAD))
    await asyncio.sleep(0)
    assert len(sent) == 2
    events.credit(2 * WEIGHT)
    await asyncio.wait_for(task, 10)
    assert len(sent) == 3


def test_what_is_held_can_be_flushed() -> None:
    events, sent = stream(10 * WEIGHT)
    for _ in range(3):
        events.put(DELTA, PAYLOAD)
    events.flush()
    events.flush()
    assert sent == [Event(1, DELTA, PAYLOAD), Deltas(1, (PAYLOAD, PAYLOAD))]
