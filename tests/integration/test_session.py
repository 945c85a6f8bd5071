"""The session over each transport, against real gRPC servers; only the clock is a fake."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, ClassVar

import grpc
import pytest

from supervisor.auth import KeysUnreachable, TokenRefused
from supervisor.backoff import QUICK_S, STABLE_S, ReconnectSettings
from supervisor.session import ANNOUNCE_GAP_S, HOLD_BACK_S, GaveUp, Session, SessionSettings
from supervisor.transport import StatusCode, StreamStatus, Unread
from supervisor.transport.large import LargeRequest
from tests.support.fake_clock import FakeClock
from tests.support.stream_server import Dial, StreamServer, eventually, serving, settled
from tests.support.transports import TransportFactory

REGISTRATION = b"registration"
HEARTBEAT = b"heartbeat"
MIB = 1024 * 1024


class Box:
    """An outbox of the simplest kind: what is not accepted goes back to the front."""

    def __init__(self) -> None:
        self.waiting: deque[bytes] = deque()
        self.taken: list[bytes] = []
        self.accepted_all: list[bytes] = []
        self.streams: list[str] = []
        self.ends: list[StreamStatus | None] = []
        self.unread: list[Unread] = []
        self.batch_messages = 8
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def put(self, *messages: bytes) -> None:
        self.waiting.extend(messages)
        self._idle.clear()
        self._wake.set()

    async def take(self) -> Sequence[bytes]:
        assert not self.taken, "accepted must follow each take"
        while not self.waiting:
            self._wake.clear()
            await self._wake.wait()
        self.taken = [self.waiting.popleft() for _ in range(min(self.batch_messages, len(self.waiting)))]
        return self.taken

    def accepted(self, count: int, unread_bytes: int) -> None:
        self.accepted_all += self.taken[:count]
        self.waiting.extendleft(reversed(self.taken[count:]))
        self.taken = []
        if not self.waiting:
            self._idle.set()

    def stream_opened(self) -> None:
        self.streams.append("opened")

    def stream_closed(self, status: StreamStatus | None, unread: Unread) -> None:
        assert not self.taken, "the last batch must be accounted for before the stream is closed"
        self.streams.append("closed")
        self.ends.append(status)
        self.unread.append(unread)

    async def flushed(self) -> None:
        await self._idle.wait()


class Inbox:
    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.streams_closed = 0
        self.full = False
        self.emptied = asyncio.Event()

    async def room(self) -> None:
        await self.emptied.wait()

    def stream_closed(self) -> None:
        self.streams_closed += 1

    def handle(self, message: bytes | LargeRequest) -> None:
        assert isinstance(message, bytes)
        if message == b"bug":
            raise RuntimeError("a defect in the worker")
        self.messages.append(message)


class FixedAuth:
    """Gives a token, or raises what is in `errors` first."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.closed = False

    async def metadata(self) -> list[tuple[str, str]]:
        if self.errors:
            raise self.errors.pop(0)
        return [("authorization", "Bearer the-token")]

    def close(self) -> None:
        self.closed = True


class Bench:
    """A session and what it talks to; `started` runs it."""

    make_transport: ClassVar[TransportFactory]

    def __init__(self, *addresses: str, **reconnect: Any) -> None:
        self.clock = FakeClock()
        self.box = Box()
        self.inbox = Inbox()
        self.auth = FixedAuth()
        self.session = Session(
            settings=SessionSettings(addresses=addresses, reconnect=ReconnectSettings(**{"jitter_s": 0.0} | reconnect)),
            transport=self.make_transport(),
            auth=self.auth,
            outgoing=self.box,
            incoming=self.inbox,
            registration=lambda is_heartbeat: HEARTBEAT if is_heartbeat else REGISTRATION,
            clock=self.clock,
        )
        self.running: asyncio.Task[None] | None = None

    @contextlib.asynccontextmanager
    async def started(self) -> AsyncIterator[asyncio.Task[None]]:
        before = asyncio.all_tasks()
        running = self.running = asyncio.create_task(self.session.run())
        try:
            yield running
        finally:
            self.session.stop()
            with contextlib.suppress(GaveUp, TokenRefused, RuntimeError, asyncio.CancelledError):
                await asyncio.wait_for(running, 5)
            await eventually(lambda: not {task.get_name() for task in asyncio.all_tasks() - before if _ours(task)})
            assert self.auth.closed

    async def pauses(self) -> float:
        """Wait until the session waits to dial again; returns for how long."""
        await eventually(lambda: self.clock.waits and not self.session_open)
        return self.clock.waits[0]

    @property
    def session_open(self) -> bool:
        return self.box.streams.count("opened") > self.box.streams.count("closed")

    async def beat(self) -> None:
        """Wait until the scheduler has answered and nothing but the next heartbeat is waited for."""
        await eventually(lambda: len(self.clock.waits) == 1 and self.session.connected)


@pytest.fixture(autouse=True)
def each_transport(make_transport: TransportFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "make_transport", staticmethod(make_transport), raising=False)


def _ours(task: asyncio.Task[Any]) -> bool:
    return task.get_name().startswith(("session", "grpcio"))


async def hold(dial: Dial) -> None:
    await dial.headers()
    await dial.read_all()


async def deaf(dial: Dial) -> None:
    await dial.headers()
    await asyncio.Event().wait()


def redirecting(target: Callable[[], str]) -> Callable[[Dial], Coroutine[Any, Any, None]]:
    async def redirect(dial: Dial) -> None:
        await dial.abort(grpc.StatusCode.FAILED_PRECONDITION, f"not_leader:{target()}")

    return redirect


def ending(code: grpc.StatusCode, details: str, *messages: bytes) -> Callable[[Dial], Coroutine[Any, Any, None]]:
    async def end(dial: Dial) -> None:
        await dial.headers()
        await dial.read()
        await dial.send(*messages)
        await dial.abort(code, details)

    return end


def lines(caplog: pytest.LogCaptureFixture, *, word: str) -> list[str]:
    return [record.getMessage() for record in caplog.records if word in record.getMessage()]


# -- on one stream --------------------------------------------------------------------------------


async def test_the_registration_comes_first_and_then_what_waits() -> None:
    async with serving(hold) as server:
        bench = Bench(server.address)
        bench.box.put(*[b"%d" % number for number in range(20)])
        async with bench.started():
            await eventually(lambda: server.dials and len(server.dials[0].received) == 21)
            assert server.dials[0].received == [REGISTRATION, *(b"%d" % number for number in range(20))]
            assert server.dials[0].metadata["authorization"] == "Bearer the-token"
            bench.box.put(b"later")
            await eventually(lambda: server.dials[0].received[-1] == b"later")
            await eventually(lambda: bench.session.connected)
            assert (bench.session.epoch, bench.session.target) == (1, server.address)


async def test_what_arrives_is_handed_on_in_order() -> None:
    async def flood(dial: Dial) -> None:
        await dial.send(*[b"%d" % number for number in range(3000)])
        await dial.read_all()

    async with serving(flood) as server:
        bench = Bench(server.address)
        async with bench.started():
            await eventually(lambda: len(bench.inbox.messages) == 3000)
            assert bench.inbox.messages == [b"%d" % number for number in range(3000)]


async def test_messages_before_the_end_of_a_stream_are_handed_on() -> None:
    sent = [b"%d" % number for number in range(50)]
    async with serving(ending(grpc.StatusCode.UNAVAILABLE, "leaving", *sent)) as server:
        bench = Bench(server.address)
        bench.box.put(*[b"x" * 1000] * 200)  # so that sends are under way when the stream ends
        async with bench.started():
            await bench.pauses()
            assert bench.inbox.messages == sent * bench.session.epoch


async def test_heartbeats_keep_to_their_schedule() -> None:
    async with serving(hold) as server:
        bench = Bench(server.address)
        async with bench.started():
            await bench.beat()
            assert bench.clock.waits == [10]
            bench.clock.advance(13)  # a late wake-up ...
            await eventually(lambda: server.dials[0].received == [REGISTRATION, HEARTBEAT])
            await eventually(lambda: bench.clock.waits == [7])  # ... does not shift what follows
            bench.clock.advance(7 + 30)  # and what was missed is not made up for
            await eventually(lambda: server.dials[0].received == [REGISTRATION, HEARTBEAT, HEARTBEAT])
            await eventually(lambda: bench.clock.waits == [10])


async def test_a_timer_that_is_early_makes_one_heartbeat_not_two() -> None:
    async with serving(hold) as server:
        bench = Bench(server.address)
        bench.clock.early_s = 0.001
        async with bench.started():
            await bench.beat()
            bench.clock.advance(9.9995)
            await eventually(lambda: bench.clock.waits == [pytest.approx(10.0005)])
            await settled(lambda: len(server.dials[0].received), quiet_s=0.05)
            assert server.dials[0].received == [REGISTRATION, HEARTBEAT]


async def test_a_change_is_announced_at_once_and_changes_together_share_a_heartbeat() -> None:
    async with serving(hold) as server:
        bench = Bench(server.address)
        async with bench.started():
            await bench.beat()
            bench.clock.advance(4)
            for _ in range(5):
                bench.session.announce()
            await eventually(lambda: server.dials[0].received == [REGISTRATION, HEARTBEAT])
            await eventually(lambda: bench.clock.waits == [6])  # the schedule stays
            bench.clock.advance(0.005)
            bench.session.announce()
            await eventually(lambda: bench.clock.waits == [pytest.approx(ANNOUNCE_GAP_S - 0.005)])
            bench.session.announce()
            assert len(server.dials[0].received) == 2
            bench.clock.advance(ANNOUNCE_GAP_S)
            await eventually(lambda: len(server.dials[0].received) == 3)
            await eventually(lambda: bench.clock.waits and bench.clock.waits[0] > 1)
            assert server.dials[0].received == [REGISTRATION, HEARTBEAT, HEARTBEAT]


async def test_a_change_while_no_stream_is_open_needs_no_heartbeat() -> None:
    async with serving(hold) as server:
        bench = Bench(server.address)
        bench.session.announce()
        async with bench.started():
            await bench.beat()
            bench.box.put(b"x")
            await eventually(lambda: server.dials[0].received == [REGISTRATION, b"x"])


async def test_a_heartbeat_goes_ahead_of_what_is_queued() -> None:
    go_on = asyncio.Event()

    async def slow_reader(dial: Dial) -> None:
        await dial.headers()
        await dial.read()
        await go_on.wait()
        await dial.read_all()

    async with serving(slow_reader) as server:
        bench = Bench(server.address)
        bench.box.batch_messages = 4
        bench.box.put(*[b"x" * (MIB // 4)] * 100)
        async with bench.started():
            await bench.beat()
            await settled(lambda: len(bench.box.accepted_all))
            taken = len(bench.box.accepted_all) + len(bench.box.taken)
            assert taken < 100
            bench.session.announce()
            await settled(lambda: bench.clock.waits, quiet_s=0.05)
            bench.clock.advance(ANNOUNCE_GAP_S)
            await settled(lambda: bench.clock.waits, quiet_s=0.05)
            go_on.set()
            await eventually(lambda: len(server.dials[0].received) == 102)
            assert server.dials[0].received.index(HEARTBEAT) == 1 + taken


# -- from one stream to the next ------------------------------------------------------------------


async def test_what_was_not_accepted_goes_out_on_the_next_stream_in_order() -> None:
    refuse = asyncio.Event()

    async def first_deaf(dial: Dial) -> None:
        await dial.headers()
        if len(server.dials) == 1:
            await dial.read()
            await refuse.wait()
            await dial.abort(grpc.StatusCode.UNAVAILABLE, "restarting")
        await dial.read_all()

    messages = [b"%3d" % number + b"x" * (MIB // 4) for number in range(60)]
    async with serving(first_deaf) as server:
        bench = Bench(server.address)
        bench.box.put(*messages)
        async with bench.started():
            await settled(lambda: len(bench.box.accepted_all))
            refuse.set()
            bench.clock.advance(await bench.pauses())
            accepted = len(bench.box.accepted_all)
            assert 0 < accepted < 60
            await eventually(lambda: len(server.dials) == 2 and len(server.dials[1].received) == 61 - accepted)
            assert server.dials[1].received == [REGISTRATION, *messages[accepted:]]
            assert bench.box.accepted_all == messages
            assert bench.box.streams == ["opened", "closed", "opened"]
            assert bench.box.ends == [StreamStatus(StatusCode.UNAVAILABLE, "restarting")]
            assert bench.session.epoch == 2


async def test_what_is_queued_waits_for_the_answer_but_not_for_long() -> None:
    async def silent(dial: Dial) -> None:
        await dial.read_all()

    async with serving(silent) as server:
        bench = Bench(server.address)
        bench.box.put(b"result")
        async with bench.started():
            await eventually(lambda: HOLD_BACK_S in bench.clock.waits)
            await eventually(lambda: server.dials and server.dials[0].received)
            assert server.dials[0].received == [REGISTRATION]
            bench.clock.advance(HOLD_BACK_S)
            await eventually(lambda: server.dials[0].received == [REGISTRATION, b"result"])
            assert not bench.session.connected


async def test_after_a_stream_that_stayed_up_the_next_dial_comes_quickly(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    end = asyncio.Event()

    async def until_end(dial: Dial) -> None:
        await dial.headers()
        await end.wait()
        await dial.abort(grpc.StatusCode.UNAVAILABLE, "shutting\ndown")

    async with serving(until_end) as server:
        bench = Bench(server.address, jitter_s=1.0)
        async with bench.started():
            await eventually(lambda: bench.session.connected)
            bench.clock.advance(STABLE_S + 2.34)
            await settled(lambda: bench.clock.waits, quiet_s=0.05)
            end.set()
            assert 0 <= await bench.pauses() <= QUICK_S
            assert not bench.session.connected
    (line,) = lines(caplog, word="ended")
    assert line.startswith(f"stream 1 to {server.address} ended, up for 7.3 s: UNAVAILABLE: shutting down; next: ")


async def test_a_scheduler_that_ends_each_stream_at_once_is_dialed_less_and_less() -> None:
    async with serving(ending(grpc.StatusCode.INTERNAL, "no")) as server:
        bench = Bench(server.address)
        async with bench.started():
            pauses = []
            for _ in range(5):
                pauses.append(await bench.pauses())
                bench.clock.advance(pauses[-1])
                await eventually(lambda: len(server.dials) == len(pauses) + 1)
            assert pauses == [5, 10, 20, 40, 60]


async def test_a_scheduler_that_is_not_there_yet_is_dialed_until_it_is(
    unused_tcp_port: int, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(f"127.0.0.1:{unused_tcp_port}")
    server = StreamServer(hold)
    try:
        async with bench.started():
            assert await bench.pauses() == 5
            assert bench.session.epoch == 0
            assert "refused" in lines(caplog, word="no stream to")[0]
            await server.start(f"127.0.0.1:{unused_tcp_port}")
            bench.clock.advance(5)
            await eventually(lambda: bench.session.connected)
    finally:
        await server.stop()


async def test_seeds_are_dialed_one_after_the_other_without_a_wait(unused_tcp_port_factory: Callable[[], int]) -> None:
    down = [f"127.0.0.1:{unused_tcp_port_factory()}" for _ in range(2)]
    async with serving(hold) as server:
        bench = Bench(*down, server.address)
        async with bench.started():
            await eventually(lambda: bench.session.connected)
            assert bench.session.target == server.address


async def test_giving_up_names_the_last_status(unused_tcp_port: int) -> None:
    address = f"127.0.0.1:{unused_tcp_port}"
    bench = Bench(address, max_attempts=3)
    async with bench.started() as running:
        for pause in (5, 10):
            assert await bench.pauses() == pause
            bench.clock.advance(pause)
            await settled(lambda: bench.clock.waits, quiet_s=0.05)
        with pytest.raises(GaveUp, match="gave up after 3 failed dials in a row") as caught:
            await running
    assert caught.value.status.code is StatusCode.UNAVAILABLE
    assert address in str(caught.value)
    assert "refused" in str(caught.value)


# -- leaders --------------------------------------------------------------------------------------


async def test_a_redirect_is_followed_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serving(hold) as leader, serving(redirecting(lambda: leader.address)) as follower:
        bench = Bench(follower.address)
        bench.box.put(b"result")
        async with bench.started():
            await eventually(lambda: leader.dials and leader.dials[0].received == [REGISTRATION, b"result"])
            assert bench.session.target == leader.address
            assert lines(caplog, word="is not the leader")
            await leader.stop()  # then the seeds come again
            await eventually(lambda: len(follower.dials) >= 2)


@pytest.mark.parametrize("named", ["nonsense", "http://x:1", "", "x:99999"])
async def test_a_malformed_redirect_is_an_ordinary_failure(named: str, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(redirecting(lambda: named)) as server:
        bench = Bench(server.address)
        async with bench.started():
            assert await bench.pauses() == 5
            assert bench.session.target == server.address
            assert bool(lines(caplog, word="the redirect is ignored")) is bool(named)


async def test_schedulers_that_point_at_each_other_are_not_dialed_without_end() -> None:
    servers: list[StreamServer] = []
    async with (
        serving(redirecting(lambda: servers[1].address)) as first,
        serving(redirecting(lambda: servers[0].address)) as second,
    ):
        servers += [first, second]
        bench = Bench(first.address)
        async with bench.started():
            assert await bench.pauses() == 5
            assert (len(first.dials), len(second.dials)) == (3, 3)
            bench.clock.advance(5)
            assert await bench.pauses() in (5, 10)
            await eventually(lambda: len(first.dials) + len(second.dials) == 7)


# -- credentials ----------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED])
async def test_a_refused_token_is_said_clearly_and_tried_again(
    code: grpc.StatusCode, caplog: pytest.LogCaptureFixture
) -> None:
    async def refuse_once(dial: Dial) -> None:
        if len(server.dials) == 1:
            await dial.abort(code, "unknown key")
        await hold(dial)

    async with serving(refuse_once) as server:
        bench = Bench(server.address)
        async with bench.started():
            bench.clock.advance(await bench.pauses())
            await eventually(lambda: bench.session.connected)
    (line,) = lines(caplog, word="refused the token")
    assert line.startswith(f"{server.address} refused the token ({code.name}: unknown key): check that AUTH_TOKEN")
    assert [record.levelname for record in caplog.records if record.getMessage() == line] == ["ERROR"]
    assert "the-token" not in caplog.text


async def test_without_a_credential_nothing_is_dialed_until_there_is_one(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(hold) as server:
        bench = Bench(server.address)
        bench.auth.errors = [KeysUnreachable("no keys"), TokenRefused("stale", final=False)]
        async with bench.started():
            for pause in (5, 10):
                assert await bench.pauses() == pause
                assert not server.dials
                bench.clock.advance(pause)
                await settled(lambda: bench.clock.waits, quiet_s=0.05)
            await eventually(lambda: bench.session.connected)
    assert [line.partition("; next")[0] for line in lines(caplog, word="not dialed")] == [
        f"{server.address} is not dialed: no keys",
        f"{server.address} is not dialed: stale",
    ]


async def test_a_token_that_is_refused_for_good_ends_the_session() -> None:
    bench = Bench("127.0.0.1:1")
    bench.auth.errors = [TokenRefused("expired")]
    async with bench.started() as running:
        with pytest.raises(TokenRefused, match="expired"):
            await asyncio.wait_for(asyncio.shield(running), 5)


# -- the end --------------------------------------------------------------------------------------


async def test_stop_ends_a_stream_at_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serving(deaf) as server:
        bench = Bench(server.address)
        bench.box.put(*[b"x" * MIB] * 40)
        async with bench.started() as running:
            await settled(lambda: len(bench.box.accepted_all))
            bench.session.stop()
            bench.session.stop()
            await asyncio.wait_for(running, 5)
            assert len(bench.box.accepted_all) + len(bench.box.waiting) == 40
            assert bench.box.streams == ["opened", "closed"]
    (line,) = lines(caplog, word="is closed")
    assert line == f"stream 1 to {server.address} is closed, up for 0.0 s: CANCELLED: closed by this worker"


async def test_stop_ends_a_pause(unused_tcp_port: int) -> None:
    bench = Bench(f"127.0.0.1:{unused_tcp_port}")
    async with bench.started() as running:
        await bench.pauses()
        bench.session.stop()
        await asyncio.wait_for(running, 5)


async def test_stop_ends_a_dial() -> None:
    accepted = asyncio.Event()
    writers: list[asyncio.StreamWriter] = []

    async def silent(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        accepted.set()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    bench = Bench(f"{host}:{port}")
    async with bench.started() as running:
        await asyncio.wait_for(accepted.wait(), 5)
        bench.session.stop()
        bench.session.stop()
        await asyncio.wait_for(running, 5)
    server.close()
    for writer in writers:
        writer.close()


async def test_stop_before_run() -> None:
    bench = Bench("127.0.0.1:1")
    bench.session.stop()
    async with bench.started() as running:
        await asyncio.wait_for(running, 5)
    assert bench.session.epoch == 0


async def test_drain_delivers_what_waits_and_lets_the_scheduler_end_the_stream(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)

    async def last_words(dial: Dial) -> None:
        await dial.headers()
        await dial.read_all()
        await dial.send(b"goodbye")

    messages = [b"%d" % number for number in range(100)]
    async with serving(last_words) as server:
        bench = Bench(server.address)
        async with bench.started() as running:
            await eventually(lambda: bench.session.connected)
            bench.box.put(*messages)
            assert await bench.session.drain(10)
            await asyncio.wait_for(running, 5)
            assert server.dials[0].half_closed
            assert server.dials[0].received == [REGISTRATION, *messages]
            assert bench.inbox.messages == [b"goodbye"]
            assert bench.box.unread == [Unread(math.inf)], "it was read to its end"
    assert lines(caplog, word="is closed")[0].endswith(": OK")


async def test_drain_does_not_wait_out_a_pause(unused_tcp_port: int) -> None:
    bench = Bench(f"127.0.0.1:{unused_tcp_port}")
    server = StreamServer(hold)
    try:
        async with bench.started() as running:
            bench.box.put(b"result")
            await bench.pauses()
            await server.start(f"127.0.0.1:{unused_tcp_port}")
            assert await bench.session.drain(10)
            await asyncio.wait_for(running, 5)
            assert server.dials[0].received == [REGISTRATION, b"result"]
    finally:
        await server.stop()


async def test_drain_gives_up_when_its_time_is_over() -> None:
    async with serving(deaf) as server:
        bench = Bench(server.address)
        bench.box.put(*[b"x" * MIB] * 40)
        async with bench.started() as running:
            await settled(lambda: len(bench.box.accepted_all))
            draining = asyncio.create_task(bench.session.drain(7))
            await eventually(lambda: 7 in bench.clock.waits)
            bench.clock.advance(7)
            assert not await draining
            await asyncio.wait_for(running, 5)
            assert bench.box.unread != [Unread(math.inf)], "it was not read to its end"


@pytest.mark.parametrize("behave", [hold, deaf])
async def test_canceling_run_is_clean(behave: Any, caplog: pytest.LogCaptureFixture) -> None:
    async with serving(behave) as server:
        bench = Bench(server.address)
        bench.box.put(*[b"x" * MIB] * 40)
        async with bench.started() as running:
            await settled(lambda: len(bench.box.accepted_all))
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running
            assert bench.box.streams == ["opened", "closed"]
            await eventually(server.dials[0].ended.is_set)
    assert "never retrieved" not in caplog.text


async def test_a_defect_in_the_worker_is_not_hidden() -> None:
    async def poison(dial: Dial) -> None:
        await dial.send(b"bug")
        await dial.read_all()

    async with serving(poison) as server:
        bench = Bench(server.address)
        async with bench.started() as running:
            with pytest.raises(RuntimeError, match="a defect in the worker"):
                await asyncio.wait_for(asyncio.shield(running), 5)
        assert bench.box.streams == ["opened", "closed"]
