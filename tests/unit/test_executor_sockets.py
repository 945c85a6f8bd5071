"""A session inside of an executor: credits, the end from either side, and what is said of it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from executor import sockets
from executor.blobs import Blobs
from executor.files import StoreSettings
from executor.sockets import ActiveSession, Sockets
from gen_worker import ActionContext, RealtimeSocket, worker_websocket
from gen_worker.errors import CanceledError, ResourceError, ValidationError
from gen_worker.pipe.arena import BLOB_THRESHOLD_BYTES, ArenaReader, ArenaWriter, create_arena
from gen_worker.pipe.messages import (
    EVENT_OVERHEAD_BYTES,
    Blob,
    Free,
    Result,
    SocketClose,
    SocketCredit,
    SocketFrame,
    SocketOpen,
    Upward,
)
from gen_worker.realtime import Frame
from gen_worker.signature import inspect_function
from tests.support.rig import until

WINDOW = 4096
KEY = 7


@worker_websocket()
async def handler(ctx: ActionContext, sock: RealtimeSocket) -> None: ...


class Place:
    """One session and the pipe's other end in the test's hands."""

    def __init__(self) -> None:
        self.said: list[Upward] = []
        self.arena_down, self.arena_up = create_arena("down"), create_arena("up")
        self.writer = ArenaWriter(self.arena_down)
        self.reader = ArenaReader(self.arena_up)
        self.blobs = Blobs(ArenaReader(self.arena_down), ArenaWriter(self.arena_up), self.said.append)
        self.forgotten: list[int] = []
        self.session = ActiveSession(
            SocketOpen(KEY, "s", "handler", {}, 0, 0.0, "", "", WINDOW, 2 * BLOB_THRESHOLD_BYTES),
            inspect_function(handler),
            send=self.said.append,
            blobs=self.blobs,
            forget=lambda key, _: self.forgotten.append(key),
            loop_thread=threading.get_ident(),
            store=StoreSettings(),
        )
        self.socket = RealtimeSocket(self.session)

    def sent(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.said if isinstance(message, kind)]

    def deliver(self, *frames: bytes) -> None:
        for data in frames:
            self.session.deliver(SocketFrame(KEY, data))


@pytest.fixture
async def place() -> AsyncIterator[Place]:
    place = Place()
    yield place
    place.writer.close()
    place.reader.close()


async def test_sending_waits_for_credit(place: Place) -> None:
    async def send_all() -> None:
        for number in range(10):
            await place.socket.send_bytes(bytes([number]) * 1000)

    sending = asyncio.create_task(send_all())
    await until(lambda: len(place.sent(SocketFrame)) == 3)
    await asyncio.sleep(0.01)
    assert len(place.sent(SocketFrame)) == 3  # of 1256 bytes each
    for count in range(4, 11):
        place.session.events.credit(1000 + EVENT_OVERHEAD_BYTES)
        await until(lambda count=count: len(place.sent(SocketFrame)) == count)  # type: ignore[misc]
    await sending
    assert [frame.data[0] for frame in place.sent(SocketFrame)] == list(range(10))


async def test_a_peer_that_takes_nothing_is_too_slow(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "STALL_S", 0.02)
    for _ in range(3):
        await place.socket.send_bytes(b"x" * 1000)
    with pytest.raises(CanceledError, match="slow_consumer"):
        await place.socket.send_bytes(b"x" * 1000)
    assert place.said[-1] == SocketClose(KEY, "slow_consumer")
    assert await place.session.receive() is None
    with pytest.raises(CanceledError, match="over: slow_consumer"):
        await place.socket.send_text("more")


async def test_a_peer_that_takes_a_little_is_waited_for(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "STALL_S", 0.05)
    for _ in range(3):
        await place.socket.send_bytes(b"x" * 1000)
    sending = asyncio.create_task(place.socket.send_bytes(b"x" * 3000))
    for _ in range(10):
        await asyncio.sleep(0.02)
        place.session.events.credit(1)  # far from enough, but something leaves
    assert not sending.done()
    place.session.events.credit(4000)
    await sending
    assert place.sent(SocketClose) == []


async def test_taking_frames_gives_credit_by_half_windows(place: Place) -> None:
    frames = [bytes([number]) * 600 for number in range(10)]
    place.deliver(*frames)
    received = [await place.session.receive() for _ in frames]
    assert received == [Frame(data) for data in frames]
    given = [message.size for message in place.sent(SocketCredit)]
    assert all(size >= WINDOW // 2 for size in given)
    assert 10 * 856 - WINDOW // 2 < sum(given) <= 10 * 856


async def test_large_frames(place: Place) -> None:
    data = b"d" * BLOB_THRESHOLD_BYTES
    blob = place.writer.put(data)
    place.session.deliver(SocketFrame(KEY, blob, is_text=True))
    assert place.said == []  # it stays where it is until it is taken
    assert await place.session.receive() == Frame(data, is_text=True)
    assert place.said == [SocketCredit(KEY, len(data) + EVENT_OVERHEAD_BYTES), Free(blob.offset)]
    await place.socket.send_bytes(data)
    (frame,) = place.sent(SocketFrame)
    assert isinstance(frame.data, Blob)
    assert place.reader.read(frame.data) == data


async def test_frames_that_were_not_taken_are_given_back(place: Place) -> None:
    blob = place.writer.put(b"d" * BLOB_THRESHOLD_BYTES)
    place.session.deliver(SocketFrame(KEY, blob))
    place.session.finish()
    assert place.said == [SocketClose(KEY, "completed"), Free(blob.offset), Result(KEY)]
    assert place.forgotten == [KEY]


async def test_a_frame_over_the_limit_ends_it(place: Place) -> None:
    with pytest.raises(ValidationError, match="2097153 bytes is over the limit of 2097152"):
        await place.socket.send_bytes(b"x" * (2 * BLOB_THRESHOLD_BYTES + 1))
    assert place.said == [SocketClose(KEY, "frame_too_large")]
    with pytest.raises(CanceledError):
        await place.socket.send_bytes(b"x")


async def test_the_other_ends_close_comes_after_its_frames(place: Place) -> None:
    place.deliver(b"1", b"2")
    place.session.end_input("closed")
    assert [data async for data in place.socket.iter_bytes()] == [b"1", b"2"]
    with pytest.raises(CanceledError, match="over: closed"):
        await place.socket.send_bytes(b"x")
    place.session.finish(CanceledError("over"))
    assert place.sent(SocketClose) == []
    assert [result.failure.error_type for result in place.sent(Result)] == ["canceled"]


async def test_the_other_ends_close_wakes_who_waits(place: Place) -> None:
    for _ in range(3):
        await place.socket.send_bytes(b"x" * 1000)
    sending = asyncio.create_task(place.socket.send_bytes(b"x" * 1000))
    receiving = asyncio.create_task(place.session.receive())
    await asyncio.sleep(0)
    place.session.end_input("closed")
    async with asyncio.timeout(sockets.STALL_S / 2):
        assert await receiving is None
        with pytest.raises(CanceledError):
            await sending


async def test_closing_ends_the_own_iteration(place: Place) -> None:
    receiving = asyncio.create_task(place.session.receive())
    await asyncio.sleep(0)
    await place.socket.close()
    await place.socket.close()
    assert await receiving is None
    with pytest.raises(CanceledError, match="closed by this handler"):
        await place.socket.send_json({})
    place.session.finish()
    assert place.said == [SocketClose(KEY, "closed"), Result(KEY)]


async def test_events_count_against_the_same_window(place: Place) -> None:
    place.session.emit("job.log", b"x" * 2000)
    await place.socket.send_bytes(b"x" * 1000)
    sending = asyncio.create_task(place.socket.send_bytes(b"x" * 1000))
    await asyncio.sleep(0.01)
    assert not sending.done()
    place.session.events.credit(2256)
    await sending


async def test_a_sender_that_never_waits_lets_others_run(place: Place) -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    for _ in range(1000):
        await place.socket.send_bytes(b"")
        place.session.events.credit(EVENT_OVERHEAD_BYTES)
    counting.cancel()
    assert turns >= 1000 // sockets.TURN_FRAMES


async def test_no_shared_memory_is_the_handlers_error(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(data: bytes) -> None:
        raise OSError(28, "no space")

    monkeypatch.setattr(place.blobs, "store", full)
    for _ in range(10):  # and takes no room of the window
        with pytest.raises(ResourceError, match="no shared memory"):
            await place.socket.send_bytes(b"x" * 3000)


# -- the reader's side ----------------------------------------------------------------------------


async def test_what_comes_for_a_session_that_has_ended_is_given_back(place: Place) -> None:
    made: list[ActiveSession] = []

    def start(session: ActiveSession) -> asyncio.Task[None]:
        made.append(session)
        return asyncio.create_task(asyncio.sleep(0))

    spec = inspect_function(handler)
    loop = asyncio.get_running_loop()
    served = Sockets(
        {"handler": spec}, send=place.said.append, blobs=place.blobs, start=start, strike_after_s=1.0, loop=loop,
        loop_thread=threading.get_ident(), store=StoreSettings(),
    )  # fmt: skip
    served.open(SocketOpen(1, "s", "nobody", {}, 0, 0.0, "", "", WINDOW, 1))
    assert [type(message) for message in place.said] == [SocketClose, Result]
    served.open(SocketOpen(2, "s", "handler", {}, 0, 0.0, "", "", WINDOW, 1))
    served.flush()
    await until(lambda: bool(made))
    made[0].finish()
    blob = place.writer.put(b"d" * BLOB_THRESHOLD_BYTES)
    late: list[Callable[[], None]] = [
        lambda: served.frame(SocketFrame(2, blob)),
        lambda: served.close(SocketClose(2, "closed")),
        lambda: served.credit(SocketCredit(2, 1)),
        served.flush,
    ]
    for call in late:
        call()
    await until(lambda: Free(blob.offset) in place.said)
