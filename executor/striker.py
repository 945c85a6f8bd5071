"""The second, harder step of a cancel: interrupting what ignores the flag.

Owns: the timer thread (started by the first cancel) and the runs that it watches. After its delay a run is struck, and
again every REPEAT_S for as long as it runs: code may swallow even a BaseException, or be in a C call when it comes. Who
does not end by that is killed with its process by the supervisor.
"""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from typing import Final

REPEAT_S: Final = 0.1

Strike = Callable[[], bool]
"""Interrupts a run once; False when there is nothing left to interrupt."""


class Striker:
    """See the module. `clock` is monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, Strike]] = []
        self._count = 0
        self._thread: threading.Thread | None = None

    def watch(self, strike: Strike, delay_s: float) -> None:
        """Call `strike` after delay_s seconds and from then on every REPEAT_S until it returns False."""
        with self._changed:
            self._add(self._clock() + delay_s, strike)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="striker", daemon=True)
                self._thread.start()
            self._changed.notify()

    def _add(self, when: float, strike: Strike) -> None:
        self._count += 1
        heapq.heappush(self._due, (when, self._count, strike))

    def _work(self) -> None:
        while True:
            with self._changed:
                wait = self._due[0][0] - self._clock() if self._due else None
                if wait is None or wait > 0:
                    self._changed.wait(wait)
                    continue
                _, _, strike = heapq.heappop(self._due)
            if strike():
                with self._changed:
                    self._add(self._clock() + REPEAT_S, strike)
