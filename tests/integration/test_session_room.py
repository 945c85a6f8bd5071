"""The session and a worker that is full: nothing more is read, and everything else goes on."""

from __future__ import annotations

import asyncio

import grpc
import pytest

from tests.integration.test_session import HEARTBEAT, REGISTRATION, Bench, hold
from tests.support.stream_server import Dial, eventually, serving, settled
from tests.support.transports import TransportFactory

KIB = 1024


@pytest.fixture(autouse=True)
def each_transport(make_transport: TransportFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "make_transport", staticmethod(make_transport), raising=False)


async def flood(dial: Dial) -> None:
    reading = asyncio.create_task(dial.read_all())
    await dial.send(*[b"%d " % number + b"x" * 64 * KIB for number in range(1000)])
    await reading


async def test_a_full_worker_reads_no_more_and_does_the_rest() -> None:
    async with serving(flood) as server:
        bench = Bench(server.address)
        bench.inbox.full = True
        async with bench.started():
            await eventually(lambda: bench.inbox.messages)
            await settled(lambda: len(bench.inbox.messages))
            read = len(bench.inbox.messages)
            assert 1 <= read < 500
            bench.box.put(b"result")
            await eventually(lambda: server.dials[0].received[-1] == b"result")
            bench.clock.advance(10)
            await eventually(lambda: server.dials[0].received[-1] == HEARTBEAT)
            assert len(bench.inbox.messages) == read
            bench.inbox.full = False
            bench.inbox.emptied.set()
            await eventually(lambda: len(bench.inbox.messages) == 1000)
            assert [int(message.split()[0]) for message in bench.inbox.messages] == list(range(1000))


async def test_a_stream_that_ends_while_the_worker_is_full_is_replaced() -> None:
    end = asyncio.Event()

    async def send_and_end(dial: Dial) -> None:
        await dial.send(b"one")
        await end.wait()
        await dial.send(b"two")
        await dial.abort(grpc.StatusCode.UNAVAILABLE, "leaving")

    async with serving(send_and_end) as server:
        bench = Bench(server.address)
        bench.inbox.full = True
        async with bench.started():
            await eventually(lambda: bench.inbox.messages == [b"one"])
            server.behave = hold
            end.set()
            await eventually(server.dials[0].ended.is_set)

            def is_replaced() -> bool:
                if len(server.dials) == 1:
                    bench.box.put(b"result")  # what can't be sent shows that the stream is over; the first may still be
                return len(server.dials) == 2 and server.dials[1].received[:2] == [REGISTRATION, b"result"]

            await eventually(is_replaced)
            assert bench.inbox.messages == [b"one", b"two"]
            assert bench.inbox.streams_closed == 1


async def test_a_full_worker_can_be_stopped() -> None:
    async with serving(flood) as server:
        bench = Bench(server.address)
        bench.inbox.full = True
        async with bench.started() as running:
            await eventually(lambda: bench.inbox.messages)
            bench.session.stop()
            await asyncio.wait_for(running, 5)
