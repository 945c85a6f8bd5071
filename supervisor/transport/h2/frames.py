"""Received bytes to whole HTTP/2 frames.

Owns: the bytes of a frame that is not complete yet.

`h2` takes any bytes; it is given one frame at a time all the same, for three reasons. What came before a broken frame
is handled before the break is noticed, so no message in front of it is lost. A peer that speaks something else is
noticed by its first nine bytes, and not after the megabytes that those announce. And a GOAWAY is handled apart from
`h2`, which takes it for the end of the connection although streams go on after it (RFC 9113, 6.8).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Self

HEADER_BYTES: Final = 9
GOAWAY: Final = 0x7
_TYPE_OFFSET: Final = 3
_STREAM_IDS: Final = 0x7FFF_FFFF
_GOAWAY: Final = struct.Struct(">LL")
_SHOWN_BYTES: Final = 200


class BadFrame(Exception):
    """Bytes that are no frame this side takes."""


@dataclass(frozen=True, slots=True)
class Goaway:
    """The peer leaves: the last stream that it still serves, why (an error code of HTTP/2), and its words."""

    last_stream: int
    code: int
    words: str

    @classmethod
    def parse(cls, frame: bytes) -> Self:
        """Of a whole frame. Raises BadFrame."""
        payload = frame[HEADER_BYTES:]
        if len(payload) < _GOAWAY.size:
            raise BadFrame("a GOAWAY that is cut short")
        last_stream, code = _GOAWAY.unpack_from(payload)
        words = payload[_GOAWAY.size :][:_SHOWN_BYTES].decode(errors="replace")
        return cls(last_stream & _STREAM_IDS, code, words)


def type_of(frame: bytes) -> int:
    """The type of a whole frame."""
    return frame[_TYPE_OFFSET]


class FrameCutter:
    """See the module. `max_payload` is SETTINGS_MAX_FRAME_SIZE as announced."""

    def __init__(self, max_payload: int) -> None:
        self._max_payload = max_payload
        self._parts: list[bytes] = []
        self._have = 0
        self._need = HEADER_BYTES
        """Until so many bytes are here there is no use in looking."""

    def cut(self, data: bytes) -> Iterator[bytes]:
        """The frames that are whole with `data`. To be used up; raises BadFrame after those before it."""
        self._have += len(data)
        if self._have < self._need:
            self._parts.append(data)
            return
        if self._parts:
            self._parts.append(data)
            data = b"".join(self._parts)
            self._parts.clear()
        start, end = 0, len(data)
        while True:
            self._need = HEADER_BYTES
            if end - start >= HEADER_BYTES:
                length = int.from_bytes(data[start : start + 3], "big")
                if length > self._max_payload:
                    raise BadFrame(f"a frame of {length} bytes, {self._max_payload} are taken")
                self._need = HEADER_BYTES + length
            if end - start < self._need:
                break
            stop = start + self._need
            yield data[start:stop]
            start = stop
        self._have = end - start
        if self._have:
            self._parts.append(data[start:])
