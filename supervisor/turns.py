"""After which sends the event loop has looked at its connections.

Owns: the times of sends that nothing was seen to follow. A process that stood still (SIGSTOP, no CPU) finds an end that
came meanwhile only when its loop looks at the connections again, and may send before that. So the moment at which an
end was noticed says nothing of what was sent since the look before it.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import Final

LOOKS: Final = 2
"""The first turn after a send looks; what it finds is told in the next at the latest."""
_KEPT: Final = 64


class Turns:
    """See the module. `call_soon` has something called in the loop's next turn; `clock` in monotonic seconds."""

    def __init__(self, call_soon: Callable[[Callable[[], None]], object], clock: Callable[[], float]) -> None:
        self._call_soon = call_soon
        self._clock = clock
        self._seen: deque[tuple[float, float]] = deque(maxlen=_KEPT)
        """When something was sent first, and when the loop had looked after it."""
        self._sent_at = math.inf
        """When that was sent first which the turns under way are for."""
        self._next_at = math.inf
        """When that was sent first which came after they began."""

    def sent(self, now: float) -> None:
        """Something goes out now."""
        if self._sent_at == math.inf:
            self._begin(now)
        else:
            self._next_at = min(self._next_at, now)

    def unseen_since(self, noticed_at: float) -> float:
        """When the first of what the loop had not looked after, by `noticed_at`, was sent; infinity: it had for all."""
        late = (sent_at for sent_at, seen_at in self._seen if seen_at > noticed_at)
        return min(*late, self._sent_at, self._next_at, math.inf)

    def _begin(self, now: float) -> None:
        self._sent_at = now
        self._turn(LOOKS)

    def _turn(self, left: int) -> None:
        if left:
            self._call_soon(lambda: self._turn(left - 1))
            return
        self._seen.append((self._sent_at, self._clock()))
        self._sent_at, following, self._next_at = math.inf, self._next_at, math.inf
        if following < math.inf:
            self._begin(following)
