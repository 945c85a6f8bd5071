"""Payloads in shared memory: read in place, given back, copied where a view of them would outlive that."""

from __future__ import annotations

import os
from collections.abc import Iterator

import msgspec
import pytest

from executor.blobs import Blobs, keeps_views
from gen_worker.pipe.arena import BLOB_THRESHOLD_BYTES, ArenaError, ArenaReader, ArenaWriter, create_arena
from gen_worker.pipe.messages import Blob, Free, Upward

BIG = b"\x5a" * BLOB_THRESHOLD_BYTES


class Ends:
    def __init__(self) -> None:
        down, up = create_arena("down"), create_arena("up")
        self.writer = ArenaWriter(down)
        self.reader = ArenaReader(up)
        self.sent: list[Upward] = []
        self.blobs = Blobs(ArenaReader(os.dup(down)), ArenaWriter(os.dup(up)), self.sent.append)


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.writer.close()
    made.reader.close()


class Plain(msgspec.Struct):
    data: bytes
    parent: Plain | None = None


class Holder(msgspec.Struct):
    data: memoryview


class Nested(msgspec.Struct):
    plain: Plain
    by_name: dict[str, list[Holder] | None]


class WithRaw(msgspec.Struct):
    raw: msgspec.Raw


def test_small_payloads_pass(ends: Ends) -> None:
    assert ends.blobs.decode(b"abc", bytes, Plain) == b"abc"
    assert ends.blobs.store(b"abc") == b"abc"
    ends.blobs.discard(b"abc")
    assert ends.sent == []


def test_a_blob_is_decoded_and_freed(ends: Ends) -> None:
    blob = ends.writer.put(BIG)
    assert ends.blobs.decode(blob, bytes, Plain) == BIG
    assert ends.sent == [Free(blob.offset)]


def test_a_blob_is_freed_when_it_does_not_decode(ends: Ends) -> None:
    blob = ends.writer.put(BIG)
    with pytest.raises(msgspec.DecodeError):
        ends.blobs.decode(blob, msgspec.msgpack.Decoder(Holder).decode, Holder)
    assert ends.sent == [Free(blob.offset)]


def test_a_view_into_a_blob_becomes_a_copy(ends: Ends) -> None:
    blob = ends.writer.put(msgspec.msgpack.encode({"data": BIG}))
    decoded = ends.blobs.decode(blob, msgspec.msgpack.Decoder(Holder).decode, Holder)
    ends.writer.free(blob.offset)
    ends.writer.put(b"\x00" * blob.size)
    assert bytes(decoded.data) == BIG


def test_which_types_look_into_their_bytes() -> None:
    assert [keeps_views(kind) for kind in (Plain, Holder, Nested, WithRaw)] == [False, True, True, True]


def test_an_output_is_stored_and_its_block_used_again(ends: Ends) -> None:
    blob = ends.blobs.store(BIG)
    assert isinstance(blob, Blob)
    assert ends.reader.read(blob) == BIG
    ends.blobs.freed(blob.offset)
    assert ends.blobs.store(BIG) == blob
    with pytest.raises(ArenaError):
        ends.blobs.freed(12345)


def test_a_run_that_did_not_start_gives_its_blob_back(ends: Ends) -> None:
    blob = ends.writer.put(BIG)
    ends.blobs.discard(blob)
    assert ends.sent == [Free(blob.offset)]
