"""That a process notes when it had no turn."""

from __future__ import annotations

import asyncio
import time

from gen_worker.testing.torture.history import Interval
from gen_worker.testing.torture.pulse import PULSE_S, note_stalls
from tests.support.stream_server import eventually


async def test_a_loop_that_is_held_up_is_a_stall() -> None:
    stalls: list[Interval] = []
    noting = asyncio.create_task(note_stalls(stalls))
    await asyncio.sleep(0)
    began = time.monotonic()
    time.sleep(10 * PULSE_S)  # noqa: ASYNC251  (that is the stall)
    ended = time.monotonic()
    await eventually(lambda: any(stall.end >= ended for stall in stalls))
    noting.cancel()
    await asyncio.gather(noting, return_exceptions=True)
    stall = next(stall for stall in stalls if stall.end >= ended)
    assert began <= stall.start <= began + 2 * PULSE_S
