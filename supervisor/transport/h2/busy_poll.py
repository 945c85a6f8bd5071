"""Waiting for what comes next without sleeping, where it comes so soon that this pays.

Owns: which waits were short lately, and whether the loop polls. A loop that sleeps has to be woken, which takes 20 us
and more where its CPU sleeps too, and goes on with cold caches. So the loop is kept turning for a moment where the last
waits ended within that, as KVM does before it halts a guest's CPU (halt_poll_ns). A run's way through the supervisor
has two waits, for the executor after a receipt and for the scheduler after a send; each kind is judged by itself.

What it costs is bounded: `limit_s` of CPU for each message, at times when messages follow each other that fast. A
supervisor with nothing to do, or with a message now and then, sleeps.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import Final

STREAK: Final = 6
"""So many waits of a kind must have been short in a row."""


class _Wait(enum.IntEnum):
    AFTER_SEND = 0
    AFTER_RECEIPT = 1


class BusyPoll:
    """See the module. `call_soon` has something called in the loop's next turn; `clock` and `limit_s` in seconds."""

    def __init__(
        self, call_soon: Callable[[Callable[[], None]], object], clock: Callable[[], float], limit_s: float
    ) -> None:
        self._call_soon = call_soon
        self._clock = clock
        self._limit_s = limit_s
        self._streaks = [0, 0]
        """How many waits of each kind were short in a row, the last one included."""
        self._wait = _Wait.AFTER_SEND
        self._since = float("-inf")
        """When the present wait began."""
        self._polls = False

    def sent(self) -> None:
        """A message went out."""
        self._begin(_Wait.AFTER_SEND)

    def received(self) -> None:
        """Something came."""
        self._begin(_Wait.AFTER_RECEIPT)

    def _begin(self, wait: _Wait) -> None:
        now = self._clock()
        was_short = now - self._since <= self._limit_s
        self._streaks[self._wait] = self._streaks[self._wait] + 1 if was_short else 0
        self._wait, self._since = wait, now
        if not self._polls and self._streaks[wait] >= STREAK:
            self._polls = True
            self._call_soon(self._turn)

    def _turn(self) -> None:
        if self._streaks[self._wait] >= STREAK and self._clock() - self._since <= self._limit_s:
            self._call_soon(self._turn)
        else:
            self._polls = False
