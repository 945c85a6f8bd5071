"""That something changed, for those who show it."""

from __future__ import annotations

import asyncio


class Changes:
    """Counts changes; many of them while a watcher is busy wake it once. Belongs to one event loop."""

    def __init__(self) -> None:
        self.number = 0
        self._news = asyncio.Event()

    def tell(self) -> None:
        self.number += 1
        self._news.set()

    async def wait(self, seen: int) -> int:
        """The number of the latest change, once that is not `seen`."""
        while self.number == seen:
            self._news.clear()
            await self._news.wait()
        return self.number
