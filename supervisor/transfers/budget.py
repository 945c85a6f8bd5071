"""How much of the disk models may take, and what goes when more is needed.

Owns: what the downloads of this process have still to write. WORKER_MODEL_CACHE_MAX_GB counts blobs; without it the
disk may be FULL of its size. Interrupted downloads go first, then the least recently used snapshots with the blobs
that no other has; what anybody uses or makes, in this or another worker, stays.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from gen_worker.errors import ResourceError
from supervisor.transfers.locks import locked_now
from supervisor.transfers.store import Store, last_use

log = logging.getLogger(__name__)

FULL: Final = 0.95


class DiskUsage(Protocol):
    """Bytes, as shutil.disk_usage gives them."""

    @property
    def total(self) -> int: ...
    @property
    def used(self) -> int: ...
    @property
    def free(self) -> int: ...


class Budget:
    """See the module. Blocks, but for `arrived` and `release`."""

    def __init__(
        self,
        store: Store,
        max_bytes: int,
        on_removed: Callable[[tuple[str, ...]], None],
        disk_usage: Callable[[Path], DiskUsage] = shutil.disk_usage,
    ) -> None:
        """`on_removed` gets the refs that are no longer on disk."""
        self._store = store
        self._max_bytes = max_bytes
        self._on_removed = on_removed
        self._disk_usage = disk_usage
        self._coming: dict[str, int] = {}

    def reserve(self, digest: str, need_bytes: int, wanted: frozenset[str]) -> None:
        """Make room for what a snapshot lacks; its `wanted` blobs' parts stay. Raises ResourceError with the sizes."""
        if self._room() < need_bytes:
            self._make_room(digest, need_bytes, wanted)
        self._coming[digest] = need_bytes

    def arrived(self, digest: str, size: int) -> None:
        """So much of it is on the disk now (negative: is to be written again)."""
        if digest in self._coming:
            self._coming[digest] -= size

    def release(self, digest: str) -> None:
        self._coming.pop(digest, None)

    def _room(self) -> int:
        coming = sum(max(each, 0) for each in list(self._coming.values()))
        if self._max_bytes:
            return self._max_bytes - self._store.used_bytes() - coming
        disk = self._disk_usage(self._store.root)
        return min(int(disk.total * FULL) - disk.used, disk.free) - coming

    def _make_room(self, digest: str, need_bytes: int, wanted: frozenset[str]) -> None:
        self._store.remove_abandoned(wanted)
        self._sweep()
        if self._room() + self._store.used_bytes() < need_bytes:
            raise self._no_room(need_bytes, 0)  # not even an empty cache has room: nothing is removed in vain
        in_use = 0
        for candidate in self._by_last_use():
            if self._room() >= need_bytes:
                return
            if candidate == digest:
                continue
            refs = self._store.remove_snapshot(candidate)
            if refs is None:
                in_use += 1
                continue
            log.info("%s was removed from disk to make room", ", ".join(refs) or f"snapshot {candidate}")
            self._sweep()
            self._on_removed(refs)
        if self._room() < need_bytes:
            raise self._no_room(need_bytes, in_use)

    def _no_room(self, need_bytes: int, in_use: int) -> ResourceError:
        limit = f"WORKER_MODEL_CACHE_MAX_GB is {gb(self._max_bytes)}" if self._max_bytes else "the disk is too full"
        used = f"; {in_use} models that are in use were not removed" if in_use else ""
        sizes = f"{gb(need_bytes)} are needed, {gb(max(self._room(), 0))} are left"
        return ResourceError(f"no room on disk: {sizes}: {limit}{used}")

    def _sweep(self) -> None:
        with locked_now(self._store.store_lock):
            self._store.remove_loose_blobs()

    def _by_last_use(self) -> list[str]:
        digests = [path.name for path in self._store.snapshots.iterdir()]
        return sorted(digests, key=lambda each: last_use(self._store.use_lock(each)))


def gb(size: int) -> str:
    """Bytes as GB of 2**30, for people."""
    return f"{size / 2**30:.2f} GB"
