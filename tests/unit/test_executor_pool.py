"""Threads come when work waits, and nothing is ever left waiting beside an idle thread."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

from executor.pool import ThreadPool


@pytest.fixture
def eager_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


class Counted:
    """Counts what was handled and lets a test wait for a number."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.handled: list[int] = []

    def handle(self, item: int) -> None:
        with self.changed:
            self.handled.append(item)
            self.changed.notify_all()

    def wait(self, count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.handled) >= count, 20), len(self.handled)


def test_one_thread_keeps_the_order() -> None:
    counted = Counted()
    pool = ThreadPool(1, counted.handle)
    pool.submit(range(100))
    counted.wait(100)
    assert counted.handled == list(range(100))
    assert pool.size == 1


def test_blocking_items_all_run_at_once() -> None:
    barrier = threading.Barrier(16)
    counted = Counted()

    def meet(item: int) -> None:
        barrier.wait(20)
        counted.handle(item)

    pool = ThreadPool(16, meet)
    pool.submit(range(16))
    counted.wait(16)
    assert pool.size == 16


def test_idle_threads_are_used_before_new_ones() -> None:
    counted = Counted()
    pool = ThreadPool(64, counted.handle)
    for count in range(1, 50):
        pool.submit([count])
        counted.wait(count)
    assert pool.size < 8


def test_the_limit_holds() -> None:
    running = threading.Semaphore(4)
    counted = Counted()

    def handle(item: int) -> None:
        assert running.acquire(blocking=False)
        threading.Event().wait(0.0005)
        running.release()
        counted.handle(item)

    pool = ThreadPool(4, handle)
    pool.submit(range(100))
    counted.wait(100)
    assert pool.size == 4


@pytest.mark.usefixtures("eager_switches")
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_no_item_is_left_waiting(limit: int) -> None:
    """A lost call would leave the last items of a round waiting for ever."""
    counted = Counted()
    pool = ThreadPool(limit, counted.handle)
    done = 0
    for round_number in range(1500):
        items = [round_number] * (round_number % 5 + 1)
        pool.submit(items)
        done += len(items)
        if round_number % 3:
            counted.wait(done)
    counted.wait(done)
    assert len(counted.handled) == done
