"""An output that still lies in its executor's shared memory, and the result that will have it.

Owns: that the block there is given back once. What waits to be sent takes no memory of the supervisor's until it is
sent, and outlives its executor: the memory stays as long as the arena's descriptor is open here.
"""

from __future__ import annotations

from collections.abc import Callable

from gen_worker.pipe.arena import ArenaReader
from gen_worker.pipe.messages import Blob
from supervisor.wire_codec import encode_result


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

    def release(self) -> None:
        """Nobody will read it (any more)."""
        if self._held:
            self._held = False
            self._free(self._blob.offset)
            self._arena.release()


class LargeResult:
    """A success whose message is made when it is sent (the outbox's Output)."""

    def __init__(self, run_id: str, output: HeldOutput) -> None:
        self._run_id = run_id
        self._output = output
        self.size = output.size + len(run_id)

    def message(self) -> bytes:
        return encode_result(self._run_id, self._output.read(), None)

    def release(self) -> None:
        self._output.release()
