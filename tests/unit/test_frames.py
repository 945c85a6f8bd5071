"""Frames: the same bytes as multiprocessing.Connection, in whatever pieces they come, and nothing over the cap."""

from __future__ import annotations

import multiprocessing
import os
import socket
import struct
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_worker.pipe.frames import FRAME_CAP_BYTES, FrameDecoder, FrameError, encode_frame

# Connection._send_bytes writes header and body apart from 16384 bytes on.
SIZES = [0, 1, 3, 4, 5, 255, 16379, 16380, 16383, 16384, 16385, 16388, 70_000, 1_000_000]


@pytest.fixture
def ends() -> Iterator[tuple[Connection, socket.socket]]:
    near, far = multiprocessing.Pipe(duplex=True)
    sock = socket.socket(fileno=os.dup(near.fileno()))
    near.close()
    yield far, sock
    far.close()
    sock.close()


def bodies_of(sizes: list[int]) -> list[bytes]:
    return [bytes([index % 251]) * size for index, size in enumerate(sizes)]


def test_reads_what_a_connection_sends(ends: tuple[Connection, socket.socket]) -> None:
    connection, sock = ends
    bodies = bodies_of(SIZES)

    def send() -> None:
        for body in bodies:
            connection.send_bytes(body)

    sender = threading.Thread(target=send)
    sender.start()
    decoder = FrameDecoder()
    received: list[bytes] = []
    buffer = memoryview(bytearray(65536))
    while len(received) < len(bodies):
        received += decoder.feed(buffer[: sock.recv_into(buffer)])
    sender.join()
    assert received == bodies
    assert decoder.pending == 0


def test_a_connection_reads_what_is_sent(ends: tuple[Connection, socket.socket]) -> None:
    connection, sock = ends
    bodies = bodies_of(SIZES)
    sender = threading.Thread(target=sock.sendall, args=(b"".join(map(encode_frame, bodies)),))
    sender.start()
    assert [connection.recv_bytes() for _ in bodies] == bodies
    sender.join()


def test_split_at_every_offset() -> None:
    bodies = [b"", b"a", b"bc" * 20, b"", b"last"]
    stream = b"".join(map(encode_frame, bodies))
    for cut in range(len(stream) + 1):
        decoder = FrameDecoder()
        assert decoder.feed(stream[:cut]) + decoder.feed(stream[cut:]) == bodies
        assert decoder.pending == 0


@given(st.lists(st.binary(max_size=40), max_size=20), st.data())
def test_any_chunking_gives_the_same_frames(bodies: list[bytes], data: st.DataObject) -> None:
    stream = b"".join(map(encode_frame, bodies))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=20)))
    decoder, received = FrameDecoder(), []
    for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        piece = bytearray(stream[start:stop])
        received += decoder.feed(memoryview(piece))
        piece[:] = b"\xff" * len(piece)  # the caller uses its buffer again: nothing may be left pointing into it
    assert received == bodies
    assert decoder.pending == 0


def test_pending_counts_the_unfinished_frame() -> None:
    decoder = FrameDecoder()
    decoder.feed(encode_frame(b"whole") + b"\x00\x00")
    assert decoder.pending == 2


def test_a_body_over_the_cap_is_refused_before_it_is_read() -> None:
    decoder = FrameDecoder(cap=10)
    assert decoder.feed(encode_frame(b"x" * 10)) == [b"x" * 10]
    with pytest.raises(FrameError, match="says it has 11 bytes; the cap is 10"):
        decoder.feed(struct.pack("!i", 11))
    assert decoder.pending == 0


@pytest.mark.parametrize("length", [-1, -2, -(2**31), FRAME_CAP_BYTES + 1, 2**31 - 1])
def test_lengths_that_no_frame_has(length: int) -> None:
    with pytest.raises(FrameError):
        FrameDecoder().feed(struct.pack("!i", length) + b"\x00" * 8)


def test_frames_before_the_broken_one_are_handed_over() -> None:
    decoder = FrameDecoder()
    decoder.feed(encode_frame(b"first")[:3])
    with pytest.raises(FrameError) as caught:
        decoder.feed(encode_frame(b"first")[3:] + encode_frame(b"second") + struct.pack("!i", -5))
    assert caught.value.bodies == [b"first", b"second"]


def test_nothing_is_taken_after_garbage() -> None:
    decoder = FrameDecoder()
    with pytest.raises(FrameError):
        decoder.feed(struct.pack("!i", -5))
    with pytest.raises(FrameError) as caught:
        decoder.feed(encode_frame(b"looks honest"))
    assert not caught.value.bodies


@given(st.lists(st.binary(max_size=200), max_size=10))
def test_random_bytes_raise_nothing_but_frame_errors(pieces: list[bytes]) -> None:
    decoder = FrameDecoder()
    for piece in pieces:
        try:
            decoder.feed(piece)
        except FrameError:
            continue


def test_encoding_over_the_cap_is_refused() -> None:
    assert len(encode_frame(b"x" * FRAME_CAP_BYTES)) == FRAME_CAP_BYTES + 4
    with pytest.raises(FrameError, match="over the cap"):
        encode_frame(b"x" * (FRAME_CAP_BYTES + 1))
