"""The processes below this one: its children, and what those leave behind when they die.

Owns: which children are ours, and SIGCHLD.

1. `adopt` has the kernel give us the descendants whose parent died; to PID 1 of a container it gives them anyway.
2. Each executor has a mark in its environment, which all that it starts inherits, also what leaves its process group.
   `claim` says that an executor lives, `disclaim` that it was waited for.
3. `sweep`, at each of these ends and at each SIGCHLD: an adopted process that is dead is reaped; one whose executor is
   dead is killed. A status that a Popen of this process waits for is never taken from it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import secrets
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from supervisor.prctl import become_subreaper

log = logging.getLogger(__name__)

MARK: Final = "GEN_WORKER_EXECUTOR"
"""The variable that carries the mark."""
LOOKS: Final = 5
LOOK_S: Final = 0.02
"""How often, and after how many seconds, a process is looked at again that was in the midst of an exec."""
_ENTRY: Final = f"{MARK}=".encode()


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    state: str
    session: int


class Family:
    """See the module. All methods belong to the main thread."""

    def __init__(self) -> None:
        self.prefix = f"{secrets.token_hex(8)}."
        """All marks of this supervisor begin with it."""
        self._numbers = itertools.count()
        self._own: dict[int, str] = {}
        self._earlier: frozenset[int] = frozenset()
        self._adopts = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._looks = 0

    def adopt(self) -> None:
        """Become the parent of orphans. Children that are here already came with an exec. Raises OSError."""
        self._earlier = frozenset(child.pid for child in _children())
        become_subreaper()
        self._adopts = True

    def follow(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sweep at every SIGCHLD from now on."""
        # Not by the loop: uvloop keeps this signal for itself, though it starts no process here. It wakes up anyway.
        signal.signal(signal.SIGCHLD, lambda *_: loop.call_soon_threadsafe(self.sweep))
        self._loop = loop

    def unfollow(self) -> None:
        self._loop = None
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def new_mark(self) -> str:
        return f"{self.prefix}{next(self._numbers)}"

    def claim(self, pid: int, mark: str) -> None:
        """This child is waited for by who started it, and what has its mark may live."""
        self._own[pid] = mark

    def disclaim(self, pid: int) -> None:
        """It was waited for: what it left behind is killed."""
        self._own.pop(pid, None)
        self.sweep()

    def sweep(self) -> None:
        """Reap and kill what was adopted. What a killed process leaves to us comes with its SIGCHLD."""
        if self._adopts:
            self._looks = LOOKS
            self._look()

    def _look(self) -> None:
        self._looks -= 1
        unclear = False
        alive = set(self._own.values())
        session = os.getsid(0)
        for child in _children():
            if child.pid in self._own:
                continue
            if child.state == "Z":
                # In our own session it may be a library's Popen's; those of executors have sessions of their own.
                if child.session != session or child.pid in self._earlier:
                    _reap(child.pid)
                continue
            mark = _mark(child.pid)
            if mark is None:
                unclear = True
            elif mark.startswith(self.prefix) and mark not in alive:
                log.info("process %d outlived the executor that it came from: killed", child.pid)
                _kill(child.pid)
        if unclear and self._looks > 0 and self._loop is not None:
            self._loop.call_later(LOOK_S, self._look)


def _children() -> Iterator[_Process]:
    """The children of this process, dead ones included."""
    me = os.getpid()
    for pid in _candidates():
        try:
            stat = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace")
        except OSError:
            continue  # gone meanwhile
        state, parent, _, session = stat.rpartition(")")[2].split()[:4]
        if int(parent) == me:
            yield _Process(pid, state, int(session))


def _candidates() -> list[int]:
    """Our children as the kernel lists them; where it has no such list (CONFIG_PROC_CHILDREN), all processes."""
    try:
        lists = [task.joinpath("children").read_text("ascii") for task in Path("/proc/self/task").iterdir()]
        return [int(pid) for pids in lists for pid in pids.split()]
    except OSError:
        return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _mark(pid: int) -> str | None:
    """The mark of a process; empty when it has none. None when it has no environment, as in the midst of an exec."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return ""  # another user's, or gone
    if entries == [b""]:
        return None
    found = next((entry for entry in entries if entry.startswith(_ENTRY)), b"")
    return os.fsdecode(found.removeprefix(_ENTRY))


def _reap(pid: int) -> None:
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        log.debug("process %d was waited for by someone else", pid)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError) as error:
        log.warning("process %d can't be killed: %s", pid, error)


FAMILY: Final = Family()
"""This process's own: a process has one set of children."""
