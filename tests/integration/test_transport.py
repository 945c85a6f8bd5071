"""What the session relies on, for each transport, against a real gRPC server on the loopback."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import trustme

from gen_worker.wire import METHOD
from supervisor.dial_hints import hint
from supervisor.transport import StatusCode, Stream, StreamClosed, TlsFiles, Transport
from supervisor.transport.gather import ENOUGH, GATHER_S, SOME
from supervisor.transport.grpcio import INBOX_BYTES, INBOX_MESSAGES, GrpcioTransport
from supervisor.transport.messages import Joined, Message, apart, count_of
from supervisor.transport.unread import ROUND_TRIP_MAX_S
from tests.support.seam import plain
from tests.support.stream_server import Dial, eventually, serving, settled
from tests.support.transports import TransportFactory

MIB = 1024 * 1024


@pytest.fixture(autouse=True)
async def no_task_is_left() -> AsyncIterator[None]:
    before = asyncio.all_tasks()
    yield
    await eventually(lambda: asyncio.all_tasks() <= before | {asyncio.current_task()})


@contextlib.asynccontextmanager
async def opened(
    transport: Transport, target: str, metadata: tuple[tuple[str, str], ...] = ()
) -> AsyncIterator[Stream]:
    stream = await transport.open(target, metadata)
    try:
        yield stream
    finally:
        await stream.close()


async def dialed_and_answered(transport: Transport, target: str) -> None:
    async with opened(transport, target) as stream:
        await stream.established()


async def receive_all(stream: Stream) -> tuple[list[list[bytes]], StreamClosed]:
    """Every batch, and the end."""
    batches: list[list[bytes]] = []
    while True:
        try:
            batches.append(plain(await stream.receive()))
        except StreamClosed as closed:
            return batches, closed


async def echo(dial: Dial) -> None:
    while (message := await dial.read()) is not None:
        await dial.send(message)


async def hold(dial: Dial) -> None:
    await dial.headers()
    await dial.read_all()


# -- messages -------------------------------------------------------------------------------------


async def test_messages_of_all_sizes_pass_both_ways_in_order(make_transport: TransportFactory) -> None:
    messages = [b"", b"a", b"b" * 1000, b"c" * MIB, b"d" * (9 * MIB), b"e"]
    async with serving(echo) as server, opened(make_transport(), server.address) as stream:
        sending = asyncio.create_task(stream.send(messages))
        echoed: list[bytes] = []
        while len(echoed) < len(messages):
            echoed += plain(await stream.receive())
        await sending
        assert echoed == messages


async def test_joined_messages_arrive_as_they_were(make_transport: TransportFactory) -> None:
    messages: list[Message] = [b"a", Joined.of([b"b", b"", b"c" * 100_000]), b"d", Joined.of([b"e"])]
    async with serving(echo) as server, opened(make_transport(), server.address) as stream:
        await stream.send(messages)
        echoed: list[bytes] = []
        while len(echoed) < count_of(messages):
            echoed += plain(await stream.receive())
        assert echoed == list(apart(messages))


async def test_the_method_and_the_metadata_reach_the_server(make_transport: TransportFactory) -> None:
    async with serving(hold) as server:
        async with opened(make_transport(), server.address, (("authorization", "Bearer abc"),)) as stream:
            await stream.established()
        assert server.methods == [METHOD]
        assert server.dials[0].metadata["authorization"] == "Bearer abc"


async def test_one_receive_gives_all_that_is_here(make_transport: TransportFactory) -> None:
    sent = [b"%d" % number for number in range(500)]

    async def flood(dial: Dial) -> None:
        await dial.send(*sent)

    async with serving(flood) as server, opened(make_transport(), server.address) as stream:
        await stream.established()
        await eventually(server.dials[0].ended.is_set)
        await settled(lambda: len(asyncio.all_tasks()))
        batches, _ = await receive_all(stream)
    assert [message for batch in batches for message in batch] == sent
    assert len(batches) < 50


async def test_messages_that_grpc_gives_faster_than_they_are_handled_come_together() -> None:
    sent = [b"%d" % number for number in range(3000)]

    async def flood(dial: Dial) -> None:
        await dial.send(*sent)

    async with serving(flood) as server, opened(GrpcioTransport(), server.address) as stream:
        await stream.established()
        batches, _ = await receive_all(stream)
    assert [message for batch in batches for message in batch] == sent
    assert max(map(len, batches)) >= ENOUGH


async def test_a_message_that_comes_alone_is_handed_over_soon(make_transport: TransportFactory) -> None:
    """Also when the transport tries whether others come with it."""
    async with serving(echo) as server, opened(make_transport(), server.address) as stream:
        waits = []
        for number in range(4 * SOME):
            began = time.monotonic()
            await stream.send([b"%d" % number])
            assert plain(await stream.receive()) == [b"%d" % number]
            waits.append(time.monotonic() - began)
        assert sorted(waits)[len(waits) // 2] < 10 * GATHER_S


async def test_messages_before_the_end_are_delivered_and_then_its_status(make_transport: TransportFactory) -> None:
    sent = [b"%d" % number for number in range(40)]

    async def flood_and_abort(dial: Dial) -> None:
        await dial.send(*sent)
        await dial.abort(grpc.StatusCode.FAILED_PRECONDITION, "not_leader:10.0.0.1:80")

    async with serving(flood_and_abort) as server, opened(make_transport(), server.address) as stream:
        await stream.established()
        batches, closed = await receive_all(stream)
    assert [message for batch in batches for message in batch] == sent
    assert (closed.status.code, closed.status.details) == (StatusCode.FAILED_PRECONDITION, "not_leader:10.0.0.1:80")


# -- backpressure ---------------------------------------------------------------------------------


async def test_a_session_that_does_not_receive_makes_the_scheduler_wait(make_transport: TransportFactory) -> None:
    total = 40
    written = 0

    async def flood(dial: Dial) -> None:
        nonlocal written
        for _ in range(total):
            await dial.send(b"x" * MIB)
            written += 1

    async with serving(flood) as server, opened(make_transport(), server.address) as stream:
        await stream.established()
        await settled(lambda: written)
        assert written < total / 2
        batches, closed = await receive_all(stream)
    assert closed.status.code is StatusCode.OK
    assert sum(len(batch) for batch in batches) == total
    assert max(sum(map(len, batch)) for batch in batches) <= INBOX_BYTES + MIB


async def test_the_number_of_waiting_messages_is_bounded_too(make_transport: TransportFactory) -> None:
    total = 3 * INBOX_MESSAGES

    async def flood(dial: Dial) -> None:
        await dial.send(*[b"x"] * total)

    async with serving(flood) as server, opened(make_transport(), server.address) as stream:
        await stream.established()
        await eventually(server.dials[0].ended.is_set)
        batches, _ = await receive_all(stream)
    assert sum(map(len, batches)) == total
    assert max(map(len, batches)) <= INBOX_MESSAGES


async def test_a_scheduler_that_does_not_read_makes_send_wait_and_the_count_says_how_far_it_came(
    make_transport: TransportFactory,
) -> None:
    refuse = asyncio.Event()

    async def deaf(dial: Dial) -> None:
        await dial.headers()
        await refuse.wait()
        await dial.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too slow")

    async with serving(deaf) as server, opened(make_transport(), server.address) as stream:
        await stream.established()
        sending = asyncio.create_task(stream.send([b"x" * MIB] * 40))
        done, _ = await asyncio.wait([sending], timeout=0.3)
        assert not done
        refuse.set()
        with pytest.raises(StreamClosed) as caught:
            await sending
    assert caught.value.status.code is StatusCode.RESOURCE_EXHAUSTED
    assert 0 <= caught.value.accepted < 40


# -- the end --------------------------------------------------------------------------------------


async def test_the_schedulers_status_survives_a_send_that_is_under_way(make_transport: TransportFactory) -> None:
    async def redirect(dial: Dial) -> None:
        await dial.headers()
        await dial.read()
        await dial.abort(grpc.StatusCode.FAILED_PRECONDITION, "not_leader:10.0.0.1:80")

    async def send_until_closed(stream: Stream) -> StreamClosed:
        while True:
            try:
                await stream.send([b"x" * 1000] * 10)
            except StreamClosed as closed:
                return closed

    transport = make_transport()
    async with serving(redirect) as server:
        for _ in range(25):
            async with opened(transport, server.address) as stream:
                sent, (_, received) = await asyncio.gather(send_until_closed(stream), receive_all(stream))
            assert sent.status == received.status
            assert str(received) == "FAILED_PRECONDITION: not_leader:10.0.0.1:80"
            assert 0 <= sent.accepted < 10


async def test_a_send_finds_the_end_behind_messages_that_nobody_receives(make_transport: TransportFactory) -> None:
    """A session that waits for room does not receive; its sends must not wait for what only receiving would bring."""

    async def flood_and_refuse(dial: Dial) -> None:
        await dial.send(*[b"x"] * (3 * INBOX_MESSAGES))
        await dial.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "enough")

    async def send_on(stream: Stream) -> None:
        while True:
            await stream.send([b"y"])

    async with serving(flood_and_refuse) as server, opened(make_transport(), server.address) as stream:
        await stream.established()
        await eventually(server.dials[0].ended.is_set)
        with pytest.raises(StreamClosed) as caught:
            await asyncio.wait_for(send_on(stream), 10)
        batches, closed = await receive_all(stream)
    assert caught.value.status == closed.status
    assert closed.status.code is StatusCode.RESOURCE_EXHAUSTED
    assert sum(map(len, batches)) == 3 * INBOX_MESSAGES


async def test_send_after_the_end_accepts_nothing(make_transport: TransportFactory) -> None:
    async def refuse(dial: Dial) -> None:
        await dial.read()
        await dial.abort(grpc.StatusCode.UNAUTHENTICATED, "who?")

    async with serving(refuse) as server, opened(make_transport(), server.address) as stream:
        await stream.send([b"hello"])
        _, closed = await receive_all(stream)
        assert closed.status.code is StatusCode.UNAUTHENTICATED
        for _ in range(2):
            with pytest.raises(StreamClosed) as caught:
                await stream.send([b"x"])
            assert (caught.value.status, caught.value.accepted) == (closed.status, 0)
            with pytest.raises(StreamClosed):
                await stream.receive()


async def test_a_server_that_is_gone_ends_the_stream(make_transport: TransportFactory) -> None:
    async with serving(hold) as server, opened(make_transport(), server.address) as stream:
        await stream.established()
        await server.stop()
        _, closed = await receive_all(stream)
    assert closed.status.code in {StatusCode.UNAVAILABLE, StatusCode.CANCELLED, StatusCode.UNKNOWN}


async def test_established_waits_for_headers(make_transport: TransportFactory) -> None:
    answer = asyncio.Event()

    async def late(dial: Dial) -> None:
        await answer.wait()
        await dial.headers()
        await dial.read_all()

    async with serving(late) as server, opened(make_transport(), server.address) as stream:
        waiting = asyncio.create_task(stream.established())
        await stream.send([b"hello"])
        await eventually(lambda: server.dials)
        assert not waiting.done()
        answer.set()
        await waiting


async def test_established_returns_for_a_message_and_leaves_it_to_receive(make_transport: TransportFactory) -> None:
    async def greet(dial: Dial) -> None:
        await dial.send(b"hello")
        await dial.read_all()

    async with serving(greet) as server, opened(make_transport(), server.address) as stream:
        await stream.established()
        assert list(await stream.receive()) == [b"hello"]


async def test_a_refusal_of_the_dial_keeps_its_status(make_transport: TransportFactory) -> None:
    """Whether it comes out of `open`, or of the stream when that was quicker."""

    async def refuse(dial: Dial) -> None:
        await dial.abort(grpc.StatusCode.FAILED_PRECONDITION, "not_leader:10.0.0.1:80")

    transport = make_transport()
    async with serving(refuse) as server:
        for _ in range(10):
            with pytest.raises(StreamClosed) as caught:
                async with opened(transport, server.address) as stream:
                    await stream.established()
            assert str(caught.value) == "FAILED_PRECONDITION: not_leader:10.0.0.1:80"


async def test_established_raises_when_the_stream_ends_before(make_transport: TransportFactory) -> None:
    async def refuse(dial: Dial) -> None:
        await dial.read()
        await dial.abort(grpc.StatusCode.PERMISSION_DENIED, "no")

    async with serving(refuse) as server, opened(make_transport(), server.address) as stream:
        await stream.send([b"hello"])
        with pytest.raises(StreamClosed) as caught:
            await stream.established()
    assert str(caught.value) == "PERMISSION_DENIED: no"


# -- close ----------------------------------------------------------------------------------------


async def test_close_ends_what_waits_and_may_be_called_again(make_transport: TransportFactory) -> None:
    async def deaf(dial: Dial) -> None:
        await dial.headers()
        await asyncio.Event().wait()

    async with serving(deaf) as server:
        stream = await make_transport().open(server.address, ())
        await stream.established()
        sending = asyncio.create_task(stream.send([b"x" * MIB] * 40))
        receiving = asyncio.create_task(stream.receive())
        await settled(sending.done, quiet_s=0.05)
        await stream.close()
        for task in (sending, receiving):
            with pytest.raises(StreamClosed) as caught:
                await task
            assert caught.value.status.code is StatusCode.CANCELLED
        await stream.close()
        await eventually(server.dials[0].ended.is_set)
        assert not server.dials[0].half_closed


async def test_close_while_the_inbox_is_full(make_transport: TransportFactory) -> None:
    async def flood(dial: Dial) -> None:
        await dial.send(*[b"x" * MIB] * 40)

    async with serving(flood) as server:
        stream = await make_transport().open(server.address, ())
        await stream.established()
        await settled(lambda: len(asyncio.all_tasks()))
        async with asyncio.timeout(5):
            await stream.close()


async def test_close_with_grace_lets_the_scheduler_read_all_and_end_the_stream(
    make_transport: TransportFactory,
) -> None:
    async def answer_last(dial: Dial) -> None:
        await dial.read_all()
        await dial.send(b"bye")

    async with serving(answer_last) as server:
        stream = await make_transport().open(server.address, ())
        await stream.send([b"1", b"2", b"3"])
        receiving = asyncio.create_task(receive_all(stream))
        await stream.close(grace_s=10)
        batches, closed = await receiving
        assert batches == [[b"bye"]]
        assert closed.status.code is StatusCode.OK
        assert server.dials[0].half_closed
        assert server.dials[0].received == [b"1", b"2", b"3"]


async def test_close_with_grace_does_not_wait_longer(make_transport: TransportFactory) -> None:
    async def deaf(dial: Dial) -> None:
        await dial.headers()
        await asyncio.Event().wait()

    async with serving(deaf) as server:
        stream = await make_transport().open(server.address, ())
        await stream.established()
        async with asyncio.timeout(5):
            await stream.close(grace_s=0.05)


async def test_a_canceled_send_ends_the_stream(make_transport: TransportFactory) -> None:
    async def deaf(dial: Dial) -> None:
        await dial.headers()
        await asyncio.Event().wait()

    async with serving(deaf) as server, opened(make_transport(), server.address) as stream:
        await stream.established()
        sending = asyncio.create_task(stream.send([b"x" * MIB] * 40))
        await settled(sending.done, quiet_s=0.05)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        with pytest.raises(StreamClosed):
            await stream.receive()


async def test_streams_leave_no_descriptors_behind(make_transport: TransportFactory) -> None:
    def descriptors() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    transport = make_transport()
    async with serving(hold) as server:
        async with opened(transport, server.address) as stream:
            await stream.established()
        await eventually(server.dials[0].ended.is_set)
        before = descriptors()
        for _ in range(10):
            async with opened(transport, server.address) as stream:
                await stream.established()
        await eventually(lambda: descriptors() <= before)


# -- connecting -----------------------------------------------------------------------------------


async def test_a_refused_connection_says_so(make_transport: TransportFactory, unused_tcp_port: int) -> None:
    with pytest.raises(StreamClosed) as caught:
        await make_transport().open(f"127.0.0.1:{unused_tcp_port}", ())
    assert caught.value.status.code is StatusCode.UNAVAILABLE
    assert "refused" in caught.value.status.details


async def test_a_server_that_comes_up_is_reached_by_the_next_dial(
    make_transport: TransportFactory, unused_tcp_port: int
) -> None:
    transport = make_transport()
    address = f"127.0.0.1:{unused_tcp_port}"
    for _ in range(3):
        with pytest.raises(StreamClosed):
            await transport.open(address, ())
    async with serving(hold) as other:
        await other.stop()
        await other.start(address)
        async with asyncio.timeout(2), opened(transport, address) as stream:
            await stream.established()


@contextlib.asynccontextmanager
async def tcp_peer(first_bytes: bytes) -> AsyncIterator[str]:
    """A TCP server that sends `first_bytes` and then nothing."""
    writers: list[asyncio.StreamWriter] = []

    async def accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        writer.write(first_bytes)
        with contextlib.suppress(ConnectionError):
            await writer.drain()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"{host}:{port}"
    finally:
        server.close()
        for writer in writers:
            writer.close()


async def test_a_peer_that_accepts_and_says_nothing_is_noticed(make_transport: TransportFactory) -> None:
    async with tcp_peer(b"") as address:
        with pytest.raises(StreamClosed) as caught:
            await make_transport(connect_timeout_s=0.1).open(address, ())
    assert caught.value.status.code is StatusCode.UNAVAILABLE
    assert caught.value.status.details == f"{address} did not answer, or spoke no HTTP/2, within 0.1 s"


async def test_a_peer_that_speaks_something_else_is_noticed(make_transport: TransportFactory) -> None:
    async with tcp_peer(b"HTTP/1.1 400 Bad Request\r\n\r\n") as address:
        with pytest.raises(StreamClosed) as caught:
            await make_transport().open(address, ())
    assert caught.value.status.code is StatusCode.UNAVAILABLE


async def test_canceling_open_leaves_nothing_behind(make_transport: TransportFactory) -> None:
    async with tcp_peer(b"") as address:
        opening = asyncio.create_task(make_transport().open(address, ()))
        await settled(opening.done, quiet_s=0.05)
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening


# -- TLS ------------------------------------------------------------------------------------------


class Pki:
    """A CA, a server's and a client's certificate, and their files."""

    def __init__(self, directory: Path) -> None:
        self.ca = trustme.CA()
        self.server = self.ca.issue_cert("127.0.0.1")
        client = self.ca.issue_cert("worker@example.org")
        self.ca_file = str(directory / "ca.pem")
        self.cert_file = str(directory / "cert.pem")
        self.key_file = str(directory / "key.pem")
        self.ca.cert_pem.write_to_path(self.ca_file)
        client.cert_chain_pems[0].write_to_path(self.cert_file)
        client.private_key_pem.write_to_path(self.key_file)

    def credentials(self, *, mutual: bool, host: str = "") -> grpc.ServerCredentials:
        certificate = self.ca.issue_cert(host) if host else self.server
        chain = b"".join(pem.bytes() for pem in certificate.cert_chain_pems)
        return grpc.ssl_server_credentials(
            [(certificate.private_key_pem.bytes(), chain)],
            root_certificates=self.ca.cert_pem.bytes() if mutual else None,
            require_client_auth=mutual,
        )


@pytest.fixture
def pki(tmp_path: Path) -> Pki:
    return Pki(tmp_path)


async def test_tls_with_a_private_ca(make_transport: TransportFactory, pki: Pki) -> None:
    transport = make_transport(TlsFiles(ca_file=pki.ca_file))
    async with serving(echo, pki.credentials(mutual=False)) as server, opened(transport, server.address) as stream:
        await stream.send([b"secret"])
        assert list(await stream.receive()) == [b"secret"]


async def test_mutual_tls(make_transport: TransportFactory, pki: Pki) -> None:
    files = TlsFiles(pki.ca_file, pki.cert_file, pki.key_file)
    async with serving(echo, pki.credentials(mutual=True)) as server:
        async with opened(make_transport(files), server.address) as stream:
            await stream.send([b"secret"])
            assert list(await stream.receive()) == [b"secret"]
        with pytest.raises(StreamClosed) as caught:  # with no client certificate
            async with opened(make_transport(TlsFiles(ca_file=pki.ca_file)), server.address) as stream:
                await stream.established()
        assert caught.value.status.code is StatusCode.UNAVAILABLE


async def test_a_certificate_of_another_ca_is_refused(
    make_transport: TransportFactory, pki: Pki, tmp_path: Path
) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    async with serving(echo, pki.credentials(mutual=False)) as server:
        for files in (TlsFiles(ca_file=str(other)), TlsFiles()):
            with pytest.raises(StreamClosed) as caught:
                await make_transport(files).open(server.address, ())
            assert caught.value.status.code is StatusCode.UNAVAILABLE


async def test_a_plain_dial_of_a_tls_server_fails(make_transport: TransportFactory, pki: Pki) -> None:
    async with serving(echo, pki.credentials(mutual=False)) as server:
        with pytest.raises(StreamClosed) as caught:
            await make_transport(connect_timeout_s=2).open(server.address, ())
    assert caught.value.status.code is StatusCode.UNAVAILABLE


@pytest.fixture(params=["ca_file", "cert_file", "key_file"])
def broken_file(request: pytest.FixtureRequest, pki: Pki) -> Path:
    path = Path(getattr(pki, request.param))
    path.write_bytes(b"not a PEM file")
    return path


async def test_a_tls_file_that_is_no_pem_file_is_named(
    make_transport: TransportFactory, pki: Pki, broken_file: Path
) -> None:
    with pytest.raises(StreamClosed) as caught:
        await make_transport(TlsFiles(pki.ca_file, pki.cert_file, pki.key_file)).open("127.0.0.1:1", ())
    assert caught.value.status.code is StatusCode.UNAVAILABLE
    assert str(broken_file) in caught.value.status.details


async def test_a_missing_tls_file_is_named(make_transport: TransportFactory, tmp_path: Path) -> None:
    missing = tmp_path / "missing.pem"
    with pytest.raises(StreamClosed) as caught:
        await make_transport(TlsFiles(ca_file=str(missing))).open("127.0.0.1:1", ())
    assert caught.value.status.code is StatusCode.UNAVAILABLE
    assert str(missing) in caught.value.status.details


@pytest.mark.parametrize("trouble", ["other name", "other ca", "no client certificate", "plain server", "plain dial"])
async def test_tls_that_fails_comes_with_a_hint(
    make_transport: TransportFactory, pki: Pki, tmp_path: Path, trouble: str
) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(str(other))
    credentials = pki.credentials(
        mutual=trouble == "no client certificate", host="127.0.0.2" if trouble == "other name" else ""
    )
    files = TlsFiles(ca_file=str(other) if trouble == "other ca" else pki.ca_file)
    async with serving(hold, None if trouble == "plain server" else credentials) as server:
        with pytest.raises(StreamClosed) as caught:
            await dialed_and_answered(make_transport(None if trouble == "plain dial" else files), server.address)
    assert hint(caught.value.status.details), caught.value.status.details
    assert ("host in SCHEDULER_ADDR" in hint(caught.value.status.details)) is (trouble == "other name")


# -- what an end leaves unread --------------------------------------------------------------------


async def test_a_scheduler_that_reads_leaves_only_the_last_moment_unread(make_transport: TransportFactory) -> None:
    async def until_told(dial: Dial) -> None:
        await dial.headers()
        while await dial.read() != b"end":
            pass
        await dial.abort(grpc.StatusCode.UNAVAILABLE, "leaving")

    async with serving(until_told) as server, opened(make_transport(), server.address) as stream:
        await stream.established()
        for _ in range(20):
            await stream.send([b"x" * 100])
            await asyncio.sleep(0.02)
        asked = time.monotonic()
        await stream.send([b"end"])
        await receive_all(stream)
        await stream.close()
        unread = stream.unread()
        assert not unread.saturated
        assert asked - ROUND_TRIP_MAX_S < unread.since < time.monotonic()


async def test_a_scheduler_that_does_not_read_leaves_its_windows_unread(make_transport: TransportFactory) -> None:
    sent = 0

    async def flood(stream: Stream) -> None:
        nonlocal sent
        while True:
            await stream.send([b"x" * 10_000])
            sent += 1

    async def deaf(dial: Dial) -> None:
        await dial.headers()
        await asyncio.Event().wait()

    async with serving(deaf) as server, opened(make_transport(), server.address) as stream:
        await stream.established()
        flooding = asyncio.create_task(flood(stream))
        await settled(lambda: sent, quiet_s=0.3)
        await stream.close()
        with pytest.raises(StreamClosed):
            await flooding
        unread = stream.unread()
        assert unread.saturated
        assert unread.size is None or unread.size >= sent * 10_005
