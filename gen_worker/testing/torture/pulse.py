"""Whether the torture's own process gets its turns.

Owns: nothing; it notes in the history when it did not. Its scheduler reads nothing meanwhile, and what it does then it
does late: what it judges of a worker must allow for that.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from gen_worker.testing.torture.history import Interval

PULSE_S: Final = 0.01
"""So often it looks, and what is late by no more is no stall."""


async def note_stalls(stalls: list[Interval]) -> None:
    """Until it is canceled."""
    while True:
        due = time.monotonic() + PULSE_S
        await asyncio.sleep(PULSE_S)
        now = time.monotonic()
        if now - due > PULSE_S:
            stalls.append(Interval(due, now))
