"""What can go wrong at the scheduler's end, as one tree.

    MockOrchestratorError
    +-- UsageError            an option or an argument makes no sense
    |   +-- ListenError       the address can't be listened on
    +-- StreamEndedError      a message can't be sent: that worker's stream is over
    +-- RunFailedError        the worker's result says that the run failed
    +-- WaitTimeoutError      what was waited for did not come (also a TimeoutError)
        +-- NoWorkerError
        +-- NoResultError

`exit_code` is what the command line tool leaves with.
"""

from __future__ import annotations

from typing import ClassVar


class MockOrchestratorError(Exception):
    """Base of this package's errors."""

    exit_code: ClassVar[int] = 70
    """EX_SOFTWARE of sysexits.h."""


class UsageError(MockOrchestratorError):
    """The caller's input can't be used."""

    exit_code = 64
    """EX_USAGE of sysexits.h: 1, 2 and 3 have meanings of their own here."""


class ListenError(UsageError):
    """The address is taken, not ours, or not an address."""


class StreamEndedError(MockOrchestratorError):
    """The stream to the worker is over."""

    exit_code = 3


class RunFailedError(MockOrchestratorError):
    """A run ended with success=false; the fields are those of the result."""

    exit_code = 1

    def __init__(self, run_id: str, *, error_type: str, safe_message: str, error_message: str, retryable: bool) -> None:
        text = f"{error_type or 'error'}: {safe_message or error_message or 'no message'}"
        if error_message and error_message != safe_message and safe_message:
            text += f"\n{error_message}"
        super().__init__(text)
        self.run_id = run_id
        self.error_type = error_type
        self.safe_message = safe_message
        self.error_message = error_message
        self.retryable = retryable


class WaitTimeoutError(MockOrchestratorError, TimeoutError):
    """It did not happen in time; the message says what was waited for."""

    exit_code = 3


class NoWorkerError(WaitTimeoutError):
    """No worker that fits is there."""

    exit_code = 2


class NoResultError(WaitTimeoutError):
    """A run has no result yet."""
