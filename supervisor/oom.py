"""Whether it was the kernel's OOM killer that killed an executor.

Owns: the count of OOM kills of this cgroup, as it was a moment ago. A SIGKILL by the OOM killer looks like any other;
but the count has risen before the process is gone.

1. `find_counter` finds the file: cgroup v2's memory.events, v1's memory.oom_control, else the host's /proc/vmstat.
2. `OomWatch` reads it every SAMPLE_S and keeps two samples, so that an old OOM kill of some other process is not taken
   for the cause of a death today.
3. `explain` puts the words into the cause of a SIGKILL that is not ours. One OOM kill explains one death.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from supervisor.child import ExitCause

log = logging.getLogger(__name__)

SAMPLE_S: Final = 2.0
"""An OOM kill explains a death up to twice this later."""
_KEY: Final = "oom_kill"


@dataclass(frozen=True, slots=True)
class OomCounter:
    """A file with a line `oom_kill N`, and whose memory it counts for."""

    path: Path
    whose: str

    def read(self) -> int | None:
        """The count so far; None when the file can't be read or has none (kernels before 4.13)."""
        try:
            text = self.path.read_text("ascii", "replace")
        except OSError:
            return None
        for line in text.splitlines():
            key, _, value = line.partition(" ")
            if key == _KEY and value.strip().isdigit():
                return int(value)
        return None


def find_counter(root: Path = Path("/")) -> OomCounter | None:
    """The most specific counter that can be read under `root`; None without any."""
    candidates = [OomCounter(path, "the cgroup") for path in _cgroup_files(root)]
    candidates.append(OomCounter(root / "proc/vmstat", "the host"))
    return next((counter for counter in candidates if counter.read() is not None), None)


def _cgroup_files(root: Path) -> list[Path]:
    """Where this process's cgroup may have its count.

    In a container the path may be the host's while the mount begins at the container's cgroup: so also the mount's top.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8", "replace").splitlines()
    except OSError:
        return []
    mounts = root / "sys/fs/cgroup"
    unified: list[Path] = []
    memory: list[Path] = []
    for line in lines:
        _, controllers, path = line.split(":", 2) if line.count(":") > 1 else ("", "-", "")
        inside = path.lstrip("/")
        if not controllers:
            unified += [mounts / inside / "memory.events", mounts / "unified" / inside / "memory.events"]
            unified.append(mounts / "memory.events")
        elif "memory" in controllers.split(","):
            memory += [mounts / "memory" / inside / "memory.oom_control", mounts / "memory/memory.oom_control"]
    return memory + unified  # a controller is in one hierarchy only: where v1 has it, v2 has no count


class OomWatch:
    """See the module."""

    def __init__(self, counter: OomCounter | None) -> None:
        self._counter = counter
        self._timer: asyncio.TimerHandle | None = None
        count = self._count()
        self._older = count
        self._newer = count

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        if self._counter is None:
            log.debug("OOM kills can't be told from others: neither the cgroup nor the host counts them")
            return
        self._timer = loop.call_later(SAMPLE_S, self._tick, loop)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def sample(self) -> None:
        """Take a new sample; the one before it is the measure from now on."""
        self._older = self._newer
        self._newer = max(self._newer, self._count())

    def explain(self, cause: ExitCause) -> ExitCause:
        """`cause`, with the OOM killer named when it was that."""
        if self._counter is None or cause.returncode != -signal.SIGKILL or cause.reason:
            return cause
        if self._count() <= self._older:
            return cause
        self._older += 1
        self._newer = max(self._newer, self._older)
        reason = f"the kernel's OOM killer: {self._counter.whose} ran out of memory"
        return dataclasses.replace(cause, reason=reason, out_of_memory=True)

    def _tick(self, loop: asyncio.AbstractEventLoop) -> None:
        self.sample()
        self._timer = loop.call_later(SAMPLE_S, self._tick, loop)

    def _count(self) -> int:
        count = None if self._counter is None else self._counter.read()
        return 0 if count is None else count
