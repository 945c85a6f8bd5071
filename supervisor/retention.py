"""What went out on a stream and is not known to have arrived, packed.

Owns: these messages, in order, and when enough has followed one to let go of it. A tiny message kept as an object of
its own takes several times its size, and there may be hundreds of thousands of them: they are joined into packs, and a
pack stays until the last message in it may go. Small results are alike but for their ids, so packs of them are pressed.
"""

from __future__ import annotations

import zlib
from array import array
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Final, NamedTuple

from supervisor.held_output import LargeResult

PACK_BYTES: Final = 64 * 1024
"""A pack that has reached it is closed; a message of this size is a pack of its own, and not copied. A large result,
which is larger still, stays where its output lies."""
PACK_S: Final = 1.0
"""So long after its first message a pack is closed, so that those of a slow stream are let go of in time."""

PRESSED_MESSAGES: Final = 256
"""Packs of so many and more are pressed, which takes half a millisecond each; with fewer, larger messages it would be
their bytes that it takes its time for."""


class Sent(NamedTuple):
    """A message that went out. `ticket` is the keeper's, `key` its run's.

    An event has no ticket: the number is how many are joined in `data` (transport/messages.py), 0 for one as it is.
    """

    key: int
    ticket: int
    data: bytes | LargeResult


class Pack:
    """Messages that went out one after the other."""

    __slots__ = (
        "_count",
        "_data",
        "_has_tickets",
        "_pressed",
        "_size",
        "ends",
        "keys",
        "opened_at",
        "sizes",
        "tickets",
        "times",
    )

    def __init__(self, now: float) -> None:
        self._data: bytes | bytearray | LargeResult = b""
        self.sizes = array("I")
        self.keys = array("Q")
        self.tickets = array("Q")
        self.times = array("d")
        """When each went out; of an event, when it will have been read."""
        self.ends = array("Q")
        """Where in the stream each ended, in bytes."""
        self.opened_at = now
        self._pressed = b""
        """Data, sizes, keys and tickets, which are empty then."""
        self._has_tickets = False
        self._count = 0
        self._size = 0

    def __len__(self) -> int:
        return self._count

    @property
    def size(self) -> int:
        """Bytes of the messages in it."""
        return self._size

    @property
    def sent_at(self) -> float:
        """The last one's time."""
        return self.times[-1]

    @property
    def position(self) -> int:
        """Where in the stream its last message ended, in bytes."""
        return self.ends[-1]

    def add(self, key: int, ticket: int, data: bytes | LargeResult, position: int, now: float) -> None:
        size = len(data)
        if not isinstance(data, bytes) or (size >= PACK_BYTES and not self.sizes):
            self._data = data
        else:
            if not isinstance(self._data, bytearray):
                self._data = bytearray()
            self._data += data
        self.sizes.append(size)
        self.keys.append(key)
        self.tickets.append(ticket)
        self.times.append(now)
        self.ends.append(position)
        self._count += 1
        self._size += size

    def press(self) -> None:
        """Take less memory. Nothing is added any more; of times and ends the last ones stay."""
        if self._count < PRESSED_MESSAGES or not isinstance(self._data, bytearray):
            return
        self.times, self.ends = self.times[-1:], self.ends[-1:]
        self._has_tickets = any(self.tickets)
        columns = (self.sizes.tobytes(), self.keys.tobytes(), self.tickets.tobytes(), self._data)
        self._pressed = zlib.compress(b"".join(columns), level=1)
        self._data, self.sizes = bytearray(), array("I")
        self.keys, self.tickets = array("Q"), array("Q")

    def _unpress(self) -> None:
        """Be as before, but that all messages have the last one's time and end."""
        if not self._pressed:
            return
        columns, at = memoryview(zlib.decompress(self._pressed)), 0
        self._pressed = b""
        for column in (self.sizes, self.keys, self.tickets):
            end = at + column.itemsize * self._count
            column.frombytes(columns[at:end])
            at = end
        self._data = bytearray(columns[at:])
        self.times, self.ends = self.times * self._count, self.ends * self._count

    def kept(self) -> Iterable[int]:
        """The keeper's tickets of the messages, as far as it has any."""
        if self._pressed and not self._has_tickets:
            return ()
        self._unpress()
        return self.tickets

    def __iter__(self) -> Iterator[Sent]:
        self._unpress()
        if not isinstance(self._data, bytearray):  # one that was not copied
            yield Sent(self.keys[0], self.tickets[0], self._data)
            return
        view, offset = memoryview(self._data), 0
        for key, ticket, size in zip(self.keys, self.tickets, self.sizes, strict=True):
            yield Sent(key, ticket, bytes(view[offset : offset + size]))
            offset += size

    def release(self) -> None:
        """The messages are needed no more."""
        if isinstance(self._data, LargeResult):
            self._data.release()

    def without(self, unwanted: Callable[[int], bool]) -> Pack:
        """The same without the messages of the runs that are not wanted."""
        left = Pack(self.opened_at)
        for message, end, time in zip(self, self.ends, self.times, strict=True):
            if not unwanted(message.key):
                left.add(*message, end, time)
        return left

    def after(self, position: int, since: float) -> Pack:
        """The same without what ended at `position` of the stream or before, or has a time before `since`."""
        self._unpress()
        start = max(bisect_right(self.ends, position), bisect_left(self.times, since))
        if not start:
            return self
        left = Pack(self.opened_at)
        for message, end, time in islice(zip(self, self.ends, self.times, strict=True), start, None):
            left.add(*message, end, time)
        return left


class Retention:
    """See the module. `limit_bytes` that follow on the stream prove a message delivered."""

    def __init__(self, limit_bytes: int, *, press: bool = False) -> None:
        """`press`: packs of small messages take less memory, and no more is asked of them than pack by pack."""
        self.limit_bytes = limit_bytes
        self._press = press
        self._packs: deque[Pack] = deque()
        self.size = 0
        """Bytes of the messages that are retained."""

    def add(self, key: int, ticket: int, data: bytes | LargeResult, position: int, now: float) -> None:
        """A message (see Sent) went out, and ended at `position` of the stream."""
        size = len(data)
        last = self._packs[-1] if self._packs else None
        if last is None or last.size + size > PACK_BYTES or now - last.opened_at >= PACK_S:
            if last is not None and self._press:
                last.press()
            last = Pack(now)
            self._packs.append(last)
        last.add(key, ticket, data, position, now)
        self.size += size

    def arrived(self, position: int, before: float | None) -> Iterator[Pack]:
        """Take out what is known to have arrived, on a stream that has taken `position` bytes.

        That is what enough bytes have followed, and, unless it is None, what went out at `before` or earlier.
        """
        packs = self._packs
        while packs and (
            position - packs[0].position >= self.limit_bytes or (before is not None and packs[0].sent_at <= before)
        ):
            pack = packs.popleft()
            self.size -= pack.size
            yield pack

    def take_all(self) -> list[Pack]:
        """Take out everything: its stream is gone."""
        packs, self._packs = list(self._packs), deque()
        self.size = 0
        return packs

    def __len__(self) -> int:
        return sum(map(len, self._packs))


def messages(packs: Iterable[Pack]) -> Iterator[Sent]:
    """All that is in them, in order."""
    for pack in packs:
        yield from pack
