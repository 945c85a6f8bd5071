"""The outbox: order per run, nothing lost, nothing held up by a flood, results kept until they have arrived."""

from __future__ import annotations

import asyncio
import gc
import logging
import tracemalloc
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from supervisor import outbox as module
from supervisor.outbox import (
    BATCH_MESSAGES,
    DELIVERED_BYTES,
    DELIVERED_BYTES_MAX,
    DELIVERED_S,
    EVENTS_BYTES,
    READ_S,
    TURN_BYTES,
    Outbox,
)
from supervisor.retention import PACK_BYTES
from supervisor.transport import StatusCode, StreamStatus, Unread
from supervisor.transport.messages import PREFIX_BYTES, Joined, Message, apart, count_of, in_one_piece
from supervisor.transport.unread import UNREAD_S


class Box:
    """An outbox with a clock of the test's and a record of its credits."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.credits: Counter[int] = Counter()
        self.calls = 0
        self.outbox = Outbox(self._credit, lambda: self.now)

    def _credit(self, key: int, size: int) -> None:
        self.credits[key] += size
        self.calls += 1

    def take(self) -> list[bytes]:
        """A batch that is there without waiting, each message for itself."""
        return list(map(in_one_piece, apart(take_now(self.outbox))))

    def send_all(self) -> list[bytes]:
        """Hand everything over to a stream that takes it."""
        sent: list[bytes] = []
        while self.outbox.depth:
            batch = self.take()
            assert batch
            self.outbox.accepted(len(batch))
            sent += batch
        return sent


def take_now(outbox: Outbox) -> Sequence[Message]:
    step = outbox.take()
    try:
        step.send(None)
    except StopIteration as stop:
        taken: Sequence[Message] = stop.value
        return taken
    step.close()
    raise AssertionError("take waits")


@pytest.fixture
def box() -> Box:
    return Box()


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


# -- order --------------------------------------------------------------------------------------


def test_events_of_a_run_keep_their_order_and_its_result_is_last(box: Box) -> None:
    for number in range(300):
        box.outbox.put_event(1, b"e%d" % number, 10)
    box.outbox.put_result(1, b"result")
    assert box.send_all() == [b"e%d" % number for number in range(300)] + [b"result"]


def test_results_and_answers_overtake_the_flood_of_another_run(box: Box) -> None:
    for _ in range(500):
        box.outbox.put_event(1, b"x" * 2000, 2000)
    box.outbox.put_result(2, b"result of 2")
    box.outbox.put_control(b"answer")
    assert box.take()[:2] == [b"result of 2", b"answer"]


def test_a_flood_of_one_run_lets_the_events_of_another_into_the_same_batch(box: Box) -> None:
    for _ in range(500):
        box.outbox.put_event(1, b"x" * 1000, 1000)
    box.outbox.put_event(2, b"event of 2", 10)
    box.outbox.put_result(2, b"result of 2")
    batch = box.take()
    assert batch.index(b"event of 2") <= TURN_BYTES // 1000 + 1
    assert batch.index(b"result of 2") == batch.index(b"event of 2") + 1


def test_many_runs_take_turns(box: Box) -> None:
    for key in range(1, 11):
        for _ in range(40):
            box.outbox.put_event(key, bytes([key]) * 4096, 4096)
    first = box.take()
    assert len({message[0] for message in first}) == 10
    box.outbox.accepted(len(first))
    assert Counter(message[0] for message in box.send_all() + first) == dict.fromkeys(range(1, 11), 40)


def test_an_urgent_flood_is_cut_into_batches(box: Box) -> None:
    for number in range(1000):
        box.outbox.put_result(number + 1, b"%d" % number)
    batch = box.take()
    assert len(batch) == BATCH_MESSAGES
    box.outbox.accepted(len(batch))
    assert batch + box.send_all() == [b"%d" % number for number in range(1000)]


def test_a_large_message_goes_out_alone_but_goes_out(box: Box) -> None:
    box.outbox.put_result(1, b"x" * 10_000_000)
    box.outbox.put_result(2, b"small")
    assert [len(message) for message in box.take()] == [10_000_000]
    box.outbox.accepted(1)
    assert box.take() == [b"small"]


def test_a_large_message_never_rides_with_others(box: Box) -> None:
    """A heartbeat waits for the batch."""
    box.outbox.put_result(1, b"first")
    box.outbox.put_result(2, b"x" * 10_000_000)
    box.outbox.put_event(3, b"event", 10)
    box.outbox.put_result(3, b"y" * 10_000_000)
    sizes = []
    while box.outbox.depth:
        batch = box.take()
        sizes.append([len(message) for message in batch])
        box.outbox.accepted(len(batch))
    assert sizes == [[5, 5], [10_000_000], [10_000_000]]


def test_a_result_waits_for_events_that_are_being_handed_over(box: Box) -> None:
    box.outbox.put_event(1, b"e1", 10)
    assert box.take() == [b"e1"]
    box.outbox.put_result(1, b"result")
    box.outbox.accepted(0)
    assert box.take() == [b"e1", b"result"]


def test_a_result_whose_last_events_just_went_out_follows(box: Box) -> None:
    box.outbox.put_event(1, b"e1", 10)
    assert box.take() == [b"e1"]
    box.outbox.put_result(1, b"result")
    assert box.outbox.depth
    box.outbox.accepted(1)
    assert box.send_all() == [b"result"]


# -- partial hand-over --------------------------------------------------------------------------


@pytest.mark.parametrize("count", range(8))
def test_what_was_not_accepted_comes_again_in_order(box: Box, count: int) -> None:
    box.outbox.put_control(b"c")
    box.outbox.put_result(9, b"r9")
    for name in (b"1a", b"1b", b"1c"):
        box.outbox.put_event(1, name, 10)
    box.outbox.put_result(1, b"1r")
    box.outbox.put_event(2, b"2a", 10)
    batch = box.take()
    assert batch == [b"c", b"r9", b"1a", b"1b", b"1c", b"1r", b"2a"]
    box.outbox.put_event(2, b"2b", 10)
    box.outbox.accepted(count)
    rest = box.send_all()
    assert sorted(batch[:count] + rest) == sorted([*batch, b"2b"])
    assert [m for m in rest if m[:1] in b"cr"] == [m for m in batch[count:] if m[:1] in b"cr"]
    assert [m for m in rest if m[:1] == b"1"] == [m for m in batch[count:] if m[:1] == b"1"]
    assert [m for m in rest if m[:1] == b"2"] == [m for m in [*batch[count:], b"2b"] if m[:1] == b"2"]


def test_a_queue_has_one_place_in_the_turns_however_often_it_comes_back(box: Box) -> None:
    for _ in range(3):
        box.outbox.put_event(1, b"e", 10)
        box.take()
        box.outbox.put_event(1, b"f", 10)
        box.outbox.accepted(0)
    assert box.outbox.depth == 6
    assert len(box.outbox._turns) == 1
    assert len(box.send_all()) == 6


def test_a_batch_that_nobody_settled_is_taken_again(box: Box) -> None:
    """As when the task that took it was canceled before it could send."""
    box.outbox.put_event(1, b"e", 10)
    box.outbox.put_result(2, b"r")
    assert box.take() == [b"r", b"e"]
    assert box.take() == [b"r", b"e"]
    box.outbox.accepted(2)
    assert box.outbox.depth == 0
    assert box.credits == {1: 10}


# -- waiting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("put", ["event", "result", "control"])
async def test_take_waits_for_a_message(box: Box, put: str) -> None:
    task = asyncio.ensure_future(box.outbox.take())
    await asyncio.sleep(0)
    assert not task.done()
    if put == "event":
        box.outbox.put_event(1, b"m", 1)
    elif put == "result":
        box.outbox.put_result(1, b"m")
    else:
        box.outbox.put_control(b"m")
    assert await asyncio.wait_for(task, 5) == [b"m"]


async def test_closing_the_stream_wakes_a_pending_take_with_what_may_be_lost(box: Box) -> None:
    box.outbox.put_result(1, b"r")
    box.send_all()
    task = asyncio.ensure_future(box.outbox.take())
    await asyncio.sleep(0)
    box.outbox.stream_closed()
    assert await asyncio.wait_for(task, 5) == [b"r"]
    box.outbox.stream_closed()  # the old stream's sender got it and could do nothing with it
    assert box.take() == [b"r"]


async def test_a_take_that_is_canceled_takes_nothing(box: Box) -> None:
    task = asyncio.ensure_future(box.outbox.take())
    await asyncio.sleep(0)
    box.outbox.put_result(1, b"r")
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    box.outbox.stream_closed()
    assert await asyncio.wait_for(box.outbox.take(), 5) == [b"r"]


async def test_flushed_waits_until_all_is_handed_over(box: Box) -> None:
    await asyncio.wait_for(box.outbox.flushed(), 5)
    box.outbox.put_event(1, b"e", 10)
    flushed = asyncio.ensure_future(box.outbox.flushed())
    box.take()
    box.outbox.put_result(1, b"r")
    for done in (False, False, True):
        box.outbox.accepted(int(done or box.credits == {}))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert flushed.done() is done
        if not done:
            assert box.take() == [b"r"]


# -- results until they are known delivered -----------------------------------------------------


def test_results_go_again_on_the_next_stream_once_and_in_order(box: Box) -> None:
    box.outbox.put_event(1, b"e", 10)
    for key in (1, 2, 3):
        box.outbox.put_result(key, b"r%d" % key)
    sent = box.send_all()
    assert sent == [b"r2", b"r3", b"e", b"r1"]
    box.outbox.put_result(4, b"newer")
    box.outbox.stream_closed()
    box.outbox.stream_closed()
    assert box.send_all() == [b"r2", b"r3", b"r1", b"newer"], "results only, those that went out before anything newer"


def test_a_stream_that_was_read_to_its_end_leaves_nothing_to_send_again(box: Box) -> None:
    for key in (1, 2):
        box.outbox.put_result(key, b"r%d" % key)
    box.send_all()
    box.outbox.put_result(3, b"r3")
    box.outbox.stream_closed()
    box.outbox.put_result(4, b"r4")
    box.outbox.stream_read_to_end()
    assert box.send_all() == [b"r3", b"r4"], "what never went out still has to"
    box.outbox.stream_read_to_end()
    assert box.outbox._backlog._answers_bytes == 0


def test_results_go_again_for_every_stream_that_breaks(box: Box) -> None:
    box.outbox.put_result(1, b"r")
    for _ in range(3):
        assert box.send_all() == [b"r"]
        box.outbox.stream_closed()


def test_answers_and_events_do_not_go_again(box: Box) -> None:
    box.outbox.put_control(b"answer")
    box.outbox.put_event(1, b"e", 10)
    box.send_all()
    box.outbox.stream_closed()
    assert box.outbox.depth == 0


@pytest.mark.parametrize(
    ("window", "kept_bytes"),
    [(0, DELIVERED_BYTES), (20 * 2**20, 40 * 2**20), (2**31 - 1, DELIVERED_BYTES_MAX)],
)
def test_a_scheduler_with_a_large_window_must_be_sent_more_before_a_result_is_forgotten(
    box: Box, window: int, kept_bytes: int
) -> None:
    box.outbox.stream_opened()
    box.outbox.put_result(1, b"result")
    box.outbox.accepted(len(box.take()), window)
    sent = 0
    while sent + 2**20 < kept_bytes:
        box.outbox.put_event(2, b"x" * 2**20, 10)
        box.outbox.accepted(len(box.take()), 0)
        sent += 2**20
    assert len(box.outbox._retained)
    box.outbox.put_event(2, b"x" * 2**21, 10)
    box.outbox.accepted(len(box.take()), 0)
    assert not len(box.outbox._retained)


@pytest.mark.parametrize(("following", "again"), [(DELIVERED_BYTES - 256 * 2, True), (DELIVERED_BYTES, False)])
def test_enough_bytes_behind_it_prove_a_result_delivered(box: Box, following: int, again: bool) -> None:
    box.outbox.put_result(1, b"r")
    box.send_all()
    box.outbox.put_control(b"x" * following)
    box.send_all()
    box.outbox.stream_closed()
    assert (box.outbox.depth == 1) is again


def test_tiny_results_are_kept_until_as_many_bytes_followed_and_take_little(box: Box, traced: None) -> None:
    """However many fit in the window of a scheduler that does not read, none is taken for delivered too early."""
    count = 27_000
    before = process_bytes()
    for first in range(0, count, BATCH_MESSAGES):
        for number in range(first, first + BATCH_MESSAGES):
            box.outbox.put_result(number + 1, b"%040d" % number)
        box.outbox.accepted(len(box.take()))
    assert process_bytes() - before < 100 * count, "what is kept of a tiny result is several times its size"
    box.outbox.stream_closed()
    assert box.outbox.depth >= count
    again = box.send_all()
    assert again[:count] == [b"%040d" % number for number in range(count)]


def process_bytes() -> int:
    """What Python has allocated now."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


@pytest.mark.parametrize(("seconds", "again"), [(DELIVERED_S - 0.5, True), (DELIVERED_S, False)])
def test_a_stream_that_outlives_a_result_proves_it_delivered(box: Box, seconds: float, again: bool) -> None:
    box.outbox.put_result(1, b"r")
    box.send_all()
    box.now += seconds
    box.outbox.stream_closed()
    assert (box.outbox.depth == 1) is again


def test_time_without_a_stream_proves_nothing(box: Box) -> None:
    box.outbox.put_result(1, b"r")
    box.send_all()
    box.now += 1
    box.outbox.stream_closed()
    box.now += 10 * DELIVERED_S
    assert box.send_all() == [b"r"]
    box.outbox.stream_closed()
    assert box.send_all() == [b"r"]


# -- events that a stream swallowed ---------------------------------------------------------------


def stuck(box: Box, seconds: float = UNREAD_S) -> None:
    """The next batch is not taken for so long, then its stream ends."""
    box.outbox.put_control(b"stuck")
    box.take()
    box.now += seconds
    box.outbox.accepted(0)


@pytest.mark.parametrize("result", ["not yet", "waits", "went out"])
def test_events_of_a_stream_that_was_not_read_go_again_before_the_rest(box: Box, result: str) -> None:
    for number in range(5):
        box.outbox.put_event(1, b"e%d" % number, 10)
    if result == "went out":
        box.outbox.put_result(1, b"r")
    box.send_all()
    if result == "waits":
        box.outbox.put_result(1, b"r")
    stuck(box)
    box.outbox.stream_closed()
    if result == "not yet":
        box.outbox.put_event(1, b"e5", 10)
        box.outbox.put_result(1, b"r")
    events = [b"e%d" % number for number in range(6 if result == "not yet" else 5)]
    assert [message for message in box.send_all() if message != b"stuck"] == [*events, b"r"]
    assert box.credits[1] == 10 * len(events), "a repeated event is credited once"
    assert box.outbox._backlog._answers_bytes == 0


def test_events_of_a_stream_that_was_read_do_not_go_again(box: Box) -> None:
    box.outbox.put_event(1, b"e", 10)
    box.send_all()
    stuck(box, UNREAD_S / 2)
    box.outbox.stream_closed(StreamStatus(StatusCode.UNAVAILABLE, "reset"))
    assert box.send_all() == [b"stuck"]


def one_a_second(box: Box, count: int) -> list[bytes]:
    """Events of run 1 that went out at 1000, 1001, ..."""
    events = [b"event %03d" % number for number in range(count)]
    for event in events:
        box.outbox.put_event(1, event, 10)
        box.send_all()
        box.now += 1
    return events


def test_what_went_out_too_late_to_be_read_goes_again(box: Box) -> None:
    events = one_a_second(box, 10)
    box.outbox.put_event(1, b"next", 10)
    box.outbox.put_result(1, b"result")
    box.outbox.stream_closed(StreamStatus(StatusCode.UNAVAILABLE, "reset"), Unread(since=1007.0))
    assert box.send_all() == [*events[7:], b"next", b"result"]
    assert box.credits[1] == 110, "a repeated event is credited once"


@pytest.mark.parametrize("unread", [0, 1, 3, 10, 11])
def test_what_may_lie_unread_of_a_saturated_stream_goes_again(box: Box, unread: int) -> None:
    events = one_a_second(box, 10)
    size = unread * (len(events[0]) + PREFIX_BYTES)
    box.outbox.stream_closed(None, Unread(since=1010.0, saturated=True, size=size))
    assert box.send_all() == events[max(0, 10 - unread) :]


def test_part_of_an_event_that_lies_unread_is_all_of_it(box: Box) -> None:
    events = one_a_second(box, 3)
    box.outbox.stream_closed(None, Unread(since=1003.0, saturated=True, size=1))
    assert box.send_all() == events[2:]


def test_what_was_read_does_not_go_again_however_late_it_was(box: Box) -> None:
    events = one_a_second(box, 10)
    size = 2 * (len(events[0]) + PREFIX_BYTES)
    box.outbox.stream_closed(None, Unread(since=1000.0, size=size))
    assert box.send_all() == events[8:]


def test_a_saturated_stream_of_which_no_more_is_known(box: Box) -> None:
    events = one_a_second(box, 10)
    box.outbox.put_result(1, b"result")
    box.send_all()
    box.outbox.stream_closed(None, Unread(since=1010.0, saturated=True))
    assert box.send_all() == [*events, b"result"]


def test_after_a_rush_more_may_be_unread(box: Box) -> None:
    """A scheduler reads no faster than it does."""
    events = [b"%05d" % number for number in range(3000)]
    for event in events:
        box.outbox.put_event(1, event, 10)
    box.send_all()
    box.now += 0.6
    box.outbox.stream_closed(None, Unread(since=box.now))
    first = int(box.send_all()[0])
    assert first == pytest.approx(0.6 / READ_S, abs=2)


def test_unread_events_across_packs(box: Box) -> None:
    events = [b"%05d" % number + b"x" * 1000 for number in range(500)]
    for event in events:
        box.outbox.put_event(1, event, 10)
    box.send_all()
    size = 200 * (len(events[0]) + PREFIX_BYTES)
    box.outbox.stream_closed(None, Unread(since=1001.0, saturated=True, size=size))
    assert box.send_all() == events[300:]


def test_events_go_again_when_the_peer_had_gone_silent(box: Box) -> None:
    box.outbox.put_event(2, b"e0", 10)
    box.send_all()
    box.outbox.put_event(2, b"e1", 10)
    box.outbox.stream_closed(StreamStatus(StatusCode.UNAVAILABLE, "ping timeout", silent=True))
    assert box.send_all() == [b"e0", b"e1"]


def test_events_of_a_run_whose_result_has_arrived_do_not_go_again(box: Box) -> None:
    box.outbox.put_event(1, b"e", 10)
    box.outbox.put_result(1, b"r")
    box.send_all()
    box.now += DELIVERED_S
    box.outbox.forget_delivered()
    stuck(box)
    box.outbox.stream_closed()
    assert box.send_all() == [b"stuck"]


def test_time_on_a_stream_that_is_not_read_proves_nothing(box: Box) -> None:
    box.outbox.put_result(1, b"r")
    box.send_all()
    stuck(box, 2 * DELIVERED_S)
    box.outbox.stream_closed()
    assert box.send_all() == [b"r", b"stuck"]


def test_one_stuck_stream_says_nothing_of_the_next(box: Box) -> None:
    stuck(box)
    box.outbox.stream_closed()
    box.outbox.stream_opened()
    box.outbox.put_event(1, b"e", 10)
    box.send_all()
    box.outbox.stream_closed()
    assert box.outbox.depth == 0


def test_what_is_kept_of_events_is_bounded(box: Box) -> None:
    for _ in range(3000):
        box.outbox.put_event(1, b"e" * 16_000, 10)
        box.outbox.accepted(len(box.take()))
    assert box.outbox._events.size <= EVENTS_BYTES + PACK_BYTES


# -- credits ------------------------------------------------------------------------------------


def test_credits_are_what_went_out_in_one_call_per_run_and_batch(box: Box) -> None:
    for _ in range(50):
        box.outbox.put_event(1, b"x", 100)
        box.outbox.put_event(2, b"x", 7)
    batch = box.take()
    assert len(batch) == 100
    assert not box.credits, "nothing went out yet"
    box.outbox.accepted(60)
    assert box.credits == {1: 5000, 2: 70}
    assert box.calls == 2
    box.send_all()
    assert box.credits == {1: 5000, 2: 350}


# -- joined events ------------------------------------------------------------------------------

JOINED = Joined.of([b"a", b"b", b"c"])


def test_joined_events_travel_in_one_and_count_as_what_they_are(box: Box) -> None:
    box.outbox.put_event(1, b"e", 10)
    box.outbox.put_event(1, JOINED, 30)
    box.outbox.put_result(1, b"r")
    assert box.outbox.depth == 5
    batch = take_now(box.outbox)
    assert batch == [b"e", JOINED, b"r"]
    box.outbox.accepted(count_of(batch))
    assert box.credits == {1: 40}
    assert box.outbox.depth == 0


@pytest.mark.parametrize("accepted", [1, 2, 3, 4])
def test_a_stream_that_ends_amid_joined_events_cuts_them_apart(box: Box, accepted: int) -> None:
    box.outbox.put_event(1, b"e", 10)
    box.outbox.put_event(1, JOINED, 30)
    box.outbox.put_result(1, b"r")
    messages = box.take()
    box.outbox.accepted(accepted)
    assert box.credits == {1: 40 if accepted == 4 else 10}
    box.outbox.stream_closed()
    assert box.send_all() == messages[accepted:]
    assert box.credits == {1: 40}


def test_a_batch_that_is_refused_twice_proves_nothing_delivered(box: Box) -> None:
    """It was stuck for a minute, and was not when it was tried once more: what went out before it is as doubtful."""
    box.outbox.put_result(1, b"result")
    box.send_all()
    box.outbox.put_control(b"stuck")
    box.take()
    box.now += DELIVERED_S + 1
    box.outbox.accepted(0)
    box.take()
    box.outbox.accepted(0)
    box.outbox.stream_closed()
    assert b"result" in box.send_all()


def test_events_that_the_loop_had_not_looked_after_go_again() -> None:
    """They were sent when the end was there already, by a process that had stood still."""
    box, later = Box(), deque[Callable[[], None]]()
    box.outbox = Outbox(lambda *_: None, lambda: box.now, call_soon=later.append)
    events = [b"seen", b"unseen"]
    for event in events:
        box.outbox.put_event(1, event, 1)
        box.send_all()
        if event == b"seen":
            while later:
                later.popleft()()
        box.now += 1
    box.outbox.stream_closed(None, Unread(since=box.now, noticed_at=box.now))
    assert box.send_all() == [b"unseen"]


def test_joined_events_that_were_not_read_go_again(box: Box, caplog: pytest.LogCaptureFixture) -> None:
    box.outbox.put_event(1, JOINED, 30)
    box.outbox.put_event(1, b"d", 10)
    box.send_all()
    stuck(box)
    caplog.set_level(logging.INFO, "supervisor.outbox")
    box.outbox.stream_closed()
    assert "4 events that may not have been read are sent again" in caplog.text
    assert box.send_all() == [b"stuck", b"a", b"b", b"c", b"d"]
    assert box.credits == {1: 40}, "their credit was given when they went out first"


def test_a_batch_is_bounded_by_the_messages_in_it(box: Box) -> None:
    for _ in range(100):
        box.outbox.put_event(1, Joined.of([b"x"] * 50), 50)
    assert BATCH_MESSAGES <= len(box.take()) < BATCH_MESSAGES + 50


# -- any order of things ------------------------------------------------------------------------

KEYS = st.integers(1, 5)


class OutboxMachine(RuleBasedStateMachine):
    """Random producers, a random session and streams that lose their last messages when they break."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        for name, value in {
            "BATCH_MESSAGES": 6,
            "BATCH_BYTES": 400,
            "TURN_BYTES": 100,
            "DELIVERED_BYTES": 3000,
            "EVENTS_BYTES": 3000,
        }.items():
            self.patch.setattr(module, name, value)
        self.box = Box()
        self.next_key = 6
        self.names = {key: key for key in range(1, 6)}
        self.events: dict[int, list[bytes]] = {}
        self.weights: Counter[int] = Counter()
        self.results: dict[int, bytes] = {}
        self.batch: list[bytes] | None = None
        self.taken_at = 0.0
        self.quiet_at = self.box.now
        """When the stream last had nothing that it did not take."""
        self.unread = False
        self.repeatable: set[bytes] = set()
        """Events that had gone out and may not have been read."""
        self.stream: list[tuple[bytes, float]] = []
        self.accepted: list[bytes] = []
        self.arrived: list[bytes] = []

    def teardown(self) -> None:
        try:
            self.settle_all()
        finally:
            self.patch.undo()

    # Producers.

    @rule(slot=KEYS, size=st.integers(0, 150), weight=st.integers(1, 500))
    def put_event(self, slot: int, size: int, weight: int) -> None:
        key = self.names[slot]
        queue = self.events.setdefault(key, [])
        message = b"E %d %d " % (key, len(queue)) + b"x" * size
        queue.append(message)
        self.weights[key] += weight
        self.box.outbox.put_event(key, message, weight)

    @rule(slot=KEYS, sizes=st.lists(st.integers(0, 60), min_size=1, max_size=4), weight=st.integers(1, 500))
    def put_joined(self, slot: int, sizes: list[int], weight: int) -> None:
        key = self.names[slot]
        queue = self.events.setdefault(key, [])
        messages = [b"E %d %d " % (key, number) + b"x" * size for number, size in enumerate(sizes, len(queue))]
        queue += messages
        self.weights[key] += weight
        self.box.outbox.put_event(key, Joined.of(messages), weight)

    @rule(slot=KEYS, size=st.integers(0, 500))
    def put_result(self, slot: int, size: int) -> None:
        key = self.names[slot]
        self.results[key] = b"R %d " % key + b"x" * size
        self.box.outbox.put_result(key, self.results[key])
        self.names[slot] = self.next_key  # no event of this run can follow
        self.next_key += 1

    @rule()
    def put_control(self) -> None:
        self.box.outbox.put_control(b"C")

    # The session.

    @precondition(lambda self: self.batch is None and self.box.outbox.depth)
    @rule()
    def take(self) -> None:
        self.batch = self.box.take()
        self.taken_at = self.box.now
        assert self.batch
        assert len(self.batch) <= 6 + 3, "only the last may be joined ones that are too many"

    @precondition(lambda self: self.batch is not None)
    @rule(share=st.floats(0, 1))
    def accept(self, share: float) -> None:
        assert self.batch is not None
        count = round(len(self.batch) * share)
        self.box.outbox.accepted(count)
        if count < len(self.batch):
            self.unread = self.box.now - self.taken_at >= UNREAD_S
        self.stream += [(message, self.box.now) for message in self.batch[:count]]
        self.accepted += self.batch[:count]
        self.batch = None

    @rule(seconds=st.sampled_from([0.1, 5.0, 61.0]))
    def pass_time(self, seconds: float) -> None:
        self.box.now += seconds
        if self.batch is None:
            self.quiet_at = self.box.now

    @rule(
        losses=st.integers(0, 40),
        late_s=st.sampled_from([0.0, 0.1, 5.0]),
        saturated=st.booleans(),
        room=st.none() | st.integers(0, 2500),
    )
    def close_stream(self, losses: int, late_s: float, saturated: bool, room: int | None) -> None:
        """It loses its last messages: no more than a connection holds, none older than keepalive finds out.

        And no more than the transport says: what went out in the last `late_s` unless it is saturated, `room` bytes.
        """
        if self.batch is not None:
            self.unread = self.box.now - self.taken_at >= UNREAD_S
        since = self.box.now - late_s
        lost, size, held = 0, 0, 0
        for message, sent_at in reversed(self.stream):
            size += len(message) + 256
            held += len(message) + PREFIX_BYTES
            seen_at = self.quiet_at if self.unread else self.box.now
            too_old = seen_at - sent_at >= DELIVERED_S
            early = sent_at < since and not saturated and not self.unread
            if lost == losses or size >= 3000 or too_old or early or (room is not None and held > room):
                break
            lost += 1
        self.arrived += [message for message, _ in self.stream[: len(self.stream) - lost]]
        behind_s = module.BEHIND_S
        may_repeat = (
            self.accepted if self.unread or saturated else [m for m, at in self.stream if at >= since - behind_s]
        )
        self.repeatable |= {message for message in may_repeat if message[:1] == b"E"}
        self.stream = []
        self.batch = None  # a batch under way is settled by stream_closed
        self.box.outbox.stream_closed(None, Unread(since, saturated, room))
        self.box.outbox.stream_opened()
        self.unread = False

    def settle_all(self) -> None:
        if self.batch is not None:
            self.accept(0.0)
        self.close_stream(40, 0.1, saturated=True, room=None)
        while self.box.outbox.depth:
            self.take()
            self.accept(1.0)
        self.arrived += [message for message, _ in self.stream]
        assert set(self.results.values()) <= set(self.arrived), "a result never arrived"
        for key, events in self.events.items():
            assert list(first_times(m for m in self.accepted if m.startswith(b"E %d " % key))) == events
            assert set(events) <= set(self.arrived), "an event was lost"
            assert self.box.credits[key] == self.weights[key]
        assert not self.box.outbox._turns
        assert self.box.outbox._backlog._answers_bytes == 0, "what waited was counted in and out"

    # What always holds.

    @invariant()
    def handed_over_in_order(self) -> None:
        for key in {int(message.split()[1]) for message in self.accepted if message != b"C"}:
            own = [m for m in first_times(self.accepted) if m != b"C" and int(m.split()[1]) == key]
            events = self.events.get(key, [])
            got = [m for m in own if m.startswith(b"E")]
            assert got == events[: len(got)]
            if own[-1].startswith(b"R"):
                assert got == events, "a result went out before its events"

    @invariant()
    def events_go_out_again_only_when_they_may_not_have_been_read(self) -> None:
        twice = {m for m, count in Counter(self.accepted).items() if count > 1 and m.startswith(b"E")}
        assert twice <= self.repeatable, "an event was sent again though it was read"

    @invariant()
    def turns_are_unique(self) -> None:
        turns = self.box.outbox._turns
        assert len({id(queue) for queue in turns}) == len(turns)
        assert all(queue.items for queue in turns)


def first_times(messages: Iterable[bytes]) -> Iterator[bytes]:
    return iter(dict.fromkeys(messages))


TestOutboxMachine = OutboxMachine.TestCase


# -- realtime sessions ----------------------------------------------------------------------------


def test_a_sessions_close_follows_its_frames_and_is_not_kept(box: Box) -> None:
    box.outbox.put_event(1, b"frame", 10, transient=True)
    box.outbox.put_close(1, b"close")
    box.outbox.put_close(2, b"close of 2")
    assert box.send_all() == [b"close of 2", b"frame", b"close"]
    assert box.credits[1] == 10
    box.outbox.stream_closed()
    assert box.send_all() == []


def test_frames_go_with_their_stream_and_closes_stay(box: Box) -> None:
    box.outbox.put_event(1, b"frame", 10, transient=True)
    box.outbox.put_event(2, b"frame", 10, transient=True)
    box.outbox.put_close(2, b"close of 2")
    box.outbox.put_event(3, b"event", 10)
    box.outbox.put_result(3, b"result")
    assert box.take()  # under way when the stream ends
    box.outbox.stream_closed()
    box.outbox.put_close(1, b"close of 1")
    assert sorted(box.send_all()) == [b"close of 1", b"close of 2", b"event", b"result"]
    assert not box.outbox.depth
