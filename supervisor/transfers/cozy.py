"""A model of the hub, from its ref to a whole snapshot in the store.

Owns: the order of the steps.

1. The hub says which snapshot the ref stands for. When it can't be reached a whole copy on disk does.
2. The snapshot's lock: of several workers, or refs to one snapshot, one downloads and the others find it done.
3. Blobs that are here already are linked into the staging directory; room is made for the rest.
4. The rest comes, FILES_AT_ONCE files at a time, each linked when it is verified.
5. The staging directory is renamed to the snapshot.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from typing import Final

import aiohttp

from gen_worker.errors import RetryableError, ValidationError
from gen_worker.model_refs import ParsedModelRef
from supervisor.transfers.budget import Budget, gb
from supervisor.transfers.download import Source, download
from supervisor.transfers.hub import Hub
from supervisor.transfers.locks import locked, locked_now
from supervisor.transfers.messages import ModelFiles, TransferSettings
from supervisor.transfers.meter import Meter
from supervisor.transfers.part_file import DiskFull, disk_full_errors, remove_part
from supervisor.transfers.snapshots import RemoteFile, Snapshot
from supervisor.transfers.store import Record, Store

log = logging.getLogger(__name__)

FILES_AT_ONCE: Final = 8


class CozyModels:
    """See the module."""

    def __init__(
        self, settings: TransferSettings, session: aiohttp.ClientSession, hub: Hub, store: Store, budget: Budget
    ) -> None:
        self._settings = settings
        self._session = session
        self._hub = hub
        self._store = store
        self._budget = budget

    async def fetch(self, ref: ParsedModelRef, meter: Meter) -> ModelFiles:
        """Have it whole on disk. Raises WorkerError, OSError."""
        local = await asyncio.to_thread(self._local, ref.canonical)
        if local is not None and (ref.digest is not None or not self._settings.hub_url):
            return await self._used(local)
        try:
            snapshot = await self._hub.snapshot(ref)
        except RetryableError as error:
            if local is None:
                raise
            log.warning("%s; the copy of %s on disk is used", error, ref.canonical)
            return await self._used(local)
        await asyncio.to_thread(self._store.prepare)
        async with locked(self._store.fetch_lock(snapshot.digest)):
            record = await asyncio.to_thread(self._found, ref, snapshot)
            if record is None:
                record = await _Fetch(self, ref, snapshot, meter).run()
        return self._store.model(record)

    def models(self) -> list[ModelFiles]:
        """All that is whole on disk; blocks."""
        return [self._store.model(record) for record in self._store.records() if self._store.is_whole(record)]

    async def remove(self, ref: str) -> int | None:
        """Take it from disk, with all other refs to the same snapshot; freed bytes, None when it is in use.

        Raises ValidationError when it is not here.
        """
        return await asyncio.to_thread(self._remove, ref)

    def _remove(self, ref: str) -> int | None:
        record = self._store.record(ref)
        if record is None:
            raise ValidationError(f"{ref} is not on this disk; `gen-worker models` lists what is")
        before = self._store.used_bytes()
        if self._store.evict(record.snapshot) is None:
            return None
        return before - self._store.used_bytes()

    def _local(self, ref: str) -> Record | None:
        record = self._store.record(ref)
        return record if record is not None and self._store.is_whole(record) else None

    def _found(self, ref: ParsedModelRef, snapshot: Snapshot) -> Record | None:
        """The record of a snapshot that is here already, by whatever ref it came."""
        files = {file.path: file.size_bytes for file in snapshot.files}
        if not self._store.is_whole(Record(ref.canonical, snapshot.digest, {}, files)):
            return None
        return self._store.remember(ref.canonical, snapshot)

    async def _used(self, record: Record) -> ModelFiles:
        await asyncio.to_thread(self._store.touch, record.snapshot)
        return self._store.model(record)


class _Fetch:
    """Steps 3 to 5 for one snapshot, whose lock is held."""

    def __init__(self, models: CozyModels, ref: ParsedModelRef, snapshot: Snapshot, meter: Meter) -> None:
        self._store = models._store  # noqa: SLF001  (one object in two parts)
        self._budget = models._budget  # noqa: SLF001
        self._hub = models._hub  # noqa: SLF001
        self._source = Source(
            models._session,  # noqa: SLF001
            models._settings.retry,  # noqa: SLF001
            ref.canonical,
            self._fresh_url,
        )
        self._ref = ref
        self._snapshot = snapshot
        self._meter = meter
        self._urls = {file.path: file.url for file in snapshot.files}
        self._renewing = asyncio.Lock()
        self._slots = asyncio.Semaphore(FILES_AT_ONCE)

    async def run(self) -> Record:
        snapshot, store = self._snapshot, self._store
        async with locked(store.store_lock, shared=True):
            missing = await asyncio.to_thread(store.adopt_blobs, snapshot)
        blobs = {file.blake3: file for file in missing}
        need = sum(file.size_bytes for file in blobs.values())
        self._meter.begin(snapshot.size_bytes, snapshot.size_bytes - sum(file.size_bytes for file in missing))
        log.info("downloading %s: %s in %d files", self._ref.canonical, gb(need), len(blobs))
        try:
            await asyncio.to_thread(self._budget.reserve, snapshot.digest, need, store, frozenset(blobs))
            with disk_full_errors(store.root):
                await self._all(missing)
                record = await asyncio.to_thread(store.publish, self._ref.canonical, snapshot)
        except DiskFull:
            await asyncio.to_thread(self._clean_up, list(blobs))
            raise
        finally:
            self._budget.release(snapshot.digest)
        self._meter.tell()
        log.info("%s is on disk: %s", self._ref.canonical, gb(snapshot.size_bytes))
        return record

    async def _all(self, missing: list[RemoteFile]) -> None:
        """Raises what the first download that fails raises; the others are canceled."""
        places: dict[str, list[RemoteFile]] = {}
        for file in missing:
            places.setdefault(file.blake3, []).append(file)
        try:
            async with asyncio.TaskGroup() as group:
                for same in places.values():
                    group.create_task(self._one(same[0], same))
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    async def _one(self, file: RemoteFile, places: list[RemoteFile]) -> None:
        """Download one blob and link it to all its places."""

        def on_bytes(size: int) -> None:
            self._budget.arrived(self._snapshot.digest, size)
            self._meter.add(size * len(places))

        target = self._store.blob(file.blake3)
        async with self._slots:
            for place in places:
                # Again when the blob, to which nothing links yet, was just removed to make room.
                while not await asyncio.to_thread(self._stage, place):
                    await download(self._source, file, target, on_bytes)

    def _stage(self, place: RemoteFile) -> bool:
        with locked_now(self._store.store_lock, shared=True):
            return self._store.stage(self._snapshot.digest, place)

    async def _fresh_url(self, file: RemoteFile, refused: str) -> str:
        """A URL that is not the refused one; files that expired together ask the hub once."""
        async with self._renewing:
            if self._urls[file.path] == refused:
                log.info("the URLs of %s have expired: the hub is asked for fresh ones", self._ref.canonical)
                fresh = await self._hub.snapshot(self._ref)
                if fresh.digest != self._snapshot.digest:  # the tag has moved on meanwhile
                    fresh = await self._hub.pinned(self._ref, self._snapshot.digest)
                self._urls.update({each.path: each.url for each in fresh.files})
            return self._urls[file.path]

    def _clean_up(self, digests: list[str]) -> None:
        """The disk is full: free what this download wrote."""
        store = self._store
        with locked_now(store.store_lock):
            shutil.rmtree(store.staging / self._snapshot.digest, ignore_errors=True)
            for digest in digests:
                remove_part(store.blob(digest))
                blob = store.blob(digest)  # whole, but not linked to its place when another one failed
                if blob.exists() and blob.stat().st_nlink == 1:
                    blob.unlink()
