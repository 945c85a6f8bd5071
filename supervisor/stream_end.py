"""How a stream ended, and the one line of the log that says so.

Owns: the wording. Pure.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Final

from supervisor.backoff import Lifetime
from supervisor.dial_hints import hint
from supervisor.transport import StatusCode, StreamStatus

REFUSALS: Final = (StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED)
_MAX_SHOWN: Final = 400


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """How a dial, or the stream that it opened, ended."""

    target: str
    status: StreamStatus
    life: Lifetime = field(default_factory=Lifetime)
    epoch: int = 0
    """0: there was no stream."""
    dialed: bool = True
    """False: there was no credential to dial with."""
    drained: bool = False
    """The session drained: all that there was went out on this stream, and it did not break."""


def description(end: StreamEnd, redirect: str | None) -> tuple[int, str]:
    """The level and the text of the line that says how a stream ended."""
    status = shown(end.status)
    if not end.dialed:
        return logging.WARNING, f"{end.target} is not dialed: {_one_line(end.status.details)}"
    if end.status.code in REFUSALS:
        return logging.ERROR, (
            f"{end.target} refused the token ({status}): check that AUTH_TOKEN, WORKER_JWT or AUTH_TOKEN_FILE "
            "is current and meant for this scheduler, and that the scheduler has its issuer's keys"
        )
    if redirect is not None:
        return logging.INFO, f"{end.target} is not the leader, {redirect} is said to be"
    if not end.epoch:
        return logging.WARNING, f"no stream to {end.target}: {status}{hint(end.status.details)}"
    level = logging.INFO if end.status.code is StatusCode.OK else logging.WARNING
    return level, f"stream {end.epoch} to {end.target} ended, {age(end.life)}: {status}"


def age(life: Lifetime) -> str:
    """How long a stream lived, for a log line."""
    if life.up_s is None:
        return f"open for {life.open_s:.1f} s without an answer"
    return f"up for {life.up_s:.1f} s"


def shown(status: StreamStatus) -> str:
    """A status as one line: its details are the scheduler's words, of any length."""
    return _one_line(str(status))


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MAX_SHOWN]
