"""Notices what others do to the models on disk: a worker that shares the cache, an operator, a mount.

Owns: when it is looked. A look is a `stat` for each model and each directory of records, some microseconds; it needs
no watches of the system, which network file systems do not have.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

WATCH_S: Final = 0.05
"""Half of the 100 ms in which the scheduler is told."""
_GRAIN_NS: Final = 20_000_000
"""More than the step of any file system's clock: of two changes within one, the second may leave no trace."""

Models = frozenset[str]


class DiskWatch:
    """See the module. `look` gives the models that are there, `records` are the directories of what was downloaded."""

    def __init__(
        self, look: Callable[[], Models], *, models_changed: Callable[[], None], records_changed: Callable[[], None]
    ) -> None:
        self._look = look
        self._models_changed = models_changed
        self._records_changed = records_changed
        self._known: Models = frozenset()
        self._task: asyncio.Task[None] | None = None

    def start(self, records: Iterable[Path]) -> None:
        """From now on; what is there already is known."""
        self.knows()
        self._task = asyncio.get_running_loop().create_task(self._watch(tuple(records)))

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def knows(self) -> None:
        """What is there now need not be told."""
        self._known = self._look()

    async def _watch(self, records: tuple[Path, ...]) -> None:
        stamps = [_stamp(directory) for directory in records]
        while True:
            await asyncio.sleep(WATCH_S)
            before, stamps = stamps, [_stamp(directory) for directory in records]
            try:
                if stamps != before:
                    self._records_changed()
                if self._look() != self._known:
                    self.knows()
                    self._models_changed()
            except Exception:
                log.exception("a defect in telling what changed on disk")  # the next change is told all the same


def _stamp(directory: Path) -> tuple[int, bool]:
    """When something in it came or went; another once the clock has gone on, so that it is looked at again."""
    try:
        found = directory.stat()
    except OSError:
        return 0, True
    return found.st_mtime_ns, time.time_ns() - found.st_mtime_ns > _GRAIN_NS
