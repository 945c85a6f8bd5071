"""An output that still lies in its executor's shared memory, and the result that will have it.

Owns: that the block there is given back once. What waits to be sent, or may have to be sent again, takes no memory of
the supervisor's, and outlives its executor: the memory stays as long as the arena's descriptor is open here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from gen_worker.pipe.arena import ArenaReader
from gen_worker.pipe.messages import Blob
from supervisor.transport.large import PIECE_BYTES
from supervisor.wire_codec import encode_result_head


class HeldOutput:
    """See the module. `free` gives the block back to the executor, if that still lives."""

    def __init__(self, arena: ArenaReader, blob: Blob, free: Callable[[int], None]) -> None:
        """Raises ArenaError when the blob can't be in the arena."""
        arena.hold(blob)
        self._arena = arena
        self._blob = blob
        self._free = free
        self._held = True

    @property
    def size(self) -> int:
        return self._blob.size

    def read(self) -> bytes:
        """A copy. Raises ArenaError when the file no longer has it, which its seal rules out."""
        return self._arena.read(self._blob)

    def read_into(self, position: int, target: memoryview) -> None:
        """Fill `target` with what is at `position`; as `read`."""
        self._arena.read_into(self._blob, position, target)

    def release(self) -> None:
        """Nobody will read it (any more)."""
        if self._held:
            self._held = False
            self._free(self._blob.offset)
            self._arena.release()


class LargeResult:
    """A success whose message is read where its output lies, each time that it is sent (the outbox's Output)."""

    def __init__(self, run_id: str, output: HeldOutput) -> None:
        self.run_id = run_id
        self._output = output
        self._head = encode_result_head(run_id, output.size)
        self._holders = 1

    def __len__(self) -> int:
        return len(self._head) + self._output.size

    def pieces(self) -> Iterator[bytes | memoryview]:
        """The message, a piece at a time; each is overwritten by the next. May be called in a thread."""
        yield self._head
        buffer, size = memoryview(bytearray(PIECE_BYTES)), self._output.size
        for position in range(0, size, PIECE_BYTES):
            piece = buffer[: size - position]
            self._output.read_into(position, piece)
            yield piece

    def hold(self) -> None:
        """One more needs it; a `release` follows."""
        self._holders += 1

    def release(self) -> None:
        """One who needed it does no more."""
        self._holders -= 1
        if not self._holders:
            self._output.release()
