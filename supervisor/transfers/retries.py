"""Trying again: what is worth it, how often, and how long to wait in between.

Owns: the count of failures in a row. Whoever talks to another host raises Transient for what may pass; a byte of
progress since the last failure starts the count and the waits anew, so a long download over a bad line goes on.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import tenacity

from gen_worker.errors import RetryableError
from supervisor.transfers.messages import RetrySettings

T = TypeVar("T")

log = logging.getLogger(__name__)


class Transient(Exception):
    """May pass when tried again; `wait_s` is how long the other side asked to wait, None when it did not."""

    def __init__(self, message: str, wait_s: float | None = None) -> None:
        super().__init__(message)
        self.wait_s = wait_s


class _Patience:
    """Tenacity's stop and wait, counted from the last progress."""

    def __init__(self, settings: RetrySettings, progress: Callable[[], int], uniform: Callable[[], float]) -> None:
        self._settings = settings
        self._progress = progress
        self._uniform = uniform
        self._seen = progress()
        self._attempt = 0
        self.failures = 0

    def _note(self, state: tenacity.RetryCallState) -> None:
        if state.attempt_number == self._attempt:
            return  # tenacity asks for the wait and for the stop
        self._attempt = state.attempt_number
        if self._progress() != self._seen:
            self._seen = self._progress()
            self.failures = 0
        self.failures += 1

    def stop(self, state: tenacity.RetryCallState) -> bool:
        self._note(state)
        return self.failures >= self._settings.attempts

    def wait(self, state: tenacity.RetryCallState) -> float:
        self._note(state)
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, Transient) and error.wait_s is not None:
            return error.wait_s
        full = min(self._settings.max_s, self._settings.first_s * 2.0 ** min(self.failures - 1, 16))
        return full * (0.5 + self._uniform() / 2)


async def with_retries(
    settings: RetrySettings,
    work: Callable[[], Awaitable[T]],
    *,
    progress: Callable[[], int] = lambda: 0,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    uniform: Callable[[], float] = random.random,
) -> T:
    """What `work` returns, tried again while it raises Transient. Raises RetryableError when that does not end."""
    patience = _Patience(settings, progress, uniform)

    def say(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        log.warning("%s; trying again in %.1f s", error, state.upcoming_sleep)

    async def attempt() -> T:  # tenacity awaits only what it can tell to be a coroutine function
        return await work()

    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(Transient),
        stop=patience.stop,
        wait=patience.wait,
        sleep=sleep,
        before_sleep=say,
        reraise=True,
    )
    try:
        return await retrying(attempt)
    except Transient as error:
        raise RetryableError(f"{error}; given up after {patience.failures} attempts in a row") from error
