"""The file behind an upload, read from a descriptor that an executor handed over.

Owns: the descriptor and what must hold of the file: a regular one, within the limit, and the same from the first byte
to the last. The bytes are read in a thread, a block at a time; nothing else of the file is ever in memory.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import AsyncIterator
from typing import Final, Self

from gen_worker.errors import ValidationError
from gen_worker.mime_types import HEAD_BYTES
from supervisor.transfers.threads import in_thread

BLOCK_BYTES: Final = 1024 * 1024


class UploadSource:
    """A Source (file_store.py); a context manager, which closes the descriptor."""

    def __init__(self, fd: int, limit_bytes: int) -> None:
        """Raises ValidationError for what can't be stored; `limit_bytes` 0: no limit. The descriptor is taken over."""
        self._fd = fd
        found = os.fstat(fd)
        try:
            _check(found, limit_bytes)
        except BaseException:
            os.close(fd)
            raise
        self.size_bytes = found.st_size
        self._version = (found.st_size, found.st_mtime_ns)
        self._digest = ""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        os.close(self._fd)

    async def head(self) -> bytes:
        """Its first bytes, enough to tell what kind of file it is."""
        return await in_thread(self._pread, HEAD_BYTES, 0)

    async def blocks(self) -> AsyncIterator[bytes]:
        """All bytes, from the first. Raises ValidationError when the file changes meanwhile, before the last block."""
        digest = hashlib.sha256()
        offset = 0
        while offset < self.size_bytes:
            block = await in_thread(self._read, offset, digest)
            offset += len(block)
            if offset == self.size_bytes:
                self._check_unchanged()
            yield block
        if not self.size_bytes:
            self._check_unchanged()
        self._digest = digest.hexdigest()

    async def digest(self) -> str:
        """SHA-256 of all bytes, in hex. Raises ValidationError as `blocks`."""
        if not self._digest:
            async for _ in self.blocks():
                pass
        return self._digest

    def _read(self, offset: int, digest: hashlib._Hash) -> bytes:
        block = self._pread(min(BLOCK_BYTES, self.size_bytes - offset), offset)
        if not block:
            raise ValidationError(f"it shrank from {self.size_bytes} to {offset} bytes while it was stored")
        digest.update(block)
        return block

    def _pread(self, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._fd, size, offset)
        except OSError as error:
            raise ValidationError(f"it can't be read: {error.strerror}") from error

    def _check_unchanged(self) -> None:
        found = os.fstat(self._fd)
        if (found.st_size, found.st_mtime_ns) != self._version:
            raise ValidationError(f"it was written to while it was stored ({self.size_bytes} bytes at first)")
        # A file that has bytes beyond its size is one that the kernel makes up, as in /proc.
        if self._pread(1, self.size_bytes):
            raise ValidationError(f"it has more than the {self.size_bytes} bytes that it says")


def _check(found: os.stat_result, limit_bytes: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ValidationError("it is not a regular file")
    if limit_bytes and found.st_size > limit_bytes:
        raise ValidationError(f"it has {found.st_size} bytes, over the limit WORKER_MAX_UPLOAD_BYTES={limit_bytes}")
