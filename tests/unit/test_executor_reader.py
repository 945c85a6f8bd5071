"""Who reads the pipe while a run is on the thread that read it, and which functions are short."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

from executor.pace import PROOF_RUNS, Pace
from executor.reader import Relief

TICK_S = 0.002
LIMIT_S = 0.001


class Readers:
    """Stands for the reader threads: each does the work it is given, until it finds that another reads."""

    def __init__(self) -> None:
        self.relief = Relief(self._take_over, TICK_S)
        self.taken_over = threading.Semaphore(0)
        self.tries = self.count = 0
        self.without_threads = 0

    def _take_over(self) -> None:
        self.tries += 1
        if self.tries <= self.without_threads:
            raise RuntimeError("can't start new thread")
        if self.relief.relieves():
            self.count += 1
            self.taken_over.release()


def nothing() -> None:
    """A run that takes no time."""


def until(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_the_reader_reads_on_after_brief_work() -> None:
    readers = Readers()
    assert sum(readers.relief.covers(nothing) for _ in range(1000)) >= 1000 - readers.count


def test_long_work_finds_another_reader_and_ends_its_own() -> None:
    readers = Readers()
    assert not readers.relief.covers(lambda: _assert(readers.taken_over.acquire(timeout=20)))
    assert readers.count == 1


def test_while_no_thread_can_be_started_it_is_tried_again() -> None:
    readers = Readers()
    readers.without_threads = 3
    assert not readers.relief.covers(lambda: _assert(readers.taken_over.acquire(timeout=20)))
    assert (readers.tries, readers.count) == (4, 1)


def test_the_next_reader_is_not_taken_for_the_one_before() -> None:
    """The first is still at work when the second has work of its own: each finds only its own end."""
    readers = Readers()
    second_at_work, first_ended, ends = threading.Event(), threading.Event(), []

    def first() -> None:
        assert readers.taken_over.acquire(timeout=20)
        thread = threading.Thread(target=lambda: ends.append(readers.relief.covers(second)))
        thread.start()
        assert second_at_work.wait(20)

    def second() -> None:
        second_at_work.set()
        assert first_ended.wait(20)
        assert readers.taken_over.acquire(timeout=20)

    assert not readers.relief.covers(first)
    first_ended.set()
    until(lambda: ends)
    assert ends == [False]
    assert readers.count == 2


def test_a_relief_that_sleeps_is_woken() -> None:
    readers = Readers()
    readers.relief.covers(nothing)
    for _ in range(3):
        until(lambda: readers.relief.sleeps)
        while readers.taken_over.acquire(blocking=False):
            pass  # on a busy machine doing nothing may take long enough
        before = readers.count
        assert not readers.relief.covers(lambda: _assert(readers.taken_over.acquire(timeout=20)))
        assert readers.count == before + 1


@pytest.mark.parametrize("seconds", [0.0, LIMIT_S * 0.9])
def test_a_function_is_short_when_it_was_often_enough(seconds: float) -> None:
    pace = Pace(LIMIT_S)
    for _ in range(PROOF_RUNS):
        assert not pace.is_short("echo")
        pace.note("echo", seconds)
    assert pace.is_short("echo")
    assert not pace.is_short("other")


def test_one_long_run_starts_the_count_again() -> None:
    pace = Pace(LIMIT_S)
    for seconds in [0.0] * PROOF_RUNS + [LIMIT_S] + [0.0] * (PROOF_RUNS - 1):
        pace.note("echo", seconds)
    assert not pace.is_short("echo")
    pace.note("echo", 0.0)
    assert pace.is_short("echo")


def _assert(holds: bool) -> None:
    assert holds
