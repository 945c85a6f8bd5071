"""Replacing all executors while the worker serves (SIGHUP): the same worker with the code that is on disk now.

Owns: that one renewal is under way at a time, and what is asked for meanwhile.

1. One slot after the other is renewed, so that the executors of the others serve meanwhile.
2. When a new executor does not serve, the rest keep the code that they have: broken code costs one slot, not all.
3. What is asked for during a renewal starts another one after it: its code may be newer than what was booted.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from supervisor.pool import Pool

log = logging.getLogger(__name__)

REASON = "it was asked for new executors"


class Renewal:
    """See the module. `prepare` is called before each renewal; it says whether there is to be one."""

    def __init__(self, pool: Callable[[], Pool], drain_s: float, prepare: Callable[[], bool]) -> None:
        """Each executor gets drain_s seconds for the runs that it has."""
        self._pool = pool
        self._drain_s = drain_s
        self._prepare = prepare
        self._task: asyncio.Task[None] | None = None
        self._wanted = False

    def request(self) -> None:
        """Renew all executors, now or after the renewal that is under way."""
        self._wanted = True
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        """The worker leaves: executors are not replaced any more."""
        if self._task is not None:
            self._task.cancel()

    async def _run(self) -> None:
        while self._wanted:
            self._wanted = False
            if self._prepare():
                await self._renew_all()

    async def _renew_all(self) -> None:
        pool = self._pool()
        log.info("renewing %d executors, one by one", pool.slot_count)
        for number in range(pool.slot_count):
            if not await pool.renew(number, REASON, self._drain_s):
                rest = pool.slot_count - number - 1
                log.error("the new executor of slot %d does not serve: %d others keep what they have", number, rest)
                return
        log.info("all executors are new")  # gen_worker/serve/state.py knows this line
