"""The h2 transport frame by frame: what no good server can be made to send, and what exactly it sends itself."""

from __future__ import annotations

import asyncio
import logging
import struct

import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes
from hyperframe.frame import DataFrame, GoAwayFrame, HeadersFrame, PingFrame, RstStreamFrame, WindowUpdateFrame

from gen_worker.wire import MESSAGE_LIMIT_BYTES, METHOD
from gen_worker.wire import worker_scheduler_pb2 as pb
from supervisor.input_arena import InputArena
from supervisor.transport import StatusCode, Stream, StreamClosed, StreamStatus
from supervisor.transport.h2.dial import H2Transport
from supervisor.transport.h2.inbox import INBOX_BYTES
from supervisor.transport.h2.stream import FRAME_BYTES, WINDOW_BYTES
from supervisor.transport.messages import PREFIX_BYTES, Joined, Message
from tests.support.http2_peer import (
    ANSWER,
    OK,
    Peer,
    call,
    data,
    goaway,
    listening,
    packed,
    ping,
    reset,
    settings,
    window,
)
from tests.support.seam import plain
from tests.support.stream_server import Dial, eventually, serving, settled

DEFAULT_WINDOW = 65_535


async def hold(dial: Dial) -> None:
    await dial.headers()
    await dial.read_all()


async def until_end(stream: Stream) -> tuple[list[bytes], StreamStatus]:
    """All messages, and how the stream ended."""
    messages: list[bytes] = []
    async with asyncio.timeout(10):
        while True:
            try:
                messages += plain(await stream.receive())
            except StreamClosed as closed:
                return messages, closed.status


async def ending(peer: Peer, stream: Stream, *frames: object) -> StreamStatus:
    """The status of a stream to which these frames are sent."""
    peer.send(*frames)  # type: ignore[arg-type]
    _, status = await until_end(stream)
    return status


# -- the call -------------------------------------------------------------------------------------


async def test_the_headers_are_those_of_grpc() -> None:
    async with call() as (_, peer):
        request = dict(peer.request)
        assert list(request)[:4] == [":method", ":scheme", ":path", ":authority"]
        assert (request[":method"], request[":scheme"], request[":path"]) == ("POST", "http", METHOD)
        assert request[":authority"].startswith("127.0.0.1:")
        assert (request["te"], request["content-type"]) == ("trailers", "application/grpc")
        assert request["user-agent"].startswith("gen-worker/")
        assert request["authorization"] == "Bearer abc"


async def test_the_token_is_not_logged(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with call() as (_, peer):
        assert dict(peer.request)["authorization"] == "Bearer abc"
    assert not [record for record in caplog.records if record.name.startswith(("h2", "hpack"))]
    assert "abc" not in caplog.text


# -- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [1, 2, 4, 5, 6, 7, 1000])
async def test_messages_are_split_anywhere_over_frames(step: int) -> None:
    sent = [b"", b"a", b"bcdefg", b"", b"h" * 300]
    whole = packed(*sent)
    async with call() as (stream, peer):
        peer.send(*(data(whole[start : start + step], pad=start % 3) for start in range(0, len(whole), step)))
        peer.send(peer.headers(OK, end=True))
        messages, status = await until_end(stream)
    assert messages == sent
    assert status.code is StatusCode.OK


async def test_a_compressed_message_is_refused_after_those_before_it() -> None:
    async with call() as (stream, peer):
        peer.send(data(packed(b"one") + b"\x01\x00\x00\x00\x03two" + packed(b"three")))
        messages, status = await until_end(stream)
        await eventually(lambda: peer.of(RstStreamFrame))
        assert peer.of(RstStreamFrame)[0].error_code == ErrorCodes.CANCEL
    assert messages == [b"one"]
    assert (status.code, "compressed" in status.details) == (StatusCode.INTERNAL, True)


async def test_a_message_that_is_too_large_is_refused_by_its_prefix() -> None:
    async with call() as (stream, peer):
        status = await ending(peer, stream, data(struct.pack(">BL", 0, MESSAGE_LIMIT_BYTES + 1)))
    assert status.code is StatusCode.RESOURCE_EXHAUSTED
    assert f"{MESSAGE_LIMIT_BYTES + 1} bytes" in status.details


async def test_a_message_that_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervisor.transport.h2.stream.MESSAGE_LIMIT_BYTES", 10)
    async with call() as (stream, peer):
        with pytest.raises(StreamClosed) as caught:
            await stream.send([b"small", b"l" * 11, b"after"])
        await eventually(lambda: peer.received == packed(b"small"))
    assert (caught.value.status.code, caught.value.accepted) == (StatusCode.RESOURCE_EXHAUSTED, 1)


# -- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "code", "details"),
    [
        ({**ANSWER, "grpc-status": "9", "grpc-message": "not_leader:10.0.0.1:80"}, 9, "not_leader:10.0.0.1:80"),
        ({**ANSWER, "grpc-status": "16", "grpc-message": "schl%C3%BCssel%20100%25 %zz"}, 16, "schlüssel 100% %zz"),
        ({**ANSWER, "grpc-status": "0"}, 0, ""),
        ({**ANSWER, "grpc-status": "99", "grpc-message": "odd"}, 2, "grpc-status 99 is none of gRPC's; odd"),
        ({**ANSWER, "grpc-status": "nine"}, 2, "grpc-status nine is none of gRPC's"),
        ({":status": "503", "grpc-status": "8"}, 8, ""),
        ({":status": "503", "content-type": "text/html"}, 14, "HTTP status 503"),
        ({":status": "404"}, 12, "HTTP status 404"),
        ({":status": "401"}, 16, "HTTP status 401"),
        ({":status": "418"}, 2, "HTTP status 418"),
        ({":status": "200", "content-type": "text/html"}, 2, "content-type text/html"),
        (ANSWER, 2, "without a status"),
    ],
)
async def test_an_answer_of_headers_alone(fields: dict[str, str], code: int, details: str) -> None:
    async with call(answered=False) as (stream, peer):
        peer.send(peer.headers(fields, end=True))
        with pytest.raises(StreamClosed) as caught:
            await stream.established()
    assert caught.value.status.code == code
    assert details in caught.value.status.details


async def test_an_answer_that_is_no_grpc_ends_the_call_before_its_body() -> None:
    async with call(answered=False) as (stream, peer):
        peer.send(peer.headers({":status": "200", "content-type": "text/html"}), data(b"<html>" * 100))
        messages, status = await until_end(stream)
        await eventually(lambda: peer.of(RstStreamFrame))
    assert messages == []
    assert status.code is StatusCode.UNKNOWN


async def test_informational_answers_come_before_the_real_one() -> None:
    async with call(answered=False) as (stream, peer):
        peer.send(peer.headers({":status": "103"}), peer.headers(ANSWER), data(packed(b"hello")))
        await stream.established()
        assert list(await stream.receive()) == [b"hello"]


@pytest.mark.parametrize("trailers", [None, {"x-other": "1"}])
async def test_an_end_without_a_status(trailers: dict[str, str] | None) -> None:
    async with call() as (stream, peer):
        last = data(b"", end=True) if trailers is None else peer.headers(trailers, end=True)
        status = await ending(peer, stream, data(packed(b"x")), last)
    assert (status.code, "without a status" in status.details) == (StatusCode.UNKNOWN, True)


async def test_an_end_amid_a_message() -> None:
    async with call() as (stream, peer):
        status = await ending(peer, stream, data(packed(b"whole", b"cut")[:-1]), peer.headers(OK, end=True))
    assert (status.code, "amid a message" in status.details) == (StatusCode.INTERNAL, True)


@pytest.mark.parametrize(
    ("reset_code", "code"),
    [
        (ErrorCodes.NO_ERROR, StatusCode.INTERNAL),
        (ErrorCodes.PROTOCOL_ERROR, StatusCode.INTERNAL),
        (ErrorCodes.REFUSED_STREAM, StatusCode.UNAVAILABLE),
        (ErrorCodes.CANCEL, StatusCode.CANCELLED),
        (ErrorCodes.ENHANCE_YOUR_CALM, StatusCode.RESOURCE_EXHAUSTED),
        (ErrorCodes.INADEQUATE_SECURITY, StatusCode.PERMISSION_DENIED),
        (4711, StatusCode.INTERNAL),
    ],
)
async def test_a_reset_ends_the_stream_behind_what_came(reset_code: int, code: StatusCode) -> None:
    async with call() as (stream, peer):
        peer.send(data(packed(b"one", b"two")), reset(reset_code))
        messages, status = await until_end(stream)
        with pytest.raises(StreamClosed) as caught:
            await stream.send([b"x"])
    assert messages == [b"one", b"two"]
    assert status.code is code
    assert (caught.value.status, caught.value.accepted) == (status, 0)


async def test_a_graceful_goaway_lets_the_call_go_on() -> None:
    async with call() as (stream, peer):
        peer.send(goaway(2**31 - 1, 0, b"max_age"), goaway(1, 0, b"max_age"), data(packed(b"still here")))
        assert list(await stream.receive()) == [b"still here"]
        await stream.send([b"so am I"])
        await eventually(lambda: peer.received == packed(b"so am I"))
        peer.writer.close()
        _, status = await until_end(stream)
    assert status.code is StatusCode.UNAVAILABLE
    assert status.details.endswith("left: GOAWAY NO_ERROR (max_age)")


async def test_a_goaway_that_did_not_take_the_call_ends_it() -> None:
    async with call(answered=False) as (stream, peer):
        status = await ending(peer, stream, goaway(0, ErrorCodes.ENHANCE_YOUR_CALM, b"too_many_pings"))
    assert status.code is StatusCode.UNAVAILABLE
    assert "GOAWAY ENHANCE_YOUR_CALM (too_many_pings)" in status.details


async def test_a_connection_that_is_lost() -> None:
    async with call() as (stream, peer):
        peer.send(data(packed(b"last")))
        peer.writer.close()
        messages, status = await until_end(stream)
    assert messages == [b"last"]
    assert (status.code, "closed the connection" in status.details) == (StatusCode.UNAVAILABLE, True)


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x7f" * 100,
        struct.pack(">LBL", FRAME_BYTES + 1 << 8, 0, 1)[:9],
        DataFrame(2, b"nobody's").serialize(),
        HeadersFrame(1, data=b"\xff\xff\xff\xff", flags=["END_HEADERS"]).serialize(),
        WindowUpdateFrame(0, window_increment=2**31 - 1).serialize(),
    ],
    ids=["noise", "overlong", "no stream", "hpack", "window"],
)
async def test_garbage_ends_the_connection_behind_what_came_before(garbage: bytes) -> None:
    async with call() as (stream, peer):
        peer.send(data(packed(b"before")), garbage)
        messages, status = await until_end(stream)
        await eventually(lambda: peer.closed)
    assert messages == [b"before"]
    assert status.code is StatusCode.INTERNAL
    assert "broke HTTP/2" in status.details


async def test_a_peer_of_another_kind_is_known_by_its_first_bytes() -> None:
    async with listening(b"HTTP/1.1 400 Bad Request\r\n\r\n") as (address, _):
        with pytest.raises(StreamClosed) as caught:
            await H2Transport(connect_timeout_s=60).open(address, ())
    assert caught.value.status.code is StatusCode.UNAVAILABLE
    assert "speaks no HTTP/2" in caught.value.status.details


async def test_a_name_that_is_none() -> None:
    with pytest.raises(StreamClosed) as caught:
        await H2Transport().open("no-such-host.invalid:80", ())
    assert caught.value.status.code is StatusCode.UNAVAILABLE
    assert "no-such-host.invalid:80 can't be resolved" in caught.value.status.details


async def test_close_says_goodbye() -> None:
    async with call() as (stream, peer):
        await stream.close()
        await eventually(lambda: peer.closed)
        assert peer.of(RstStreamFrame)[0].error_code == ErrorCodes.CANCEL
        assert peer.of(GoAwayFrame)[0].error_code == ErrorCodes.NO_ERROR


# -- flow control ---------------------------------------------------------------------------------


@pytest.mark.parametrize("joined", [1, 3, 99], ids="joined by {}".format)
async def test_what_the_windows_let_go_is_what_is_accepted(joined: int) -> None:
    message = b"m" * (1000 - PREFIX_BYTES)
    messages: list[Message] = [message] * 100
    if joined > 1:
        messages = [message, *[Joined.of([message] * joined)] * (99 // joined), *[message] * (99 % joined)]
    async with call() as (stream, peer):
        sending = asyncio.create_task(stream.send(messages))
        await eventually(lambda: len(peer.received) == DEFAULT_WINDOW)
        peer.send(window(3000))  # the connection's window is as small
        await settled(lambda: len(peer.received), quiet_s=0.05)
        assert len(peer.received) == DEFAULT_WINDOW
        peer.send(window(2000, stream=0))
        await eventually(lambda: len(peer.received) == DEFAULT_WINDOW + 2000)
        assert not sending.done()
        peer.send(peer.headers({"grpc-status": "8", "grpc-message": "enough"}, end=True))
        with pytest.raises(StreamClosed) as caught:
            await sending
        assert caught.value.accepted == len(peer.received) // 1000 == 67
        assert caught.value.status == StreamStatus(StatusCode.RESOURCE_EXHAUSTED, "enough")


async def test_settings_may_change_amid_a_stream() -> None:
    big = 2**20
    async with call(settings({SettingCodes.INITIAL_WINDOW_SIZE: 0}).serialize()) as (stream, peer):
        sending = asyncio.create_task(stream.send([b"x" * 100_000]))
        await settled(lambda: peer.received, quiet_s=0.05)
        assert not peer.received
        peer.send(settings({SettingCodes.INITIAL_WINDOW_SIZE: 50_000}))
        await eventually(lambda: len(peer.received) == 50_000)
        assert max(len(frame.data) for frame in peer.of(DataFrame)) == 16_384
        peer.send(settings({SettingCodes.INITIAL_WINDOW_SIZE: 10_000}))  # what is out is more than that
        peer.send(window(2**24, 0), settings({SettingCodes.MAX_FRAME_SIZE: big, SettingCodes.INITIAL_WINDOW_SIZE: big}))
        await sending
        await eventually(lambda: len(peer.received) == 100_000 + PREFIX_BYTES)
        assert len(peer.of(DataFrame)[-1].data) == 50_000 + PREFIX_BYTES


async def test_received_data_is_acknowledged_when_the_session_took_it() -> None:
    def updates(peer: Peer) -> dict[int, int]:
        found: dict[int, int] = {0: 0, 1: 0}
        for frame in peer.of(WindowUpdateFrame):
            found[frame.stream_id] += frame.window_increment
        return found

    async with call() as (stream, peer):
        at_first = {0: WINDOW_BYTES - DEFAULT_WINDOW, 1: 0}
        assert updates(peer) == at_first
        body = packed(b"x" * 1000) * (WINDOW_BYTES // 1005)
        peer.send(*(data(body[start : start + FRAME_BYTES]) for start in range(0, len(body), FRAME_BYTES)))
        peer.send(ping())
        await eventually(lambda: peer.of(PingFrame))  # so all of it is there
        assert updates(peer) == at_first
        received = await stream.receive()
        assert sum(len(message) for message in received) <= INBOX_BYTES
        while len(received) < WINDOW_BYTES // 1005:
            received = [*received, *await stream.receive()]
        await eventually(lambda: updates(peer)[1] > WINDOW_BYTES // 2)
        assert updates(peer)[0] - at_first[0] == updates(peer)[1] <= len(body)


@pytest.mark.parametrize("end", ["reset", "goaway", "close", "us"])
async def test_a_large_request_whose_rest_never_comes_frees_its_memory(end: str) -> None:
    arena = InputArena()
    request = pb.TaskExecutionRequest(run_id="r", function_name="f", input_payload=b"x" * 2 * 2**20)
    body = packed(pb.WorkerSchedulerMessage(run_request=request).SerializeToString())
    async with call(transport=H2Transport(arena=arena)) as (stream, peer):
        peer.send(*(data(body[start : start + FRAME_BYTES]) for start in range(0, 2**20, FRAME_BYTES)))
        await eventually(lambda: arena.writer._used)
        if end == "reset":
            peer.send(reset(ErrorCodes.CANCEL))
        elif end == "goaway":
            peer.send(goaway(0, words=b"bye"))
        elif end == "close":
            peer.writer.close()
        else:
            await stream.close()
        messages, _ = await until_end(stream)
        assert messages == []
        assert not arena.writer._used
    arena.close()


async def test_a_message_larger_than_the_window_comes_through() -> None:
    size = 3 * WINDOW_BYTES
    async with call() as (stream, peer):
        body, sent = packed(b"y" * size), 0
        while sent < len(body):
            if sent == WINDOW_BYTES + peer.room():
                await asyncio.sleep(0.001)
                continue
            part = body[sent : min(sent + FRAME_BYTES, WINDOW_BYTES + peer.room())]
            peer.send(data(part))
            sent += len(part)
        assert [len(message) for message in await stream.receive()] == [size]


# -- keepalive ------------------------------------------------------------------------------------


async def test_pings_are_answered() -> None:
    async with call() as (_, peer):
        peer.send(ping())
        await eventually(lambda: peer.of(PingFrame))
        (answer,) = peer.of(PingFrame)
        assert (answer.opaque_data, set(answer.flags)) == (b"12345678", {"ACK"})


async def test_an_idle_stream_is_not_pinged_to_death() -> None:
    """A server with gRPC's defaults ends a connection for that; messages in between make good for it."""
    transport = H2Transport(keepalive_s=0.02, keepalive_timeout_s=0.02)
    async with serving(hold) as server:
        stream = await transport.open(server.address, ())
        await stream.established()
        await asyncio.sleep(0.5)
        for _ in range(10):
            await stream.send([b"a heartbeat"])
            await asyncio.sleep(0.05)
        await eventually(lambda: len(server.dials[0].received) == 10)
        await stream.close()
        assert stream._last_status().details == "closed by this worker"


async def test_a_peer_that_is_gone_without_a_word_is_noticed() -> None:
    transport = H2Transport(keepalive_s=0.05, keepalive_timeout_s=0.2)
    async with call(transport=transport) as (stream, peer):
        for _ in range(2):
            await eventually(lambda: peer.of(PingFrame))
            peer.frames.clear()
            peer.send(ping(ack=True))
            await stream.send([b"a heartbeat"])
        _, status = await until_end(stream)
    assert status.code is StatusCode.UNAVAILABLE
    assert "did not answer a ping within 0.2 s" in status.details
