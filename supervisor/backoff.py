"""How long to wait before the scheduler is dialed again.

Owns: how many attempts failed in a row, and how many streams broke early. Pure: no clock, no sleep, and the
randomness is handed in.

    the last stream ...                                   the next dial comes after
    stayed up for STABLE_S                                quick_delay(): results wait for it; all counts start anew
    brought messages, but broke before (3 times at most)  quick_delay(): the scheduler was probably restarted
    else, or there was none                               next_delay(): RECONNECT_DELAY, doubled for each failure
                                                          in a row up to RECONNECT_MAX_DELAY, and jitter

So a scheduler that is restarted is found again within half a second, while one that takes every stream and ends it
at once is soon dialed as rarely as one that is gone: only a stream that stayed up starts the counts anew.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

STABLE_S: Final = 5.0
"""A stream that was up this long was no accident."""
QUICK_S: Final = 0.5
"""The longest wait after such a stream; random, so that a thousand workers don't come back in one instant."""
BRIEF_STREAMS: Final = 3
"""Streams in a row that may break early and still be replaced quickly."""
MIN_DELAY_S: Final = 0.05
"""The first wait when RECONNECT_DELAY is less: 0 could never grow, and would dial without end."""
_MAX_DOUBLINGS: Final = 32
"""Keeps the power small; any maximum is reached before."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReconnectSettings:
    """RECONNECT_DELAY, RECONNECT_MAX_DELAY and RECONNECT_JITTER_SECONDS, in seconds; MAX_RECONNECT_ATTEMPTS."""

    delay_s: float = 5.0
    max_delay_s: float = 60.0
    jitter_s: float = 1.0
    max_attempts: int = 0
    """Failed dials in a row before giving up; 0: never."""


@dataclass(frozen=True, slots=True)
class Lifetime:
    """How far a dial came. All at their defaults: there was no stream."""

    open_s: float = 0.0
    """From when messages could be handed over to the end."""
    up_s: float | None = None
    """From the scheduler's first answer (headers or a message) to the end; None: it never answered."""
    got_message: bool = False


class Backoff:
    """See the module. `uniform` gives random numbers from 0 to 1."""

    def __init__(self, settings: ReconnectSettings, uniform: Callable[[], float] = random.random) -> None:
        self._settings = settings
        self._uniform = uniform
        self._failures = 0
        self._brief_streams = 0

    def stayed_up(self, life: Lifetime) -> bool:
        """Whether this was a stream after which the counts start anew.

        A scheduler may have nothing to say for long, and sends not even headers then. A stream that lasted, in silence,
        longer than the longest wait counts as well: dials spaced like that are no flood.
        """
        if life.up_s is not None:
            return life.up_s >= STABLE_S
        return life.open_s >= max(STABLE_S, self._settings.max_delay_s)

    def record(self, life: Lifetime) -> bool:
        """Take note of how a dial ended. True when the same address is worth another dial after `quick_delay`."""
        if self.stayed_up(life):
            self._failures = self._brief_streams = 0
            return True
        if not life.got_message:
            return False
        self._brief_streams += 1
        return self._brief_streams <= BRIEF_STREAMS

    def quick_delay(self) -> float:
        """Seconds; jitter alone."""
        return self._uniform() * min(QUICK_S, self._settings.jitter_s)

    def next_delay(self) -> float:
        """Seconds; each call counts as one more failure."""
        settings = self._settings
        doubled = max(settings.delay_s, MIN_DELAY_S) * 2.0 ** min(self._failures, _MAX_DOUBLINGS)
        self._failures += 1
        return min(doubled, max(settings.max_delay_s, MIN_DELAY_S)) + self._uniform() * settings.jitter_s
