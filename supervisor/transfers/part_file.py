"""A file on its way: `<name>.part`, hashed as it is written, and renamed when it is whole and right.

Owns: the `.part`, locked as long as it is open, so that two processes never write one. What a former process left in it
is read once, to go on from there; apart from that each byte is hashed when it comes and never read again.

A verified file is read-only and its time of modification is a whole second (`is_sealed`): whoever writes to it later
gives it another, and it is verified anew before it is used again.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from blake3 import blake3

from gen_worker.errors import ResourceError
from supervisor.transfers.locks import locked_if_free, try_lock

READ_BYTES: Final = 4 * 1024 * 1024
_NO_ROOM: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class DiskFull(ResourceError):
    """The disk has no room for what is being written."""


class PartFile:
    """See the module. One thread at a time; all of it blocks."""

    def __init__(self, target: Path) -> None:
        self.path = part_of(target)
        self.offset = 0
        """Bytes that are written and hashed."""
        self._target = target
        self._hasher = blake3()
        self._fd = -1

    def try_open(self) -> bool:
        """Open and lock it; False while another process has it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with disk_full_errors(self.path.parent):
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            # Whoever had it may have renamed or removed it while we waited: then the lock is on what is no .part.
            if not try_lock(fd) or not _is_at(fd, self.path):
                return False
            self._fd, fd = fd, -1
        finally:
            if fd >= 0:
                os.close(fd)
        return True

    def adopt(self, expected_bytes: int) -> None:
        """Take over what is there already, unless that is more than there should be."""
        size = os.fstat(self._fd).st_size
        if size > expected_bytes:
            self.restart()
            return
        os.lseek(self._fd, 0, os.SEEK_SET)
        while piece := os.read(self._fd, READ_BYTES):
            self._hasher.update(piece)
            self.offset += len(piece)

    def restart(self) -> None:
        """Start from zero."""
        os.ftruncate(self._fd, 0)
        os.lseek(self._fd, 0, os.SEEK_SET)
        self._hasher.reset()
        self.offset = 0

    def append(self, pieces: Sequence[bytes]) -> None:
        """Raises DiskFull, OSError."""
        data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._hasher.update(data)
        view, done = memoryview(data), 0
        with disk_full_errors(self.path.parent):
            while done < len(view):
                done += os.write(self._fd, view[done:])
        self.offset += done

    @property
    def digest(self) -> str:
        return self._hasher.hexdigest()

    def finish(self) -> None:
        """It is whole and right: onto the disk, sealed, and under its own name. Raises DiskFull, OSError."""
        with disk_full_errors(self.path.parent):
            os.fsync(self._fd)
            seal(self._fd)
            self.path.rename(self._target)
            sync_directory(self._target.parent)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def part_of(target: Path) -> Path:
    return target.with_name(f"{target.name}.part")


def remove_part(target: Path) -> None:
    """Take what was left of a download, unless another one is writing it."""
    part = part_of(target)
    if part.exists():
        with locked_if_free(part) as free:
            if free:
                part.unlink(missing_ok=True)


@contextmanager
def disk_full_errors(directory: Path) -> Iterator[None]:
    """An OSError for a disk without room becomes DiskFull."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise DiskFull(f"the disk of {directory} is full: {error.strerror}") from error
        raise


def seal(fd: int) -> None:
    """Mark a verified file as such."""
    second = int(os.fstat(fd).st_mtime)
    os.fchmod(fd, 0o444)
    os.utime(fd, (second, second))


def is_sealed(found: os.stat_result) -> bool:
    """Whether nobody wrote to the file since it was verified."""
    return found.st_mtime_ns % 1_000_000_000 == 0


def hash_file(path: Path) -> str:
    """Its BLAKE3. Raises OSError."""
    hasher = blake3()
    with path.open("rb", buffering=0) as file:
        while piece := file.read(READ_BYTES):
            hasher.update(piece)
    return hasher.hexdigest()


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _is_at(fd: int, path: Path) -> bool:
    """Whether the open file is what `path` names now."""
    ours = os.fstat(fd)
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (named.st_dev, named.st_ino)
