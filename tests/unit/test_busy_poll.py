"""When the loop polls instead of sleeping, with a clock and a loop of its own."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from supervisor.transport.h2.busy_poll import STREAK, BusyPoll

LIMIT_S = 0.0003
SHORT_S, LONG_S = 0.0001, 0.01


class Loop:
    """A clock, and the calls of the next turn."""

    def __init__(self) -> None:
        self.now = 100.0
        self.calls: list[Callable[[], None]] = []
        self.poll = BusyPoll(self.calls.append, lambda: self.now, LIMIT_S)

    @property
    def polls(self) -> bool:
        return bool(self.calls)

    def turn(self) -> None:
        calls = self.calls[:]
        self.calls.clear()
        for call in calls:
            call()

    def after(self, seconds: float) -> BusyPoll:
        self.now += seconds
        return self.poll

    def runs(self, count: int, executor_s: float = SHORT_S, scheduler_s: float = SHORT_S) -> None:
        """Requests and their results, each after its wait."""
        for _ in range(count):
            self.after(scheduler_s).received()
            self.turn()
            self.after(executor_s).sent()
            self.turn()


@pytest.fixture
def loop() -> Loop:
    return Loop()


def test_it_polls_after_a_streak_of_short_waits(loop: Loop) -> None:
    loop.runs(STREAK - 1)
    assert not loop.polls
    loop.runs(2)
    assert loop.polls


def test_it_stops_when_nothing_comes_in_time(loop: Loop) -> None:
    loop.runs(STREAK + 1)
    loop.after(LIMIT_S * 0.9)
    loop.turn()
    assert loop.polls
    loop.after(LIMIT_S * 0.2)
    loop.turn()
    assert not loop.polls


def test_a_long_wait_has_its_kind_begin_anew(loop: Loop) -> None:
    loop.runs(STREAK * 3)
    loop.after(LONG_S)
    loop.turn()
    loop.after(0).received()
    assert loop.polls, "no wait for the executor was long"
    loop.after(SHORT_S).sent()
    loop.turn()
    loop.runs(STREAK - 1)
    assert not loop.polls
    loop.runs(1)
    assert loop.polls


def test_slow_messages_never_have_it_poll(loop: Loop) -> None:
    for _ in range(STREAK * 4):
        loop.after(LONG_S).received()
        assert not loop.polls
        loop.after(LONG_S).sent()
        assert not loop.polls


def test_each_kind_of_wait_is_judged_by_itself(loop: Loop) -> None:
    """A scheduler that is far away, and an executor that is quick."""
    loop.runs(STREAK * 2, scheduler_s=LONG_S)
    assert not loop.polls, "it waits for the scheduler now"
    loop.after(LONG_S).received()
    assert loop.polls, "for the executor"
    loop.after(SHORT_S).sent()
    loop.turn()
    assert not loop.polls


def test_it_is_in_the_loop_once(loop: Loop) -> None:
    loop.runs(STREAK + 1)
    for _ in range(10):
        loop.after(SHORT_S).received()
        loop.after(SHORT_S).sent()
        assert len(loop.calls) == 1
