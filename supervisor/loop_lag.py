"""How late the event loop comes round: the one figure that shows what holds the supervisor up.

Owns: the measurements of the last seconds. A task sleeps for TICK_S; what it sleeps longer, everything else waited too:
heartbeats, results, health checks.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Final

from supervisor.clock import Clock, SystemClock

log = logging.getLogger(__name__)

TICK_S: Final = 0.5
KEPT_S: Final = 10.0
STALL_S: Final = 1.0
"""A lag that is logged: a tenth of the usual heartbeat interval."""


class LoopLag:
    """See the module. `observe` gets each measurement, in seconds."""

    def __init__(self, observe: Callable[[float], None], clock: Clock | None = None) -> None:
        self._observe = observe
        self._clock = SystemClock() if clock is None else clock
        self._recent: deque[float] = deque(maxlen=int(KEPT_S / TICK_S))

    @property
    def worst_s(self) -> float:
        """The longest of the last KEPT_S."""
        return max(self._recent, default=0.0)

    async def run(self) -> None:
        """Measure until canceled."""
        while True:
            due = self._clock.now() + TICK_S
            await self._clock.sleep(TICK_S)
            lag = max(0.0, self._clock.now() - due)
            self._recent.append(lag)
            self._observe(lag)
            if lag >= STALL_S:
                log.warning("the event loop stood still for %.1f s: is this host short of CPU, or suspended?", lag)
