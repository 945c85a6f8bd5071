"""What a stream can tell of what its scheduler had not read when it ended.

Owns: how long a message needs until a scheduler has it, and the last rush.

An event that is sent at t arrives at t + rtt/2. An end that is noticed at T left the scheduler at T - rtt/2. So what
was sent after T - rtt had not arrived when the scheduler ended the stream, and what was sent before had, but for the
time that either side takes to hand it over.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import struct
from typing import Final, Protocol

ROUND_TRIP_MIN_S: Final = 0.0005
ROUND_TRIP_MAX_S: Final = 0.1
"""Bounds of a round trip that is estimated from how long it took to connect."""

_TCP_INFO_MIN_RTT_OFFSET: Final = 148
"""Of tcpi_min_rtt in struct tcp_info (linux/tcp.h). tcpi_rtt is no measure: the peer's delayed acknowledgements, up to
40 ms, are in it."""
_MICROSECONDS: Final = struct.Struct("=I")
_NO_SAMPLE: Final = 2**32 - 1
UNREAD_S: Final = 0.25
"""A stream that took nothing for so long was not read: its window was full. One that is read takes all at once."""
PAUSE_S: Final = 0.0005
"""What is sent after a pause of this length did not wait for what was sent before."""
RUSH_S: Final = 0.02
"""Messages that took less to send are no rush, and were not waited for: a library takes some milliseconds at times."""
SLOWER: Final = 4
"""So many times as long as it took to send them a scheduler may take to read messages."""


class TcpInfo(Protocol):
    """What is used of a socket; asyncio's TransportSocket and uvloop's are such."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        """Raises OSError."""
        ...


def tcp_round_trip(connection: TcpInfo) -> float:
    """Seconds, the least that the kernel has measured in the last minutes; 0.0 when it does not say."""
    size = _TCP_INFO_MIN_RTT_OFFSET + _MICROSECONDS.size
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, size)
        (microseconds,) = _MICROSECONDS.unpack_from(info, _TCP_INFO_MIN_RTT_OFFSET)
    except (OSError, struct.error):  # it is closed already, or no Linux
        return 0.0
    return 0.0 if microseconds == _NO_SAMPLE else float(microseconds) / 1e6


def tcp_round_trip_to(port: int) -> float:
    """The same of this process's connection to `port` of whatever host; 0.0 when there is none.

    For a library that keeps its socket to itself. It is looked at for a moment, and never used.
    """
    with contextlib.suppress(OSError):  # no Linux
        return max((_round_trip_of(int(entry.name), port) for entry in os.scandir("/proc/self/fd")), default=0.0)
    return 0.0


def _round_trip_of(descriptor: int, port: int) -> float:
    copy = -1
    try:
        if stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            copy = os.dup(descriptor)
            connection = socket.socket(fileno=copy)
            copy = -1  # the socket closes it
            with connection:
                if connection.type == socket.SOCK_STREAM and connection.getpeername()[1:2] == (port,):
                    return tcp_round_trip(connection)
    except OSError:  # it is closed by now, or has no peer
        pass
    finally:
        if copy >= 0:
            os.close(copy)
    return 0.0


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
        return now if caught_up else self._began
