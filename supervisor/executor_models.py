"""The models of one executor: what it holds, what it is told to load or drop, and what its device shows of that.

Owns: the states of its model objects and the one ModelCache ledger of its device, which it drives by measurement:

1. A load needs its estimate: what the model took last time, else its weights. Idle models leave, the least recently
   used first, until the probe shows estimate and margin free, under the cap. A model in use never leaves.
2. Orders go to the executor one at a time, so that the probe, read before and after, shows what each did.
3. After an unload what came back is compared with what was recorded. Memory that stays out costs the executor its
   place: it is recycled (drained, restarted), the one way that surely returns it.

A model object is named by its id and by the type it was loaded as, since one directory may serve as pipeline for one
function and as tokenizer for another; what leaves is the model, with all of its objects.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from gen_worker.injection import ModelArtifacts, qualified_name
from gen_worker.model_cache import GB, ModelCache
from gen_worker.pipe.messages import LoadModel, ModelLoaded, ModelUnloaded
from supervisor.device_meter import DeviceMeter, MemoryLimits, gib, no_room, stayed_out
from supervisor.devices import DeviceMemory, DeviceProbe
from supervisor.executor_handle import ExecutorHandle, HandleState
from supervisor.model_sizes import ModelSizes
from supervisor.model_source import LocalModel, ModelSource
from supervisor.residence import ModelKey, ModelMoves, Outcome, Residence, Room

log = logging.getLogger(__name__)

OVERHEAD_BYTES: Final = 2 * 2**30
"""What an idle executor may hold beyond its models before it is taken for a leak: the CUDA context, workspaces of
libraries and what torch's allocator keeps of past activations."""
_FILES_TYPE: Final = qualified_name(ModelArtifacts)


@dataclass(frozen=True, slots=True)
class _Order:
    """What the executor does now, and the device before it."""

    key: ModelKey
    """Of an unload: the model's id and ""."""
    expected: int
    """Bytes that it takes or gives back."""
    weights: int
    before: DeviceMemory | None
    uses: int | None
    """How many runs had begun here; None: some were going on, and the probe does not speak of models alone."""


@dataclass(slots=True)
class _Job:
    """Models that were asked for together and stay together."""

    keys: deque[ModelKey]
    keep: frozenset[str]


class ExecutorModels:
    """See the module. `moves` is told what happens without being asked for."""

    def __init__(
        self,
        handle: ExecutorHandle,
        limits: MemoryLimits,
        probe: DeviceProbe,
        sizes: ModelSizes,
        source: ModelSource,
        moves: ModelMoves,
    ) -> None:
        self.handle = handle
        self._limits = limits
        self._meter = DeviceMeter(handle.device, probe)
        self._sizes = sizes
        self._source = source
        self._moves = moves
        self._is_gpu = handle.device.is_gpu
        cap = limits.usable(handle.device) / GB if self._is_gpu else None
        self.ledger = ModelCache(cap, limits.margin_gb, max_host_gb=limits.host_gb)
        self.states: dict[ModelKey, Residence] = {}
        self.failed: set[ModelKey] = set()
        """What could not be loaded here last time."""
        self._job: _Job | None = None
        self._order: _Order | None = None
        self._leaving: dict[str, bool] = {}
        """Models on their way out, in order -> whether they may stay in host memory."""
        self._held: set[str] = set()
        """Whose files must stay on disk."""
        self._uses = 0

    # -- questions ----------------------------------------------------------------------------

    def state(self, keys: Sequence[ModelKey]) -> Residence | None:
        """HOT when it holds all; UNLOADING when one leaves; None when one was not asked for; else LOADING."""
        states = [self.states.get(key) for key in keys]
        if Residence.UNLOADING in states:
            return Residence.UNLOADING
        if None in states:
            return None
        return Residence.HOT if all(state is Residence.HOT for state in states) else Residence.LOADING

    def room(self, keys: Sequence[ModelKey]) -> Room:
        """What a load of `keys` would find here now."""
        if self._job is not None or self.handle.state is not HandleState.READY:
            return Room.BUSY
        need = self.need(keys)
        if not self._is_gpu or not need:
            return Room.FREE
        if need > self._limits.usable(self.handle.device):
            return Room.NONE
        memory = self._meter.read()
        if memory is None:
            return Room.FREE  # it can't be read, which is logged: the load itself will show
        leaving = self._plan(need, memory, frozenset(model_id for model_id, _ in keys))
        if leaving is not None:
            return Room.EVICT if leaving else Room.FREE
        return Room.BUSY if self._leaving or self.handle.load else Room.NONE

    def need(self, keys: Sequence[ModelKey]) -> int:
        """Bytes that loading what is missing of `keys` is expected to take; the weights of a model count once."""
        total, by_weights = 0, set()
        for key in keys:
            found = self._source.local(key[0])
            if key in self.states or found is None:
                continue
            if self._sizes.measured(*key, found.weight_bytes) is None:
                if key[0] in by_weights:
                    continue  # pipeline and tokenizer of one directory, say: only one of them can have them
                by_weights.add(key[0])
            total += self._estimate(key, found)
        return total

    def recycle_if_it_leaks(self) -> bool:
        """Recycle it when its device shows far more in use than its models, although nothing runs."""
        known = self.ledger.vram_used_gb
        beyond = self._meter.beyond(round(known * GB))
        if self.handle.load or self._leaving or beyond <= OVERHEAD_BYTES:
            return False
        self._recycle(f"its models take {known:.2f} GiB, and {gib(beyond)} more are in use since it started")
        return True

    @property
    def memory(self) -> DeviceMemory | None:
        """What its device shows; None on the CPU."""
        return self._meter.read()

    @property
    def loading(self) -> set[ModelKey]:
        return {key for key, state in self.states.items() if state is Residence.LOADING}

    def has(self, model_id: str) -> bool:
        """Whether objects of it are in memory, on the device or in the host's."""
        loaded = any(key[0] == model_id and state is not Residence.LOADING for key, state in self.states.items())
        return loaded or self.ledger.is_in_host(model_id)

    # -- orders -------------------------------------------------------------------------------

    def load(self, keys: Sequence[ModelKey]) -> bool:
        """Have it load what it lacks of `keys`; false while it is busy with another load."""
        missing = [key for key in keys if key not in self.states]
        if self._job is not None:
            return False
        if missing:
            self.states.update(dict.fromkeys(missing, Residence.LOADING))
            self._job = _Job(deque(missing), frozenset(model_id for model_id, _ in keys))
            self._hold_files()
            self._step()
        return True

    def unload(self, model_id: str) -> None:
        """Have it drop a model and its copies in host memory, when the last run that uses it has ended."""
        if self.has(model_id):
            self._leave(model_id, to_host=False)
            self._step()

    def acquire(self, model_ids: Iterable[str]) -> None:
        """A run begins that uses them."""
        self._uses += 1
        for model_id in model_ids:
            self.ledger.pin(model_id)

    def release(self, model_ids: Iterable[str]) -> None:
        """The run has ended."""
        for model_id in model_ids:
            self.ledger.unpin(model_id)
        self._step()

    def close(self) -> None:
        """The executor is gone, and all that it held with it."""
        self.states.clear()
        self._hold_files()

    # -- what it answers ----------------------------------------------------------------------

    def loaded(self, message: ModelLoaded) -> Outcome:
        order, key = self._order, (message.model_id, message.type_name)
        if order is None or self._job is None or order.key != key:
            log.error("executor %s loaded %s, which nobody asked for", self.handle.name, key[0])
            return Outcome.NOTHING
        self._order = None
        self.ledger.cancel_reservation(key[0])
        if message.failure is not None:
            self.ledger.drop_from_host(key[0])  # the executor has let go of it, too
            if self._retry(self._job, key, message):
                return Outcome.NOTHING
            self.failed.add(key)
            self._drop_job()
            self._step()
            return Outcome.FAILED
        self.failed.discard(key)
        size = self._size_of(message, order)
        total = self.ledger.size_gb(key[0]) + (order.expected if size is None else size) / GB
        self.states[key] = Residence.HOT
        types = frozenset(type_name for model_id, type_name in self.states if model_id == key[0])
        self.ledger.mark_loaded_to_vram(key[0], types, total, evict=False)
        if size is not None:
            self._sizes.remember(*key, order.weights, size)
        self._job.keys.popleft()
        keep = self._job.keep
        if not self._job.keys:
            self._job = None
        self._restore_margin(keep)
        self._step()
        return Outcome.LOADED

    def unloaded(self, message: ModelUnloaded) -> None:
        order, model_id = self._order, message.model_id
        if order is None or order.key != (model_id, ""):
            log.error("executor %s dropped %s, which nobody asked for", self.handle.name, model_id)
            return
        self._order = None
        self._leaving.pop(model_id, None)
        keys = [key for key, state in self.states.items() if key[0] == model_id and state is not Residence.LOADING]
        if message.failure is not None:
            self.states.update(dict.fromkeys(keys, Residence.HOT))
            if self._job is not None:
                self._recycle(f"model {model_id} could not be unloaded to make room: {message.failure.detail}")
            self._step()
            return
        for key in keys:
            del self.states[key]
        if message.host_bytes:
            self.ledger.mark_moved_to_host(model_id, message.host_bytes / GB)
        else:
            self.ledger.unload_model(model_id)
            self.ledger.drop_from_host(model_id)
        self._hold_files()
        self._receipt(order, message)
        self._step()

    # -- one step after the other -------------------------------------------------------------

    def _step(self) -> None:
        """Send the next order, if none is under way: first what leaves, then what comes."""
        if self._order is not None or not (self._leaving or self._job):
            return
        leaving = next((model_id for model_id in self._leaving if not self.ledger.is_pinned(model_id)), None)
        if leaving is not None:
            self._send_unload(leaving)
        elif self._job is not None:
            self._send_load(self._job)

    def _send_unload(self, model_id: str) -> None:
        to_host = self._leaving[model_id] and self.ledger.is_in_vram(model_id)
        if to_host:
            returning = self._job.keep if self._job is not None else ()
            older = self.ledger.plan_host_eviction(self.ledger.size_gb(model_id), returning)
            to_host = older is not None
            if older:
                self._leaving = {**dict.fromkeys(older, False), **self._leaving}
                self._send_unload(older[0])
                return
        expected = round(self.ledger.size_gb(model_id) * GB)
        self._order = _Order((model_id, ""), expected, 0, self._meter.read(), self._uses_if_quiet())
        self.handle.send_unload(model_id, to_host=to_host)

    def _send_load(self, job: _Job) -> None:
        key = job.keys[0]
        found = self._source.local(key[0])
        if found is None:
            log.warning("the files of model %s were removed before they were loaded", key[0])
            self._abandon_job()
            return
        need, memory = self._estimate(key, found), self._meter.read()
        if self._is_gpu and need and memory is not None and not self._make_room(job, need, memory):
            return
        self.ledger.reserve(key[0], need / GB)
        self._order = _Order(key, need, found.weight_bytes, memory, self._uses_if_quiet())
        log.info("loading %s as %s, %s expected", *key, gib(need), extra={"executor": self.handle.name})
        self.handle.send_load(LoadModel(*key, found.root_dir, dict(found.files), dict(found.metadata)))
        self._moves.load_started(self.handle, key[0])

    def _make_room(self, job: _Job, need: int, memory: DeviceMemory) -> bool:
        """Whether there is room now; else idle models are told to leave, or the job ends."""
        leaving = self._plan(need, memory, job.keep)
        if leaving == []:
            return True
        if leaving:
            for model_id in leaving:
                log.info(
                    "%s leaves %s to make room for %s",
                    model_id, self.handle.device.name, job.keys[0][0], extra={"executor": self.handle.name},
                )  # fmt: skip
                self._leave(model_id, to_host=True)
            self._step()
        elif self.handle.load or self._leaving:
            self._abandon_job()
        elif not self.recycle_if_it_leaks():
            key = job.keys[0]
            self._drop_job()
            failure = no_room(key[0], need, self.handle.device, memory)
            asyncio.get_running_loop().call_soon(self._moves.load_refused, self.handle, key, failure)
        return False

    def _plan(self, need: int, memory: DeviceMemory, keep: frozenset[str]) -> list[str] | None:
        return self.ledger.plan_eviction(need / GB, memory.free_bytes / GB, keep | self._leaving.keys())

    def _leave(self, model_id: str, *, to_host: bool) -> None:
        """Put a model on its way out; no run is given to the executor for it from here on."""
        self._leaving[model_id] = to_host
        hot = [key for key, state in self.states.items() if key[0] == model_id and state is Residence.HOT]
        if hot:
            self.states.update(dict.fromkeys(hot, Residence.UNLOADING))
            asyncio.get_running_loop().call_soon(self._moves.models_moved)  # what is said of it is not true any more

    def _retry(self, job: _Job, key: ModelKey, message: ModelLoaded) -> bool:
        """After a load that ran out of memory: again, when another model can leave before it."""
        if message.failure is None or message.failure.error_type != "resource" or message.poisoned:
            return False
        can_leave = self.ledger.evictable(job.keep | self._leaving.keys())
        leaving = next((model_id for model_id in can_leave if self.ledger.size_gb(model_id)), None)
        if leaving is None or not self._is_gpu:
            return False
        log.warning("loading %s ran out of memory: %s leaves, and it is tried again", key[0], leaving)
        self._leave(leaving, to_host=True)
        self._step()
        return True

    def _restore_margin(self, keep: frozenset[str]) -> None:
        """What was loaded may have taken more than expected: idle models leave until the margin is free again."""
        memory = self._meter.read()
        if memory is None:
            return
        leaving = self._plan(0, memory, keep)
        for model_id in self.ledger.evictable(keep | self._leaving.keys()) if leaving is None else leaving:
            self._leave(model_id, to_host=True)

    def _receipt(self, order: _Order, message: ModelUnloaded) -> None:
        """Compare what came back with what was recorded."""
        model_id, expected = message.model_id, order.expected
        after = self._meter.read()
        if after is None or order.before is None:
            log.info("unloaded %s", model_id, extra={"executor": self.handle.name})
            return
        actual = after.free_bytes - order.before.free_bytes
        quiet = order.uses is not None and order.uses == self._uses_if_quiet()
        figures = f"expected {gib(expected)} back, {self.handle.device.name} shows {gib(actual)}"
        while_runs = "" if quiet else ", while runs went on"
        log.info("unloaded %s: %s%s", model_id, figures, while_runs, extra={"executor": self.handle.name})
        if quiet and stayed_out(expected, actual):
            self._recycle(f"memory stayed out after {model_id} was unloaded: {figures}")

    def _recycle(self, reason: str) -> None:
        log.warning("executor %s is recycled: %s", self.handle.name, reason)
        self.handle.recycle(reason)
        self._abandon_job()

    def _abandon_job(self) -> None:
        """What it was to load has not been asked for, as far as runs are concerned: they are placed anew."""
        self._drop_job()
        asyncio.get_running_loop().call_soon(self._moves.models_moved)

    def _drop_job(self) -> None:
        for key in self._job.keys if self._job is not None else ():
            self.states.pop(key, None)
        self._job = None
        self._hold_files()

    # -- figures ------------------------------------------------------------------------------

    def _estimate(self, key: ModelKey, found: LocalModel) -> int:
        if key[1] == _FILES_TYPE:
            return 0
        measured = self._sizes.measured(*key, found.weight_bytes)
        if measured is not None:
            return measured
        # Weights are loaded once; another object of the same model, never measured, is its tokenizer or the like.
        return 0 if self.ledger.size_gb(key[0]) else found.weight_bytes

    def _size_of(self, message: ModelLoaded, order: _Order) -> int | None:
        """What an object takes: by the executor's count, else (that knows only torch) by the probe; None: unknown."""
        if message.device_bytes or not self._is_gpu or message.type_name == _FILES_TYPE:
            return message.device_bytes
        after = self._meter.read()
        if after is None or order.before is None or order.uses is None or order.uses != self._uses_if_quiet():
            return None
        return max(0, after.used_bytes - order.before.used_bytes)

    def _uses_if_quiet(self) -> int | None:
        return None if self.handle.load else self._uses

    def _hold_files(self) -> None:
        """Files stay on disk while an object made of them is there or on its way."""
        wanted = {model_id for model_id, _ in self.states}
        for model_id in wanted - self._held:
            self._source.hold(model_id)
        for model_id in self._held - wanted:
            self._source.release(model_id)
        self._held = wanted
