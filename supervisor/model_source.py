"""Where model files come from, as residency sees it: a model is on this disk, or it can be fetched.

Owns: the seam, and the models of WORKER_MODEL_ARTIFACTS_JSON. A ModelSource knows which models are whole on disk and
fetches others; it decides nothing about memory. All calls are made on the supervisor's loop and return at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gen_worker.model_refs import canonical_ref
from gen_worker.pipe.messages import Failure
from gen_worker.weights import WeightsError, weight_bytes

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class LocalModel:
    """A model whose files are whole on this disk."""

    root_dir: str
    files: Mapping[str, str]
    """Named files, relative to root_dir or absolute; may be empty."""
    metadata: Mapping[str, str]
    weight_bytes: int
    """Bytes of its weight files: the first estimate of what it takes on a device; 0 when it has none."""


class ModelSource(Protocol):
    """Model ids are canonical refs, or any name of a local artifact."""

    def knows(self, model_id: str) -> bool:
        """Whether it is here or could be fetched: what a well-formed ref is when downloads are configured."""

    def local(self, model_id: str) -> LocalModel | None:
        """Its files, when they are whole on disk now."""

    def fetch(self, model_id: str) -> None:
        """Have it fetched unless that is under way; `model_fetched` or `fetch_failed` follows later."""

    def on_disk(self) -> Collection[str]:
        """The ids of all that is whole on disk."""

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


class Artifacts(Protocol):
    """A local model directory, as WORKER_MODEL_ARTIFACTS_JSON gives it."""

    @property
    def root_dir(self) -> str: ...
    @property
    def files(self) -> Mapping[str, str]: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...


class LocalArtifacts:
    """A ModelSource of directories that are there, or are not: nothing can be fetched.

    `events` is to be set before the first fetch.
    """

    events: SourceEvents

    def __init__(self, artifacts: Mapping[str, Artifacts]) -> None:
        self._artifacts = {canonical(model_id): found for model_id, found in artifacts.items()}
        self._found: dict[str, LocalModel] = {}

    def knows(self, model_id: str) -> bool:
        return model_id in self._artifacts

    def local(self, model_id: str) -> LocalModel | None:
        """As ModelSource has it; the weights are counted once."""
        artifacts = self._artifacts.get(model_id)
        if artifacts is None or not Path(artifacts.root_dir).is_dir():
            return None
        found = self._found.get(model_id)
        if found is None:
            size = _counted(model_id, Path(artifacts.root_dir))
            found = LocalModel(artifacts.root_dir, dict(artifacts.files), dict(artifacts.metadata), size)
            self._found[model_id] = found
        return found

    def fetch(self, model_id: str) -> None:
        """Say what is there now; it can only have been mounted or removed meanwhile."""
        asyncio.get_running_loop().call_soon(self._tell, model_id)

    def on_disk(self) -> Collection[str]:
        return [model_id for model_id, found in self._artifacts.items() if Path(found.root_dir).is_dir()]

    def hold(self, model_id: str) -> None:
        """Nothing: these directories are not this worker's to remove."""

    def release(self, model_id: str) -> None:
        """Nothing, as in `hold`."""

    def _tell(self, model_id: str) -> None:
        if self.local(model_id) is not None:
            self.events.model_fetched(model_id)
            return
        artifacts = self._artifacts.get(model_id)
        where = f"there is no directory {artifacts.root_dir}" if artifacts else "it is not named there"
        detail = f"model {model_id} of WORKER_MODEL_ARTIFACTS_JSON can't be loaded: {where}"
        self.events.fetch_failed(model_id, Failure("fatal", "model can't be loaded: its files are missing", detail))


def _counted(model_id: str, root: Path) -> int:
    """Bytes of the weights; 0 when they can't be read, which the load will then say."""
    try:
        return weight_bytes(root)
    except (OSError, WeightsError) as error:
        log.warning("the weights of model %s can't be counted: %s", model_id, error)
        return 0


def canonical(ref: str) -> str:
    """The canonical form of a ref; a name that is no ref (a local model may have any) stays as it is."""
    try:
        return canonical_ref(ref)
    except ValueError:
        return ref
