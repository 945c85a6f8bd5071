"""How far a model's download is, and how fast it goes.

Owns: the count of bytes. Listeners are told a few times a second, the log every LOG_S.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Final

from supervisor.transfers.service import OnProgress

log = logging.getLogger(__name__)

TELL_S: Final = 0.25
LOG_S: Final = 10.0
WINDOW_S: Final = 5.0
"""The rate is that of the last seconds, so that it follows a line that gets slow."""
_MIB: Final = 2**20


class Meter:
    """See the module. `clock` gives monotonic seconds."""

    def __init__(self, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.listeners: dict[object, OnProgress] = {}
        self.total_bytes = 0
        self.done_bytes = 0
        self._name = name
        self._clock = clock
        self._samples: deque[tuple[float, int]] = deque()
        self._told = -TELL_S
        self._logged = clock()

    def begin(self, total_bytes: int, done_bytes: int) -> None:
        """So much there is to do, and so much was here already."""
        self.total_bytes, self.done_bytes = total_bytes, done_bytes
        self._samples.clear()
        self._samples.append((self._clock(), done_bytes))
        self.tell()

    def add(self, size: int) -> None:
        self.done_bytes += size
        if self._clock() - self._told >= TELL_S:
            self.tell()

    def tell(self) -> None:
        """Tell everybody now."""
        now = self._clock()
        self._told = now
        rate = self._rate(now)
        for listener in list(self.listeners.values()):
            listener(self.done_bytes, self.total_bytes, rate)
        if now - self._logged >= LOG_S:
            self._logged = now
            done, total = self.done_bytes / _MIB, self.total_bytes / _MIB
            log.info("%s: %.0f of %.0f MiB, %.1f MiB/s", self._name, done, total, rate / _MIB)

    def _rate(self, now: float) -> float:
        """Bytes per second over the window."""
        self._samples.append((now, self.done_bytes))
        while len(self._samples) > 1 and now - self._samples[0][0] > WINDOW_S:
            self._samples.popleft()
        since, done = self._samples[0]
        return max(self.done_bytes - done, 0) / (now - since) if now > since else 0.0
