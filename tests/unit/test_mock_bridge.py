"""The WebSocket bridge of the development scheduler: which end closes with what."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator

import pytest
from websockets.asyncio.client import connect

from gen_worker.testing.mock_orchestrator import ListenError, MockOrchestrator, RealtimeBridge, UsageError
from gen_worker.wire import worker_scheduler_pb2 as pb
from tests.unit.test_mock_orchestrator import FakeWorker, tool

WAIT_S = 20.0


@pytest.fixture
async def orchestrator() -> AsyncIterator[MockOrchestrator]:
    async with MockOrchestrator() as found:
        yield found


@pytest.fixture
async def bridge(orchestrator: MockOrchestrator) -> AsyncIterator[RealtimeBridge]:
    fields = {"tenant_id": "t", "user_id": "u"}
    async with RealtimeBridge(orchestrator, **fields, timeout_ms=9, required_models=["m"]) as found:
        yield found


@pytest.fixture
async def worker(orchestrator: MockOrchestrator) -> AsyncIterator[FakeWorker]:
    async with FakeWorker(orchestrator.address) as found:
        await found.register()
        await orchestrator.wait_for_worker(timeout=WAIT_S)
        yield found


async def test_the_path_names_the_handler(bridge: RealtimeBridge, worker: FakeWorker) -> None:
    async with connect(f"{bridge.url}/talk%20to?me=1") as client:
        opened = (await worker.receive()).realtime_open_cmd
        assert (opened.function_name, opened.tenant_id, opened.user_id) == ("talk to", "t", "u")
        assert (opened.timeout_ms, list(opened.required_models)) == (9, ["m"])
        await client.send("text")
        await client.send(b"\xff")
        frames = [(await worker.receive()).realtime_frame for _ in range(2)]
        assert [(frame.data, frame.is_text) for frame in frames] == [(b"text", True), (b"\xff", False)]
        for is_text in (True, False):
            answer = pb.RealtimeFrame(session_id=opened.session_id, data=b"\xff", is_text=is_text)
            await worker.send(realtime_frame=answer)
        assert [await client.recv(), await client.recv()] == ["�", b"\xff"]
    assert (await worker.receive()).realtime_close_cmd.reason == "closed"


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("completed", 1000),
        ("closed", 1000),
        ("unknown_function", 1008),
        ("frame_too_large", 1009),
        ("error:KeyError", 1011),
        ("timeout", 1011),
        ("worker_crashed", 1011),
        ("slow_consumer", 1013),
        ("error:" + "é" * 100, 1011),
    ],
)
async def test_codes(bridge: RealtimeBridge, worker: FakeWorker, reason: str, code: int) -> None:
    async with connect(f"{bridge.url}/talk") as client:
        session_id = (await worker.receive()).realtime_open_cmd.session_id
        await worker.send(realtime_close_cmd=pb.RealtimeCloseCommand(session_id=session_id, reason=reason))
        await asyncio.wait_for(client.wait_closed(), WAIT_S)
        assert client.close_code == code
        assert reason.startswith(client.close_reason or "-")
        assert client.close_reason == reason or len(reason.encode()) > 123


async def test_without_a_worker(bridge: RealtimeBridge) -> None:
    async with connect(f"{bridge.url}/talk") as client:
        await asyncio.wait_for(client.wait_closed(), WAIT_S)
        assert (client.close_code, client.close_reason) == (1013, "no worker is connected")


async def test_the_workers_stream_ends(
    bridge: RealtimeBridge, worker: FakeWorker, orchestrator: MockOrchestrator
) -> None:
    async with connect(f"{bridge.url}/talk") as client:
        await worker.receive()
        orchestrator.find().half_close()
        await asyncio.wait_for(client.wait_closed(), WAIT_S)
        assert (client.close_code, client.close_reason) == (1012, "the worker's stream ended")


async def test_what_a_worker_sends_after_its_close_is_a_violation(
    worker: FakeWorker, orchestrator: MockOrchestrator
) -> None:
    session = await orchestrator.open_realtime("talk", session_id="s1")
    close = pb.RealtimeCloseCommand(session_id="s1", reason="completed")
    await worker.send(realtime_close_cmd=close)
    await session.wait_closed(WAIT_S)
    await worker.send(realtime_frame=pb.RealtimeFrame(session_id="s1"))
    await worker.send(realtime_close_cmd=close)
    await worker.send(realtime_frame=pb.RealtimeFrame(session_id="never opened"))
    await orchestrator.wait_until(lambda: len(orchestrator.violations) == 2)
    first, second = orchestrator.violations
    assert first.endswith("a frame of session s1 came after its close")
    assert second.endswith("a second close of session s1")
    await orchestrator.open_realtime("talk", session_id="s1")
    await worker.send(realtime_close_cmd=close)
    await orchestrator.wait_until(lambda: "s1" not in orchestrator.sessions)
    assert len(orchestrator.violations) == 2


async def test_a_port_that_is_taken(orchestrator: MockOrchestrator) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bridge = RealtimeBridge(orchestrator, f"127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(ListenError, match="Address already in use"):
            await bridge.__aenter__()


async def test_without_the_package(orchestrator: MockOrchestrator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "websockets.asyncio.server", None)
    with pytest.raises(UsageError, match=r"pip install 'gen-worker\[serve\]'"):
        RealtimeBridge(orchestrator)


async def test_cli() -> None:
    async with tool("--realtime-listen", "127.0.0.1:0", "--tenant-id", "acme") as running:
        address = await running.note("listening on ")
        url = (await running.note("websocket handlers on ")).removesuffix("/<function>")
        async with FakeWorker(address) as worker:
            await worker.register()
            assert (await running.line()).startswith("[connected]")
            assert (await running.line()).startswith("[registration]")
            async with connect(f"{url}/talk") as client:
                opened = (await worker.receive()).realtime_open_cmd
                assert (opened.function_name, opened.tenant_id) == ("talk", "acme")
                await client.send("hi")
                assert (await worker.receive()).realtime_frame.data == b"hi"
                running.process.terminate()
                await asyncio.wait_for(client.wait_closed(), WAIT_S)
            code, _, errors = await running.finish()
    assert code == 0
    assert "Traceback" not in errors
