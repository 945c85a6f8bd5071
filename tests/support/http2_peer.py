"""A peer of the h2 transport that sends the very frames a test says, right or wrong.

Owns: the listening socket and what the transport sent, cut into frames. A grpcio server would send only what is right.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

from hpack import Decoder, Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from supervisor.transport.h2.dial import H2Transport
from supervisor.transport.h2.stream import H2Stream
from supervisor.transport.messages import prefix
from tests.support.stream_server import eventually

F = TypeVar("F", bound=Frame)
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
ANSWER = {":status": "200", "content-type": "application/grpc"}
OK = {"grpc-status": "0"}


def packed(*messages: bytes) -> bytes:
    """Messages as they lie in DATA frames."""
    return b"".join(prefix(message) + message for message in messages)


@dataclass(eq=False)
class Peer:
    """One connection, the server's side."""

    writer: asyncio.StreamWriter
    frames: list[Frame] = field(default_factory=list)
    closed: bool = False
    _hpack: Encoder = field(default_factory=Encoder)

    def send(self, *frames: Frame | bytes) -> None:
        """All in one write, so that one wake-up brings them all."""
        self.writer.write(b"".join(each if isinstance(each, bytes) else each.serialize() for each in frames))

    def headers(self, fields: Mapping[str, str], *, end: bool = False) -> HeadersFrame:
        flags = ["END_HEADERS", "END_STREAM"] if end else ["END_HEADERS"]
        return HeadersFrame(1, data=self._hpack.encode(list(fields.items())), flags=flags)

    def of(self, kind: type[F]) -> list[F]:
        """The frames of one kind that the transport sent so far."""
        return [frame for frame in self.frames if isinstance(frame, kind)]

    def room(self) -> int:
        """How much the transport has given back to the stream's window so far."""
        return sum(frame.window_increment for frame in self.of(WindowUpdateFrame) if frame.stream_id)

    @property
    def received(self) -> bytes:
        """The payload of its DATA frames."""
        return b"".join(frame.data for frame in self.of(DataFrame))

    @property
    def request(self) -> list[tuple[str, str]]:
        """The headers of its call."""
        decoder = Decoder()
        return [(str(name), str(value)) for name, value in decoder.decode(self.of(HeadersFrame)[0].data)]

    async def read(self, reader: asyncio.StreamReader) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            assert await reader.readexactly(len(PREFACE)) == PREFACE
            while True:
                frame, length = Frame.parse_frame_header(memoryview(await reader.readexactly(9)))
                frame.parse_body(memoryview(await reader.readexactly(length)))
                self.frames.append(frame)
        self.closed = True


def settings(values: Mapping[int, int] | None = None, *, ack: bool = False) -> SettingsFrame:
    return SettingsFrame(0, settings=dict(values or {}), flags=["ACK"] if ack else [])


def data(payload: bytes, *, end: bool = False, pad: int = 0) -> DataFrame:
    flags = [name for name, is_set in (("END_STREAM", end), ("PADDED", pad)) if is_set]
    return DataFrame(1, payload, flags=flags, pad_length=pad)


def window(size: int, stream: int = 1) -> WindowUpdateFrame:
    return WindowUpdateFrame(stream, window_increment=size)


def reset(code: int) -> RstStreamFrame:
    return RstStreamFrame(1, error_code=code)


def goaway(last_stream: int, code: int = 0, words: bytes = b"") -> GoAwayFrame:
    return GoAwayFrame(0, last_stream_id=last_stream, error_code=code, additional_data=words)


def ping(*, ack: bool = False) -> PingFrame:
    return PingFrame(0, b"12345678", flags=["ACK"] if ack else [])


@contextlib.asynccontextmanager
async def listening(first: bytes | None = None) -> AsyncIterator[tuple[str, list[Peer]]]:
    """An address, and who dialed it. Each is sent `first`: plain SETTINGS unless a test says otherwise."""
    peers: list[Peer] = []
    reading: list[asyncio.Task[None]] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(writer)
        writer.write(settings().serialize() if first is None else first)
        peers.append(peer)
        reading.append(asyncio.create_task(peer.read(reader)))

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"{host}:{port}", peers
    finally:
        server.close()
        for peer in peers:
            peer.writer.close()
        await asyncio.gather(*reading)


@contextlib.asynccontextmanager
async def call(
    first: bytes | None = None, *, answered: bool = True, transport: H2Transport | None = None
) -> AsyncIterator[tuple[H2Stream, Peer]]:
    """A stream and its peer, which has sent the answer's headers unless told not to."""
    async with listening(first) as (address, peers):
        stream = await (transport or H2Transport()).open(address, (("authorization", "Bearer abc"),))
        try:
            (peer,) = peers
            if answered:
                peer.send(peer.headers(ANSWER))
                await stream.established()
            await eventually(lambda: peer.of(HeadersFrame))
            yield stream, peer
        finally:
            await stream.close()
