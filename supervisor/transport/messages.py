"""What a stream is given: a message, several that are joined, or a large one that lies elsewhere.

Owns: the prefix that gRPC puts before each, and taking joined messages apart. Deltas come by the hundred and are small:
what is joined once, as it lies on the wire, costs the outbox and the transport what one message does.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Final, Protocol, Self

PREFIX: Final = struct.Struct(">BL")
"""A byte that says whether the message is compressed, and its length."""
PREFIX_BYTES: Final = PREFIX.size
"""It counts in the windows of HTTP/2 as the message does."""


def prefix(message: Sized) -> bytes:
    """What goes before a message."""
    return PREFIX.pack(0, len(message))


class Joined:
    """At least one message. `data` is all of them with their prefixes, `count` how many they are."""

    __slots__ = ("count", "data")

    def __init__(self, data: bytes, count: int) -> None:
        self.data = data
        self.count = count

    @classmethod
    def of(cls, messages: Sequence[bytes]) -> Self:
        return cls(b"".join(part for message in messages for part in (prefix(message), message)), len(messages))

    def __len__(self) -> int:
        """Bytes, with the prefixes."""
        return len(self.data)

    def __iter__(self) -> Iterator[bytes]:
        """The messages, without prefixes."""
        start = 0
        for stop in self._ends():
            yield self.data[start + PREFIX_BYTES : stop]
            start = stop

    def whole_within(self, size: int) -> int:
        """How many of them the first `size` bytes hold to their end."""
        return sum(stop <= size for stop in self._ends())

    def cut(self, count: int) -> tuple[Self, Self]:
        """The first `count` messages, and the others; there must be some of both."""
        stop = next(stop for number, stop in enumerate(self._ends(), 1) if number == count)
        return type(self)(self.data[:stop], count), type(self)(self.data[stop:], self.count - count)

    def _ends(self) -> Iterator[int]:
        position, end = 0, len(self.data)
        while position < end:
            position += PREFIX_BYTES + PREFIX.unpack_from(self.data, position)[1]
            yield position


class LargeMessage(Protocol):
    """An encoded message that lies elsewhere, and is read from there when it is sent."""

    def __len__(self) -> int: ...

    def pieces(self) -> Iterator[bytes | memoryview]:
        """All of it in order, a piece at a time. A piece is valid until the next is asked for."""
        ...


Message = bytes | Joined | LargeMessage
"""What a stream is given: a message, or several in one."""


def count_of(messages: Iterable[Message]) -> int:
    """How many messages these are, each joined one counted."""
    return sum(message.count if isinstance(message, Joined) else 1 for message in messages)


def wire_size(message: Message) -> int:
    """What it takes of the stream, in bytes."""
    return len(message) if isinstance(message, Joined) else PREFIX_BYTES + len(message)


def apart(messages: Iterable[Message]) -> Iterator[bytes | LargeMessage]:
    """One message after the other, as they were before they were joined."""
    for message in messages:
        if isinstance(message, Joined):
            yield from message
        else:
            yield message


def in_one_piece(message: bytes | LargeMessage) -> bytes:
    """A message as it is encoded, wherever it lies."""
    return message if isinstance(message, bytes) else b"".join(bytes(piece) for piece in message.pieces())
