"""Payloads that lie in shared memory: the executor's ends of the two arenas.

Owns: the arenas, which are not safe to share between threads by themselves, and when a blob is given back.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import msgspec

from gen_worker.pipe.arena import BLOB_THRESHOLD_BYTES, ArenaReader, ArenaWriter
from gen_worker.pipe.messages import Blob, Free, Payload, Upward
from gen_worker.type_walk import types_in


class Blobs:
    """See the module. `send` takes the Free of a blob that was read."""

    def __init__(self, reader: ArenaReader, writer: ArenaWriter, send: Callable[[Upward], None]) -> None:
        self._reader = reader
        self._writer = writer
        self._send = send
        self._read_lock = threading.Lock()
        self._write_lock = threading.Lock()

    def decode(self, payload: Payload, decode: Callable[[bytes | memoryview], Any], type_: type) -> Any:
        """What `decode` makes of a payload for `type_`. A blob is given back by it, also when `decode` raises.

        It is decoded in place, unless what comes out may look into it. Raises ArenaError for a blob that can't be, and
        what `decode` raises.
        """
        if isinstance(payload, bytes):
            return decode(payload)
        try:
            with self._read_lock:
                data = self._reader.read(payload) if keeps_views(type_) else self._reader.view(payload)
            return decode(data)
        finally:
            self._send(Free(payload.offset))

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


@functools.cache
def keeps_views(type_: type) -> bool:
    """Whether a value of the type may refer to the bytes that it was decoded from: it has a memoryview or a Raw."""
    views = msgspec.inspect.MemoryViewType, msgspec.inspect.RawType
    return any(isinstance(each, views) for each in types_in(type_))
