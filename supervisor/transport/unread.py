"""What a stream can tell of what its scheduler had not read when it ended.

Owns: how long a message needs until a scheduler has it, and the last rush.

An event that is sent at t arrives at t + rtt/2. An end that came at T (tcp_info.py) left the scheduler at T - rtt/2. So
what was sent after T - rtt had not arrived when the scheduler ended the stream, and what was sent before had, but for
the time that either side takes to hand it over.
"""

from __future__ import annotations

from typing import Final

ROUND_TRIP_MIN_S: Final = 0.0005
ROUND_TRIP_MAX_S: Final = 0.1
"""Bounds of a round trip that is estimated from how long it took to connect."""
UNREAD_S: Final = 0.25
"""A stream that took nothing for so long was not read: its window was full. One that is read takes all at once."""
PAUSE_S: Final = 0.0005
"""What is sent after a pause of this length did not wait for what was sent before."""
RUSH_S: Final = 0.02
"""Messages that took less to send are no rush, and were not waited for: a library takes some milliseconds at times."""
SLOWER: Final = 4
"""So many times as long as it took to send them a scheduler may take to read messages."""


def estimated_round_trip(seconds: float, round_trips: int) -> float:
    """From how long it took to connect, which takes so many: an upper bound, as near as it gets."""
    return min(max(seconds / round_trips, ROUND_TRIP_MIN_S), ROUND_TRIP_MAX_S)


class Stretch:
    """The last time in which messages followed one another so closely that a scheduler may not have kept up."""

    def __init__(self, now: float) -> None:
        self._began = self._ended = now

    def sent(self, began: float, now: float) -> None:
        """`send` took from `began` until now."""
        if began - self._ended > PAUSE_S:
            self._began = began
        self._ended = now

    def since(self, now: float) -> float:
        """What went out before this has been read, if the scheduler had read all when the stretch began."""
        took_s = self._ended - self._began
        caught_up = took_s < RUSH_S or now - self._ended > SLOWER * took_s
        return now if caught_up else min(now, self._began)
