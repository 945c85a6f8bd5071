"""The dtype of weights on a server, by two Range requests over real HTTP."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import pytest

from gen_worker.errors import FatalError, RetryableError
from supervisor.transfers.hf_probe import file_dtype, probe_dtype
from supervisor.transfers.http import open_session
from supervisor.transfers.messages import RetrySettings
from tests.support.dev_hugging_face import safetensors
from tests.support.faulty_server import Answer, Asked, FaultyServer, ranged

RETRY = RetrySettings(2, 0.001, 0.001)


class FileServer(FaultyServer):
    data = safetensors("BF16", 4 * 2**20)

    def serve(self, asked: Asked) -> Answer:
        return ranged(self.data, asked.headers.get("Range", ""))


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as server:
        yield server


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with open_session(5.0) as session:
        yield session


async def test_two_range_requests_and_no_more(server: FileServer, session: aiohttp.ClientSession) -> None:
    assert await probe_dtype(session, server.url + "/f", {"Authorization": "Bearer x"}, RETRY) == "BF16"
    (length,) = struct.unpack("<Q", server.data[:8])
    assert [each.headers["Range"] for each in server.asked] == ["bytes=0-7", f"bytes=8-{length + 7}"]
    assert {each.headers["Authorization"] for each in server.asked} == {"Bearer x"}


async def test_a_server_without_ranges_is_read_as_far_as_needed(
    server: FileServer, session: aiohttp.ClientSession
) -> None:
    server.on_request = lambda _: Answer(200, server.data)
    assert await probe_dtype(session, server.url, {}, RETRY) == "BF16"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<html>not found</html>", "its header would have"),
        (bytes(8), "its header would have 0 bytes"),
        (struct.pack("<Q", 5) + b"hello", "its header is broken"),
        (struct.pack("<Q", 15) + b'{"a":{"dtype":1', "its header is broken"),
        (struct.pack("<Q", 8) + b'{"a":{}}', "its header is broken"),
    ],
)
async def test_what_is_no_safetensors_file(
    server: FileServer, session: aiohttp.ClientSession, data: bytes, words: str, tmp_path: Path
) -> None:
    server.data = data
    with pytest.raises(FatalError, match=words):
        await probe_dtype(session, server.url, {}, RETRY)
    path = tmp_path / "f"
    path.write_bytes(data)
    assert file_dtype(path) == ""


async def test_refusals_and_bad_moments(server: FileServer, session: aiohttp.ClientSession) -> None:
    server.on_request = lambda _: Answer(403)
    with pytest.raises(FatalError, match="403"):
        await probe_dtype(session, server.url, {}, RETRY)
    server.on_request = lambda _: Answer(200, b"shrt")
    with pytest.raises(RetryableError, match="ended early"):
        await probe_dtype(session, server.url, {}, RETRY)
    server.on_request = lambda asked: Answer(503) if asked.number == 3 else None
    assert await probe_dtype(session, server.url, {}, RETRY) == "BF16"


async def test_the_token_does_not_follow_to_another_host(server: FileServer, session: aiohttp.ClientSession) -> None:
    with FileServer() as front:
        front.on_request = lambda _: Answer(302, headers={"Location": f"{server.url}/cdn"})
        assert await probe_dtype(session, front.url, {"Authorization": "Bearer x"}, RETRY) == "BF16"
    assert {each.headers["Authorization"] for each in front.asked} == {"Bearer x"}
    assert not [each for each in server.asked if "Authorization" in each.headers]


def test_the_same_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(safetensors("F16", 100))
    assert file_dtype(path) == "F16"
    assert file_dtype(tmp_path / "none") == ""
