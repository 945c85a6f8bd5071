"""When a file transfer is tried again.

Owns: nothing; tenacity's loop with this worker's settings, and the honouring of Retry-After.
"""

from __future__ import annotations

import logging
from typing import Final

import httpx
import tenacity

from gen_worker.errors import RetryableError
from supervisor.transfers.http import is_transient, retry_after
from supervisor.transfers.messages import RetrySettings

log = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 5
"""Of one request: with the default waits, about 10 s of an absent server. A run waits for it."""
MAX_RETRY_AFTER_S: Final = 60.0
"""A server that wants more patience than this is told of as one that does not answer."""


class TryAgain(RetryableError):
    """An attempt failed in a way that the next may not. What the last one raises is the answer."""

    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


def attempts(settings: RetrySettings) -> tenacity.AsyncRetrying:
    """For `async for attempt in ...: with attempt:`: up to MAX_ATTEMPTS, as long as they raise TryAgain."""
    backoff = tenacity.wait_exponential(settings.first_s, settings.max_s) + tenacity.wait_random(0, settings.first_s)

    def wait(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        after_s = error.after_s if isinstance(error, TryAgain) else 0.0
        return max(after_s, backoff(state))

    return tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(TryAgain),
        stop=tenacity.stop_after_attempt(min(MAX_ATTEMPTS, settings.attempts)),
        wait=wait,
        before_sleep=_log,
        reraise=True,
    )


def check_again(response: httpx.Response, who: str) -> None:
    """Raise TryAgain for an answer that says that another time is better; `who` is the words for the server."""
    if is_transient(response.status_code):
        wait_s = min(retry_after(response.headers) or 0.0, MAX_RETRY_AFTER_S)
        raise TryAgain(f"{who} answered {response.status_code}", wait_s)


def _log(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome is not None else None
    log.warning("%s; attempt %d follows", error, state.attempt_number + 1)
