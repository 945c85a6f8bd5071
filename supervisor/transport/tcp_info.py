"""What the kernel knows of a TCP connection.

Owns: where its figures lie in struct tcp_info (linux/tcp.h), and a second descriptor of a socket that a library keeps
to itself. Other systems than Linux say nothing, and no figure is the answer.
"""

from __future__ import annotations

import os
import socket
import struct
from pathlib import Path
from typing import Final, Protocol, Self

_STATE_OFFSET: Final = 0
_LAST_DATA_RECEIVED_OFFSET: Final = 52
_LAST_ACK_RECEIVED_OFFSET: Final = 56
_MIN_RTT_OFFSET: Final = 148
"""tcpi_rtt is no measure: the peer's delayed acknowledgements, up to 40 ms, are in it."""
_FIGURE: Final = struct.Struct("=I")
_SIZE: Final = _MIN_RTT_OFFSET + _FIGURE.size
_NO_SAMPLE: Final = 2**32 - 1
_ESTABLISHED: Final = 1
_TICK_S: Final = 0.01
"""The kernel's clock may be as coarse (CONFIG_HZ): less is told apart from nothing by none of these figures."""


class TcpSocket(Protocol):
    """What is used of a socket; asyncio's TransportSocket and uvloop's are such."""

    def getsockopt(self, level: int, option: int, size: int, /) -> bytes:
        """Raises OSError."""
        ...


def round_trip(connection: TcpSocket) -> float:
    """Seconds, the least that the kernel has measured in the last minutes; 0.0 when it does not say."""
    if (info := _info(connection)) is None:
        return 0.0
    microseconds = _figure(info, _MIN_RTT_OFFSET)
    return 0.0 if microseconds == _NO_SAMPLE else microseconds / 1e6


def since_end(connection: TcpSocket) -> float:
    """Seconds since the peer ended what it says on the connection; 0.0 for just now, and when the kernel does not say.

    To be asked when its end was noticed. Where the connection lives on, the end was the last data. Where it is gone, it
    is the last acknowledgement: one comes with a FIN, and what a reset finds unacknowledged nobody has read. Exact to
    the kernel's tick.
    """
    if (info := _info(connection)) is None:
        return 0.0
    lives = info[_STATE_OFFSET] == _ESTABLISHED
    seconds = _figure(info, _LAST_DATA_RECEIVED_OFFSET if lives else _LAST_ACK_RECEIVED_OFFSET) / 1e3
    return seconds if seconds > _TICK_S else 0.0


def _info(connection: TcpSocket) -> bytes | None:
    try:
        info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE)
    except OSError:  # it is closed already, or no Linux
        return None
    return info if len(info) == _SIZE else None


def _figure(info: bytes, offset: int) -> int:
    (figure,) = _FIGURE.unpack_from(info, offset)
    return int(figure)


class Observed:
    """A library's connection, to be asked about and never used. `close` it soon after its end.

    The library ends a connection by a shutdown, so that this descriptor does not keep it open.
    """

    def __init__(self, connection: socket.socket | None) -> None:
        self._connection = connection

    @classmethod
    def to_port(cls, port: int) -> Self:
        """This process's connection to `port` of whatever host; one that tells nothing when it has not just one."""
        # All are looked at before the first copy, which may get the number of one that is closed by then.
        found = [copy for descriptor in _sockets() if (copy := _copy(descriptor, port)) is not None]
        if len(found) == 1:
            return cls(found[0])
        for connection in found:
            connection.close()
        return cls(None)

    @property
    def round_trip_s(self) -> float:
        """See round_trip."""
        return 0.0 if self._connection is None else round_trip(self._connection)

    @property
    def since_end_s(self) -> float:
        """See since_end."""
        return 0.0 if self._connection is None else since_end(self._connection)

    def close(self) -> None:
        """It tells nothing from here on."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _sockets() -> list[int]:
    try:
        return [int(entry.name) for entry in Path("/proc/self/fd").iterdir() if entry.is_socket()]
    except OSError:  # no Linux
        return []


def _copy(descriptor: int, port: int) -> socket.socket | None:
    """Another descriptor of an open connection to `port`."""
    connection = None
    try:
        copy = os.dup(descriptor)
        try:
            connection = socket.socket(fileno=copy)
        except OSError:  # another file has its number by now
            os.close(copy)
            return None
        if connection.type == socket.SOCK_STREAM and connection.getpeername()[1:2] == (port,):
            info = _info(connection)
            if info is not None and info[_STATE_OFFSET] == _ESTABLISHED:
                return connection
    except OSError:  # it is closed by now, or has no peer
        pass
    if connection is not None:
        connection.close()
    return None
