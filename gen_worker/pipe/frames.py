"""Frames on the pipe: the length prefix of multiprocessing.Connection, many frames at a time.

Owns: cutting a byte stream into frames and back. A frame is a 4-byte big-endian signed length and its
body; a length of -1 means that the real length follows as 8 bytes (bodies over 0x7fffffff). A frame over the
cap is refused as soon as its length is read, before its body is.

The framing is that of CPython's Lib/multiprocessing/connection.py (Connection._send_bytes), so a plain
Connection can stand at either end.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

FRAME_CAP_BYTES: Final = 8 * 1024 * 1024
"""No honest frame is larger: payloads of a MiB and more go through the arena."""

_LENGTH = struct.Struct("!i")
_PREFIX_BYTES = _LENGTH.size


class FrameError(Exception):
    """The other end sent what can't be a frame; nothing after it can be trusted.

    `bodies` are the whole frames that came before it in the same `feed`: they count.
    """

    def __init__(self, message: str, bodies: Sequence[bytes] = ()) -> None:
        super().__init__(message)
        self.bodies = bodies


def encode_frame(body: bytes) -> bytes:
    """One frame. Raises FrameError when the body is over the cap."""
    if len(body) > FRAME_CAP_BYTES:
        raise FrameError(f"a frame of {len(body)} bytes is over the cap of {FRAME_CAP_BYTES}")
    return _LENGTH.pack(len(body)) + body


class FrameDecoder:
    """Cuts what `feed` is given into whole frames and keeps the rest for the next call.

    Once it met what is no frame it takes nothing more: each further `feed` raises the same.
    """

    __slots__ = ("_broken", "_cap", "_rest")

    def __init__(self, cap: int = FRAME_CAP_BYTES) -> None:
        self._cap = cap
        self._rest = bytearray()
        self._broken = ""

    @property
    def pending(self) -> int:
        """Bytes of a frame that is not whole yet."""
        return len(self._rest)

    def feed(self, data: bytes | bytearray | memoryview) -> list[bytes]:
        """The bodies of the frames that `data` completes, in order. Raises FrameError."""
        if self._broken:
            raise FrameError(self._broken)
        if not self._rest and len(data) >= _PREFIX_BYTES:
            (length,) = _LENGTH.unpack_from(data)
            if length == len(data) - _PREFIX_BYTES and length <= self._cap:  # one frame, which is what a small run is
                return [bytes(data[_PREFIX_BYTES:])]
        bodies: list[bytes] = []
        if self._rest:
            self._rest += data
            with memoryview(self._rest) as source:
                position, broken = self._cut(source, bodies)
            del self._rest[:position]
        else:
            with memoryview(data) as source:
                position, broken = self._cut(source, bodies)
                self._rest += source[position:]
        if broken:
            self._broken = broken
            self._rest.clear()
            raise FrameError(broken, bodies)
        return bodies

    def _cut(self, source: memoryview, bodies: list[bytes]) -> tuple[int, str]:
        """Append the whole frames at the start of `source`; returns where they end, and what is wrong there."""
        position, end = 0, len(source)
        while end - position >= _PREFIX_BYTES:
            (length,) = _LENGTH.unpack_from(source, position)
            if not 0 <= length <= self._cap:
                return position, f"a frame says it has {length} bytes; the cap is {self._cap}"
            stop = position + _PREFIX_BYTES + length
            if stop > end:
                break
            bodies.append(bytes(source[position + _PREFIX_BYTES : stop]))
            position = stop
        return position, ""
