"""Large payloads of runs: shared memory that all executors read, filled while the scheduler's message arrives.

Owns: the one arena from the supervisor to its executors, and each payload in it from its first byte until an executor
has it. Which executor that will be is not known when the bytes come, and a copy to another place would cost as much as
all the rest; so they share one, through a descriptor that can only be read.

A payload that nobody refers to any more gives its block back: a stream that breaks, a run that is refused or canceled
need not say so.
"""

from __future__ import annotations

import asyncio
import os
from typing import Final

from gen_worker.pipe.arena import ArenaReader, ArenaWriter, create_arena
from gen_worker.pipe.messages import Blob

GIVE_BACK_BYTES: Final = 16 * 1024 * 1024
"""3 ms."""


class Input:
    """One payload. It has its block until `hand_over`, or until it is gone."""

    __slots__ = ("_arena", "_blob", "_done", "_size", "error")

    def __init__(self, arena: InputArena, size: int, blob: Blob | None, error: OSError | None = None) -> None:
        """Without a blob it keeps nothing of what is written; `error` says why."""
        self._arena = arena
        self._size = size
        self._blob = blob
        self._done = 0
        self.error = error
        """Why there is no memory for it."""

    def __len__(self) -> int:
        return self._size

    def write(self, data: bytes | memoryview) -> None:
        """Append. Without memory for it this sets `error`, and what is written later is dropped."""
        if self._blob is None:
            return
        try:
            self._arena.writer.write(self._blob, self._done, data)
        except OSError as error:
            self.error = error
            self._give_back()
        self._done += len(data)

    def view(self) -> memoryview:
        """It in place, to be looked into: one that has its memory. It is valid as long as this object is."""
        return self._arena.reader.view(self._blob) if self._blob is not None else memoryview(b"")

    def read(self) -> bytes:
        """A copy of what was written."""
        return self._arena.reader.read(Blob(self._blob.offset, self._done)) if self._blob is not None else b""

    def hand_over(self, arena: ArenaWriter) -> Blob | None:
        """The block, which the caller frees in its `arena` from now on; None when it does not lie there."""
        if self._blob is None or arena is not self._arena.writer:
            return None
        blob, self._blob = self._blob, None
        return blob

    def _give_back(self) -> None:
        if self._blob is not None:
            self._arena.writer.free(self._blob.offset)
            self._blob = None

    def __del__(self) -> None:
        self._give_back()


class _Writer(ArenaWriter):
    """Gives pages back a part at a time, each in a turn of the event loop: those of 256 MiB hold it up for 40 ms."""

    def _give_back(self, offset: int, block: int) -> None:
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # there is none to be held up
            super()._give_back(offset, block)
            return
        parts = iter(range(offset, offset + block, GIVE_BACK_BYTES))

        def give_back_part() -> None:
            part = next(parts, None)
            if part is None:
                self._released.setdefault(block, []).append(offset)
            else:
                self._remove_pages(part, min(block, GIVE_BACK_BYTES))
                loop.call_soon(give_back_part)

        give_back_part()


class InputArena:
    """See the module."""

    def __init__(self) -> None:
        fd = create_arena("inputs")
        os.fchmod(fd, 0o400)  # another user could open it for writing through /proc otherwise
        self.writer: ArenaWriter = _Writer(fd)
        self.reader = ArenaReader(fd)
        self.read_fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)
        """What executors inherit."""

    def reserve(self, size: int) -> Input:
        """Room for a payload; never raises."""
        try:
            return Input(self, size, self.writer.reserve(size))
        except OSError as error:
            return Input(self, size, None, error)

    def close(self) -> None:
        """For tests: a worker keeps it until it is gone."""
        self.writer.close()
        os.close(self.read_fd)


Payload = bytes | Input
"""Of a run that has not started."""
