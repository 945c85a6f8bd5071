"""The HTTP server on real sockets: what it answers, and what it does with those who don't behave."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator
from http import HTTPStatus
from typing import cast

import httpx
import pytest

from supervisor import http_server as module
from supervisor.endpoints import Answer, Endpoints
from supervisor.http_server import HttpServer
from supervisor.status import Status


class Worker:
    """What stands behind the endpoints."""

    def __init__(self) -> None:
        self.unready: list[str] = []
        self.size = 10
        self.broken = False

    def metrics(self, accept: str) -> tuple[str, bytes]:
        if self.broken:
            raise RuntimeError("a defect")
        return f"text/{accept or 'none'}", b"m" * self.size


@pytest.fixture
def worker() -> Worker:
    return Worker()


@contextlib.asynccontextmanager
async def serving(worker: Worker) -> AsyncIterator[str]:
    endpoints = Endpoints(
        unready=lambda: worker.unready, status=lambda: cast("Status", {"version": 1}), metrics=worker.metrics
    )
    server = HttpServer("127.0.0.1:0", endpoints.answer)
    url = await server.start()
    assert url is not None
    try:
        yield url
    finally:
        await server.stop()


@contextlib.asynccontextmanager
async def raw(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(url.rpartition(":")[2]))
    try:
        yield reader, writer
    finally:
        writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def test_routes(worker: Worker) -> None:
    async with serving(worker) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/livez?verbose")).text == "ok\n"
        assert (await client.get("/readyz")).status_code == 200
        worker.unready = ["no executor is ready", "draining"]
        refused = await client.get("/readyz")
        assert (refused.status_code, refused.text) == (503, "no executor is ready\ndraining\n")
        assert (await client.get("/livez")).status_code == 200
        metrics = await client.get("/metrics", headers={"accept": "x"})
        assert (metrics.headers["content-type"], metrics.text) == ("text/x", "m" * 10)
        status = await client.get("/status")
        assert (status.headers["content-type"], status.json()) == ("application/json", {"version": 1})
        assert status.headers["cache-control"] == "no-store"
        assert "/readyz" in (await client.get("/")).text
        assert (await client.get("/nothing")).status_code == 404


async def test_methods(worker: Worker) -> None:
    async with serving(worker) as url, httpx.AsyncClient(base_url=url) as client:
        head = await client.head("/livez")
        assert (head.status_code, head.headers["content-length"], head.content) == (200, "3", b"")
        posted = await client.post("/status", content=b"x" * 100_000)
        assert (posted.status_code, posted.headers["allow"]) == (405, "GET, HEAD")
        assert (await client.get("/livez")).status_code == 200


async def test_a_defect_is_answered_and_logged(worker: Worker, caplog: pytest.LogCaptureFixture) -> None:
    worker.broken = True
    async with serving(worker) as url, httpx.AsyncClient(base_url=url) as client:
        assert (await client.get("/metrics")).status_code == 500
        assert (await client.get("/livez")).status_code == 200
    assert "RuntimeError: a defect" in caplog.text


async def test_pipelined_requests_are_answered_in_order(worker: Worker) -> None:
    async with serving(worker) as url, raw(url) as (reader, writer):
        writer.write(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n" * 2 + b"GET /nothing HTTP/1.0\r\n\r\n")
        answers = await asyncio.wait_for(reader.read(), 10)
        assert re.findall(rb"HTTP/1.1 (\d+)", answers) == [b"200", b"200", b"404"]


@pytest.mark.parametrize("said", [b"\x16\x03\x01 TLS?\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", b"GET /" + b"x" * 100_000])
async def test_no_http(worker: Worker, said: bytes) -> None:
    async with serving(worker) as url, raw(url) as (reader, writer):
        writer.write(said)
        assert (await asyncio.wait_for(reader.read(), 10)).startswith(b"HTTP/1.1 400")


async def test_one_that_does_not_read_is_not_read_from(worker: Worker) -> None:
    worker.size = 1_000_000
    async with serving(worker) as url, raw(url) as (_, writer):
        written = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                while written < 50_000_000:
                    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 1000)
                    await writer.drain()
                    written += 34_000
        # It took what the kernel's buffers take, and not fifty million bytes that would each make a megabyte.
        assert written < 50_000_000
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/livez")).status_code == 200


async def test_silent_clients_are_bounded_in_number_and_time(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE_S", 0.2)
    monkeypatch.setattr(module, "MAX_CONNECTIONS", 2)
    async with serving(worker) as url, contextlib.AsyncExitStack() as stack:
        readers = [(await stack.enter_async_context(raw(url)))[0] for _ in range(3)]
        # The third is hung up on, the first two when their time is over.
        assert [await asyncio.wait_for(reader.read(), 10) for reader in readers] == [b"", b"", b""]
        async with httpx.AsyncClient(base_url=url) as client:
            assert (await client.get("/livez")).status_code == 200


async def test_a_taken_port_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        server = HttpServer(address, lambda *_: pytest.fail("nobody asks"))
        assert await server.start() is None
        await server.stop()
    assert f"WORKER_HTTP_ADDR: {address} can't be listened on (Address already in use)" in caplog.text
    assert "free the port or set another" in caplog.text


async def test_a_name_is_listened_on_where_most_look_for_it() -> None:
    server = HttpServer("localhost:0", lambda *_: pytest.fail("nobody asks"))
    assert str(await server.start()).startswith("http://127.0.0.1:")
    await server.stop()


@pytest.mark.parametrize("address", ["no-such-host.invalid:1", "192.0.2.1:80"])
async def test_an_address_that_is_not_here_is_a_warning(address: str, caplog: pytest.LogCaptureFixture) -> None:
    assert await HttpServer(address, lambda *_: pytest.fail("nobody asks")).start() is None
    assert address in caplog.text


async def test_ipv6(worker: Worker) -> None:
    del worker
    server = HttpServer("[::1]:0", lambda *_: Answer(HTTPStatus.OK, "text/plain", b"six"))
    url = await server.start()
    if url is None:
        pytest.skip("this host has no IPv6")
    async with httpx.AsyncClient() as client:
        assert (await client.get(url)).text == "six"
    await server.stop()
