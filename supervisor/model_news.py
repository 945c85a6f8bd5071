"""What becomes of models, told to whom it concerns: the runs that wait, the commands that asked, the registration.

Owns: how often a waiting run hears of progress. Where a model goes is residency's to say, who ends is the dispatcher's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec

from gen_worker.model_cache import GB
from gen_worker.pipe.messages import Failure, ModelLoaded, ModelUnloaded
from supervisor.executor_handle import ExecutorHandle
from supervisor.lanes import Lanes
from supervisor.model_commands import ModelCommands
from supervisor.model_source import FetchProgress
from supervisor.observer import Observer
from supervisor.outbox import Outbox
from supervisor.residence import ModelKey, Outcome, Residence
from supervisor.residency import Residency
from supervisor.runs import Run
from supervisor.socket_session import SocketSession
from supervisor.wire_codec import encode_event

log = logging.getLogger(__name__)

PROGRESS_GAP_S: Final = 1.0
"""Between two progress events of a download on one run."""
PROGRESS_DEPTH: Final = 1024
"""While so many messages wait for the scheduler, no progress joins them: it would be old when it is read."""


class ModelNews:
    """See the module: residency's ModelMoves and the source's SourceEvents, and what executors say of models."""

    def __init__(  # noqa: PLR0913  (keyword-only, the parts that it connects)
        self,
        *,
        residency: Residency,
        lanes: Lanes,
        commands: ModelCommands,
        outbox: Outbox,
        end: Callable[[Run, Failure], None],
        moved: Callable[[], None],
        clock: Callable[[], float],
        observer: Observer,
    ) -> None:
        """`end` ends a run that waits; `moved` is called when runs may go on and the registration may differ."""
        self._residency = residency
        self._lanes = lanes
        self._commands = commands
        self._outbox = outbox
        self._end = end
        self._moved = moved
        self._clock = clock
        self._observer = observer
        self._told: dict[str, float] = {}
        """When the progress of a fetch was told last."""
        residency.moves = self

    # -- from the executors -------------------------------------------------------------------

    def model_loaded(self, handle: ExecutorHandle, loaded: ModelLoaded) -> None:
        key = (loaded.model_id, loaded.type_name)
        extra = {"executor": handle.name}
        outcome = self._residency.loaded(handle, loaded)
        if outcome is Outcome.LOADED:
            size = f"{loaded.device_bytes / GB:.2f} GiB on the device"
            log.info("loaded %s as %s in %.2f s, %s", *key, loaded.seconds, size, extra=extra)
            self._tell(loaded.model_id, 1.0, "load")
            self._observer.load_ended(loaded.model_id, loaded.seconds, None)
        elif outcome is Outcome.FAILED and loaded.failure is not None:
            log.error("loading %s as %s failed: %s", *key, loaded.failure.detail, extra=extra)
            self._observer.load_ended(loaded.model_id, loaded.seconds, loaded.failure)
            self.failed({key}, loaded.failure)
        self._moved()

    def model_unloaded(self, handle: ExecutorHandle, unloaded: ModelUnloaded) -> None:
        was_on_device = self._residency.ledger(handle).is_in_vram(unloaded.model_id)
        self._residency.unloaded(handle, unloaded)
        if unloaded.failure is None:
            if was_on_device:  # else its copy left host memory
                commanded = self._commands.unloads(unloaded.model_id)
                self._observer.model_evicted(unloaded.model_id, "command" if commanded else "room")
        else:
            log.error("unloading %s failed: %s", unloaded.model_id, unloaded.failure.detail)
            self._commands.unload_failed(unloaded.model_id, unloaded.failure)
        self._moved()

    def executor_died(self, handle: ExecutorHandle) -> None:
        """To be told before residency forgets what it held."""
        if not handle.recycled:
            return
        held = (model for model in self._residency.held() if model.handle is handle)
        for model_id in sorted({model.model_id for model in held if model.state is not Residence.LOADING}):
            self._observer.model_evicted(model_id, "recycled")

    def failed(self, keys: set[ModelKey], failure: Failure) -> None:
        """What can't be loaded ends the runs that wait for it, unless another executor serves them."""
        for run in self._lanes.stranded(keys):
            self._end(run, failure)
        for model_id in dict.fromkeys(model_id for model_id, _ in keys):
            self._commands.load_ended(model_id, failure)

    # -- residency's moves --------------------------------------------------------------------

    def load_started(self, handle: ExecutorHandle, model_id: str) -> None:  # noqa: ARG002  (the protocol's)
        self._tell(model_id, 0.0, "load")

    def load_refused(self, handle: ExecutorHandle, key: ModelKey, failure: Failure) -> None:
        log.error("%s is not loaded: %s", key[0], failure.detail, extra={"executor": handle.name})
        self._observer.load_ended(key[0], 0.0, failure)
        self.failed({key}, failure)
        self._moved()

    def models_moved(self) -> None:
        self._moved()

    # -- the source's events ------------------------------------------------------------------

    def model_fetched(self, model_id: str) -> None:
        self._told.pop(model_id, None)
        self._residency.fetch_ended(model_id)
        self._tell(model_id, 1.0, "download")
        self._moved()

    def fetch_failed(self, model_id: str, failure: Failure) -> None:
        self._told.pop(model_id, None)
        self._residency.fetch_ended(model_id)
        log.error("model %s can't be had: %s", model_id, failure.detail or failure.safe_message)
        needed = {key for key in self._lanes.keys() if key[0] == model_id}  # noqa: SIM118  (no mapping)
        self.failed(needed or {(model_id, "")}, failure)
        self._moved()

    def fetch_progress(self, model_id: str, done_bytes: int, total_bytes: int, bytes_per_s: float) -> None:
        fraction = FetchProgress(done_bytes, total_bytes).share
        self._residency.downloads.update_download_progress(model_id, fraction)
        now = self._clock()
        if now - self._told.get(model_id, float("-inf")) < PROGRESS_GAP_S:
            return
        self._told[model_id] = now
        figures = {"bytes": done_bytes, "total_bytes": total_bytes, "bytes_per_s": round(bytes_per_s)}
        self._tell(model_id, fraction, "download", figures)

    def disk_changed(self) -> None:
        self._moved()

    # -- inside -------------------------------------------------------------------------------

    def _tell(self, model_id: str, fraction: float, stage: str, figures: dict[str, Any] | None = None) -> None:
        """A progress event for each run that waits for the model. It takes nothing of the run's own window."""
        payload = {"progress": fraction, "stage": stage, "model": model_id, **(figures or {}), "timestamp": time.time()}
        encoded = msgspec.json.encode(payload)
        for run in self._lanes.waiting_for(model_id):
            if self._outbox.depth > PROGRESS_DEPTH:
                return
            if isinstance(run, SocketSession):
                continue  # its events go with its stream, and it has said nothing yet
            run.progress = encoded
            self._outbox.put_event(run.key, encode_event(run.run_id, "job.progress", encoded), 0)
