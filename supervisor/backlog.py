"""How much waits in the supervisor, and whether more may be read from the scheduler.

Owns: the count of what runs that wait for an executor take, and of answers that wait for the stream. Events are not
counted: each run has a window for them.

1. While either is over its bound, `full` says so and the session reads nothing more: HTTP/2 then makes the scheduler
   wait. Deadlines, heartbeats and what goes out are not held up by that.
2. What is not read may be the cancel that would help. So of runs beyond the bound another batch is read every GLANCE_S,
   as long as they take less than GLANCE_BYTES. And when none of the runs left for STALL_S of this, reading goes
   on, and runs past the bound are answered `worker busy` until the backlog is below it again (`refuses`).
3. While too many answers wait, no run is started that would only add to them (`holds_runs`); those that run go on. When
   none of them left for STALL_S, one more batch is read, and so on: the stream may have ended, and its status lie
   behind what is not read. Else both sides would wait for the other for ever.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable
from typing import Final

log = logging.getLogger(__name__)

RUNS_BYTES: Final = 24 * 1024 * 1024
GLANCE_BYTES: Final = 8 * 1024 * 1024
"""Beyond RUNS_BYTES, for a look at what comes behind: two batches of what a transport holds, or many small ones."""
GLANCE_S: Final = 0.5
ANSWERS_BYTES: Final = 16 * 1024 * 1024
"""With the results that the outbox retains, both full, a supervisor stays under 200 MiB."""
RUN_OVERHEAD_BYTES: Final = 1024
"""What a waiting run takes beyond its payload, roughly; it bounds the number of tiny ones."""
STALL_S: Final = 10.0


class Backlog:
    """See the module. `clock` gives monotonic seconds; `release` is called when `holds_runs` is over."""

    def __init__(self, clock: Callable[[], float], release: Callable[[], object] = lambda: None) -> None:
        self._clock = clock
        self._release = release
        self._runs_bytes = 0
        self._answers_bytes = 0
        self._last_left = clock()
        self._refuses = False
        self._glances = False
        """The last batch was read though the runs were over their bound."""
        self._less = asyncio.Event()

    @property
    def full(self) -> bool:
        """Nothing more should be read from the scheduler now."""
        return self.holds_runs or (self._runs_bytes > RUNS_BYTES and not self._refuses)

    @property
    def runs_bytes(self) -> int:
        """What runs that wait for an executor take."""
        return self._runs_bytes

    @property
    def answers_bytes(self) -> int:
        """What answers that wait for the stream take."""
        return self._answers_bytes

    @property
    def holds_runs(self) -> bool:
        """No run should be started now."""
        return self._answers_bytes > ANSWERS_BYTES

    @property
    def refuses(self) -> bool:
        """A run that comes now is one too many."""
        return self._refuses

    def run_waits(self, payload_bytes: int) -> None:
        self._runs_bytes += payload_bytes + RUN_OVERHEAD_BYTES

    def run_left(self, payload_bytes: int) -> None:
        """A run that waited was started, or ended."""
        self._runs_bytes -= payload_bytes + RUN_OVERHEAD_BYTES
        self._last_left = self._clock()
        if self._runs_bytes <= RUNS_BYTES:
            self._glances = False
        if self._refuses and self._runs_bytes <= RUNS_BYTES:
            self._refuses = False
            log.info("runs are taken again: what waits is below %d MiB", RUNS_BYTES // 2**20)
        self._less.set()

    def answer_waits(self, size: int) -> None:
        self._answers_bytes += size

    def answer_left(self, size: int) -> None:
        """An answer went out."""
        held = self.holds_runs
        self._answers_bytes -= size
        if held:
            self._last_left = self._clock()
            if not self.holds_runs:
                self._release()
        self._less.set()

    async def room(self) -> None:
        """Wait until more may be read; at a standstill, or for a glance, this is one batch, though `full` stays."""
        now = self._clock()
        if not self._glances:
            self._last_left = now  # a standstill counts from here
        self._glances = not self.holds_runs and self._runs_bytes < RUNS_BYTES + GLANCE_BYTES
        glance_at = now + GLANCE_S if self._glances else math.inf
        while self.full:
            stands_still_at = self._last_left + STALL_S
            self._less.clear()
            try:
                async with asyncio.timeout(max(0.0, min(glance_at, stands_still_at) - self._clock())):
                    await self._less.wait()
            except TimeoutError:
                if glance_at < stands_still_at:
                    return
                if self._runs_bytes > RUNS_BYTES and not self._refuses:
                    self._refuse()
                if self.holds_runs:
                    return

    async def room_for_answers(self) -> None:
        """Wait until another answer may be queued that can as well be queued later."""
        while self.holds_runs:
            self._less.clear()
            await self._less.wait()

    def _refuse(self) -> None:
        self._refuses = True
        mib = self._runs_bytes // 2**20
        log.warning("runs of %d MiB wait, none was started for %g s: more are answered `worker busy`", mib, STALL_S)
