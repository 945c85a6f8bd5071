"""What the kernel tells of real connections: how long the way is, and when the other side ended."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from supervisor.transport.tcp_info import Observed, round_trip, since_end
from tests.support.worker_process import eventually

TICK_S = 0.011
"""The kernel's figures are exact to this."""
RESET = struct.pack("ii", 1, 0)


@pytest.fixture
def server() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture
def client(server: socket.socket) -> Iterator[socket.socket]:
    with socket.create_connection(server.getsockname()) as client:
        yield client


@pytest.fixture
def peer(server: socket.socket, client: socket.socket) -> Iterator[socket.socket]:
    with server.accept()[0] as peer:
        yield peer


def port_of(server: socket.socket) -> int:
    return int(server.getsockname()[1])


def say_the_end(peer: socket.socket) -> None:
    peer.sendall(b"the end")


def reset(peer: socket.socket) -> None:
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    peer.close()


def test_the_round_trip_of_a_connection(server: socket.socket, client: socket.socket, peer: socket.socket) -> None:
    assert 0.0 < round_trip(client) < 1.0
    observed = Observed.to_port(port_of(server))
    assert 0.0 < observed.round_trip_s < 1.0
    peer.sendall(b"still there")
    assert client.recv(100) == b"still there", "it is looked at, and not used"
    client.close()
    assert round_trip(client) == 0.0, "it is closed"
    observed.close()
    assert (observed.round_trip_s, observed.since_end_s) == (0.0, 0.0)


def test_nothing_is_told_where_there_is_not_just_one(server: socket.socket) -> None:
    assert Observed.to_port(port_of(server)).round_trip_s == 0.0
    with socket.create_connection(server.getsockname()), socket.create_connection(server.getsockname()):
        assert Observed.to_port(port_of(server)).round_trip_s == 0.0


def test_one_that_was_shut_down_is_gone(server: socket.socket, client: socket.socket, peer: socket.socket) -> None:
    """Another descriptor does not keep it open, and it is not found again."""
    observed = Observed.to_port(port_of(server))
    client.shutdown(socket.SHUT_RDWR)
    client.close()
    assert peer.recv(100) == b""
    assert Observed.to_port(port_of(server)).round_trip_s == 0.0
    observed.close()


@pytest.mark.parametrize("end", [say_the_end, socket.socket.close, reset])
async def test_when_the_other_side_ended(
    client: socket.socket, peer: socket.socket, end: Callable[[socket.socket], None]
) -> None:
    """However late one asks, and whatever was sent after it."""
    client.sendall(b"read")
    assert peer.recv(100) == b"read"
    end(peer)
    ended_at = time.monotonic()
    await eventually(lambda: time.monotonic() - ended_at > 0.1)
    try:
        for _ in range(3):
            client.sendall(b"unread")
    except OSError:  # it knows by now
        pass
    assert since_end(client) == pytest.approx(time.monotonic() - ended_at, abs=TICK_S)
