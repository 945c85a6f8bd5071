"""The event loop's lag, with a clock that moves when the test says so."""

from __future__ import annotations

import asyncio

import pytest

from supervisor.loop_lag import KEPT_S, TICK_S, LoopLag
from tests.support.fake_clock import FakeClock
from tests.support.rig import until


async def test_what_comes_late_is_measured_kept_and_said(caplog: pytest.LogCaptureFixture) -> None:
    clock, seen = FakeClock(), list[float]()
    lag = LoopLag(seen.append, clock)
    assert lag.worst_s == 0
    task = asyncio.create_task(lag.run())

    async def tick(late_s: float) -> None:
        count = len(seen)
        await until(lambda: clock.waits == [TICK_S])
        clock.advance(TICK_S + late_s)
        await until(lambda: len(seen) > count)

    await tick(0.0)
    await tick(2.0)
    assert seen == [pytest.approx(0), pytest.approx(2)]
    assert lag.worst_s == pytest.approx(2)
    assert "the event loop stood still for 2.0 s" in caplog.text
    for _ in range(int(KEPT_S / TICK_S)):
        await tick(0.01)
    assert lag.worst_s == pytest.approx(0.01)
    task.cancel()
