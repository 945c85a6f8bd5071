"""How much of the disk models may take, and what goes when more is needed.

Owns: what the downloads of this process have still to write. WORKER_MODEL_CACHE_MAX_GB counts the blobs of the store
and what was downloaded into Hugging Face's cache; without it the disk may be FULL of its size. Interrupted downloads go
first, then the least recently used models; what anybody uses or makes, in this or another worker, stays.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol

from gen_worker.errors import ResourceError
from supervisor.transfers.store import Store

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


class Evictable(Protocol):
    """One place where models lie."""

    @property
    def disk(self) -> Path:
        """A directory on its disk, which need not be there yet."""

    def used_bytes(self) -> int: ...

    def removable(self) -> list[tuple[float, str]]:
        """(last use in epoch seconds, name) of each model, those in use included."""

    def evict(self, name: str) -> tuple[str, ...] | None:
        """Remove it: the refs that are gone with it; None when it is in use."""


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
        self.places: list[Evictable] = [store]
        self._max_bytes = max_bytes
        self._on_removed = on_removed
        self._disk_usage = disk_usage
        self._coming: dict[str, int] = {}

    def reserve(self, name: str, need_bytes: int, place: Evictable, wanted: frozenset[str] = frozenset()) -> None:
        """Make room in `place` for a model; the parts of `wanted` blobs stay. Raises ResourceError with the sizes."""
        if self._room(place) < need_bytes:
            self._make_room(name, need_bytes, place, wanted)
        self._coming[name] = need_bytes

    def arrived(self, name: str, size: int) -> None:
        """So much of it is on the disk now (negative: is to be written again)."""
        if name in self._coming:
            self._coming[name] -= size

    def release(self, name: str) -> None:
        self._coming.pop(name, None)

    def _room(self, place: Evictable) -> int:
        coming = sum(max(each, 0) for each in list(self._coming.values()))
        if self._max_bytes:
            return self._max_bytes - sum(each.used_bytes() for each in self.places) - coming
        disk = self._disk_usage(_existing(place.disk))
        return min(int(disk.total * FULL) - disk.used, disk.free) - coming

    def _make_room(self, name: str, need_bytes: int, place: Evictable, wanted: frozenset[str]) -> None:
        self._store.remove_abandoned(wanted)
        places = self.places if self._max_bytes else [each for each in self.places if _same_disk(each, place)]
        if self._room(place) + sum(each.used_bytes() for each in places) < need_bytes:
            raise self._no_room(need_bytes, place, 0)  # not even with all gone: nothing is removed in vain
        in_use = 0
        found = sorted((used, each, owner) for owner in range(len(places)) for used, each in places[owner].removable())
        for _, candidate, owner in found:
            if self._room(place) >= need_bytes:
                return
            if candidate == name:
                continue
            refs = places[owner].evict(candidate)
            if refs is None:
                in_use += 1
                continue
            log.info("%s was removed from disk to make room", ", ".join(refs) or f"snapshot {candidate}")
            self._on_removed(refs)
        if self._room(place) < need_bytes:
            raise self._no_room(need_bytes, place, in_use)

    def _no_room(self, need_bytes: int, place: Evictable, in_use: int) -> ResourceError:
        limit = f"WORKER_MODEL_CACHE_MAX_GB is {gb(self._max_bytes)}" if self._max_bytes else "the disk is too full"
        used = f"; {in_use} models that are in use were not removed" if in_use else ""
        sizes = f"{gb(need_bytes)} are needed, {gb(max(self._room(place), 0))} are left"
        return ResourceError(f"no room on disk: {sizes}: {limit}{used}")


def _same_disk(one: Evictable, other: Evictable) -> bool:
    return _existing(one.disk).stat().st_dev == _existing(other.disk).stat().st_dev


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    return next(each for each in (path, *path.parents) if each.exists())


def gb(size: int) -> str:
    """Bytes as GB of 2**30, for people."""
    return f"{size / 2**30:.2f} GB"
