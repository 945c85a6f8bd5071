"""Shared memory beside the pipe, on real memfds."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_worker.pipe.arena import (
    BLOB_THRESHOLD_BYTES,
    RETAIN_BYTES,
    ArenaError,
    ArenaReader,
    ArenaWriter,
    create_arena,
)
from gen_worker.pipe.messages import Blob

MIB = 1024 * 1024


@pytest.fixture
def fd() -> Iterator[int]:
    fd = create_arena("test")
    yield fd
    os.close(fd)


@pytest.fixture
def writer(fd: int) -> Iterator[ArenaWriter]:
    writer = ArenaWriter(os.dup(fd))
    yield writer
    writer.close()


@pytest.fixture
def reader(fd: int) -> Iterator[ArenaReader]:
    reader = ArenaReader(os.dup(fd))
    yield reader
    reader.close()


def memory_of(fd: int) -> int:
    """Bytes that the kernel has for it now."""
    return os.fstat(fd).st_blocks * 512


@pytest.mark.parametrize(
    "size", [0, 1, BLOB_THRESHOLD_BYTES - 1, BLOB_THRESHOLD_BYTES, BLOB_THRESHOLD_BYTES + 1, 5 * MIB]
)
def test_read_and_view_give_what_was_put(writer: ArenaWriter, reader: ArenaReader, size: int) -> None:
    data = os.urandom(min(size, 4096)).ljust(size, b"\x07")[:size]
    for kind in (bytes, bytearray, memoryview):
        blob = writer.put(kind(data))
        assert blob.size == size
        assert reader.read(blob) == data
        assert bytes(reader.view(blob)) == data
        writer.free(blob.offset)


def test_an_empty_blob_in_an_empty_arena(reader: ArenaReader) -> None:
    assert reader.read(Blob(0, 0)) == b""
    assert bytes(reader.view(Blob(0, 0))) == b""


def test_a_view_of_items_is_put_as_bytes(writer: ArenaWriter, reader: ArenaReader) -> None:
    words = memoryview(b"\x01\x00\x02\x00").cast("H")
    assert reader.read(writer.put(words)) == b"\x01\x00\x02\x00"


def test_blocks_are_used_again(writer: ArenaWriter, fd: int) -> None:
    first = writer.put(b"a" * 3 * MIB)
    writer.free(first.offset)
    assert writer.put(b"b" * 4 * MIB).offset == first.offset, "3 and 4 MiB both take a block of 4"
    assert os.fstat(fd).st_size == 4 * MIB


def test_blocks_in_use_are_left_alone(writer: ArenaWriter, reader: ArenaReader) -> None:
    blobs = [writer.put(bytes([number]) * MIB) for number in range(8)]
    assert len({blob.offset for blob in blobs}) == 8
    for blob in blobs[::2]:
        writer.free(blob.offset)
    for number in range(100, 104):
        writer.put(bytes([number]) * MIB)
    for number, blob in list(enumerate(blobs))[1::2]:
        assert reader.read(blob) == bytes([number]) * MIB


def test_views_survive_growth(writer: ArenaWriter, reader: ArenaReader) -> None:
    first = writer.put(b"first" * MIB)
    view = reader.view(first)
    for _ in range(3):
        grown = writer.put(b"x" * 16 * MIB)
        assert reader.view(grown)[-1] == ord("x")
    assert bytes(view[:5]) == b"first"
    assert bytes(view[-5:]) == b"first"


def test_a_view_can_not_be_written(writer: ArenaWriter, reader: ArenaReader) -> None:
    view = reader.view(writer.put(b"x" * MIB))
    with pytest.raises(TypeError, match="read-only"):
        view[0] = 1


def test_memory_beyond_what_is_retained_goes_back(writer: ArenaWriter, fd: int) -> None:
    blobs = [writer.put(b"x" * 16 * MIB) for _ in range(10)]
    assert memory_of(fd) >= 2 * RETAIN_BYTES
    for blob in blobs:
        writer.free(blob.offset)
    assert memory_of(fd) <= RETAIN_BYTES + MIB


def test_a_block_over_the_retained_size_goes_back_at_once(writer: ArenaWriter, reader: ArenaReader, fd: int) -> None:
    blob = writer.put(b"x" * (RETAIN_BYTES + 1))
    writer.free(blob.offset)
    assert memory_of(fd) <= MIB
    again = writer.put(b"y" * (RETAIN_BYTES + 1))
    assert again.offset == blob.offset
    assert reader.view(again)[-1] == ord("y")


def test_what_is_retained_stays_bounded_when_blocks_come_and_go(writer: ArenaWriter, fd: int) -> None:
    """Released blocks that are used again must not be counted as retained ones that left."""
    size = RETAIN_BYTES // 4
    for _ in range(3):
        blobs = [writer.put(b"x" * size) for _ in range(6)]
        for blob in blobs:
            writer.free(blob.offset)
        one = writer.put(b"x" * size)
        writer.free(one.offset)
        assert memory_of(fd) <= RETAIN_BYTES + MIB


def test_retained_blocks_are_used_before_released_ones(writer: ArenaWriter, fd: int) -> None:
    size = RETAIN_BYTES // 4
    for blob in [writer.put(b"x" * size) for _ in range(6)]:
        writer.free(blob.offset)
    before = memory_of(fd)
    for _ in range(4):
        writer.put(b"y" * size)
    assert memory_of(fd) <= before + MIB


@pytest.mark.parametrize("offset", [-1, 1, MIB, 3 * MIB, 2**62])
def test_freeing_what_is_not_in_use(writer: ArenaWriter, offset: int) -> None:
    writer.put(b"x")
    with pytest.raises(ArenaError, match=f"no block at offset {offset} is in use"):
        writer.free(offset)


def test_freeing_twice(writer: ArenaWriter) -> None:
    blob = writer.put(b"x")
    writer.free(blob.offset)
    with pytest.raises(ArenaError):
        writer.free(blob.offset)


@pytest.mark.parametrize(
    "blob", [Blob(0, MIB + 1), Blob(MIB, 1), Blob(-1, 1), Blob(0, -1), Blob(1, MIB), Blob(2**63, 1), Blob(2**64 - 1, 2)]
)
def test_blobs_outside_of_the_arena(writer: ArenaWriter, reader: ArenaReader, blob: Blob) -> None:
    writer.put(b"x")
    for use in (reader.read, reader.view):
        with pytest.raises(ArenaError, match="outside of an arena"):
            use(blob)


def test_shrinking_is_refused(writer: ArenaWriter, fd: int) -> None:
    writer.put(b"x")
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)


def test_a_refused_growth_leaves_the_writer_whole(fd: int, writer: ArenaWriter, reader: ArenaReader) -> None:
    kept = writer.put(b"kept")
    _soft, hard = before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MIB, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            writer.put(b"x" * 4 * MIB)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert reader.read(kept) == b"kept"
    assert writer.put(b"next").offset == MIB


def test_the_descriptor_is_not_inherited_by_chance(fd: int) -> None:
    assert not os.get_inheritable(fd)


def test_another_process_reads_it(writer: ArenaWriter, fd: int) -> None:
    blob = writer.put(b"across" * MIB)
    script = (
        "import sys\n"
        "from gen_worker.pipe.arena import ArenaReader, ArenaError\n"
        "from gen_worker.pipe.messages import Blob\n"
        "fd, offset, size = map(int, sys.argv[1:])\n"
        "reader = ArenaReader(fd)\n"
        "assert reader.read(Blob(offset, size)) == b'across' * (size // 6)\n"
        "view = reader.view(Blob(offset, size))\n"
        "assert view[-6:] == b'across'\n"
    )
    command = [sys.executable, "-c", script, str(fd), str(blob.offset), str(blob.size)]
    subprocess.run(command, check=True, pass_fds=(fd,))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 3 * MIB)), max_size=20))
def test_any_order_of_puts_and_frees(steps: list[tuple[bool, int]]) -> None:
    fd = create_arena("random")
    writer, reader = ArenaWriter(fd), ArenaReader(os.dup(fd))
    held: list[tuple[Blob, bytes]] = []
    try:
        for number, (keep, size) in enumerate(steps):
            data = bytes([number]) * size
            held.append((writer.put(data), data))
            if not keep:
                blob, expected = held.pop(size % len(held))
                assert reader.read(blob) == expected
                writer.free(blob.offset)
        for blob, expected in held:
            assert reader.view(blob) == expected
    finally:
        reader.close()
        writer.close()
