"""Is the peer still there.

Owns: when it was heard last, and the timer. A quiet peer is pinged; one that says nothing to that either is given up.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

KEEPALIVE_S: Final = 20.0
"""After this long without a byte a ping is sent. A server with gRPC's defaults puts up with that while data comes every
10 s (the heartbeat)."""
KEEPALIVE_TIMEOUT_S: Final = 10.0


class Keepalive:
    """See the module. `ping` sends one, or says False when none may be sent; `on_dead` is called once."""

    def __init__(self, ping: Callable[[], bool], on_dead: Callable[[], None], quiet_s: float, timeout_s: float) -> None:
        self._ping = ping
        self._on_dead = on_dead
        self._quiet_s = quiet_s
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._timer = self._loop.call_later(quiet_s, self._look)

    def heard(self) -> None:
        """A byte came."""
        self._heard_at = self._loop.time()

    def stop(self) -> None:
        self._timer.cancel()

    def _look(self) -> None:
        left = self._heard_at + self._quiet_s - self._loop.time()
        if left > 0:
            self._timer = self._loop.call_later(left, self._look)
            return
        if self._ping():
            self._timer = self._loop.call_later(self._timeout_s, self._judge, self._heard_at)
        else:
            self._timer = self._loop.call_later(self._quiet_s, self._look)

    def _judge(self, heard_before: float) -> None:
        if self._heard_at == heard_before:
            self._on_dead()
        else:
            self._look()
