"""Time as the supervisor's waiting code sees it, so that tests never wait for real time.

Owns: nothing. `now` is monotonic; a test hands in a clock of its own that moves when the test says so.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import Protocol


class Clock(Protocol):
    def now(self) -> float:
        """Monotonic seconds."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Wait that long; not at all for 0 and less."""

    async def wait_for(self, awaitable: Awaitable[object], seconds: float) -> bool:
        """Wait for `awaitable`, `seconds` at most. False when the time was over first; it is canceled then."""
        ...


class SystemClock:
    """The real one."""

    def now(self) -> float:
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        if seconds > 0:
            await asyncio.sleep(seconds)

    async def wait_for(self, awaitable: Awaitable[object], seconds: float) -> bool:
        try:
            async with asyncio.timeout(max(seconds, 0)) as limit:
                await awaitable
        except TimeoutError:
            if not limit.expired():
                raise
            return False
        return True
