"""The ledger of one device's model memory: what is resident, reserved and in use, and who goes next.

Owns: the bookkeeping, and nothing else: it holds no device, loads nothing and asks nobody. The worker runs on it, one
per executor (supervisor/executor_models.py drives it with what it measured); anybody else may use one for memory of
their own.
All methods may be called from any thread.

Sizes are in GB of 2**30 bytes, as the settings have them.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final

GB: Final = 2**30
DEFAULT_MARGIN_GB: Final = 3.5
"""WORKER_VRAM_SAFETY_MARGIN_GB's default."""
DEFAULT_CONCURRENT_DOWNLOADS: Final = 2
"""WORKER_MAX_CONCURRENT_DOWNLOADS' default."""


class ModelLocation(StrEnum):
    """The best place where a model is."""

    VRAM = "vram"
    DISK = "disk"
    DOWNLOADING = "downloading"


@dataclass(frozen=True, slots=True)
class ModelCacheStats:
    """A ledger at one moment. Without a cap the total and what is available are 0."""

    vram_models: list[str]
    disk_models: list[str]
    downloading_models: list[str]
    vram_used_gb: float
    vram_total_gb: float
    vram_available_gb: float
    total_models: int
    vram_model_count: int
    disk_model_count: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class _Entry:
    __slots__ = ("disk_path", "host_gb", "in_vram", "pins", "pipeline", "progress", "reserved_gb", "size_gb", "vram_gb")

    def __init__(self) -> None:
        self.pipeline: Any = None
        self.in_vram = False
        self.vram_gb = 0.0
        self.reserved_gb = 0.0
        self.host_gb: float | None = None
        """None: no copy in host memory."""
        self.disk_path: Path | None = None
        self.size_gb = 0.0
        """On disk."""
        self.progress: float | None = None
        """Of its download, 0 to 1; None: none is under way."""
        self.pins = 0

    @property
    def location(self) -> ModelLocation | None:
        """None: known by name, and nowhere (or only in host memory)."""
        if self.in_vram:
            return ModelLocation.VRAM
        if self.progress is not None:
            return ModelLocation.DOWNLOADING
        return None if self.disk_path is None else ModelLocation.DISK

    def leave_vram(self) -> None:
        self.in_vram, self.vram_gb, self.pipeline = False, 0.0, None

    @property
    def is_nowhere(self) -> bool:
        return self.location is None and self.host_gb is None and not self.reserved_gb and not self.pins


class ModelCache:
    """See the module.

    `max_vram_gb` caps what models may hold together; None: no cap. `vram_safety_margin_gb` is what a load must leave
    free of the memory that was measured. `max_host_gb` caps the copies in host memory (WORKER_HOST_CACHE_GB).
    """

    def __init__(
        self,
        max_vram_gb: float | None = None,
        vram_safety_margin_gb: float | None = None,
        model_cache_dir: str | os.PathLike[str] | None = None,
        *,
        max_concurrent_downloads: int = DEFAULT_CONCURRENT_DOWNLOADS,
        max_host_gb: float = 0.0,
    ) -> None:
        self.max_vram_gb = None if max_vram_gb is None else float(max_vram_gb)
        self.vram_safety_margin_gb = DEFAULT_MARGIN_GB if vram_safety_margin_gb is None else vram_safety_margin_gb
        self.model_cache_dir = None if model_cache_dir is None else Path(model_cache_dir)
        self.max_host_gb = max_host_gb
        self._max_downloads = max_concurrent_downloads
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        """Least recently used first."""
        self._lock = threading.RLock()

    # -- what happened to a model -------------------------------------------------------------

    def register_model(
        self,
        model_id: str,
        location: ModelLocation | str | None = None,
        size_gb: float = 0.0,
        disk_path: str | os.PathLike[str] | None = None,
        pipeline: object = None,
    ) -> None:
        """Make a model known; with a location, put it there as the mark_ method of that would."""
        with self._lock:
            entry = self._entry(model_id)
            if disk_path is not None or location == ModelLocation.DISK:
                self.mark_cached_to_disk(model_id, disk_path or self._default_path(model_id), size_gb)
            if location == ModelLocation.VRAM:
                self.mark_loaded_to_vram(model_id, pipeline, size_gb)
            elif location == ModelLocation.DOWNLOADING:
                self.mark_downloading(model_id)
            elif size_gb:
                entry.size_gb = size_gb

    def mark_loaded_to_vram(self, model_id: str, pipeline: object, size_gb: float, *, evict: bool = True) -> list[str]:
        """It is in VRAM as `pipeline` and takes `size_gb` there, instead of what was reserved or recorded before.

        Other models that are not in use leave, the least recently used first, until all fits; their ids are returned.
        With `evict` false nobody leaves: for a caller who has objects to destroy first.
        """
        with self._lock:
            entry = self._touch(model_id)
            entry.pipeline, entry.in_vram, entry.vram_gb = pipeline, True, float(size_gb)
            entry.reserved_gb, entry.host_gb, entry.progress = 0.0, None, None
            if not evict:
                return []
            evicted = self.plan_eviction(0.0, keep=(model_id,))
            # What can't be made to fit is recorded all the same: it is there.
            evicted = self.evictable(keep=(model_id,)) if evicted is None else evicted
            for other in evicted:
                self.unload_model(other)
            return evicted

    def mark_cached_to_disk(self, model_id: str, disk_path: str | os.PathLike[str], size_gb: float = 0.0) -> None:
        """Its files are whole under `disk_path`. In VRAM it stays."""
        with self._lock:
            entry = self._touch(model_id)
            entry.disk_path, entry.size_gb, entry.progress = Path(disk_path), float(size_gb), None

    def mark_downloading(self, model_id: str, progress: float = 0.0) -> None:
        """Its files are on their way; `progress` from 0 to 1."""
        with self._lock:
            self._touch(model_id).progress = _fraction(progress)

    def update_download_progress(self, model_id: str, progress: float) -> None:
        """Of a download that is under way; for any other model it is nothing."""
        with self._lock:
            entry = self._entries.get(model_id)
            if entry is not None and entry.progress is not None:
                entry.progress = _fraction(progress)

    def mark_download_failed(self, model_id: str) -> None:
        """Its files do not come: it is where it was before."""
        with self._lock:
            entry = self._entries.get(model_id)
            if entry is not None:
                entry.progress = None
                self._forget_if_nowhere(model_id)

    def unload_model(self, model_id: str) -> bool:
        """Take it out of VRAM: to DISK when its files are there, else it is forgotten.

        False when it was not in VRAM, or is in use and stays.
        """
        with self._lock:
            entry = self._entries.get(model_id)
            if entry is None or not entry.in_vram or entry.pins:
                return False
            entry.leave_vram()
            self._forget_if_nowhere(model_id)
            return True

    # -- questions ----------------------------------------------------------------------------

    def get_pipeline(self, model_id: str) -> Any:
        """What it was loaded as, None when it is not in VRAM. This is a use: it becomes the most recently used."""
        with self._lock:
            entry = self._entries.get(model_id)
            if entry is None or not entry.in_vram:
                return None
            self._entries.move_to_end(model_id)
            return entry.pipeline

    def has_model(self, model_id: str) -> bool:
        with self._lock:
            return model_id in self._entries

    def is_in_vram(self, model_id: str) -> bool:
        return self._is_at(model_id, ModelLocation.VRAM)

    def is_on_disk(self, model_id: str) -> bool:
        """Whether it is whole on disk and not in VRAM."""
        return self._is_at(model_id, ModelLocation.DISK)

    def get_vram_models(self) -> list[str]:
        """The least recently used first, as in all these lists."""
        return self._at(ModelLocation.VRAM)

    def get_disk_models(self) -> list[str]:
        """What is whole on disk and not in VRAM."""
        return self._at(ModelLocation.DISK)

    def get_downloading_models(self) -> list[str]:
        return self._at(ModelLocation.DOWNLOADING)

    def get_all_models(self) -> list[str]:
        with self._lock:
            return list(self._entries)

    def get_available_models(self) -> list[str]:
        """What can be used without a download: in VRAM or on disk."""
        return self._at(ModelLocation.VRAM, ModelLocation.DISK)

    def are_models_available(self, model_ids: Iterable[str]) -> bool:
        return set(model_ids) <= set(self.get_available_models())

    def can_fit_in_vram(self, size_gb: float) -> bool:
        """Whether it fits beside what is resident and reserved now, without an eviction."""
        with self._lock:
            return self.shortage_gb(size_gb) <= 0

    def get_download_progress(self, model_id: str) -> float | None:
        """From 0 to 1; None when no download is under way."""
        with self._lock:
            entry = self._entries.get(model_id)
            return None if entry is None else entry.progress

    def get_max_concurrent_downloads(self) -> int:
        return self._max_downloads

    def get_stats(self) -> ModelCacheStats:
        with self._lock:
            vram, disk = self.get_vram_models(), self.get_disk_models()
            used, total = self.vram_used_gb, self.max_vram_gb or 0.0
            return ModelCacheStats(
                vram_models=vram,
                disk_models=disk,
                downloading_models=self.get_downloading_models(),
                vram_used_gb=used,
                vram_total_gb=total,
                vram_available_gb=max(0.0, total - used),
                total_models=len(self._entries),
                vram_model_count=len(vram),
                disk_model_count=len(disk),
            )

    # -- room ---------------------------------------------------------------------------------

    @property
    def vram_used_gb(self) -> float:
        """What is resident and reserved."""
        with self._lock:
            return sum(entry.vram_gb + entry.reserved_gb for entry in self._entries.values())

    @property
    def resident_bytes(self) -> int:
        """What the models in VRAM take."""
        with self._lock:
            return round(sum(entry.vram_gb for entry in self._entries.values()) * GB)

    @property
    def reserved_bytes(self) -> int:
        """What the loads under way will take."""
        with self._lock:
            return round(sum(entry.reserved_gb for entry in self._entries.values()) * GB)

    def size_gb(self, model_id: str) -> float:
        """What it takes in VRAM; 0 when it is not there."""
        with self._lock:
            entry = self._entries.get(model_id)
            return 0.0 if entry is None else entry.vram_gb

    def reserve(self, model_id: str, size_gb: float) -> None:
        """A load that will take `size_gb` more is under way; mark_loaded_to_vram or cancel_reservation ends that."""
        with self._lock:
            self._entry(model_id).reserved_gb = size_gb

    def cancel_reservation(self, model_id: str) -> None:
        with self._lock:
            entry = self._entries.get(model_id)
            if entry is not None:
                entry.reserved_gb = 0.0
                self._forget_if_nowhere(model_id)

    def pin(self, model_id: str) -> None:
        """It is used and does not leave until as many `unpin` calls followed. This is a use, as in get_pipeline."""
        with self._lock:
            self._touch(model_id).pins += 1

    def unpin(self, model_id: str) -> None:
        """One user less. Raises ValueError when there was none."""
        with self._lock:
            entry = self._entries.get(model_id)
            if entry is None or not entry.pins:
                raise ValueError(f"model {model_id} is not in use")
            entry.pins -= 1
            self._forget_if_nowhere(model_id)

    def is_pinned(self, model_id: str) -> bool:
        with self._lock:
            entry = self._entries.get(model_id)
            return entry is not None and entry.pins > 0

    def evictable(self, keep: Collection[str] = ()) -> list[str]:
        """Who may leave VRAM: not in use and not of `keep`, the least recently used first."""
        with self._lock:
            return [
                model_id
                for model_id, entry in self._entries.items()
                if entry.in_vram and not entry.pins and model_id not in keep
            ]

    def shortage_gb(self, size_gb: float, free_gb: float | None = None) -> float:
        """What has to leave before `size_gb` more fit: under the cap and, given what is free, beside the margin.

        0 or less: it fits.
        """
        over = [] if self.max_vram_gb is None else [self.vram_used_gb + size_gb - self.max_vram_gb]
        if free_gb is not None:
            over.append(size_gb + self.vram_safety_margin_gb - free_gb)
        return max(over, default=0.0)

    def plan_eviction(
        self, size_gb: float, free_gb: float | None = None, keep: Collection[str] = ()
    ) -> list[str] | None:
        """Who leaves, in order, so that `size_gb` more fit by what was recorded; None: not even all of them would do.

        What takes nothing makes no room, so it stays.
        """
        with self._lock:
            shortage, leaving = self.shortage_gb(size_gb, free_gb), []
            for model_id in self.evictable(keep):
                if shortage <= 0:
                    break
                if size := self._entries[model_id].vram_gb:
                    leaving.append(model_id)
                    shortage -= size
            return leaving if shortage <= 0 else None

    # -- copies in host memory ----------------------------------------------------------------

    def mark_moved_to_host(self, model_id: str, size_gb: float) -> None:
        """It left VRAM for host memory, where it takes `size_gb`."""
        with self._lock:
            entry = self._touch(model_id)
            entry.leave_vram()
            entry.host_gb = size_gb

    def drop_from_host(self, model_id: str) -> None:
        with self._lock:
            entry = self._entries.get(model_id)
            if entry is not None:
                entry.host_gb = None
                self._forget_if_nowhere(model_id)

    def is_in_host(self, model_id: str) -> bool:
        with self._lock:
            entry = self._entries.get(model_id)
            return entry is not None and entry.host_gb is not None

    def get_host_models(self) -> list[str]:
        with self._lock:
            return [model_id for model_id, entry in self._entries.items() if entry.host_gb is not None]

    @property
    def host_used_gb(self) -> float:
        with self._lock:
            return sum(entry.host_gb or 0.0 for entry in self._entries.values())

    def plan_host_eviction(self, size_gb: float, keep: Collection[str] = ()) -> list[str] | None:
        """Whose copies go, in order, so that one of `size_gb` fits in max_host_gb; None: beside `keep` it can't."""
        with self._lock:
            if not 0 < size_gb <= self.max_host_gb:
                return None
            shortage, leaving = self.host_used_gb + size_gb - self.max_host_gb, []
            for model_id in self.get_host_models():
                if shortage <= 0:
                    break
                if model_id not in keep:
                    leaving.append(model_id)
                    shortage -= self._entries[model_id].host_gb or 0.0
            return leaving if shortage <= 0 else None

    # -- inside -------------------------------------------------------------------------------

    def _entry(self, model_id: str) -> _Entry:
        return self._entries.setdefault(model_id, _Entry())

    def _touch(self, model_id: str) -> _Entry:
        entry = self._entry(model_id)
        self._entries.move_to_end(model_id)
        return entry

    def _forget_if_nowhere(self, model_id: str) -> None:
        if self._entries[model_id].is_nowhere:
            del self._entries[model_id]

    def _is_at(self, model_id: str, location: ModelLocation) -> bool:
        with self._lock:
            entry = self._entries.get(model_id)
            return entry is not None and entry.location is location

    def _at(self, *locations: ModelLocation) -> list[str]:
        with self._lock:
            return [model_id for model_id, entry in self._entries.items() if entry.location in locations]

    def _default_path(self, model_id: str) -> Path:
        return (self.model_cache_dir or Path()) / model_id


def _fraction(progress: float) -> float:
    return min(1.0, max(0.0, float(progress)))
