"""Whether messages that come one by one are handed over so, or some together.

Owns: whether they came faster than they were handled lately. grpc gives one message in a turn of the loop, by a thread
of its own; what handles it runs once between two of these turns, with caches that others have used meanwhile. To handle
some together takes a fifth less time. Nobody waits for that where more messages are there than are handled, and that
is so when ENOUGH come within GATHER_S while none is handled. Nothing else here tells it, so it is tried:

1. After SOME messages without a pause those that follow gather, and go on to gather while they come fast enough.
2. Where they don't, GATHER_S is lost, and they go one by one again, for twice as many as after the last such try: of
   a caller that waits for each result before its next request one run in MANY is a millisecond late.
3. One that comes ALONE_S after the last while they go one by one is such a caller's, most likely: it is handled before
   grpc is asked for the next, a run some 35 us earlier. In a rush that would only make grpc wait.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

GATHER_S: Final = 0.001
"""How long messages gather at most; a loop's timers are as coarse as that."""
GATHER: Final = 12
"""How many messages don't wait for more."""
ENOUGH: Final = 4
SOME: Final = 16
MANY: Final = 8192
PAUSE_S: Final = 0.01
ALONE_S: Final = 0.000_25
"""Less than a run takes from one request to the next, and more than lies between those of a rush."""


class Gather:
    """See the module. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._came_at = float("-inf")
        self._apart = SOME
        """How many go one by one after a try that failed."""
        self._left = SOME
        """How many of them do until the next try."""
        self.alone = False
        """Whether the last message came by itself: what waits for it should have it first."""

    def came(self) -> int:
        """A message did. Returns how many are to be here until they are handed over, or GATHER_S be over."""
        now = self._clock()
        gap, self._came_at = now - self._came_at, now
        if gap > PAUSE_S:
            self._left = max(self._left, SOME)
        self.alone = self._left > 0 and gap > ALONE_S
        if self._left > 0:
            self._left -= 1
            return 1
        return GATHER

    def handed_over(self, count: int) -> None:
        """So many had gathered."""
        if count >= ENOUGH:
            self._apart = max(SOME, self._apart // 2)
        else:
            self._left = self._apart
            self._apart = min(2 * self._apart, MANY)
