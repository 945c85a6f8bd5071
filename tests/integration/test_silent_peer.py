"""A scheduler whose process stands still: its kernel takes everything, and nobody reads it."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable

import pytest

from supervisor.outbox import DELIVERED_S
from supervisor.transport import StatusCode, StreamClosed, Transport
from supervisor.transport import grpcio as module
from supervisor.transport.grpcio import GrpcioTransport
from supervisor.transport.h2.dial import H2Transport


@pytest.fixture
async def server() -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.support.stopped_server", stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield process, (await process.stdout.readline()).decode().strip()
    finally:
        process.kill()
        await process.wait()


def options(**changes: int) -> tuple[tuple[str, int], ...]:
    """The transport's own, with some of them changed."""
    names = {name.replace("__", "."): value for name, value in changes.items()}
    return tuple((name, names.get(name, value)) for name, value in module._OPTIONS)


def impatient_grpcio(monkeypatch: pytest.MonkeyPatch) -> Transport:
    faster = options(grpc__keepalive_time_ms=1000, grpc__keepalive_timeout_ms=500, grpc__http2__ping_timeout_ms=500)
    assert faster != module._OPTIONS
    monkeypatch.setattr(module, "_OPTIONS", faster)
    return GrpcioTransport()


def impatient_h2(_: pytest.MonkeyPatch) -> Transport:
    return H2Transport(keepalive_s=1.0, keepalive_timeout_s=0.5)


@pytest.mark.parametrize("impatient", [impatient_grpcio, impatient_h2])
async def test_it_is_found_by_its_silence(
    impatient: Callable[[pytest.MonkeyPatch], Transport],
    server: tuple[asyncio.subprocess.Process, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The status says so, since it tells that what went out was not read."""
    process, address = server
    stream = await impatient(monkeypatch).open(address, ())
    await stream.send([b"before"])
    await stream.established()
    process.send_signal(signal.SIGSTOP)
    await stream.send([b"swallowed"])
    with pytest.raises(StreamClosed) as closed:
        async with asyncio.timeout(30):
            await stream.receive()
    assert closed.value.status.code is StatusCode.UNAVAILABLE
    assert closed.value.status.silent
    await stream.close()


def test_it_is_found_before_time_would_call_its_results_delivered() -> None:
    found = dict(module._OPTIONS)
    ping_s = (found["grpc.keepalive_time_ms"] + found["grpc.http2.ping_timeout_ms"]) / 1000
    assert 2 * ping_s <= DELIVERED_S
    assert found["grpc.keepalive_timeout_ms"] == found["grpc.http2.ping_timeout_ms"]
