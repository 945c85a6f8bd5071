"""Results on disk, so that they outlive the supervisor that holds them: a log in a directory of its own.

Owns: one directory, through a lock on it: whoever has the lock is its one writer. Not safe for several threads.

    directory   `00000001.log`, `00000002.log`, ...   segments; only the last one is written to
    segment     8 bytes MAGIC, then records
    record      u32 length of the body, u32 CRC-32 of the body, the body; all integers are little-endian
    body        u8 KEPT, u64 id, the message; or u8 ARRIVED and the u64 ids of results that were kept before

1. `keep` appends; `forget` appends too, and takes segments away from the oldest on when nothing in them is needed. So
   a `forget` is never lost before what it speaks of.
2. A result that nobody takes would hold on to every later segment. When most of the log is dead weight, what the oldest
   segment still has is appended again.
3. A record that a death cut short fails its check and ends its segment. After a write that failed (a full disk) the
   segment is cut back to its last whole record.

There is no fsync: what was written survives the process in the kernel's cache, and the loss of the machine is none of
this module's business (the scheduler sees the worker vanish and runs its tasks elsewhere).
"""

from __future__ import annotations

import fcntl
import logging
import os
import struct
import tempfile
import zlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from gen_worker.pipe.arena import ArenaError
from supervisor.held_output import LargeResult

log = logging.getLogger(__name__)

MAGIC: Final = b"GWRESLT1"
SEGMENT_BYTES: Final = 16 * 1024 * 1024
"""A segment that reached it is followed by a new one."""
DEAD_BYTES: Final = 4 * SEGMENT_BYTES
"""More dead weight than this, and than what is alive, is worth copying for."""

_PREFIX: Final = struct.Struct("<II")
_KEPT_HEAD: Final = struct.Struct("<BQ")
_KEPT: Final = 1
_ARRIVED: Final = 2
_SUFFIX: Final = ".log"


@dataclass(frozen=True, slots=True)
class _Kept:
    id: int
    message: bytes


@dataclass(frozen=True, slots=True)
class _Arrived:
    ids: tuple[int, ...]


@dataclass(eq=False, slots=True)
class _Segment:
    path: Path
    fd: int
    size: int = 0
    alive: int = 0
    """Results that are to be found here."""

    def append(self, record: Iterable[bytes | memoryview]) -> int:
        """Write a record, given in pieces, behind what is here. Returns its size."""
        end = self.size
        try:
            for piece in record:
                view = memoryview(piece)
                while view:
                    written = os.pwrite(self.fd, view, end)
                    view = view[written:]
                    end += written
        except (OSError, ArenaError):
            os.ftruncate(self.fd, self.size)
            raise
        size = end - self.size
        self.size = end
        return size


@dataclass(frozen=True, slots=True)
class _Place:
    segment: _Segment
    offset: int
    size: int


class Journal:
    """See the module. Every method may raise OSError; what was kept before stays kept."""

    def __init__(self, directory: Path, lock_fd: int) -> None:
        """For `create` and `adopt`, which have the lock."""
        self.directory = directory
        self._lock_fd = lock_fd
        self._segments: list[_Segment] = []
        self._places: OrderedDict[int, _Place] = OrderedDict()
        self._to_forget: list[int] = []
        """Not written yet, since the last attempt failed."""
        self._alive_bytes = 0
        self._number = 0

    @classmethod
    def create(cls, parent: Path, name: str) -> Self:
        """A new one, empty, in a directory under `parent` that has `name` and something random in its name."""
        parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            directory = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=parent))
            # Between these lines another supervisor may take it for a dead one's and remove it: then once more.
            lock_fd = _lock(directory)
            if lock_fd is not None:
                break
        journal = cls(directory, lock_fd)
        try:
            journal._roll()
        except BaseException:
            journal.close()
            raise
        return journal

    @classmethod
    def adopt(cls, directory: Path) -> Self | None:
        """That of a dead supervisor; None when it lives, or the directory is gone."""
        lock_fd = _lock(directory)
        if lock_fd is None:
            return None
        journal = cls(directory, lock_fd)
        try:
            for path in sorted(directory.glob(f"*{_SUFFIX}")):
                if path.stem.isdecimal():
                    journal._replay(path)
        except BaseException:
            journal.close()
            raise
        return journal

    @property
    def ids(self) -> list[int]:
        """Of the results that have not arrived, in the order in which they were kept."""
        return list(self._places)

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(segment.size for segment in self._segments)

    def read(self, result_id: int) -> bytes:
        """The message that was kept. Raises KeyError, and OSError when the file does not have it (any more)."""
        place = self._places[result_id]
        kept = _checked(os.pread(place.segment.fd, place.size, place.offset))
        if not isinstance(kept, _Kept) or kept.id != result_id:
            raise OSError(f"{place.segment.path}: no result {result_id} at {place.offset}")
        return kept.message

    def keep(self, result_id: int, message: bytes | LargeResult) -> None:
        """Append a result; `result_id` was never used here before. Raises ArenaError when it can't be read."""
        self._keep(result_id, _kept_record(result_id, message))
        self._compact()

    def forget(self, result_ids: Iterable[int]) -> None:
        """These have arrived. Unknown ones are passed over."""
        for result_id in result_ids:
            place = self._places.pop(result_id, None)
            if place is not None:
                self._leave(place)
                self._to_forget.append(result_id)
        if not self._places:
            self._clear()
            return
        self._drop_oldest()
        if self._to_forget:
            self._append(_arrived_record(self._to_forget))
            self._to_forget = []
        self._compact()

    def close(self) -> None:
        """Give it up. The directory goes too when every result has arrived; else the next supervisor adopts it."""
        try:
            if not self._places:
                for segment in self._segments:
                    segment.path.unlink()
                self.directory.rmdir()
        except OSError as error:
            log.warning("%s can't be removed: %s", self.directory, error)
        finally:
            for segment in self._segments:
                os.close(segment.fd)
            self._segments = []
            os.close(self._lock_fd)

    # -- inside -------------------------------------------------------------------------------

    def _keep(self, result_id: int, record: Iterable[bytes | memoryview]) -> None:
        place = self._append(record)
        place.segment.alive += 1
        self._alive_bytes += place.size
        self._places[result_id] = place

    def _leave(self, place: _Place) -> None:
        place.segment.alive -= 1
        self._alive_bytes -= place.size

    def _append(self, record: Iterable[bytes | memoryview]) -> _Place:
        """Write a record, given in pieces, behind the last one."""
        if not self._segments or self._segments[-1].size >= SEGMENT_BYTES:
            self._roll()
        segment = self._segments[-1]
        return _Place(segment, segment.size, segment.append(record))

    def _roll(self) -> None:
        path = self.directory / f"{self._number + 1:08}{_SUFFIX}"
        segment = _Segment(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
        try:
            segment.append([MAGIC])
        except OSError:
            os.close(segment.fd)
            path.unlink()
            raise
        self._number += 1
        self._segments.append(segment)

    def _clear(self) -> None:
        """Nothing is needed any more: back to one segment without records."""
        while len(self._segments) > 1:
            self._remove(self._segments[0])
        for segment in self._segments:
            os.ftruncate(segment.fd, len(MAGIC))
            segment.size = len(MAGIC)
        self._to_forget = []

    def _drop_oldest(self) -> None:
        while len(self._segments) > 1 and not self._segments[0].alive:
            self._remove(self._segments[0])

    def _remove(self, segment: _Segment) -> None:
        segment.path.unlink()
        self._segments.remove(segment)
        os.close(segment.fd)

    def _compact(self) -> None:
        dead = self.size - self._alive_bytes
        if dead <= DEAD_BYTES or dead <= self._alive_bytes:
            return
        oldest = self._segments[0]
        for result_id, place in [each for each in self._places.items() if each[1].segment is oldest]:
            self._keep(result_id, [os.pread(oldest.fd, place.size, place.offset)])
            self._leave(place)
        self._drop_oldest()

    def _replay(self, path: Path) -> None:
        self._number = int(path.stem)
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        if (start := os.pread(fd, len(MAGIC), 0)) != MAGIC:
            os.close(fd)
            if MAGIC.startswith(start):
                path.unlink()  # the death came right after it was made
            else:
                log.warning("%s is no segment of a journal: it is left alone", path)
            return
        segment = _Segment(path, fd, len(MAGIC))
        self._segments.append(segment)
        for offset, size, body in _records(fd):
            segment.size = offset + size
            if isinstance(body, _Kept):
                if (before := self._places.get(body.id)) is not None:
                    self._leave(before)  # it was appended again
                self._places[body.id] = _Place(segment, offset, size)
                segment.alive += 1
                self._alive_bytes += size
            else:
                for place in filter(None, (self._places.pop(result_id, None) for result_id in body.ids)):
                    self._leave(place)
        excess = os.fstat(fd).st_size - segment.size
        if excess > 0:
            # What is appended here must not be followed by the rest of something longer.
            os.ftruncate(fd, segment.size)
            log.info("%s ended with %d bytes that are no whole record: they are cut off", path, excess)


def _lock(directory: Path) -> int | None:
    """The descriptor that holds the lock on a directory; None when another has it, or the directory is gone."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(fd), directory.stat()):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass  # its supervisor lives, or another one has just removed it
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _kept_record(result_id: int, message: bytes | LargeResult) -> Iterator[bytes | memoryview]:
    """In pieces, since a message may be large; one that lies in shared memory is read once for its check before."""

    def pieces() -> Iterable[bytes | memoryview]:
        return (message,) if isinstance(message, bytes) else message.pieces()

    head = _KEPT_HEAD.pack(_KEPT, result_id)
    crc = zlib.crc32(head)
    for piece in pieces():
        crc = zlib.crc32(piece, crc)
    yield _PREFIX.pack(len(head) + len(message), crc) + head
    yield from pieces()


def _arrived_record(result_ids: Sequence[int]) -> tuple[bytes]:
    body = struct.pack(f"<B{len(result_ids)}Q", _ARRIVED, *result_ids)
    return (_PREFIX.pack(len(body), zlib.crc32(body)) + body,)


def _checked(record: bytes) -> _Kept | _Arrived | None:
    """What a record says; None when it is not whole."""
    if len(record) <= _PREFIX.size:
        return None
    length, crc = _PREFIX.unpack_from(record)
    body = memoryview(record)[_PREFIX.size :]
    if len(body) != length or zlib.crc32(body) != crc:
        return None
    if body[0] == _KEPT and length >= _KEPT_HEAD.size:
        _, result_id = _KEPT_HEAD.unpack_from(body)
        return _Kept(result_id, bytes(body[_KEPT_HEAD.size :]))
    if body[0] == _ARRIVED and length % 8 == 1:
        return _Arrived(struct.unpack_from(f"<{length // 8}Q", body, 1))
    return None


def _records(fd: int) -> Iterator[tuple[int, int, _Kept | _Arrived]]:
    """Offset, size and content of each whole record of a segment, up to the first that is none."""
    end = os.fstat(fd).st_size
    offset = len(MAGIC)
    while end - offset >= _PREFIX.size:
        length, _ = _PREFIX.unpack(os.pread(fd, _PREFIX.size, offset))
        size = _PREFIX.size + length
        if size > end - offset:
            return
        body = _checked(os.pread(fd, size, offset))
        if body is None:
            return
        yield offset, size, body
        offset += size
