"""What an executor prints: all of it while it is a sane amount, and a count of the rest."""

from __future__ import annotations

import asyncio
import logging

import pytest

from supervisor import output_log as module
from supervisor.output_log import BURST_LINES, LINES_S, OutputLog


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def time() -> Time:
    return Time()


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    messages = [record.getMessage() for record in caplog.records if record.name == "executor"]
    caplog.clear()
    return messages


async def test_what_fits_is_logged_line_by_line(time: Time, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    output = OutputLog("0.1", time)
    output.line("stdout", "100 % of it")
    (record,) = caplog.records
    assert (record.getMessage(), vars(record)["executor"], vars(record)["stream"]) == ("100 % of it", "0.1", "stdout")
    for _ in range(20):
        for number in range(int(LINES_S)):
            output.line("stderr", str(number))
        time.now += 1
    assert len(logged(caplog)) == 1 + 20 * LINES_S


async def test_a_flood_is_counted(time: Time, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    output = OutputLog("0", time)
    for number in range(BURST_LINES + 500):
        output.line("stdout", str(number))
    assert logged(caplog) == [str(number) for number in range(BURST_LINES)]
    output.say_left_out()
    output.say_left_out()
    assert logged(caplog) == ["500 lines of output were left out"]
    time.now += 0.1
    for _ in range(int(LINES_S)):
        output.line("stdout", "again")
    assert len(logged(caplog)) == pytest.approx(LINES_S / 10, abs=1)


async def test_the_count_is_said_soon(
    time: Time, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(module, "SAY_S", 0.01)
    monkeypatch.setattr(module, "BURST_LINES", 10)
    output = OutputLog("0", time)
    for _ in range(100):
        output.line("stdout", "x")
    async with asyncio.timeout(5):
        while "90 lines of output were left out" not in logged(caplog):
            await asyncio.sleep(0.005)
