"""When a run is struck, and how often."""

from __future__ import annotations

import threading
import time

from executor import striker
from executor.striker import Striker


def test_strikes_after_the_delay_and_again_until_it_is_over() -> None:
    times: list[float] = []
    over = threading.Event()

    def strike() -> bool:
        times.append(time.monotonic())
        if len(times) == 3:
            over.set()
            return False
        return True

    started = time.monotonic()
    Striker().watch(strike, 0.02)
    assert over.wait(20)
    assert times[0] - started >= 0.02
    assert times[1] - times[0] >= striker.REPEAT_S * 0.99


def test_the_earliest_comes_first() -> None:
    order: list[str] = []
    both = threading.Event()

    def strike(name: str) -> bool:
        order.append(name)
        if len(order) == 2:
            both.set()
        return False

    made = Striker()
    made.watch(lambda: strike("late"), 0.05)
    made.watch(lambda: strike("soon"), 0.01)
    assert both.wait(20)
    assert order == ["soon", "late"]
