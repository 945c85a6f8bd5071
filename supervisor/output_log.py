"""What an executor prints, into the log, as far as the log can be expected to take it.

Owns: the budget of one executor. Lines within it are logged one by one; of a flood the rest is counted and the count is
logged, since formatting a million lines would take from the event loop what other runs need.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

log = logging.getLogger("executor")

LINES_S: Final = 1000.0
"""Lines a second that are logged in the long run: some 4 % of a core."""
BURST_LINES: Final = 4000
SAY_S: Final = 1.0
"""How long lines are counted before the count is logged."""


class OutputLog:
    """See the module. Belongs to the running event loop; `clock` gives monotonic seconds."""

    def __init__(
        self, executor: str, clock: Callable[[], float] = time.monotonic, logger: logging.Logger = log
    ) -> None:
        """`logger` is another for a child that is no executor."""
        self._extra = {"executor": executor}
        self._log = logger
        self._clock = clock
        self._budget = float(BURST_LINES)
        self._refilled = clock()
        self._left_out = 0
        self._loop = asyncio.get_running_loop()

    def line(self, stream: str, line: str, level: int = logging.INFO) -> None:
        """One line that it printed to `stream`."""
        if self._budget < 1:
            now = self._clock()
            self._budget = min(BURST_LINES, self._budget + (now - self._refilled) * LINES_S)
            self._refilled = now
            if self._budget < 1:
                if not self._left_out:
                    self._loop.call_later(SAY_S, self.say_left_out)
                self._left_out += 1
                return
        self._budget -= 1
        self._log.log(level, "%s", line, extra={**self._extra, "stream": stream})

    def say_left_out(self) -> None:
        """Say how many lines were left out since the last time, if any were."""
        if self._left_out:
            self._log.warning("%d lines of output were left out", self._left_out, extra=self._extra)
            self._left_out = 0
