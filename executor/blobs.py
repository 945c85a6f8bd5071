"""Payloads that lie in shared memory: the executor's ends of the two arenas.

Owns: the arenas, which are not safe to share between threads by themselves, and when a blob is given back.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from gen_worker.pipe.arena import BLOB_THRESHOLD_BYTES, ArenaReader, ArenaWriter
from gen_worker.pipe.messages import Blob, Free, Payload, Upward


class Blobs:
    """See the module. `send` takes the Free of a blob that was read."""

    def __init__(self, reader: ArenaReader, writer: ArenaWriter, send: Callable[[Upward], None]) -> None:
        self._reader = reader
        self._writer = writer
        self._send = send
        self._read_lock = threading.Lock()
        self._write_lock = threading.Lock()

    def decode(self, payload: Payload, decode: Callable[[bytes | memoryview], Any]) -> Any:
        """What `decode` makes of a payload. A blob is decoded in place and freed, also when `decode` raises.

        Raises ArenaError for a blob that can't be, and what `decode` raises.
        """
        if isinstance(payload, bytes):
            return decode(payload)
        try:
            return self._decode_blob(payload, decode)
        finally:
            self._send(Free(payload.offset))

    def _decode_blob(self, blob: Blob, decode: Callable[[bytes | memoryview], Any]) -> Any:
        with self._read_lock:
            view = self._reader.view(blob)
        decoded = decode(view)
        try:
            view.release()
        except BufferError:
            # A field of type memoryview looks into the arena, which is about to be used for something else.
            del decoded
            with self._read_lock:
                data = self._reader.read(blob)
            return decode(data)
        return decoded

    def discard(self, payload: Payload) -> None:
        """Give back the payload of a run that did not start."""
        if isinstance(payload, Blob):
            self._send(Free(payload.offset))

    def store(self, data: bytes) -> Payload:
        """`data` itself when it is small, else where it lies now. Raises OSError when there is no memory for it."""
        if len(data) < BLOB_THRESHOLD_BYTES:
            return data
        with self._write_lock:
            return self._writer.put(data)

    def freed(self, offset: int) -> None:
        """The supervisor has read the blob at `offset`. Raises ArenaError when there is none."""
        with self._write_lock:
            self._writer.free(offset)
