"""A WebSocket of the development server and the worker's session: frames both ways, and how each end is told.

The worker is one that a test scripts, over real gRPC and a real WebSocket.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from gen_worker.serve.app import build_app
from gen_worker.serve.local_worker import LocalOptions, LocalWorker
from gen_worker.serve.realtime import FAILED, NORMAL, TOO_LARGE
from gen_worker.serve.server import HttpServer
from gen_worker.serve.state import DevState, Phase
from gen_worker.wire import worker_scheduler_pb2 as pb
from tests.unit.test_mock_orchestrator import FakeWorker


@dataclass
class Place:
    address: str
    worker: FakeWorker
    state: DevState

    def socket(self, name: str = "talk", **options: Any) -> connect:
        return connect(f"ws://{self.address}/v1/functions/{name}", proxy=None, **options)

    async def opened(self) -> pb.RealtimeOpenCommand:
        return (await self.worker.receive()).realtime_open_cmd


@pytest.fixture
async def place(tmp_path: Path) -> AsyncIterator[Place]:
    async with LocalWorker(LocalOptions(tmp_path, {})) as local:
        state = DevState("a project", local)
        with socket.create_server(("127.0.0.1", 0)) as listening:
            config = uvicorn.Config(build_app(state), lifespan="off", ws="websockets-sansio", log_level="warning")
            http = HttpServer(config)
            serving = asyncio.ensure_future(http.serve([listening]))
            async with FakeWorker(local.orchestrator.address, functions=("talk",), token=local.token) as worker:
                await worker.register(function_schemas=[pb.FunctionSchema(name="talk")])
                await local.orchestrator.wait_for_worker()
                state.enter(Phase.SERVING)
                yield Place(f"127.0.0.1:{listening.getsockname()[1]}", worker, state)
            http.should_exit = True
            await serving


async def test_frames_pass_both_ways_and_the_workers_end_is_the_sockets(place: Place) -> None:
    async with place.socket() as client:
        opened = await place.opened()
        assert opened.function_name == "talk"
        await client.send("a text")
        await client.send(b"\x00bytes")
        first, second = [(await place.worker.receive()).realtime_frame for _ in range(2)]
        assert (first.data, first.is_text, first.session_id) == (b"a text", True, opened.session_id)
        assert (second.data, second.is_text) == (b"\x00bytes", False)
        for data, is_text in ((b"hello", True), (b"\xff", False)):
            frame = pb.RealtimeFrame(session_id=opened.session_id, data=data, is_text=is_text)
            await place.worker.send(realtime_frame=frame)
        assert [await client.recv(), await client.recv()] == ["hello", b"\xff"]
        await place.worker.send(
            realtime_close_cmd=pb.RealtimeCloseCommand(session_id=opened.session_id, reason="completed")
        )
        with pytest.raises(ConnectionClosed) as closed:
            await client.recv()
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (NORMAL, "completed")


@pytest.mark.parametrize(("reason", "code"), [("frame_too_large", TOO_LARGE), ("error:KeyError", FAILED)])
async def test_reasons_are_codes(place: Place, reason: str, code: int) -> None:
    async with place.socket() as client:
        opened = await place.opened()
        command = pb.RealtimeCloseCommand(session_id=opened.session_id, reason=reason)
        await place.worker.send(realtime_close_cmd=command)
        with pytest.raises(ConnectionClosed) as closed:
            await client.recv()
    assert closed.value.rcvd is not None
    assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (code, reason)


async def test_a_client_that_goes_away_closes_the_session(place: Place) -> None:
    async with place.socket():
        opened = await place.opened()
    close = (await place.worker.receive()).realtime_close_cmd
    assert (close.session_id, close.reason) == (opened.session_id, "closed")


async def test_other_origins_get_no_socket(place: Place) -> None:
    with pytest.raises(InvalidStatus) as refused:
        async with place.socket(origin="http://evil.example"):
            pass
    assert refused.value.response.status_code == 403


async def test_a_post_to_a_websocket_handler_says_so(place: Place) -> None:
    async with httpx.AsyncClient() as client:
        answer = await client.post(f"http://{place.address}/v1/functions/talk", json={})
        assert answer.status_code == 405
        assert "talk is a websocket handler" in answer.json()["error"]["message"]
        listed = (await client.get(f"http://{place.address}/v1/functions")).json()
        assert [(each["name"], each["realtime"]) for each in listed] == [("talk", True)]
        assert (await client.get(f"http://{place.address}/openapi.json")).json()["paths"] == {}
