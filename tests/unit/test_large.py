"""Large messages: taken apart as protobuf understands them wherever they are cut, and put together again when sent."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from gen_worker.pipe.arena import BLOB_THRESHOLD_BYTES, ArenaError, ArenaReader, ArenaWriter, create_arena
from gen_worker.wire import worker_scheduler_pb2 as pb
from supervisor.held_output import HeldOutput, LargeResult
from supervisor.input_arena import GIVE_BACK_BYTES, Input, InputArena
from supervisor.transport import large
from supervisor.transport.h2.inbox import Inbox
from supervisor.transport.large import PIECE_BYTES, LargeRequest, Splitter
from supervisor.transport.messages import in_one_piece, prefix
from supervisor.wire_codec import encode_result, encode_result_head, varint

SMALL = 64
"""Stands for LARGE_BYTES here, so that many messages can be tried."""


@pytest.fixture
def arena() -> Iterator[InputArena]:
    arena = InputArena()
    yield arena
    arena.close()


@pytest.fixture(scope="module")
def small() -> Iterator[InputArena]:
    """Where a payload of a few bytes is a large one."""
    arena, before = InputArena(), (large.LARGE_BYTES, large.HEAD_BYTES)
    large.LARGE_BYTES, large.HEAD_BYTES = SMALL, 1000  # type: ignore[misc]
    yield arena
    large.LARGE_BYTES, large.HEAD_BYTES = before  # type: ignore[misc]
    arena.close()


def split(raw: bytes, cuts: list[int], arena: InputArena) -> bytes | LargeRequest:
    splitter, edges = Splitter(len(raw), arena), sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    for start, end in pairwise(edges):
        splitter.feed(raw[start:end])
    return splitter.message()


def parsed(data: bytes) -> pb.WorkerSchedulerMessage | None:
    try:
        return pb.WorkerSchedulerMessage.FromString(data)
    except DecodeError:
        return None


def meant(message: bytes | LargeRequest) -> pb.WorkerSchedulerMessage | None:
    """What the worker makes of it."""
    if isinstance(message, bytes):
        return parsed(message)
    decoded = parsed(message.head)
    if decoded is not None:
        decoded.run_request.input_payload = message.payload.read()
    return decoded


def blocks(arena: InputArena) -> int:
    return len(arena.writer._used)


# -- taken apart ----------------------------------------------------------------------------------

numbers = st.integers(1, 40)
payloads = st.binary(min_size=SMALL - 4, max_size=3 * SMALL)


def field(number: int, kind: int, value: bytes) -> bytes:
    return varint(number << 3 | kind) + value


def sized(value: bytes) -> bytes:
    return varint(len(value)) + value


texts = st.text(max_size=12).map(lambda text: sized(text.encode()))
fields = st.one_of(
    st.builds(field, st.sampled_from([1, 2, 4, 6, 7, 8, 9]), st.just(2), texts),
    st.builds(field, st.just(5), st.just(0), st.integers(0, 2**63 - 1).map(varint)),
    st.builds(field, numbers.map(lambda number: number + 20), st.just(2), st.binary(max_size=80).map(sized)),
    st.builds(field, numbers.map(lambda number: number + 20), st.just(0), st.integers(0, 2**64 - 1).map(varint)),
    st.builds(field, numbers.map(lambda number: number + 20), st.just(1), st.binary(min_size=8, max_size=8)),
    st.builds(field, numbers.map(lambda number: number + 20), st.just(5), st.binary(min_size=4, max_size=4)),
    st.just(field(30, 3, b"") + field(3, 2, sized(b"x" * SMALL)) + field(30, 4, b"")),  # a group
    st.just(b"\x9a\x00" + sized(b"padded tag" * 10)),
)
payload_fields = st.builds(field, st.just(3), st.just(2), payloads.map(sized))
requests = st.lists(st.one_of(fields, fields, payload_fields), max_size=6).map(b"".join)
others = st.sampled_from(
    [b"", field(13, 2, sized(field(1, 2, sized(b"run")))), field(50, 0, b"\x01"), field(50, 2, sized(b"y" * 70))]
)
wires = st.one_of(
    requests.map(lambda request: field(10, 2, sized(request))),
    st.tuples(others, requests.map(lambda request: field(10, 2, sized(request))), others).map(b"".join),
    st.lists(requests.map(lambda request: field(10, 2, sized(request))), max_size=3).map(b"".join),
)


@given(raw=wires, cuts=st.lists(st.integers(0, 2000), max_size=6))
def test_it_means_what_protobuf_says(small: InputArena, raw: bytes, cuts: list[int]) -> None:
    assert meant(split(raw, cuts, small)) == parsed(raw)
    assert not blocks(small)


@given(raw=wires.filter(bool), cuts=st.lists(st.integers(0, 2000), max_size=4), data=st.data())
def test_so_does_what_is_broken(small: InputArena, raw: bytes, cuts: list[int], data: st.DataObject) -> None:
    broken = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        broken[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    wire = bytes(broken[: data.draw(st.integers(1, len(raw)))])
    assert meant(split(wire, cuts, small)) == parsed(wire)
    assert not blocks(small)


def request(payload: bytes, **more: Any) -> bytes:
    fields = {"run_id": "r", "function_name": "f", "tenant_id": "t", **more}
    return pb.WorkerSchedulerMessage(
        run_request=pb.TaskExecutionRequest(input_payload=payload, **fields)
    ).SerializeToString()


def test_wherever_one_is_cut_its_payload_goes_to_the_arena(small: InputArena) -> None:
    raw = request(bytes(range(100)), timeout_ms=7, file_token="s" * 50)
    for cut in range(len(raw) + 1):
        message = split(raw, [cut], small)
        assert isinstance(message, LargeRequest)
        assert message.payload.read() == bytes(range(100))
        assert len(message.head) == len(raw) - 103, "the payload's field, and a byte less for the request's length"
        assert meant(message) == parsed(raw)
    del message
    assert not blocks(small)


def test_byte_by_byte(small: InputArena) -> None:
    raw = request(os.urandom(SMALL))
    message = split(raw, list(range(len(raw))), small)
    assert isinstance(message, LargeRequest)
    assert meant(message) == parsed(raw)


def test_what_is_all_head_or_tail_is_joined(small: InputArena) -> None:
    for raw in (
        request(b"p" * SMALL, run_id="r" * 2000),
        request(b"p" * SMALL, file_token="t" * 2000),
        request(b"p" * (SMALL - 1)),
        pb.WorkerSchedulerMessage(realtime_frame=pb.RealtimeFrame(data=b"d" * 500)).SerializeToString(),
    ):
        assert split(raw, list(range(0, len(raw), 7)), small) == raw
    assert not blocks(small)


# -- its memory -----------------------------------------------------------------------------------


def test_a_payload_that_nobody_has_gives_its_block_back(arena: InputArena) -> None:
    payload = arena.reserve(BLOB_THRESHOLD_BYTES)
    payload.write(b"x" * BLOB_THRESHOLD_BYTES)
    assert blocks(arena) == 1
    del payload
    assert not blocks(arena)


def test_one_that_was_handed_over_is_another_s(arena: InputArena) -> None:
    payload, other = arena.reserve(BLOB_THRESHOLD_BYTES), InputArena()
    assert payload.hand_over(other.writer) is None
    blob = payload.hand_over(arena.writer)
    assert blob is not None
    assert payload.hand_over(arena.writer) is None
    del payload
    assert blocks(arena) == 1
    arena.writer.free(blob.offset)
    other.close()


async def test_much_memory_goes_back_in_parts(arena: InputArena) -> None:
    payload = arena.reserve(5 * GIVE_BACK_BYTES + 1)
    payload.write(bytes(5 * GIVE_BACK_BYTES + 1))
    arena.writer.put(bytes(2**20))
    del payload
    memory, parts = [os.fstat(arena.read_fd).st_blocks * 512], 0
    while memory[-1] > 2**20:
        await asyncio.sleep(0)
        memory.append(os.fstat(arena.read_fd).st_blocks * 512)
        assert memory[-2] - memory[-1] <= GIVE_BACK_BYTES
        parts += memory[-2] > memory[-1]
    assert parts == 5
    for _ in range(8):  # its block has 128 MiB
        await asyncio.sleep(0)
    assert arena.writer.reserve(5 * GIVE_BACK_BYTES).offset == 0, "it is used again"


def test_executors_can_only_read(arena: InputArena) -> None:
    payload = arena.reserve(BLOB_THRESHOLD_BYTES)
    payload.write(b"x" * BLOB_THRESHOLD_BYTES)
    blob = payload.hand_over(arena.writer)
    assert blob is not None
    assert ArenaReader(arena.read_fd).view(blob)[-1] == ord("x")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.pwrite(arena.read_fd, b"y", blob.offset)


@pytest.mark.parametrize("step", ["reserve", "write"])
def test_no_memory(arena: InputArena, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(arena.writer, step, refuse)
    payload = arena.reserve(2 * BLOB_THRESHOLD_BYTES)
    payload.write(b"x" * BLOB_THRESHOLD_BYTES)
    payload.write(b"x" * BLOB_THRESHOLD_BYTES)
    assert payload.error is not None
    assert "Cannot allocate memory" in str(payload.error)
    assert len(payload) == 2 * BLOB_THRESHOLD_BYTES, "it is still told how large it was"
    assert not blocks(arena)


# -- as it comes ----------------------------------------------------------------------------------


def test_small_and_large_messages_keep_their_order(arena: InputArena) -> None:
    payloads = [b"a", os.urandom(3 * 2**20), b"b", b"", os.urandom(2**20), b"c"]
    wire = b"".join(prefix(message) + message for message in map(request, payloads))
    inbox, found = Inbox(2**24, arena), []
    for start in range(0, len(wire), 65_000):
        inbox.feed(wire[start : start + 65_000])
        found += inbox.take()
    assert [type(message) for message in found] == [bytes, LargeRequest, bytes, bytes, LargeRequest, bytes]
    assert [decoded.run_request.input_payload for decoded in map(meant, found) if decoded] == payloads


def test_what_is_large_is_held_once_it_is_whole(arena: InputArena) -> None:
    message = request(b"x" * 2**21)
    wire = prefix(message) + message
    inbox = Inbox(2**24, arena)
    inbox.feed(wire[:-1])
    assert inbox.held == 0, "it may be larger than any window"
    inbox.feed(wire[-1:])
    assert inbox.held == len(wire)
    assert len(inbox.take()) == 1
    assert inbox.held == 0


def test_a_stream_that_ends_amid_one_gives_its_block_back(arena: InputArena) -> None:
    message = request(b"x" * 2**21)
    inbox = Inbox(2**24, arena)
    inbox.feed(prefix(message) + message[: 2**20])
    assert blocks(arena) == 1
    assert inbox.is_amid_message
    inbox.abandon()
    assert not blocks(arena)
    assert inbox.is_amid_message


# -- put together ---------------------------------------------------------------------------------


@given(run_id=st.text(max_size=300), size=st.integers(1, 2**20))
def test_the_head_of_a_result(run_id: str, size: int) -> None:
    output = bytes(size)
    assert encode_result_head(run_id, size) + output == encode_result(run_id, output, None)


@given(value=st.integers(0, 2**40))
def test_varints(value: int) -> None:
    encoded, read = varint(value), 0
    for index, byte in enumerate(encoded):
        read |= (byte & 0x7F) << 7 * index
    assert read == value
    assert [byte >= 0x80 for byte in encoded] == [True] * (len(encoded) - 1) + [False]


class Held:
    """A result with its output in an arena."""

    def __init__(self, output: bytes) -> None:
        fd = create_arena("up")
        self.writer, self.reader = ArenaWriter(os.dup(fd)), ArenaReader(fd)
        self.freed: list[int] = []
        self.blob = self.writer.put(output)
        self.result = LargeResult("run", HeldOutput(self.reader, self.blob, self.freed.append))


@pytest.mark.parametrize("size", [1, PIECE_BYTES - 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES + 5])
def test_a_result_reads_the_same_each_time(size: int) -> None:
    output = os.urandom(size)
    held = Held(output)
    for _ in range(2):
        assert in_one_piece(held.result) == encode_result("run", output, None)
    assert len(held.result) == len(in_one_piece(held.result))


def test_a_result_is_given_back_when_none_needs_it() -> None:
    held = Held(b"x" * 10)
    held.result.hold()
    held.result.release()
    assert held.freed == []
    held.result.release()
    assert held.freed == [held.blob.offset]


def test_a_piece_outside_of_the_blob() -> None:
    held = Held(b"x" * 10)
    for position, size in ((-1, 2), (9, 2), (10, 1)):
        with pytest.raises(ArenaError):
            held.reader.read_into(held.blob, position, memoryview(bytearray(size)))


def test_an_input_is_read_where_it_is(arena: InputArena) -> None:
    payload: Input = arena.reserve(BLOB_THRESHOLD_BYTES + 3)
    payload.write(b"a" * BLOB_THRESHOLD_BYTES)
    payload.write(memoryview(b"bcd"))
    assert bytes(payload.view()[-4:]) == b"abcd"
    assert payload.read() == b"a" * BLOB_THRESHOLD_BYTES + b"bcd"
