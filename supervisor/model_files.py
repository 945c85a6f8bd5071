"""The models on this host's disk, and those that can be had: the ModelSource over the transfer process.

Owns: which model ids are whole on disk, which are being fetched, and the locks that keep files in use from removal.

1. Local artifacts (WORKER_MODEL_ARTIFACTS_JSON) are here if their directories are; nothing is downloaded for them.
2. What earlier workers downloaded is asked of the transfer process at start.
3. `fetch` has a model downloaded; `prefetch` does so for models that nobody waits for yet, and leaves a place free for
   one that somebody does.
4. A model that is held has its lock file locked shared by this process: whichever worker makes room, and whatever
   becomes of the transfer process, its files stay until this supervisor lets go or dies.
5. What others do to the files, as workers that share the cache directory do, is noticed (disk_watch.py).
"""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import time
from collections import Counter, deque
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Final

from gen_worker.model_refs import ParsedModelRef, canonical_name, parse_model_ref
from gen_worker.pipe.messages import Failure
from gen_worker.weights import WeightsError, weight_bytes
from supervisor.config_parse import LocalModel as Artifact
from supervisor.disk_watch import DiskWatch
from supervisor.model_source import FetchProgress, LocalModel, SourceEvents
from supervisor.observer import Observer
from supervisor.transfer_process import TransferError, TransferProcess
from supervisor.transfers.messages import FetchModel, ListModels, ModelFiles, ModelList
from supervisor.transfers.snapshots import RECORDS

log = logging.getLogger(__name__)

LIST_AGAIN_S: Final = 1.0
"""Until models are listed again when that failed and more had changed meanwhile."""


class HostModels:
    """See the module. All methods belong to the event loop."""

    def __init__(
        self,
        artifacts: Mapping[str, Artifact],
        transfers: TransferProcess,
        *,
        hub: bool,
        at_once: int,
        observer: Observer | None = None,
    ) -> None:
        """`hub` is whether there is one for cozy refs; `at_once` how many models the transfer process takes at once."""
        self._transfers = transfers
        transfers.on_models_removed = self.models_removed
        self._observer = observer or Observer()
        self._hub = hub
        self._prefetch_slots = max(1, at_once - 1)
        self._artifacts = {canonical_name(model_id): found for model_id, found in artifacts.items()}
        self._local: dict[str, LocalModel] = {}
        self._locks: dict[str, str] = {}
        """Lock files of what was downloaded."""
        self._held: Counter[str] = Counter()
        self._lock_fds: dict[str, dict[str, int]] = {}
        """Held model -> lock file -> descriptor; two where its tag came to stand for something newer meanwhile."""
        self._fetching: dict[str, asyncio.Task[None]] = {}
        self._progress: dict[str, FetchProgress] = {}
        """Of those being fetched."""
        self._wanted: set[str] = set()
        """Those being fetched that somebody waits for."""
        self._to_prefetch: deque[str] = deque()
        self._prefetching: set[str] = set()
        self._listing: asyncio.Task[None] | None = None
        self._list_again = False
        self._draining = False
        self._watch = DiskWatch(
            lambda: frozenset(self.on_disk()), models_changed=self._disk_changed, records_changed=self._list_soon
        )
        self.events: SourceEvents | None = None
        """Who is told what became of fetches, and of what changed on disk."""
        for model_id, artifact in self._artifacts.items():
            _check_artifact(model_id, artifact)

    def start(self, cache_dir: Path) -> None:
        """Find out what is on disk from earlier; where nothing was ever downloaded no process is needed for that."""
        directories = [cache_dir / records for records in RECORDS]
        self._watch.start(directories)
        if any(any(directory.glob("*.json")) for directory in directories):
            self._list_soon()

    def drain(self) -> None:
        """Begin nothing more that nobody waits for."""
        self._draining = True
        self._to_prefetch.clear()

    async def stop(self) -> None:
        """Stop what is being fetched, and let go of all files."""
        self.drain()
        await self._watch.stop()
        tasks = [*self._fetching.values(), *([] if self._listing is None else [self._listing])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for model_id in list(self._lock_fds):
            self._unlock(model_id)

    # -- ModelSource --------------------------------------------------------------------------

    def knows(self, model_id: str) -> bool:
        """Whether it is here or could be fetched, or should be here as a local artifact."""
        if model_id in self._local or model_id in self._artifacts:
            return True
        ref = _parsed(model_id)
        return ref is not None and (ref.scheme == "hf" or self._hub)

    def local(self, model_id: str) -> LocalModel | None:
        """Its files, when they are whole on disk now. A local artifact may be mounted later, or be gone again."""
        artifact = self._artifacts.get(model_id)
        if artifact is not None:
            return self._local_artifact(model_id, artifact)
        found = self._local.get(model_id)
        if found is not None and not Path(found.root_dir).is_dir():
            self._lost(model_id)
            return None
        return found

    def fetch(self, model_id: str) -> None:
        """Have it fetched unless that is under way; `model_fetched` or `fetch_failed` follows."""
        if model_id in self._artifacts:
            asyncio.get_running_loop().call_soon(self._tell_artifact, model_id)
            return
        self._wanted.add(model_id)
        self._fetch(model_id)

    def on_disk(self) -> Collection[str]:
        """The ids of all that is whole on disk."""
        roots = {model_id: found.root_dir for model_id, found in self._local.items()}
        roots |= {model_id: artifact.root_dir for model_id, artifact in self._artifacts.items()}
        # Looked at anew: another worker may have removed one to make room, and a mount comes and goes.
        return {model_id for model_id, root_dir in roots.items() if _is_there(root_dir)}

    def fetching(self) -> Mapping[str, FetchProgress]:
        """Those on their way, whether anybody waits for them or not."""
        return self._progress

    def hold(self, model_id: str) -> None:
        """Its files are in use and are not removed until as many `release` calls followed."""
        self._held[model_id] += 1
        path = self._locks.get(model_id)
        if path is not None and path not in self._lock_fds.get(model_id, {}):
            self._lock(model_id, path)

    def release(self, model_id: str) -> None:
        """One user less."""
        if self._held[model_id] > 1:
            self._held[model_id] -= 1
            return
        del self._held[model_id]
        self._unlock(model_id)

    # -- before they are needed ---------------------------------------------------------------

    def prefetch(self, model_ids: Iterable[str]) -> None:
        """Have these fetched in this order, instead of what earlier calls named and has not begun.

        A tag that is on disk is looked up again at the hub: it may stand for something newer by now. What is no ref, or
        a local artifact, is passed over; a failure is only logged, since nobody waits.
        """
        if self._draining:
            return
        names = dict.fromkeys(map(canonical_name, model_ids))
        self._to_prefetch = deque(filter(self._may_prefetch, names))
        self._prefetch_more()

    def _may_prefetch(self, model_id: str) -> bool:
        ref = _parsed(model_id)
        if ref is None or model_id in self._artifacts or not self.knows(model_id):
            return False
        return model_id not in self._local or (self._hub and ref.scheme == "cozy" and ref.digest is None)

    def _prefetch_more(self) -> None:
        while self._to_prefetch and len(self._prefetching) < self._prefetch_slots:
            model_id = self._to_prefetch.popleft()
            if self._fetch(model_id):
                self._prefetching.add(model_id)

    # -- inside -------------------------------------------------------------------------------

    def _fetch(self, model_id: str) -> bool:
        """False when it is under way already."""
        if model_id in self._fetching:
            return False
        task = asyncio.get_running_loop().create_task(self._fetch_one(model_id))
        self._fetching[model_id] = task
        self._progress[model_id] = FetchProgress()
        return True

    async def _fetch_one(self, model_id: str) -> None:
        started, first, last = time.monotonic(), -1, 0

        def progress(done_bytes: int, total_bytes: int, bytes_per_s: float) -> None:
            nonlocal first, last
            first, last = done_bytes if first < 0 else first, done_bytes
            told = self._progress[model_id] = self._progress[model_id].then(done_bytes, total_bytes)
            if self.events is not None:
                self.events.fetch_progress(model_id, told.done_bytes, told.total_bytes, bytes_per_s)

        failure: Failure | None = None
        try:
            # Until it is held it could be removed to make room, by another worker or before we knew it.
            while not self._take(await self._transfers.call(FetchModel(model_id), ModelFiles, progress)):
                log.warning("%s was removed from disk before it was used: fetched again", model_id)
        except TransferError as error:
            failure = error.failure
        finally:
            self._fetching.pop(model_id, None)
            self._progress.pop(model_id, None)
            self._prefetching.discard(model_id)
        if first >= 0 or failure is not None:  # else it was here already
            self._observer.download_ended(model_id, last - max(0, first), time.monotonic() - started, failure)
        self._fetched(model_id, failure)
        self._prefetch_more()

    def _fetched(self, model_id: str, failure: Failure | None) -> None:
        wanted = model_id in self._wanted
        self._wanted.discard(model_id)
        if failure is not None:
            if wanted and self.events is not None:
                self.events.fetch_failed(model_id, failure)
            else:
                log.error("model %s can't be fetched: %s", model_id, failure.detail or failure.safe_message)
            return
        try:
            if self.events is not None:
                self.events.model_fetched(model_id)
            self._disk_changed()
        finally:
            self.release(model_id)

    def _take(self, found: ModelFiles) -> bool:
        """It is on disk: know it and hold it; False when it was removed again meanwhile."""
        self._know(found)
        self.hold(found.ref)
        if self.local(found.ref) is not None:
            return True
        self.release(found.ref)
        return False

    def _know(self, found: ModelFiles) -> None:
        self._local[found.ref] = LocalModel(
            found.root_dir, {}, found.metadata, _counted(found.ref, Path(found.root_dir))
        )
        self._locks[found.ref] = found.lock_file

    def _list_soon(self) -> None:
        """What the records say has changed, by us or by another worker: look at them."""
        if self._listing is None or self._listing.done():
            self._listing = asyncio.get_running_loop().create_task(self._list())
        else:
            self._list_again = True

    async def _list(self) -> None:
        try:
            listed = await self._transfers.call(ListModels(), ModelList)
        except TransferError as error:
            log.error("what models are on disk is not known: %s", error)
            if self._list_again:
                self._list_again = False
                asyncio.get_running_loop().call_later(LIST_AGAIN_S, self._list_soon)
            return
        fresh = [model for model in listed.models if self._is_news(model)]
        for model in fresh:
            self._know(model)
        if fresh:
            log.info("%d downloaded models are on disk, %d of them were not known", len(listed.models), len(fresh))
            self._disk_changed()
        if self._list_again:
            self._list_again = False
            self._listing = asyncio.get_running_loop().create_task(self._list())

    def _is_news(self, model: ModelFiles) -> bool:
        if model.ref in self._artifacts or model.ref in self._fetching:
            return False
        known = self._local.get(model.ref)
        return known is None or known.root_dir != model.root_dir

    def models_removed(self, refs: Iterable[str]) -> None:
        """The transfer process took these from disk to make room."""
        for ref in refs:
            if ref in self._local and ref not in self._artifacts:
                self._lost(ref)

    def _lost(self, model_id: str) -> None:
        self._local.pop(model_id, None)
        self._locks.pop(model_id, None)
        self._disk_changed()

    def _disk_changed(self) -> None:
        self._watch.knows()
        if self.events is not None:
            self.events.disk_changed()

    def _lock(self, model_id: str, path: str) -> None:
        """Keep the files of what was downloaded from being removed."""
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            log.error("the files of %s can't be kept from being removed: %s", model_id, error)
            return
        try:
            fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            os.utime(fd)
        except OSError as error:  # BlockingIOError: it is being removed at this moment
            log.warning("the files of %s can't be kept from being removed: %s", model_id, error)
            os.close(fd)
            self._lost(model_id)
            return
        self._lock_fds.setdefault(model_id, {})[path] = fd

    def _unlock(self, model_id: str) -> None:
        for fd in self._lock_fds.pop(model_id, {}).values():
            os.utime(fd)  # it was in use until now
            os.close(fd)

    # -- local artifacts ----------------------------------------------------------------------

    def _local_artifact(self, model_id: str, artifact: Artifact) -> LocalModel | None:
        root = Path(artifact.root_dir)
        if not root.is_dir():
            self._local.pop(model_id, None)
            return None
        if model_id not in self._local:  # the weights are counted once
            weights = _counted(model_id, root)
            self._local[model_id] = LocalModel(artifact.root_dir, artifact.files, artifact.metadata, weights)
        return self._local[model_id]

    def _tell_artifact(self, model_id: str) -> None:
        """There is nothing to fetch: say whether it is here."""
        if self.events is None:
            return
        if self.local(model_id) is not None:
            self.events.model_fetched(model_id)
            return
        where = f"there is no directory {self._artifacts[model_id].root_dir}"
        detail = f"model {model_id} of WORKER_MODEL_ARTIFACTS_JSON can't be loaded: {where}"
        self.events.fetch_failed(model_id, Failure("fatal", "model can't be loaded: its files are missing", detail))


def _is_there(root_dir: str) -> bool:
    """False also for what can't be looked at: it could not be loaded either."""
    try:
        return Path(root_dir).is_dir()
    except OSError:
        return False


def _counted(model_id: str, root: Path) -> int:
    """Bytes of the weights; 0 when they can't be read, which the load will then say."""
    try:
        return weight_bytes(root)
    except (OSError, WeightsError) as error:
        log.warning("the weights of model %s can't be counted: %s", model_id, error)
        return 0


def _check_artifact(model_id: str, artifact: Artifact) -> None:
    """Say at start what is missing; it is looked for again when it is needed."""
    root = Path(artifact.root_dir)
    if not root.is_dir():
        log.error("WORKER_MODEL_ARTIFACTS_JSON: model %s can't be loaded: there is no directory %s", model_id, root)
        return
    for name in artifact.files.values():
        if not (root / name).exists():
            log.warning("WORKER_MODEL_ARTIFACTS_JSON: model %s names %s, which is not there", model_id, root / name)


def _parsed(model_id: str) -> ParsedModelRef | None:
    try:
        return parse_model_ref(model_id)
    except ValueError:
        return None
