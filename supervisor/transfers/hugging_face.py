"""A model of Hugging Face, from its ref to a whole snapshot in huggingface_hub's cache.

Owns: the order of the steps.

1. What is whole on disk (hf_disk.py) makes no network call.
2. The repo's listing, its small files that the rules need, and the dtypes of weights by Range requests.
3. The rules (hf_selection.py) choose; exactly that is downloaded.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Final, TypeVar

import aiohttp

from gen_worker.errors import AuthError, FatalError, RetryableError
from gen_worker.model_refs import ParsedModelRef
from supervisor.transfers.budget import Budget, gb
from supervisor.transfers.hf_client import FILES_AT_ONCE, Repo, Stopped, fetch_files, look_up
from supervisor.transfers.hf_disk import HfDisk, HfRecord
from supervisor.transfers.hf_probe import probe_dtype
from supervisor.transfers.hf_selection import Selection, reads, select, survey
from supervisor.transfers.http import connection_errors, is_transient, retry_after
from supervisor.transfers.locks import locked
from supervisor.transfers.messages import ModelFiles, TransferSettings
from supervisor.transfers.meter import Meter
from supervisor.transfers.part_file import DiskFull
from supervisor.transfers.retries import Transient, with_retries

log = logging.getLogger(__name__)
T = TypeVar("T")

SMALL_FILE_BYTES: Final = 64 * 2**20


class HuggingFaceModels:
    """See the module."""

    def __init__(self, settings: TransferSettings, session: aiohttp.ClientSession, budget: Budget) -> None:
        self._settings = settings
        self._session = session
        self._budget = budget
        self._disk = HfDisk(settings)
        budget.places.append(self._disk)

    def models(self) -> list[ModelFiles]:
        """All that is whole on disk; blocks."""
        return self._disk.models()

    async def remove(self, ref: str) -> int | None:
        """Freed bytes; None: it is in use."""
        return await asyncio.to_thread(self._disk.remove, ref)

    async def fetch(self, ref: ParsedModelRef, meter: Meter) -> ModelFiles:
        """Have it whole on disk. Raises WorkerError, OSError."""
        record = await asyncio.to_thread(self._disk.find, ref)
        if record is None:
            async with locked(self._disk.fetch_lock(ref.canonical)):
                record = await asyncio.to_thread(self._disk.find, ref) or await self._download(ref, meter)
        await asyncio.to_thread(self._disk.touch, ref.canonical)
        return self._disk.model(record)

    async def _download(self, ref: ParsedModelRef, meter: Meter) -> HfRecord:
        repo = await self._on_thread(lambda: look_up(ref, self._settings.hf_token))
        selection = await self._select(repo)
        cache = await asyncio.to_thread(lambda: self._disk.cache)
        meter.begin(selection.size_bytes, 0)
        chosen = ", ".join(f"{name} {precision or '?'}" for name, precision in selection.precisions.items())
        log.info("downloading %s: %s, %s", ref.canonical, gb(selection.size_bytes), chosen or "no weights")
        try:
            await asyncio.to_thread(self._budget.reserve, ref.canonical, selection.size_bytes, self._disk)
            root_dir = await self._fetch_files(repo, selection, cache, meter)
        except DiskFull:
            await asyncio.to_thread(self._disk.discard, ref, repo.commit)
            raise
        finally:
            self._budget.release(ref.canonical)
        record = await asyncio.to_thread(self._disk.remember, ref, root_dir, selection, ours=True)
        for path, size in record.files.items():
            if size != repo.files[path]:
                raise RetryableError(f"{ref.canonical}: {path} has {size} bytes, its listing says {repo.files[path]}")
        meter.add(selection.size_bytes - meter.done_bytes)
        meter.tell()
        log.info("%s is on disk", ref.canonical)
        return record

    async def _fetch_files(self, repo: Repo, selection: Selection, cache: Path, meter: Meter) -> str:
        stop, loop = threading.Event(), asyncio.get_running_loop()

        def advance(done: int) -> None:
            meter.add(max(min(done, selection.size_bytes) - meter.done_bytes, 0))

        def on_bytes(done: int) -> None:
            loop.call_soon_threadsafe(advance, done)

        def work() -> str:
            return fetch_files(repo, selection.files, self._settings.hf_token, cache, on_bytes, stop)

        try:
            return await self._on_thread(work, progress=lambda: meter.done_bytes)
        except asyncio.CancelledError:
            stop.set()  # the thread ends at the next piece
            raise
        except Stopped:
            raise RetryableError(f"the download of {repo.ref.canonical} was stopped") from None

    async def _on_thread(self, work: Callable[[], T], progress: Callable[[], int] = lambda: 0) -> T:
        """Have it done on a thread, tried again while it raises Transient."""
        return await with_retries(self._settings.retry, lambda: asyncio.to_thread(work), progress=progress)

    async def _select(self, repo: Repo) -> Selection:
        options, name = self._settings.hf, repo.ref.canonical
        small = () if options.full_repo else reads(repo.files)
        bodies = await asyncio.gather(*(self._read_small(repo, path) for path in small))
        found = survey(name, repo.files, dict(zip(small, bodies, strict=True)), options)
        slots = asyncio.Semaphore(FILES_AT_ONCE)

        async def probe(path: str) -> str:
            async with slots:
                try:
                    return await probe_dtype(self._session, repo.url(path), repo.headers, self._settings.retry)
                except (FatalError, RetryableError) as error:
                    log.warning("%s: the precision of %s is told by its name: %s", name, path, error)
                    return ""

        dtypes = await asyncio.gather(*(probe(path) for path in found.probes))
        return select(name, repo.files, found, dict(zip(found.probes, dtypes, strict=True)), options)

    async def _read_small(self, repo: Repo, path: str) -> bytes:
        if repo.files[path] > SMALL_FILE_BYTES:
            raise FatalError(
                f"{repo.ref.canonical}: {path} has {repo.files[path]} bytes, too many for what it should be"
            )
        return await with_retries(self._settings.retry, lambda: self._read_once(repo, path))

    async def _read_once(self, repo: Repo, path: str) -> bytes:
        what = f"{path} of {repo.ref.canonical}"
        with connection_errors(what):
            async with self._session.get(repo.url(path), headers=repo.headers) as response:
                if response.status == HTTPStatus.OK:
                    return await response.read()
                status, answered = response.status, response.headers
        if is_transient(status):
            raise Transient(f"{what}: Hugging Face answers {status}", retry_after(answered))
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise AuthError(
                f"Hugging Face refuses {what} ({status}): check HF_TOKEN and whether its terms are accepted"
            )
        raise FatalError(f"{what}: Hugging Face answers {status}")
