"""Runs' files: inputs into the run's directory, outputs into the file store.

Owns: the handlers of FetchInputs, RemoveInputs and StoreOutput, and how many files are on their way at once.

A file of the store is looked at by HEAD first: one that is too large is not begun, and one whose SHA-256 this tenant
has fetched before is not fetched again. What a URL's server says of its file is believed in nothing: such a file is
fetched each time. Either way the bytes are written to a file beside the cache, counted and hashed while they come.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import mimetypes
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

import httpx

from gen_worker.errors import ResourceError, RetryableError, ValidationError, WorkerError
from gen_worker.mime_types import HEAD_BYTES, UNKNOWN, mime_type_of
from gen_worker.pipe.messages import LocalFile
from supervisor.transfers.descriptors import Descriptors
from supervisor.transfers.file_store import FileStore, RemoteFile, told_by
from supervisor.transfers.input_cache import InputCache, RunDirectories, local_name
from supervisor.transfers.messages import (
    FetchInputs,
    FileSettings,
    InputsFetched,
    InputsRemoved,
    OutputStored,
    RemoveInputs,
    RetrySettings,
    StoreOutput,
)
from supervisor.transfers.retrying import TryAgain, attempts
from supervisor.transfers.service import Handler, OnProgress, expected_failure
from supervisor.transfers.threads import in_thread
from supervisor.transfers.upload_source import UploadSource
from supervisor.transfers.web import PublicWeb

log = logging.getLogger(__name__)

FETCHES: Final = 32
"""Inputs at once, of all runs: so many from stores, and so many from the web, whose servers may be slow on purpose."""
FETCHES_OF_RUN: Final = 8
UPLOADS: Final = 16
WEB_S: Final = 600.0
"""For one file from the web, however slowly it comes."""
STALE_S: Final = 24 * 3600.0
"""A part of a file that is older is not being fetched by another worker with the same cache any more."""
BLOCK_BYTES: Final = 1024 * 1024
_WEB: Final = ("http://", "https://")


@dataclass(slots=True)
class _Fetched:
    """A file that was received into `part`, with what was learned of it on the way."""

    part: Path
    size_bytes: int
    sha256: str
    head: bytes


class Files:
    """See the module."""

    def __init__(
        self,
        settings: FileSettings,
        retry: RetrySettings,
        *,
        client: httpx.AsyncClient,
        web: PublicWeb,
        descriptors: Descriptors | None,
    ) -> None:
        """Without `descriptors` nothing can be stored."""
        self._settings = settings
        self._retry = retry
        self._client = client
        self._web = web
        self._descriptors = descriptors
        self._cache = InputCache(Path(settings.cache_dir))
        self._runs = RunDirectories(Path(settings.run_dir))
        self._fetches = asyncio.Semaphore(FETCHES)
        self._web_fetches = asyncio.Semaphore(FETCHES)
        self._uploads = asyncio.Semaphore(UPLOADS)
        self._locks = _Locks()

    @property
    def handlers(self) -> Mapping[type, Handler]:
        return {FetchInputs: self.fetch, RemoveInputs: self.remove, StoreOutput: self.store}

    async def sweep(self) -> None:
        """Remove what killed workers left on the disk."""
        await in_thread(self._cache.sweep, self._settings.started - STALE_S)
        count = await in_thread(self._runs.sweep, self._settings.started)
        if count:
            log.info("removed the inputs of %d runs that a killed worker had left", count)

    # -- inputs -------------------------------------------------------------------------------

    async def fetch(self, request: FetchInputs, progress: OnProgress) -> InputsFetched:  # noqa: ARG002
        """All of the request's files, in parallel; the first that fails stops the others."""
        try:
            directory = self._runs.prepare(request.directory)
        except OSError as error:
            raise ResourceError(f"there is no directory for the run's inputs: {error.strerror or error}") from error
        store = FileStore(self._client, request.access, self._retry)
        of_run = asyncio.Semaphore(FETCHES_OF_RUN)

        async def one(index: int, ref: str) -> LocalFile:
            async with of_run, self._web_fetches if _is_url(ref) else self._fetches:
                try:
                    return await self._fetch_one(store, request, directory, index, ref)
                except WorkerError as error:
                    raise _FileError(index, error) from error

        failed: list[_FileError] = []
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(index, ref)) for index, ref in enumerate(request.refs)]
        except* _FileError as errors:
            failed = [error for error in errors.exceptions if isinstance(error, _FileError)]
        if failed:
            first = min(failed, key=lambda error: error.index)
            return InputsFetched((), expected_failure(first.error), first.index)
        return InputsFetched(tuple(task.result() for task in tasks))

    async def remove(self, request: RemoveInputs, progress: OnProgress) -> InputsRemoved:  # noqa: ARG002
        """The run has ended."""
        await in_thread(self._runs.delete, self._runs.remove(request.directory))
        return InputsRemoved()

    async def _fetch_one(
        self, store: FileStore, request: FetchInputs, directory: Path, index: int, ref: str
    ) -> LocalFile:
        tenant = request.access.tenant_id
        try:
            if _is_url(ref):
                cached, file = await self._from_web(tenant, ref)
                name = unquote(urlsplit(ref).path)
            else:
                cached, file = await self._from_store(store, tenant, ref)
                name = ref
            suffix = mimetypes.guess_extension(file.mime_type) or ""
            path = directory / local_name(request.number, index, name, suffix)
            await in_thread(self._runs.link, cached, path)
        except OSError as error:
            raise ResourceError(f"it can't be written to disk: {error.strerror or error}") from error
        return LocalFile(str(path), file.size_bytes, file.sha256, file.mime_type)

    async def _from_store(self, store: FileStore, tenant: str, ref: str) -> tuple[Path, LocalFile]:
        if not store.base_url:
            raise ValidationError("the run names no file store, and this worker has none")
        told = await store.head(ref)
        self._check_size(told.size_bytes)
        if not told.sha256:
            return await self._download_from_store(store, tenant, ref, told)
        # Whoever comes while the same bytes are on their way waits for them here.
        async with self._locks.held((tenant, told.sha256)):
            cached = await in_thread(self._cache.find, tenant, told.sha256)
            if cached is not None:
                return cached, await in_thread(_described, cached, told, ref)
            return await self._download_from_store(store, tenant, ref, told)

    async def _download_from_store(
        self, store: FileStore, tenant: str, ref: str, told: RemoteFile
    ) -> tuple[Path, LocalFile]:
        async for attempt in attempts(self._retry):
            with attempt:
                async with store.open(ref) as response, self._received(response, tenant) as got:
                    # It may have been replaced since it was looked at: what came with the bytes counts.
                    now = told_by(response)
                    wanted = now.sha256 or told.sha256 or got.sha256
                    if got.sha256 != wanted:
                        raise TryAgain(f"its bytes have SHA-256 {got.sha256}, the file store says {wanted}")
                    kept = await in_thread(self._cache.keep, got.part, tenant, got.sha256)
                    mime_type = mime_type_of(got.head, ref, now.mime_type or told.mime_type)
                    return kept, LocalFile("", got.size_bytes, got.sha256, mime_type)
        raise AssertionError("unreachable: the last attempt raises")

    async def _from_web(self, tenant: str, url: str) -> tuple[Path, LocalFile]:
        try:
            async with asyncio.timeout(WEB_S):
                return await self._download_from_web(tenant, url)
        except TimeoutError:
            raise RetryableError(f"its server took longer than {WEB_S:.0f} s") from None

    async def _download_from_web(self, tenant: str, url: str) -> tuple[Path, LocalFile]:
        async for attempt in attempts(self._retry):
            with attempt:
                async with self._web.open(url) as response, self._received(response, tenant) as got:
                    kept = await in_thread(self._cache.keep, got.part, tenant, got.sha256)
                    told = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
                    mime_type = mime_type_of(got.head, urlsplit(url).path, told)
                    return kept, LocalFile("", got.size_bytes, got.sha256, mime_type)
        raise AssertionError("unreachable: the last attempt raises")

    @asynccontextmanager
    async def _received(self, response: httpx.Response, tenant: str) -> AsyncIterator[_Fetched]:
        """The response's body as a file, which is gone afterwards unless it was kept. Raises a WorkerError, OSError."""
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise ValidationError(f"its server sends it encoded as {response.headers['Content-Encoding']}")
        length = response.headers.get("Content-Length", "")
        announced = int(length) if length.isascii() and length.isdecimal() else None
        self._check_size(announced)
        await in_thread(self._cache.make_room, announced or 0)
        part = await in_thread(self._cache.new_file, tenant)
        digest, size, head = hashlib.sha256(), 0, b""
        try:
            with part.open("xb", buffering=0) as file:
                async for block in response.aiter_raw(BLOCK_BYTES):
                    size += len(block)
                    self._check_size(size)
                    head = head or block[:HEAD_BYTES]
                    await in_thread(_write, file, block, digest)
            yield _Fetched(part, size, digest.hexdigest(), head)
        finally:
            part.unlink(missing_ok=True)

    def _check_size(self, size: int | None) -> None:
        limit = self._settings.max_input_bytes
        if limit and size is not None and size > limit:
            raise ValidationError(f"it has {size} bytes or more, over the limit WORKER_MAX_INPUT_FILE_BYTES={limit}")

    # -- outputs ------------------------------------------------------------------------------

    async def store(self, request: StoreOutput, progress: OnProgress) -> OutputStored:  # noqa: ARG002
        """Upload the open file that comes with the request's ticket."""
        if self._descriptors is None:
            raise WorkerError("this worker takes no files to store")
        fd = await self._descriptors.take(request.ticket)
        with UploadSource(fd, self._settings.max_upload_bytes) as source:
            store = FileStore(self._client, request.access, self._retry)
            if not store.base_url:
                raise ValidationError("the run names no file store, and this worker has none")
            async with self._uploads:
                mime_type = mime_type_of(await source.head(), request.ref)
                stored = await store.store(request.ref, source, mime_type, create=request.create)
        mime_type = stored.mime_type if mime_type == UNKNOWN and stored.mime_type else mime_type
        return OutputStored(LocalFile("", source.size_bytes, await source.digest(), mime_type))


class _Locks:
    """A lock per key, there while somebody has it or waits for it."""

    def __init__(self) -> None:
        self._locks: dict[tuple[str, str], tuple[asyncio.Lock, int]] = {}

    @asynccontextmanager
    async def held(self, key: tuple[str, str]) -> AsyncIterator[None]:
        lock, users = self._locks.get(key, (asyncio.Lock(), 0))
        self._locks[key] = lock, users + 1
        try:
            async with lock:
                yield
        finally:
            users = self._locks[key][1] - 1
            if users:
                self._locks[key] = lock, users
            else:
                del self._locks[key]


class _FileError(Exception):
    def __init__(self, index: int, error: WorkerError) -> None:
        super().__init__(str(error))
        self.index = index
        self.error = error


def _is_url(ref: str) -> bool:
    return ref.lower().startswith(_WEB)


def _write(file: FileIO, block: bytes, digest: hashlib._Hash) -> None:
    digest.update(block)
    rest = memoryview(block)
    while rest:
        rest = rest[file.write(rest) :]


def _described(cached: Path, told: RemoteFile, ref: str) -> LocalFile:
    with cached.open("rb") as file:
        head = file.read(HEAD_BYTES)
        size = os.fstat(file.fileno()).st_size
    return LocalFile("", size, told.sha256, mime_type_of(head, ref, told.mime_type))
