"""When something is tried again, how long is waited, and what is told meanwhile. Clocks and sleeps are the test's."""

from __future__ import annotations

import email.utils
import time
from collections.abc import Mapping

import aiohttp
import pytest

from gen_worker.errors import FatalError, RetryableError
from supervisor.transfers.http import LONGEST_WAIT_S, connection_errors, is_transient, retry_after
from supervisor.transfers.messages import RetrySettings
from supervisor.transfers.meter import LOG_S, TELL_S, Meter
from supervisor.transfers.retries import Transient, with_retries


class Work:
    """Fails so many times, with progress at the attempts that `gets_on` names."""

    def __init__(self, failures: int, *, wait_s: float | None = None, gets_on: tuple[int, ...] = ()) -> None:
        self.failures = failures
        self.wait_s = wait_s
        self.gets_on = gets_on
        self.attempts = 0
        self.done = 0
        self.slept: list[float] = []

    async def attempt(self) -> str:
        self.attempts += 1
        if self.attempts in self.gets_on:
            self.done += 1
        if self.attempts <= self.failures:
            raise Transient(f"attempt {self.attempts}", self.wait_s)
        return "done"

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)

    async def run(self, settings: RetrySettings, uniform: float = 1.0) -> str:
        return await with_retries(
            settings, self.attempt, progress=lambda: self.done, sleep=self.sleep, uniform=lambda: uniform
        )


async def test_waits_double_up_to_the_longest_with_jitter() -> None:
    work = Work(5)
    assert await work.run(RetrySettings(8, 1.0, 6.0)) == "done"
    assert work.slept == [1.0, 2.0, 4.0, 6.0, 6.0]
    least = Work(3)
    await least.run(RetrySettings(8, 1.0, 6.0), uniform=0.0)
    assert least.slept == [0.5, 1.0, 2.0], "half of it at least"


async def test_what_the_other_side_asks_for_is_waited() -> None:
    work = Work(2, wait_s=17.0)
    await work.run(RetrySettings(8, 1.0, 6.0))
    assert work.slept == [17.0, 17.0]


async def test_it_is_given_up_and_says_why() -> None:
    work = Work(99)
    with pytest.raises(RetryableError, match="attempt 3; given up after 3 attempts in a row"):
        await work.run(RetrySettings(3, 1.0, 6.0))
    assert work.slept == [1.0, 2.0]


async def test_progress_starts_the_count_and_the_waits_anew() -> None:
    work = Work(7, gets_on=(3, 5))
    assert await work.run(RetrySettings(4, 1.0, 60.0)) == "done"
    assert work.slept == [1.0, 2.0, 1.0, 2.0, 1.0, 2.0, 4.0]
    with pytest.raises(RetryableError, match="given up after 4 attempts"):
        await Work(8, gets_on=(3, 5)).run(RetrySettings(4, 1.0, 60.0))


async def test_what_does_not_pass_is_not_tried_again() -> None:
    calls = []

    async def work() -> None:
        calls.append(1)
        raise FatalError("no")

    with pytest.raises(FatalError):
        await with_retries(RetrySettings(), work)
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, None),
        ({"Retry-After": ""}, None),
        ({"Retry-After": "7"}, 7.0),
        ({"Retry-After": " 0 "}, 0.0),
        ({"Retry-After": "86400"}, LONGEST_WAIT_S),
        ({"Retry-After": "-5"}, None),
        ({"Retry-After": "soon"}, None),
        ({"Retry-After": "٣"}, None),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
    ],
)
def test_retry_after(headers: Mapping[str, str], expected: float | None) -> None:
    assert retry_after(headers) == expected


def test_retry_after_as_a_date() -> None:
    found = retry_after({"Retry-After": email.utils.formatdate(time.time() + 100, usegmt=True)})
    assert found is not None
    assert 80 < found <= 100


def test_statuses_and_connection_errors() -> None:
    assert [status for status in (200, 400, 403, 404, 408, 409, 425, 429, 500, 503, 599) if is_transient(status)] == [
        408, 425, 429, 500, 503, 599,
    ]  # fmt: skip
    for error in (TimeoutError(), aiohttp.ServerDisconnectedError(), aiohttp.ClientPayloadError("cut")):
        with pytest.raises(Transient, match=r"^the file: "), connection_errors("the file"):
            raise error
    with pytest.raises(FatalError), connection_errors("the file"):
        raise aiohttp.InvalidURL("x")
    with pytest.raises(OSError, match="disk"), connection_errors("the file"):
        raise OSError("disk")


def test_the_meter_tells_seldom_and_the_rate_of_the_last_seconds(caplog: pytest.LogCaptureFixture) -> None:
    now = 100.0
    meter = Meter("a model", lambda: now)
    told: list[tuple[int, int, float]] = []
    meter.listeners["x"] = lambda *what: told.append(what)
    meter.begin(1000, 200)
    assert told == [(200, 1000, 0.0)]
    meter.add(10)
    assert len(told) == 1, "not more than a few times a second"
    now += TELL_S
    meter.add(90)
    assert told[-1] == (300, 1000, 100 / TELL_S)
    for _ in range(int(LOG_S / TELL_S)):
        now += TELL_S
        meter.add(10)
    assert told[-1][:2] == (700, 1000)
    assert told[-1][2] == pytest.approx(10 / TELL_S), "what was fast at first counts no more"
    with caplog.at_level("INFO"):
        now += TELL_S
        meter.add(1)
        now += LOG_S
        meter.add(1)
    assert "a model: 0 of 0 MiB" in caplog.text
    meter.add(-500)
    now += TELL_S
    meter.tell()
    assert told[-1][0] == 202
    assert told[-1][2] == 0.0, "what starts from zero again has no rate below it"
