"""A clock that moves when the test says so."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from dataclasses import dataclass, field


@dataclass(eq=False)
class _Wait:
    seconds: float
    deadline: float
    over: asyncio.Event = field(default_factory=asyncio.Event)


class FakeClock:
    """Implements supervisor.clock.Clock."""

    def __init__(self) -> None:
        self._now = 1000.0
        self._waits: list[_Wait] = []
        self.early_s = 0.0
        """By how much a wait may end too soon, as a loop's timers do."""

    @property
    def waits(self) -> list[float]:
        """For how long, from its start, each present wait is; without those that don't wait at all."""
        return [wait.seconds for wait in self._waits if wait.seconds > 0]

    def advance(self, seconds: float) -> None:
        self._now += seconds
        for wait in self._waits:
            self._check(wait)

    def now(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        if seconds > 0:
            await self.wait_for(asyncio.Event().wait(), seconds)

    async def wait_for(self, awaitable: Awaitable[object], seconds: float) -> bool:
        wait = _Wait(seconds, self._now + seconds)
        self._check(wait)
        self._waits.append(wait)
        work = asyncio.ensure_future(awaitable)
        over = asyncio.create_task(wait.over.wait())
        try:
            await asyncio.wait([work, over], return_when=asyncio.FIRST_COMPLETED)
            return work.done()
        finally:
            self._waits.remove(wait)
            work.cancel()
            over.cancel()
            await asyncio.gather(work, over, return_exceptions=True)

    def _check(self, wait: _Wait) -> None:
        if wait.deadline <= self._now + self.early_s + 1e-9:
            wait.over.set()
