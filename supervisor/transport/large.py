"""Large messages at the seam: what they are, and how one is taken apart while it arrives.

Owns: nothing but one message that is under way. A payload of 64 MiB that is joined, parsed and copied in one piece
holds up the event loop for a quarter of a second, and takes its size several times over. So

1. a large result goes out as a LargeMessage (messages.py): pieces that are read from shared memory when they are sent;
2. a large request comes in as a LargeRequest: its payload went to shared memory as it came, and `head` is the message
   without it, for protobuf to parse.

`Splitter` takes one apart when it is what serializers write: `run_request` alone, and in it one large `input_payload`
among fields of any number and order. Everything else that protobuf would take (a second payload, groups, padded
varints, another kind of message) is joined as it came, so protobuf alone decides what it means.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Final, NamedTuple

from supervisor.input_arena import Input, InputArena
from supervisor.wire_codec import varint

LARGE_BYTES: Final = 1024 * 1024
"""Messages over this size are taken apart, and so are payloads from this size on: those that go by shared memory."""
HEAD_BYTES: Final = 256 * 1024
"""What surrounds a payload is less than this on either side, or the message is joined."""
PIECE_BYTES: Final = 256 * 1024
"""Large messages are copied in pieces of this size: 50 us each."""

_RUN_REQUEST: Final = 0x52
"""The tag of WorkerSchedulerMessage.run_request: field 10, length-delimited."""
_INPUT_PAYLOAD: Final = 3
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_TAG_BYTES: Final = 5
_VALUE_BYTES: Final = 10
"""The longest varints of a tag or a length, and of a value."""
_MORE: Final = 0x80
"""The bit of a varint's byte that says that another follows."""


class LargeRequest(NamedTuple):
    """A run_request with a large payload."""

    head: bytes
    """The encoded WorkerSchedulerMessage without its payload."""
    payload: Input


class _State(Enum):
    HEAD = auto()
    PAYLOAD = auto()
    TAIL = auto()
    PLAIN = auto()


class _Odd(Exception):
    """Not what is taken apart."""


class _More(Exception):
    """The field at hand is not here as a whole yet."""


class Splitter:
    """See the module. For one message of `size` bytes."""

    def __init__(self, size: int, arena: InputArena) -> None:
        self._size = size
        self._arena = arena
        self._state = _State.HEAD
        self._head = bytearray()
        """Everything before the payload."""
        self._at = 0
        """In the head: where the next field begins; 0: the request has not begun."""
        self._payload_field = 0
        """In the head: where the payload's tag is."""
        self._payload: Input | None = None
        self._missing = 0
        """Of the payload."""
        self._tail = bytearray()
        self._parts: list[bytes] = []

    def feed(self, data: bytes | memoryview) -> None:
        """The next bytes of the message, and no more than are left of it."""
        if self._state is _State.HEAD:
            self._head += data
            self._scan_head()
        elif self._payload is not None and self._missing:
            self._fill(self._payload, data)
        elif self._state is _State.TAIL:
            self._add_to_tail(data)
        else:
            self._parts.append(bytes(data))

    def message(self) -> bytes | LargeRequest:
        """The whole message, once all of it was fed."""
        if self._state is _State.TAIL and self._payload is not None:
            try:
                _check_tail(self._tail)
            except (_Odd, _More):
                self._join()
            else:
                head, field = self._head, self._payload_field
                _, begin = _varint(head, 1, _TAG_BYTES)
                fields = head[begin:field] + self._tail
                return LargeRequest(bytes((_RUN_REQUEST,)) + varint(len(fields)) + fields, self._payload)
        elif self._state is not _State.PLAIN:
            self._join()
        return b"".join(self._parts)

    # -- inside -------------------------------------------------------------------------------

    def _scan_head(self) -> None:
        head = self._head
        try:
            if not self._at:
                self._at = self._begin()
            while True:
                number, kind, position = _tag(head, self._at)
                if kind == _LENGTH:
                    length, position = _varint(head, position, _TAG_BYTES)
                    if number == _INPUT_PAYLOAD and LARGE_BYTES <= length <= self._size - position:
                        self._begin_payload(length, position)
                        return
                    position += length
                else:
                    position = _past(head, position, kind)
                _need(head, position)
                self._at = position
        except _Odd:
            self._join()
        except _More:
            if len(head) > HEAD_BYTES or self._at >= self._size:
                self._join()

    def _begin(self) -> int:
        """Where the request's first field is: the request must be all of the message."""
        if not self._head:
            raise _More
        if self._head[0] != _RUN_REQUEST:
            raise _Odd
        length, begin = _varint(self._head, 1, _TAG_BYTES)
        if begin + length != self._size:
            raise _Odd
        return begin

    def _begin_payload(self, length: int, position: int) -> None:
        self._payload_field, self._missing = self._at, length
        self._payload = self._arena.reserve(length)
        self._state = _State.PAYLOAD
        rest = bytes(self._head[position:])
        del self._head[position:]
        self._fill(self._payload, rest)

    def _fill(self, payload: Input, data: bytes | memoryview) -> None:
        part = data[: self._missing]
        payload.write(part)
        self._missing -= len(part)
        if not self._missing:
            self._state = _State.TAIL
            self._add_to_tail(data[len(part) :])

    def _add_to_tail(self, data: bytes | memoryview) -> None:
        self._tail += data
        if len(self._tail) > HEAD_BYTES:
            self._join()

    def _join(self) -> None:
        """From here on it is bytes, as it came."""
        self._state = _State.PLAIN
        self._parts = [bytes(self._head)]
        if self._payload is not None:
            self._parts += (self._payload.read(), bytes(self._tail))
        self._head, self._tail, self._payload = bytearray(), bytearray(), None


def _check_tail(tail: bytearray) -> None:
    """Fields, and no other payload among them, since the last one counts. Raises _Odd or _More."""
    position = 0
    while position < len(tail):
        number, kind, position = _tag(tail, position)
        if number == _INPUT_PAYLOAD:
            raise _Odd
        if kind == _LENGTH:
            length, position = _varint(tail, position, _TAG_BYTES)
            position += length
        else:
            position = _past(tail, position, kind)
    _need(tail, position)


def _need(data: bytearray, end: int) -> None:
    """Raises _More unless so much is here."""
    if end > len(data):
        raise _More


def _tag(data: bytearray, position: int) -> tuple[int, int, int]:
    """Field number, wire type, and where the field goes on."""
    tag, position = _varint(data, position, _TAG_BYTES)
    number, kind = tag >> 3, tag & 7
    if not number or kind not in (_VARINT, _FIXED64, _LENGTH, _FIXED32):
        raise _Odd
    return number, kind, position


def _past(data: bytearray, position: int, kind: int) -> int:
    """Where a value that has no length ends, which may be behind what is here."""
    if kind == _FIXED64:
        return position + 8
    if kind == _FIXED32:
        return position + 4
    for end in range(position, position + _VALUE_BYTES):
        if end >= len(data):
            raise _More
        if data[end] < _MORE:
            return end + 1
    raise _Odd


def _varint(data: bytearray, position: int, most: int) -> tuple[int, int]:
    """A tag or a length, in as few bytes as it takes, and where it ends."""
    value = 0
    for index in range(most):
        if position + index >= len(data):
            raise _More
        byte = data[position + index]
        value |= (byte & 0x7F) << 7 * index
        if byte < _MORE:
            if index and not byte:
                raise _Odd  # padded
            return value, position + index + 1
    raise _Odd
