"""The supervisor as it is, and a watch over its event loop.

Every 2 ms a timer looks how late it is, which is how long the loop was held up, and how much of that the loop's thread
spent on the CPU: on a machine that others use too, only the latter is the supervisor's own doing. On SIGUSR1 the worst
of both since the last time is appended to the file that BENCH_STALLS names, in seconds.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

from supervisor.worker import Worker

TICK_S = 0.002


class Watch:
    """The worst of what was seen."""

    def __init__(self, report: Path) -> None:
        self._report = report
        self._loop = asyncio.get_running_loop()
        self._late = self._busy = 0.0
        self._loop.add_signal_handler(signal.SIGUSR1, self._write)
        self._next()

    def _next(self) -> None:
        self._due = self._loop.time() + TICK_S
        self._cpu = time.thread_time()
        self._loop.call_at(self._due, self._tick)

    def _tick(self) -> None:
        self._late = max(self._late, time.monotonic() - self._due)
        self._busy = max(self._busy, time.thread_time() - self._cpu - TICK_S)
        self._next()

    def _write(self) -> None:
        with self._report.open("a") as file:
            file.write(f"{self._late} {self._busy}\n")
        self._late = self._busy = 0.0


def main() -> int:
    run = Worker.run

    async def watched(self: Worker) -> object:
        self.__dict__["watch"] = Watch(Path(os.environ["BENCH_STALLS"]))
        return await run(self)

    Worker.run = watched  # type: ignore[assignment,method-assign]
    from supervisor.main import main as supervisor_main  # noqa: PLC0415

    return supervisor_main([])


if __name__ == "__main__":
    sys.exit(main())
