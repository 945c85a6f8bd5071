"""The window that the scheduler gives to this side's messages, and what it tells of the scheduler's reading.

Owns: how much may be sent, was sent and was given back, in bytes; pure. A library gives back what its program took from
it, at the latest when that is half the window. And it may give back what nobody took: a stalled grpcio server, which
counts what arrives only as it is read, was found to have given back 1.1 MiB too much of 16, and 2.1 of 4.
"""

from __future__ import annotations

from collections import deque
from typing import Final

DEFAULT_BYTES: Final = 65_535
"""Until SETTINGS say otherwise (RFC 9113, 6.9.2)."""
IN_HAND_BYTES: Final = 64 * 1024
"""What a program may have taken from its library, and not read."""
AHEAD: Final = 2
"""So many windows may lie unread: one, and another that was given back early. To repeat is better than to lose."""
SHORT_S: Final = 0.25
"""A stream that had to wait for its window within this time before its end was saturated."""
_MARK_S: Final = 0.005
_MARKS: Final = 4096
"""Times of sending are noted this finely, and so many of them."""


class Window:
    """See the module."""

    def __init__(self) -> None:
        self._size = DEFAULT_BYTES
        """What the scheduler's settings give a stream."""
        self._granted = DEFAULT_BYTES
        """Up to where may be sent."""
        self._sent = 0
        self.peak = DEFAULT_BYTES
        """The largest that the window was at any time."""
        self._waited_at = float("-inf")
        self._marks: deque[tuple[int, float]] = deque(maxlen=_MARKS)
        """Where what was sent at a time ended; what was given back is not in it."""
        self.behind_s = 0.0
        """How long ago that went out which was not given back, when last something was."""

    def sent(self, size: int, now: float) -> None:
        """So much went out."""
        self._sent += size
        if self._marks and now - self._marks[-1][1] < _MARK_S:
            self._marks[-1] = (self._sent, self._marks[-1][1])
        else:
            self._marks.append((self._sent, now))

    def waited(self, now: float) -> None:
        """Something had to wait for room until now."""
        self._waited_at = now

    def resized(self, size: int) -> None:
        """The scheduler's settings have changed it."""
        self._granted += size - self._size
        self._size = size
        self.peak = max(self.peak, size, self._open)

    def opened(self, size: int, now: float) -> None:
        """The scheduler gave so much back."""
        self._granted += size
        self.peak = max(self.peak, self._open)
        read = self._granted - self._size
        while self._marks and self._marks[0][0] <= read:
            self._marks.popleft()
        self.behind_s = now - self._marks[0][1] if self._marks else 0.0

    @property
    def _open(self) -> int:
        return self._granted - self._sent

    @property
    def unread(self) -> int:
        """The most of what was sent that may not have been read."""
        return min(self._sent, AHEAD * self.peak - self._open + IN_HAND_BYTES)

    def was_short(self, now: float) -> bool:
        """Whether the scheduler took less than there was: more than half lies unread, or `send` waited just now."""
        return self._open < self._size // 2 or now - self._waited_at <= SHORT_S
