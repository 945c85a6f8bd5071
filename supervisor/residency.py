"""Which executor holds which models, over all executors: what the dispatcher asks before it places a run.

Owns: who has models at all (executor_models.py has those of one executor), and which models are being fetched. It
decides nothing about runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from gen_worker.model_cache import GB, ModelCache
from gen_worker.pipe.messages import Failure, FunctionInfo, ModelLoaded, ModelUnloaded
from supervisor.device_meter import MemoryLimits, no_room, too_large
from supervisor.devices import Device, DeviceProbe
from supervisor.executor_handle import ExecutorHandle
from supervisor.executor_models import ExecutorModels
from supervisor.model_names import ModelNames, Models
from supervisor.model_sizes import ModelSizes
from supervisor.model_source import FetchProgress, ModelSource
from supervisor.residence import ModelKey, ModelMoves, Outcome, Residence, Room


class HeldModel(NamedTuple):
    """A model object of an executor."""

    handle: ExecutorHandle
    model_id: str
    state: Residence


class Residency:
    """See the module. `moves` is to be set before the first executor is ready."""

    moves: ModelMoves

    def __init__(
        self,
        names: ModelNames,
        source: ModelSource,
        *,
        limits: MemoryLimits,
        probe: DeviceProbe,
        sizes: ModelSizes,
    ) -> None:
        self.names = names
        self._source = source
        self._limits = limits
        self._probe = probe
        self._sizes = sizes
        self._executors: dict[ExecutorHandle, ExecutorModels] = {}
        self.downloads = ModelCache()
        """The fetches under way, and how far they are; of what is on disk the source speaks."""

    # -- executors ----------------------------------------------------------------------------

    def executor_ready(self, handle: ExecutorHandle) -> None:
        """It holds nothing yet: what its device shows now is not its models'."""
        self._executors[handle] = ExecutorModels(
            handle, self._limits, self._probe, self._sizes, self._source, self.moves
        )

    def forget(self, handle: ExecutorHandle) -> None:
        """The executor is gone, and all that it held with it."""
        models = self._executors.pop(handle, None)
        if models is not None:
            models.close()

    def ledger(self, handle: ExecutorHandle) -> ModelCache:
        """The memory of its device."""
        return self._executors[handle].ledger

    # -- what is where ------------------------------------------------------------------------

    def keys(self, info: FunctionInfo, models: Models) -> list[ModelKey]:
        types = {injection.param: injection.type_name for injection in info.injections}
        return [(model_id, types[param]) for param, model_id in models]

    def state(self, handle: ExecutorHandle, keys: Sequence[ModelKey]) -> Residence | None:
        """HOT when it holds all of them; UNLOADING while one leaves; None when one was not asked for; else LOADING."""
        if not keys:
            return Residence.HOT
        models = self._executors.get(handle)
        return None if models is None else models.state(keys)

    def room(self, handle: ExecutorHandle, keys: Sequence[ModelKey]) -> Room:
        """What a load of `keys` would find there now."""
        return self._executors[handle].room(keys)

    def has_failed(self, handle: ExecutorHandle, keys: Sequence[ModelKey]) -> bool:
        """Whether `handle` could not load one of them last time."""
        return not self._executors[handle].failed.isdisjoint(keys)

    def holders(self, model_id: str) -> list[ExecutorHandle]:
        """The executors that have it in memory."""
        return [handle for handle, models in self._executors.items() if models.has(model_id)]

    def loading(self, handle: ExecutorHandle) -> set[ModelKey]:
        models = self._executors.get(handle)
        return set() if models is None else models.loading

    def is_loading(self, model_id: str) -> bool:
        """Whether any executor loads it now."""
        return any(model_id == loading for handle in self._executors for loading, _ in self.loading(handle))

    def hot_models(self) -> list[str]:
        """The union over executors, sorted."""
        return sorted(
            {
                key[0]
                for models in self._executors.values()
                for key, state in models.states.items()
                if state is Residence.HOT
            }
        )

    def held(self) -> Iterator[HeldModel]:
        """Each model that an executor has, or is about to have or to drop."""
        for handle, models in self._executors.items():
            for (model_id, _), state in models.states.items():
                yield HeldModel(handle, model_id, state)

    def bytes_on(self, device: Device) -> int:
        """What the ledger says that models take there."""
        return sum(models.ledger.resident_bytes for models in self._on(device))

    def reserved_on(self, device: Device) -> int:
        """What loads under way are expected to take there."""
        return sum(models.ledger.reserved_bytes for models in self._on(device))

    def model_bytes(self, handle: ExecutorHandle, model_id: str) -> int:
        """What a model takes there; 0 while that is not known."""
        return round(self._executors[handle].ledger.size_gb(model_id) * GB)

    def _on(self, device: Device) -> list[ExecutorModels]:
        return [models for handle, models in self._executors.items() if handle.device.uuid == device.uuid]

    def disk_models(self) -> list[str]:
        """What is whole on disk and not hot, sorted."""
        return sorted(set(self._source.on_disk()) - set(self.hot_models()))

    def fetching(self) -> Mapping[str, FetchProgress]:
        """What is on its way to the disk, for a run, a command or ahead of them."""
        return self._source.fetching()

    def refusal(self, keys: Sequence[ModelKey]) -> Failure | None:
        """Why no executor will have room for `keys`, whatever ends or leaves; None: one may.

        Memory that an idle executor holds beyond its models is no reason: such an executor is recycled here.
        """
        needs = {handle: models.need(keys) for handle, models in self._executors.items()}
        if not needs or not all(handle.device.is_gpu for handle in needs):
            return None
        what = " and ".join(dict.fromkeys(model_id for model_id, _ in keys))
        largest = max(self._probe.devices, key=self._limits.usable)
        need = max(needs.values())
        if need > self._limits.usable(largest):
            return too_large(what, need, largest, self._limits.usable(largest))
        if len(needs) < len(self._probe.devices) or any(self.room(handle, keys) is not Room.NONE for handle in needs):
            return None
        for models in self._executors.values():
            if models.recycle_if_it_leaks():
                return None
        free = {handle: models.memory for handle, models in self._executors.items()}
        readable = [(memory.free_bytes, memory, handle.device) for handle, memory in free.items() if memory is not None]
        if not readable:
            return None  # then there is no measure that could refuse anything
        _, memory, device = max(readable, key=lambda item: item[0])
        return no_room(what, need, device, memory)

    # -- what is to be done -------------------------------------------------------------------

    def prefetch(self) -> None:
        """Have what is likely to be asked for fetched before it is."""
        self._source.prefetch(self.names.wanted())

    def fetch(self, model_id: str) -> bool:
        """Whether its files are here; if not they are on their way when this returns."""
        if self._source.local(model_id) is not None:
            return True
        if self.downloads.get_download_progress(model_id) is None:
            self.downloads.mark_downloading(model_id)
            self._source.fetch(model_id)
        return False

    def fetch_ended(self, model_id: str) -> None:
        self.downloads.mark_download_failed(model_id)  # if it came, the source knows it now

    def load(self, handle: ExecutorHandle, keys: Sequence[ModelKey]) -> bool:
        """Have `handle` load what it lacks of `keys`; false while it is busy with another load."""
        return self._executors[handle].load(keys)

    def loaded(self, handle: ExecutorHandle, message: ModelLoaded) -> Outcome:
        return self._executors[handle].loaded(message)

    def unload(self, handle: ExecutorHandle, model_id: str) -> None:
        """Have `handle` drop a model, when no run uses it any more; none is given to it for that from here on."""
        self._executors[handle].unload(model_id)

    def unloaded(self, handle: ExecutorHandle, message: ModelUnloaded) -> None:
        self._executors[handle].unloaded(message)

    def acquire(self, handle: ExecutorHandle, models: Models) -> None:
        """A run with these models begins there."""
        self._executors[handle].acquire(_ids(models))

    def release(self, handle: ExecutorHandle, models: Models) -> None:
        """The run has ended."""
        held = self._executors.get(handle)
        if held is not None:
            held.release(_ids(models))


def _ids(models: Models) -> Iterable[str]:
    return dict.fromkeys(model_id for _, model_id in models)
