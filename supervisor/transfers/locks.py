"""Locks between processes: flock on files, which the kernel releases with whoever held them.

Owns: nothing; each lock lives as long as its descriptor.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final

POLL_S: Final = 0.05
"""How often a lock is tried that another process has; a thread that blocks on it could not be canceled."""


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Lock an open file if that is possible now. Raises OSError for a file system without locks."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def open_lock(path: Path) -> int:
    """The descriptor of a lock file, made if it is not there. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)


async def wait_lock(fd: int, *, shared: bool = False) -> None:
    while not try_lock(fd, shared=shared):  # noqa: ASYNC110  (it is another process that we wait for)
        await asyncio.sleep(POLL_S)


@asynccontextmanager
async def locked(path: Path, *, shared: bool = False) -> AsyncIterator[None]:
    """Hold a lock file's lock, once whoever has it is done."""
    fd = open_lock(path)
    try:
        await wait_lock(fd, shared=shared)
        yield
    finally:
        os.close(fd)


@contextmanager
def locked_if_free(path: Path) -> Iterator[bool]:
    """Hold it exclusively if nobody has it; the value says whether it is held."""
    fd = open_lock(path)
    try:
        yield try_lock(fd)
    finally:
        os.close(fd)


@contextmanager
def locked_now(path: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold it once whoever has it is done; for a thread, and for locks that nobody has for long."""
    fd = open_lock(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)
