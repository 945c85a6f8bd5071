"""One file from an object store onto the disk: resumed, verified, tried again.

Owns: nothing beyond one download. What comes in is gathered into pieces of PIECE_BYTES; while a thread hashes and
writes one, the next comes in.

    200 to a Range, 416, a Range that starts elsewhere     from zero
    400, 401, 403                                          the URL has expired: a fresh one from the hub
    408, 425, 429, 5xx, a broken or silent connection      again, after a wait
    other size or digest than promised                     from zero, DIGEST_ATTEMPTS times in all
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Final, TypeVar

import aiohttp

from gen_worker.errors import AuthError, FatalError, RetryableError
from supervisor.transfers.http import connection_errors, is_transient, retry_after
from supervisor.transfers.locks import POLL_S
from supervisor.transfers.messages import RetrySettings
from supervisor.transfers.part_file import PartFile
from supervisor.transfers.retries import Transient, with_retries
from supervisor.transfers.snapshots import RemoteFile

T = TypeVar("T")

log = logging.getLogger(__name__)

PIECE_BYTES: Final = 1024 * 1024
"""Large enough that handing a piece to a thread costs nothing beside hashing it."""
DIGEST_ATTEMPTS: Final = 3
FRESH_URLS: Final = 3
"""Fresh URLs in a row that are refused before it is the token that is to blame."""
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_EXPIRED: Final = frozenset({HTTPStatus.BAD_REQUEST, HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN})


@dataclass(frozen=True, slots=True)
class Source:
    """Where a file comes from. `whose` names the model; `fresh_url` asks the hub for a URL other than the given one."""

    session: aiohttp.ClientSession
    retry: RetrySettings
    whose: str
    fresh_url: Callable[[RemoteFile, str], Awaitable[str]]


class _Mismatch(Exception):
    """What the store gives is not what was promised."""


async def download(source: Source, file: RemoteFile, target: Path, on_bytes: Callable[[int], None]) -> None:
    """Have `file` whole and verified at `target`, which may appear by another process's doing meanwhile.

    `on_bytes` gets each change of how many bytes are there; negative when it starts from zero. Raises DiskFull,
    WorkerError, OSError.
    """
    part = PartFile(target)
    try:
        while not await _to_its_end(part.try_open):  # noqa: ASYNC110  (it is another process that we wait for)
            await asyncio.sleep(POLL_S)
        if await asyncio.to_thread(target.exists):
            part.remove()
            on_bytes(file.size_bytes)
            return
        await _to_its_end(part.adopt, file.size_bytes)
        if part.offset:
            log.info("%s of %s is resumed at %d of %d bytes", file.path, source.whose, part.offset, file.size_bytes)
        await _Download(source, file, part, on_bytes).run()
    finally:
        part.close()


async def _to_its_end(call: Callable[..., T], *arguments: object) -> T:
    """Call it in a thread. Canceled, wait for the thread first: it would go on with a file that others clean up."""
    work = asyncio.ensure_future(asyncio.to_thread(call, *arguments))
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait([work])
        raise


class _Download:
    """See the module."""

    def __init__(self, source: Source, file: RemoteFile, part: PartFile, on_bytes: Callable[[int], None]) -> None:
        self._source = source
        self._file = file
        self._part = part
        self._on_bytes = on_bytes
        self._told = 0
        self._received = 0
        self._url = file.url
        self._refused = 0
        self._what = f"{file.path} of {source.whose}"

    async def run(self) -> None:
        self._tell()
        for attempt in range(1, DIGEST_ATTEMPTS + 1):
            try:
                await with_retries(self._source.retry, self._rest, progress=lambda: self._received)
                if self._part.digest != self._file.blake3:
                    digests = f"blake3 is {self._part.digest}, the manifest says {self._file.blake3}"
                    raise _Mismatch(f"{self._what} is corrupt: {digests}")  # noqa: TRY301
                await _to_its_end(self._part.finish)
                break
            except _Mismatch as error:
                self._restart()
                if attempt == DIGEST_ATTEMPTS:
                    self._part.remove()
                    raise RetryableError(f"{error}; given up after {attempt} attempts") from None
                log.warning("%s; from zero again", error)

    async def _rest(self) -> None:
        """What is missing. Raises Transient, _Mismatch."""
        if self._part.offset == self._file.size_bytes:
            return
        headers = {"Range": f"bytes={self._part.offset}-"} if self._part.offset else {}
        url = self._url
        with connection_errors(self._what):
            async with self._source.session.get(url, headers=headers) as response:
                status = response.status
                if status in (HTTPStatus.OK, HTTPStatus.PARTIAL_CONTENT):
                    self._position(response)
                    await self._receive(response)
                    return
                answered = response.headers
        if status in _EXPIRED:
            await self._renew(url, status)
        if status == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            self._restart()
            raise Transient(f"{self._what}: the store has no such range (416): from zero again")
        if is_transient(status):
            raise Transient(f"{self._what}: the store answers {status}", retry_after(answered))
        raise FatalError(f"{self._what}: the store answers {status}")

    async def _renew(self, url: str, status: int) -> None:
        """The URL is refused: get another. Raises Transient, or AuthError when fresh ones are refused too."""
        self._refused += 1
        if self._refused > FRESH_URLS:
            raise AuthError(f"{self._what}: the store refuses it ({status}), with fresh URLs too")
        self._url = await self._source.fresh_url(self._file, url)
        # The first time it had expired, which is no fault; a fresh one that is refused is worth a wait.
        raise Transient(f"{self._what}: its URL is refused ({status})", 0.0 if self._refused == 1 else None)

    def _position(self, response: aiohttp.ClientResponse) -> None:
        """Make what was written fit where the answer starts. Raises Transient, _Mismatch."""
        total = response.content_length
        if response.status == HTTPStatus.OK:
            self._restart()
        else:
            found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if found is None or int(found[1]) != self._part.offset:
                self._restart()
                raise Transient(f"{self._what}: the store answers with another range: from zero again")
            total = None if found[2] == "*" else int(found[2])
        if total is not None and total != self._file.size_bytes:
            sizes = f"{total} bytes, the manifest says {self._file.size_bytes}"
            raise _Mismatch(f"{self._what} has another size: {sizes}")

    async def _receive(self, response: aiohttp.ClientResponse) -> None:
        """Write what comes. Raises Transient when it ends early, _Mismatch when there is too much."""
        loop = asyncio.get_running_loop()
        writing: asyncio.Future[None] | None = None
        pieces: list[bytes] = []
        gathered, expected = 0, self._file.size_bytes - self._part.offset
        try:
            async for piece in response.content.iter_any():
                pieces.append(piece)
                gathered += len(piece)
                expected -= len(piece)
                if expected < 0:
                    raise _Mismatch(f"{self._what} is larger than the {self._file.size_bytes} bytes of the manifest")
                if gathered >= PIECE_BYTES or not expected:
                    if writing is not None:
                        await writing
                        self._tell()
                    writing = loop.run_in_executor(None, self._part.append, pieces)
                    pieces, gathered = [], 0
        finally:
            # What came before a cut counts, and a thread that writes must be done before the file is closed.
            if writing is not None:
                await asyncio.wait([writing])
                writing.result()
            if pieces:
                await asyncio.to_thread(self._part.append, pieces)
            self._tell()
        if expected:
            there = f"{self._part.offset} of {self._file.size_bytes} bytes"
            raise Transient(f"{self._what}: the connection was closed after {there}")

    def _restart(self) -> None:
        self._part.restart()
        self._tell()

    def _tell(self) -> None:
        change = self._part.offset - self._told
        self._told = self._part.offset
        if change > 0:
            self._received += change
            self._refused = 0
        if change:
            self._on_bytes(change)
