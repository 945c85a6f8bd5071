"""When a file transfer is tried again.

Owns: nothing; tenacity's loop with this worker's settings, and the honouring of Retry-After.
"""

from __future__ import annotations

import logging
from email.utils import parsedate_to_datetime
from time import time
from typing import Final

import httpx
import tenacity

from gen_worker.errors import RetryableError
from supervisor.transfers.messages import RetrySettings

log = logging.getLogger(__name__)

MAX_ATTEMPTS: Final = 5
"""Of one request: with the default waits, about 10 s of an absent server. A run waits for it."""
MAX_RETRY_AFTER_S: Final = 60.0
"""A server that wants more patience than this is told of as one that does not answer."""
_AGAIN_STATUSES: Final = frozenset({408, 425, 429})


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
    if response.status_code in _AGAIN_STATUSES or response.status_code >= httpx.codes.INTERNAL_SERVER_ERROR:
        raise TryAgain(f"{who} answered {response.status_code}", retry_after(response))


def retry_after(response: httpx.Response) -> float:
    """Seconds of the header Retry-After, a number or a date; 0 without it."""
    text = response.headers.get("Retry-After", "").strip()
    if text.isdecimal():
        return min(float(text), MAX_RETRY_AFTER_S)
    try:
        seconds = parsedate_to_datetime(text).timestamp() - time()
    except ValueError:
        return 0.0
    return min(max(0.0, seconds), MAX_RETRY_AFTER_S)


def _log(state: tenacity.RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome is not None else None
    log.warning("%s; attempt %d follows", error, state.attempt_number + 1)
