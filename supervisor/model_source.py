"""Where model files come from, as residency sees it: a model is on this disk, or it can be fetched.

Owns: the seam. A ModelSource knows which models are whole on disk and fetches others; it decides nothing about memory.
All calls are made on the supervisor's loop and return at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from gen_worker.pipe.messages import Failure


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model whose files are whole on this disk."""

    root_dir: str
    files: Mapping[str, str]
    """Named files, relative to root_dir or absolute; may be empty."""
    metadata: Mapping[str, str]
    weight_bytes: int
    """Bytes of its weight files: the first estimate of what it takes on a device; 0 when it has none."""


@dataclass(frozen=True, slots=True)
class FetchProgress:
    """How far a fetch is."""

    done_bytes: int = 0
    total_bytes: int = 0
    """0: not known yet."""

    @property
    def share(self) -> float:
        """0 to 1."""
        return min(1.0, self.done_bytes / self.total_bytes) if self.total_bytes else 0.0

    def then(self, done_bytes: int, total_bytes: int) -> FetchProgress:
        """What is told next. A fetch that had to begin again (its process died) goes on when it is as far as it was."""
        now = FetchProgress(done_bytes, total_bytes)
        return now if (now.share, now.done_bytes) >= (self.share, self.done_bytes) else self


class ModelSource(Protocol):
    """Model ids are canonical refs, or any name of a local artifact."""

    def knows(self, model_id: str) -> bool:
        """Whether it is here or could be fetched: what a well-formed ref is when downloads are configured."""

    def local(self, model_id: str) -> LocalModel | None:
        """Its files, when they are whole on disk now."""

    def fetch(self, model_id: str) -> None:
        """Have it fetched unless that is under way; `model_fetched` or `fetch_failed` follows later."""

    def prefetch(self, model_ids: Iterable[str]) -> None:
        """Have these fetched, instead of what earlier calls named, while nobody waits for them yet."""

    def on_disk(self) -> Collection[str]:
        """The ids of all that is whole on disk."""

    def fetching(self) -> Mapping[str, FetchProgress]:
        """Those on their way, and how far they are."""

    def hold(self, model_id: str) -> None:
        """Its files are in use and are not removed until as many `release` calls followed."""

    def release(self, model_id: str) -> None:
        """One user less."""


class SourceEvents(Protocol):
    """Who is told what became of fetches."""

    def model_fetched(self, model_id: str) -> None:
        """It is whole on disk: `local` gives it."""

    def fetch_failed(self, model_id: str, failure: Failure) -> None:
        """It did not come; a later `fetch` tries again."""

    def fetch_progress(self, model_id: str, done_bytes: int, total_bytes: int, bytes_per_s: float) -> None:
        """At most a few times a second; total_bytes is 0 while it is unknown."""

    def disk_changed(self) -> None:
        """`on_disk` differs: something came, or was removed for room."""
