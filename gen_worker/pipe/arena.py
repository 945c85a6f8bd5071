"""Shared memory beside the pipe, for payloads of a MiB and more.

Owns: one memfd with one writer. Each executor inherits two of them, one per direction, so no
descriptor ever has to be sent, nothing has a name that could be left behind, and the kernel frees all of it with the
last process. The file is sealed against shrinking: a reader that maps it can't be made to fault.

1. The writer puts a payload into a free block (`put`, or `reserve` and `write` piece by piece) and sends the Blob in
   its message.
2. The reader reads or views it and sends Free(offset).
3. The writer takes the block back (`free`) and uses it again: pages that were touched before cost no fault, which
   is most of what a fresh 64 MiB buffer costs. What is kept beyond RETAIN_BYTES goes back to the kernel.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

from gen_worker.pipe.messages import Blob

BLOB_THRESHOLD_BYTES: Final = 1024 * 1024
"""Payloads from this size on go through the arena, smaller ones in the frame."""

RETAIN_BYTES: Final = 80 * 1024 * 1024
"""Free blocks keep at most this many touched bytes: room for one payload of 64 MiB and what is around it."""


class ArenaError(Exception):
    """A blob that can't be in this arena: the other end is broken."""


def create_arena(name: str) -> int:
    """A new, empty arena's file descriptor, close-on-exec, sealed against shrinking."""
    fd = os.memfd_create(f"gen-worker-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK)
    return fd


class ArenaWriter:
    """The writing end. Blocks have power-of-two sizes, so that a freed one fits the next payload of its kind."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._end = os.fstat(fd).st_size
        self._retained: dict[int, list[int]] = {}
        """Offsets of free blocks by block size: those whose pages were kept, and those that gave them back."""
        self._released: dict[int, list[int]] = {}
        self._used: dict[int, int] = {}
        self._touched: dict[int, int] = {}
        """How many bytes of a block have pages, at most, by its offset."""
        self._retained_bytes = 0

    def put(self, data: bytes | bytearray | memoryview) -> Blob:
        """Copy `data` in. Raises OSError when the kernel has no memory for it."""
        view = memoryview(data).cast("B")
        blob = self.reserve(len(view))
        try:
            self.write(blob, 0, view)
        except OSError:
            self.free(blob.offset)
            raise
        return blob

    def reserve(self, size: int) -> Blob:
        """Room for `size` bytes, to be written piece by piece. Raises OSError when the file can't grow."""
        block = 1 << (max(size, BLOB_THRESHOLD_BYTES) - 1).bit_length()
        offset = self._take(block)
        self._touched[offset] = max(self._touched.get(offset, 0), size)
        return Blob(offset, size)

    def write(self, blob: Blob, position: int, data: bytes | bytearray | memoryview) -> None:
        """Copy `data` to `position` of a blob that was reserved. Raises OSError when there is no memory for it."""
        if position + len(data) > blob.size:
            raise ValueError(f"{len(data)} bytes at {position} of a blob of {blob.size}")
        view, offset = memoryview(data), blob.offset + position
        while view:
            written = os.pwrite(self._fd, view, offset)
            view = view[written:]
            offset += written

    def free(self, offset: int) -> None:
        """The reader is done with the block at `offset`. Raises ArenaError when there is none."""
        block = self._used.pop(offset, None)
        if block is None:
            raise ArenaError(f"no block at offset {offset} is in use")
        touched = self._touched[offset]
        if self._retained_bytes + touched > RETAIN_BYTES:
            del self._touched[offset]
            self._give_back(offset, block)
        else:
            self._retained_bytes += touched
            self._retained.setdefault(block, []).append(offset)

    def close(self) -> None:
        os.close(self._fd)

    def _give_back(self, offset: int, block: int) -> None:
        """A free block's pages go to the kernel."""
        self._remove_pages(offset, block)
        self._released.setdefault(block, []).append(offset)

    def _remove_pages(self, offset: int, size: int) -> None:
        with mmap.mmap(self._fd, size, offset=offset) as mapped:
            mapped.madvise(mmap.MADV_REMOVE)

    def _take(self, block: int) -> int:
        if retained := self._retained.get(block):
            offset = retained.pop()
            self._retained_bytes -= self._touched[offset]
        elif released := self._released.get(block):
            offset = released.pop()
        else:
            offset = self._end
            os.ftruncate(self._fd, offset + block)
            self._end = offset + block
        self._used[offset] = block
        return offset


class ArenaReader:
    """The reading end. It checks each blob against the file, since the other end may be broken."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._map: mmap.mmap | None = None
        self._held = 0
        self._closing = False

    def read(self, blob: Blob) -> bytes:
        """A copy of the blob. Raises ArenaError."""
        self._check(blob)
        data = os.pread(self._fd, blob.size, blob.offset)
        if len(data) != blob.size:
            raise ArenaError(f"read {len(data)} of a blob's {blob.size} bytes")
        return data

    def read_into(self, blob: Blob, position: int, target: memoryview) -> None:
        """Fill `target` with what is at `position` of the blob. Raises ArenaError."""
        self._check(blob)
        if position < 0 or position + len(target) > blob.size:
            raise ArenaError(f"{len(target)} bytes at {position} of a blob of {blob.size}")
        if os.preadv(self._fd, [target], blob.offset + position) != len(target):
            raise ArenaError(f"a blob of {blob.size} bytes is cut short")

    def view(self, blob: Blob) -> memoryview:
        """The blob in place, valid until its Free is sent. Raises ArenaError."""
        self._check(blob)
        if not blob.size:
            return memoryview(b"")  # an empty file can't be mapped
        if self._map is None or blob.offset + blob.size > len(self._map):
            # The old map lives on for as long as views of it do.
            self._map = mmap.mmap(self._fd, 0, access=mmap.ACCESS_READ)
        return memoryview(self._map)[blob.offset : blob.offset + blob.size]

    def hold(self, blob: Blob) -> None:
        """The blob will be read later, maybe after `close`; a `release` follows. Raises ArenaError."""
        self._check(blob)
        self._held += 1

    def release(self) -> None:
        """What was held is not read any more."""
        self._held -= 1
        if self._closing and not self._held:
            os.close(self._fd)

    def close(self) -> None:
        """The memory goes with the last blob that is held."""
        self._map = None
        self._closing = True
        if not self._held:
            os.close(self._fd)

    def _check(self, blob: Blob) -> None:
        size = os.fstat(self._fd).st_size
        if blob.offset < 0 or blob.size < 0 or blob.offset + blob.size > size:
            raise ArenaError(f"a blob of {blob.size} bytes at {blob.offset} is outside of an arena of {size}")
