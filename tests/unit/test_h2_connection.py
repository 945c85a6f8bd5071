"""The short way for plain DATA frames, beside what h2 makes of the same frames."""

from __future__ import annotations

import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.exceptions import FlowControlError, H2Error

from supervisor.transport.h2.connection import STREAM, CallConnection
from supervisor.transport.h2.frames import FrameCutter

HEADERS = [(":method", "POST"), (":path", "/"), (":scheme", "http"), (":authority", "a")]


class Pair:
    """A client with a call, and the server that it goes to."""

    def __init__(self, *, short: bool = True, answered: bool = True, headers: tuple[tuple[str, str], ...] = ()) -> None:
        config = H2Configuration(client_side=True, header_encoding=None)
        self.client = CallConnection(config) if short else H2Connection(config)
        self.server = H2Connection(H2Configuration(client_side=False))
        self.client.initiate_connection()
        self.server.initiate_connection()
        self.client.send_headers(STREAM, HEADERS)
        self.server.receive_data(self.client.data_to_send())
        if answered:
            self.server.send_headers(STREAM, [(":status", "200"), *headers])
        self.client.receive_data(self.server.data_to_send())
        self.client.data_to_send()

    def frame(self, data: bytes, *, end_stream: bool = False, pad: int | None = None) -> bytes:
        self.server.send_data(STREAM, data, end_stream=end_stream, pad_length=pad)
        (frame,) = FrameCutter(2**20).cut(self.server.data_to_send())
        return frame

    @property
    def client_windows(self) -> tuple[int, int, int]:
        client = self.client
        return (
            client.remote_flow_control_window(STREAM),
            client.inbound_flow_control_window,
            client.local_flow_control_window(STREAM),
        )

    def short(self, frame: bytes) -> bytes | None:
        assert isinstance(self.client, CallConnection)
        return self.client.take_data(frame)


def test_what_comes_is_counted_as_h2_counts_it() -> None:
    ours, plain = Pair(), Pair(short=False)
    for size in (0, 1, 1000, 16_000):
        frame = ours.frame(b"x" * size)
        assert ours.short(frame) == b"x" * size
        plain.client.receive_data(frame)
    assert ours.client_windows == plain.client_windows
    for pair in (ours, plain):
        pair.client.acknowledge_received_data(17_001, STREAM)
        pair.client.increment_flow_control_window(10)
    assert ours.client.data_to_send() == plain.client.data_to_send()


def test_what_goes_is_framed_as_h2_frames_it() -> None:
    ours, plain = Pair(), Pair(short=False)
    assert isinstance(ours.client, CallConnection)
    assert not ours.client.has_data_to_send
    for size in (1, 300, 16_384):
        part = memoryview(b"y" * size)
        ours.client.put_data(part)
        plain.client.send_data(STREAM, part)
        assert ours.client.has_data_to_send
        assert ours.client.data_to_send() == plain.client.data_to_send()
    assert ours.client_windows == plain.client_windows


def test_what_is_not_plain_or_may_not_come_is_for_h2() -> None:
    assert Pair().short(Pair().frame(b"x", pad=3)) is None
    assert Pair().short(Pair().frame(b"x", end_stream=True)) is None
    assert Pair().short(b"\0\0\0\x04\x01\0\0\0\0") is None, "SETTINGS"
    assert Pair().short(b"\0\0\x01\x00\x00\0\0\0\x03x") is None, "another stream"
    assert Pair(answered=False).short(Pair().frame(b"x")) is None, "before the headers"
    assert Pair(headers=(("content-length", "1"),)).short(Pair().frame(b"x")) is None, "h2 counts it"


def test_more_than_the_window_is_for_h2_to_refuse() -> None:
    pair = Pair()
    frame = b"\0\x40\0\x00\x00\0\0\0\x01" + b"x" * 16_384
    for _ in range(3):
        assert pair.short(frame) is not None
    assert pair.short(frame) is None
    with pytest.raises(FlowControlError):
        pair.client.receive_data(frame)


def test_nothing_goes_or_comes_after_the_end() -> None:
    pair = Pair()
    assert isinstance(pair.client, CallConnection)
    pair.client.reset_stream(STREAM)
    assert pair.short(Pair().frame(b"x")) is None
    with pytest.raises(H2Error):
        pair.client.put_data(memoryview(b"x"))
