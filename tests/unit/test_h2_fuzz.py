"""The h2 transport against anything: random bytes, random frames, and good conversations with something wrong in them.

Whatever comes, the stream ends with a StreamClosed once the connection is gone, no message is made up, and no timer and
no task stays behind.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from typing import Any, Final

import pytest
from hpack import Encoder
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from supervisor.transport import StatusCode, StreamClosed, StreamStatus
from supervisor.transport.h2.dial import _headers
from supervisor.transport.h2.frames import HEADER_BYTES, BadFrame, FrameCutter
from supervisor.transport.h2.inbox import INBOX_MESSAGES, Inbox
from supervisor.transport.h2.stream import H2Stream
from tests.support.http2_peer import ANSWER, OK, data, goaway, packed, ping, reset, settings, window
from tests.support.seam import plain

SEEDS: Final = 300
TYPES: Final = range(12)


class Wire(asyncio.Transport):
    """What a stream writes to: takes all, or nothing when it is `stuck`."""

    def __init__(self, stream: H2Stream) -> None:
        super().__init__()
        self.stream = stream
        self.written = 0
        self.stuck = False
        self.closing = False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high = high or 0

    def get_write_buffer_size(self) -> int:
        return self.written if self.stuck else 0

    def write(self, data: Any) -> None:
        self.written += len(data)
        if self.stuck and self.written > self.high:
            self.stream.pause_writing()

    def is_closing(self) -> bool:
        return self.closing

    def close(self) -> None:
        if not self.closing:
            self.closing = True
            asyncio.get_running_loop().call_soon(self.stream.connection_lost, None)

    abort = close


def connected() -> tuple[H2Stream, Wire]:
    stream = H2Stream("peer:1", _headers("peer:1", (), encrypted=False))
    wire = Wire(stream)
    stream.connection_made(wire)
    return stream, wire


async def outcome(chunks: Sequence[bytes]) -> tuple[list[bytes], StreamStatus]:
    """What a stream makes of these bytes, with the session's three tasks at work, when the connection then closes."""
    stream, wire = connected()
    messages: list[bytes] = []
    accepted: list[int] = []

    async def receive() -> StreamStatus:
        try:
            await stream.established()
            while True:
                messages.extend(plain(await stream.receive()))
        except StreamClosed as closed:
            return closed.status

    async def send() -> StreamStatus:
        while True:
            try:
                await stream.send([b"x" * 700] * 9)
            except StreamClosed as closed:
                accepted.append(closed.accepted)
                return closed.status

    async with asyncio.timeout(10):
        async with asyncio.TaskGroup() as group:
            received, sent = group.create_task(receive()), group.create_task(send())
            for chunk in chunks:
                await asyncio.sleep(0)
                stream.data_received(chunk)
            await asyncio.sleep(0)
            wire.close()
        await stream.close()
        await stream.close()
    assert sent.result() == stream._status
    assert 0 <= accepted[0] < 9
    return messages, received.result()


def conversation(random_: random.Random) -> list[bytes]:
    """The frames of a server that does all it may."""
    encoder = Encoder()

    def headers(fields: dict[str, str], flags: int) -> bytes:
        payload = encoder.encode(list(fields.items()))
        return len(payload).to_bytes(3, "big") + bytes((1, flags)) + (1).to_bytes(4, "big") + payload

    frames = [settings({4: 70_000, 5: 20_000}).serialize(), settings(ack=True).serialize(), headers(ANSWER, 4)]
    body = packed(*[random_.randbytes(random_.choice((0, 1, 9, 300))) for _ in range(20)])
    while body:
        size = random_.randrange(1, 400)
        frames.append(data(body[:size], pad=random_.choice((0, 0, 7))).serialize())
        body = body[size:]
    for extra in (window(5000), window(5000, 0), ping(), ping(ack=True), settings({4: 90_000}), goaway(2**31 - 1)):
        frames.insert(random_.randrange(3, len(frames)), extra.serialize())
    frames.append(reset(8).serialize() if random_.random() < 0.2 else headers(OK, 5))
    return frames


def mutated(random_: random.Random, frames: list[bytes]) -> list[bytes]:
    """With one to three things wrong."""
    frames = list(frames)
    for _ in range(random_.randrange(1, 4)):
        at = random_.randrange(len(frames))
        frame = bytearray(frames[at])
        match random_.randrange(7):
            case 0:
                frame[random_.randrange(len(frame))] ^= 1 << random_.randrange(8)
            case 1:
                del frame[max(HEADER_BYTES, random_.randrange(len(frame))) :]
            case 2:
                frame[3] = random_.choice(TYPES)
            case 3:
                frame[4] = random_.randrange(256)
            case 4:
                frame[5:9] = random_.choice((0, 1, 2, 3, 2**31 - 1, 2**32 - 1)).to_bytes(4, "big")
            case 5:
                frames.insert(random_.randrange(len(frames)), bytes(frame))
            case _:
                payload = random_.randbytes(random_.choice((0, 1, 4, 5, 8, 40)))
                frame = bytearray(len(payload).to_bytes(3, "big") + random_.randbytes(6) + payload)
        frames[at] = bytes(frame)
    return frames


def chopped(random_: random.Random, whole: bytes) -> Iterator[bytes]:
    """In pieces as a network might bring them."""
    while whole:
        size = random_.choice((1, 5, 9, 64, 1000, 100_000))
        yield whole[:size]
        whole = whole[size:]


@pytest.fixture(autouse=True)
def nothing_goes_wrong_unseen(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record for record in caplog.records if record.name == "asyncio"] == []


@pytest.mark.parametrize("block", range(10))
async def test_conversations_with_something_wrong_in_them(block: int) -> None:
    before = asyncio.all_tasks()
    ends = set()
    for seed in range(block * SEEDS // 10, (block + 1) * SEEDS // 10):
        random_ = random.Random(seed)
        good = conversation(random_)
        expected, _ = await outcome([b"".join(good)])
        whole = b"".join(mutated(random_, good))
        messages, status = await outcome(list(chopped(random_, whole)))
        ends.add(status.code)
        assert len(messages) <= len(expected) + 40
    assert len(ends) > 2, "all of them ended alike: that was no fuzzing"
    assert asyncio.all_tasks() == before


async def test_good_conversations_come_through_whole() -> None:
    for seed in range(20):
        random_ = random.Random(seed)
        good = conversation(random_)
        expected, status = await outcome([b"".join(good)])
        assert len(expected) == 20
        assert status.code in {StatusCode.OK, StatusCode.CANCELLED}
        assert await outcome(list(chopped(random_, b"".join(good)))) == (expected, status)


_FRAME = st.builds(
    lambda kind, flags, stream, payload: (
        len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload
    ),
    st.integers(0, 15),
    st.integers(0, 255),
    st.sampled_from((0, 1, 2, 3, 2**31 - 1)),
    st.binary(max_size=60),
)


@given(st.lists(st.one_of(_FRAME, st.binary(max_size=40)), max_size=12), st.booleans())
@example([b"HTTP/1.1 200 OK\r\n\r\n"], False)
@hypothesis_settings(max_examples=150, deadline=None)
def test_random_frames(frames: list[bytes], after_settings: bool) -> None:
    first = [settings().serialize()] if after_settings else []
    _, status = asyncio.run(outcome([*first, *frames]))
    assert status.details or status.code is StatusCode.OK


@given(st.lists(st.binary(max_size=300), max_size=40), st.data())
@hypothesis_settings(max_examples=100, deadline=None)
def test_messages_survive_any_cut_of_frames_and_payloads(messages: list[bytes], draw: st.DataObject) -> None:
    body = packed(*messages)
    frames, start = b"", 0
    while start < len(body):
        size = draw.draw(st.integers(1, 200))
        frames += data(body[start : start + size]).serialize()
        start += size
    inbox, cutter, found, start = Inbox(1000), FrameCutter(1000), [], 0
    while start < len(frames):
        size = draw.draw(st.integers(1, 400))
        for frame in cutter.cut(frames[start : start + size]):
            inbox.feed(frame[HEADER_BYTES:])
        start += size
        if draw.draw(st.booleans()):
            found += inbox.take()
    found += inbox.take()
    assert found == messages
    assert inbox.held == 0
    assert not inbox.is_amid_message


def test_tiny_messages_do_not_pile_up_as_objects() -> None:
    inbox = Inbox(1000)
    inbox.feed(packed(*[b"x"] * (3 * INBOX_MESSAGES)))
    assert len(inbox.messages) == INBOX_MESSAGES
    assert inbox.held == 3 * INBOX_MESSAGES * 6
    assert [len(inbox.take()) for _ in range(4)] == [INBOX_MESSAGES] * 3 + [0]
    assert inbox.held == 0


def test_an_overlong_frame_is_noticed_by_its_length() -> None:
    cutter = FrameCutter(100)
    frames = cutter.cut(ping().serialize() + b"\x00\x00\x65\x00\x00\x00\x00\x00\x01")
    assert next(frames) == ping().serialize()
    with pytest.raises(BadFrame, match="a frame of 101 bytes, 100 are taken"):
        next(frames)


async def test_a_peer_that_asks_and_does_not_read_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervisor.transport.h2.stream._UNREAD_BYTES", 600_000)
    stream, wire = connected()
    wire.stuck = True
    stream.data_received(settings().serialize())
    flood = ping().serialize() * 5000
    for _ in range(10):
        stream.data_received(flood)
    with pytest.raises(StreamClosed, match=r"UNAVAILABLE: peer:1 reads nothing, and \d+ bytes"):
        await stream.receive()
    assert wire.written < 750_000
    await stream.close()
