"""The payload of DATA frames to gRPC messages, as far as the session keeps up.

Owns: the messages that wait to be received, what is here of the next one, and, once enough wait, the bytes behind them
as they came.

A message is a byte (1: compressed), its length in four, and its body; it may be split anywhere over frames. One that
says that it is large is not joined but taken apart as it comes (supervisor/transport/large.py). What is
`held` is not acknowledged to the scheduler, so that HTTP/2's window makes it wait. The bytes of a message that is not
whole yet are not held: it may be larger than any window.
"""

from __future__ import annotations

from typing import Final

from supervisor.input_arena import InputArena
from supervisor.transport import StatusCode, StreamStatus
from supervisor.transport.large import LARGE_BYTES, LargeRequest, Splitter
from supervisor.transport.messages import PREFIX, PREFIX_BYTES

INBOX_BYTES: Final = 4 * 1024 * 1024
INBOX_MESSAGES: Final = 1024
"""At either bound messages are no longer cut, so that tiny ones don't pile up as objects; the one that reaches it is
still cut."""


class Inbox:
    """See the module. `max_message` is the largest body that is taken, in bytes; without a `arena` all are joined."""

    def __init__(self, max_message: int, arena: InputArena | None = None) -> None:
        self._max_message = max_message
        self._arena = arena
        self.messages: list[bytes | LargeRequest] = []
        self._size = 0
        """Of what waits in `messages`, with prefixes."""
        self._rest = bytearray()
        self._head = b""
        """The prefix of the next message as far as it is here."""
        self._parts: list[bytes] = []
        self._length = 0
        """Of the next message's body."""
        self._large: Splitter | None = None
        """Has what is here of that body, if it is large."""
        self._missing = -1
        """Of the next message's body; -1: its prefix is not whole."""
        self.error: StreamStatus | None = None
        """What came is no message that can be taken; nothing after it is looked at."""

    @property
    def held(self) -> int:
        """Bytes that are here and wait for the session."""
        return self._size + len(self._rest)

    @property
    def is_amid_message(self) -> bool:
        """Part of a message is here, and nothing behind which the rest could wait."""
        return not self._rest and (self._missing >= 0 or bool(self._head))

    def feed(self, data: bytes) -> None:
        """Take what a DATA frame brought."""
        if self._rest or self._is_full:
            self._rest += data
        else:
            self._cut(data)

    def abandon(self) -> None:
        """Nothing more is fed: what is here of a large message that is not whole goes, and none is begun any more."""
        self._large = self._arena = None

    def take(self) -> list[bytes | LargeRequest]:
        """All messages that wait. What lies behind them is cut next, and counts as waiting from then on."""
        messages, self.messages = self.messages, []
        self._size = 0
        if self._rest:
            rest, self._rest = bytes(self._rest), bytearray()
            self._cut(rest)
        return messages

    @property
    def _is_full(self) -> bool:
        return self._size >= INBOX_BYTES or len(self.messages) >= INBOX_MESSAGES

    def _cut(self, data: bytes) -> None:
        position, end = 0, len(data)
        while position < end and self.error is None:
            if self._is_full:
                self._rest += data[position:]
                return
            if self._missing < 0:
                position = self._take_prefix(data, position)
                if self._missing < 0 or self.error is not None:
                    continue
            part = data[position : position + self._missing]
            position += len(part)
            self._missing -= len(part)
            if self._large is None:
                self._parts.append(part)
            else:
                self._large.feed(part)
            if not self._missing:
                self._end_message()

    def _take_prefix(self, data: bytes, position: int) -> int:
        """Returns where the body begins, when `_missing` says how long it is."""
        stop = position + PREFIX_BYTES - len(self._head)
        head = self._head + data[position:stop]
        if len(head) < PREFIX_BYTES:
            self._head = head
            return len(data)
        self._head = b""
        flag, length = PREFIX.unpack(head)
        if flag:
            reason = "the scheduler sent a compressed message, and this worker takes none"
            self.error = StreamStatus(StatusCode.INTERNAL, f"{reason} (flag {flag})")
        elif length > self._max_message:
            reason = f"the scheduler sent a message of {length} bytes; {self._max_message} are taken at most"
            self.error = StreamStatus(StatusCode.RESOURCE_EXHAUSTED, reason)
        elif length > LARGE_BYTES and self._arena is not None:
            self._large = Splitter(length, self._arena)
        self._length = self._missing = length
        if not length and self.error is None:
            self._end_message()
        return stop

    def _end_message(self) -> None:
        message: bytes | LargeRequest
        if self._large is not None:
            message, self._large = self._large.message(), None
        else:
            message = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
            self._parts.clear()
        self._missing = -1
        self.messages.append(message)
        self._size += PREFIX_BYTES + self._length
