"""A websocket handler in a unit test, with no processes."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from gen_worker import ActionContext, RealtimeSocket, worker_function, worker_websocket
from gen_worker.errors import CanceledError, ValidationError
from gen_worker.testing import SocketClosedError, open_socket, socket_harness


class In(msgspec.Struct):
    pass


@worker_function()
def plain(ctx: ActionContext, payload: In) -> In:
    return payload


@worker_websocket()
async def echo(ctx: ActionContext, sock: RealtimeSocket) -> None:
    ctx.progress(0.5)
    async for frame in sock.iter_frames():
        if frame.data == b"leave":
            return
        if frame.data == b"close":
            await sock.close()
            return
        if frame.data == b"fail":
            raise KeyError("fail")
        if frame.is_text:
            await sock.send_text(frame.data.decode())
        else:
            await sock.send_bytes(frame.data)


async def test_a_conversation() -> None:
    async with open_socket(echo, session_id="s1") as client:
        await client.send("text")
        await client.send(b"bytes")
        assert await client.receive() == "text"
        assert await client.receive() == b"bytes"
        await client.close()
        assert await client.wait_closed() == "closed"
        with pytest.raises(SocketClosedError, match="closed"):
            await client.receive()
        with pytest.raises(SocketClosedError, match="closed"):
            await client.send("late")
    assert client.outcome.sent == ["text", b"bytes"]
    assert [event.type for event in client.outcome.events] == ["job.progress"]


@pytest.mark.parametrize(
    ("frame", "reason", "closed"),
    [("leave", "completed", False), ("close", "closed", True), ("fail", "error:KeyError", False)],
)
async def test_reasons(frame: str, reason: str, closed: bool) -> None:
    async with open_socket(echo) as client:
        await client.send(frame)
        assert await client.wait_closed() == reason
    assert client.outcome.closed == closed
    assert (client.outcome.failure is None) == (frame != "fail")


async def test_the_frame_limit() -> None:
    async with open_socket(echo, max_frame_bytes=5) as client:
        await client.send("12345")
        assert await client.receive() == "12345"
        await client.send("123456")
        assert await client.wait_closed() == "frame_too_large"

    @worker_websocket()
    async def large(ctx: ActionContext, sock: RealtimeSocket) -> None:
        with pytest.raises(ValidationError):
            await sock.send_bytes(b"123456")
        with pytest.raises(CanceledError):
            await sock.send_bytes(b"1")

    async with open_socket(large, max_frame_bytes=5) as client:
        assert await client.wait_closed() == "frame_too_large"


async def test_models_and_the_wrong_kind() -> None:
    with pytest.raises(TypeError, match="has no injected parameter 'm'"):
        await open_socket(echo, models={"m": 1}).__aenter__()
    with pytest.raises(TypeError, match="plain: use run_function for it"):
        await open_socket(plain).__aenter__()


async def test_a_handler_waits_for_a_client_that_does_not_receive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_harness, "SENT_FRAMES", 3)
    sent = 0

    @worker_websocket()
    async def floods(ctx: ActionContext, sock: RealtimeSocket) -> None:
        nonlocal sent
        for _ in range(10):
            await sock.send_bytes(b"x")
            sent += 1

    async with open_socket(floods) as client:
        with pytest.raises(TimeoutError, match=r"did not end within 0\.05 s"):
            await client.wait_closed(0.05)
        assert sent == 3
        for _ in range(10):
            assert await client.receive() == b"x"
        assert await client.wait_closed() == "completed"
    async with open_socket(floods) as client:
        pass  # one that waits is told of the end
    assert client.reason == "error:CanceledError"


async def test_a_handler_that_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_harness, "END_S", 0.02)
    canceled = asyncio.Event()

    @worker_websocket()
    async def deaf(ctx: ActionContext, sock: RealtimeSocket) -> None:
        try:
            await asyncio.sleep(3600)
        finally:
            canceled.set()

    session = open_socket(deaf)
    client = await session.__aenter__()
    with pytest.raises(TimeoutError, match="sent nothing"):
        await client.receive(0.01)
    with pytest.raises(TimeoutError, match=r"deaf did not end within 0\.02 s of the end of its session"):
        await session.__aexit__(None, None, None)
    assert canceled.is_set()
