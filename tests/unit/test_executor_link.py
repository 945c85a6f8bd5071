"""The executor's end of the pipe, over a real socket pair."""

from __future__ import annotations

import multiprocessing
import socket
import threading
from collections.abc import Iterator

import pytest

from executor.link import Link
from gen_worker.pipe.frames import FrameDecoder, FrameError, encode_frame
from gen_worker.pipe.messages import Event, Free, Upward, decode_upward, encode


class Pair:
    def __init__(self) -> None:
        self.other, mine = socket.socketpair()
        self.other.settimeout(20)
        self.broken: list[OSError] = []
        self.link = Link(mine.detach(), self.broken.append)

    def read(self, count: int) -> list[Upward]:
        decoder = FrameDecoder()
        messages: list[Upward] = []
        while len(messages) < count:
            messages += [decode_upward(body) for body in decoder.feed(self.other.recv(65536))]
        return messages


@pytest.fixture
def pair() -> Iterator[Pair]:
    made = Pair()
    yield made
    made.other.close()
    made.link._socket.close()


def test_messages_arrive_in_order(pair: Pair) -> None:
    for number in range(100):
        pair.link.send(Free(number))
    assert pair.read(100) == [Free(number) for number in range(100)]


def test_it_speaks_to_a_multiprocessing_connection() -> None:
    ours, theirs = multiprocessing.Pipe()
    link = Link(socket.socket(fileno=theirs.fileno()).detach(), lambda _: None)
    link.send(Free(5))
    assert ours.recv_bytes() == encode(Free(5))
    ours.send_bytes(b"abc")
    assert link.receive() == [b"abc"]
    ours.close()
    with pytest.raises(EOFError):
        link.receive()
    theirs.close()
    link._socket.detach()


def test_a_full_socket_blocks_nobody_and_loses_nothing(pair: Pair) -> None:
    messages = [Event(key, "t", bytes([key]) * 100_000) for key in range(100)]
    for message in messages:
        pair.link.send(message)
    assert not pair.link.flush(0.01), "the reader has not begun"
    assert pair.read(100) == messages
    assert pair.link.flush(10)
    pair.link.send(Free(1))
    assert pair.read(1) == [Free(1)]


def test_frames_of_many_threads_stay_whole(pair: Pair) -> None:
    def produce(thread: int) -> None:
        for number in range(200):
            pair.link.send(Event(thread, str(number), b"x" * (number * 40)))

    threads = [threading.Thread(target=produce, args=(thread,)) for thread in range(8)]
    for thread in threads:
        thread.start()
    by_thread: dict[int, list[str]] = {}
    for message in pair.read(1600):
        assert isinstance(message, Event)
        by_thread.setdefault(message.key, []).append(message.type)
        assert len(message.payload) == int(message.type) * 40
    for thread in threads:
        thread.join()
    assert by_thread == {thread: [str(number) for number in range(200)] for thread in range(8)}


def test_a_peer_that_is_gone_is_told(pair: Pair) -> None:
    pair.other.close()
    pair.link.send(Free(1))
    assert [type(error) for error in pair.broken] == [BrokenPipeError]


def test_a_peer_that_goes_while_the_writer_waits_is_told(pair: Pair) -> None:
    for key in range(100):
        pair.link.send(Event(key, "t", b"x" * 100_000))
    pair.other.close()
    pair.link.flush(10)
    assert pair.broken


def test_several_frames_come_at_once(pair: Pair) -> None:
    pair.other.sendall(encode_frame(b"a") + encode_frame(b"b") + encode_frame(b"c")[:3])
    assert pair.link.receive() == [b"a", b"b"]
    pair.other.sendall(encode_frame(b"c")[3:])
    assert pair.link.receive() == [b"c"]


def test_garbage_and_the_end(pair: Pair) -> None:
    pair.other.sendall(b"\xff" * 8)
    with pytest.raises(FrameError):
        pair.link.receive()
    with pytest.raises(FrameError):
        pair.link.send(Event(1, "t", b"x" * 9_000_000))
    pair.link.send(Free(1))
    assert pair.read(1) == [Free(1)], "a refused message holds nobody up"
