"""The model objects that this executor holds.

Owns: them, and the one thread that loads and unloads, one at a time in the order of the messages. The supervisor
decides what is loaded when, and never unloads what a run uses; this obeys and measures.

An object is named by its model id and the type that it is injected as: one directory may serve as pipeline for one
function and as tokenizer for another. Later calls share it.
"""

from __future__ import annotations

import copy
import gc
import logging
import queue
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from executor import host_copies
from executor.cuda_faults import is_poisoned
from executor.device_memory import DeviceMemory
from executor.loaders import load_object
from executor.torch_state import initialized_cuda
from executor.tracebacks import drop_frames
from gen_worker.failures import SAFE_MESSAGE_MAX_CHARS, failure_of
from gen_worker.injection import ModelArtifacts
from gen_worker.pipe.messages import Failure, LoadModel, Memory, ModelLoaded, ModelUnloaded, UnloadModel, Upward

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Held:
    value: object
    artifacts: ModelArtifacts
    device_bytes: int = 0
    copy: host_copies.HostCopy | None = None
    """Its tensors, while they are in host memory."""

    @property
    def host_bytes(self) -> int:
        return 0 if self.copy is None else self.copy.size


class ModelStore:
    """See the module. `types` maps qualified names to what functions inject, `device` is a torch device string."""

    def __init__(
        self,
        types: Mapping[str, type],
        device: str,
        *,
        send: Callable[[Upward], None],
        on_poisoned: Callable[[str, Failure], None],
    ) -> None:
        self._types = types
        self._device = device
        self._send = send
        self._on_poisoned = on_poisoned
        self._memory = DeviceMemory(device)
        self._held: dict[tuple[str, str], _Held] = {}
        self._in_host: dict[tuple[str, str], _Held] = {}
        """Evicted from the device, and not injected until they are back."""
        self._orders: queue.SimpleQueue[LoadModel | UnloadModel] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def inject(self, model_id: str, type_name: str) -> object:
        """The object for one call. Raises KeyError when it is not loaded.

        A diffusers scheduler keeps the state of the call that it serves, so each call gets a pipeline of its own
        around the same weights.
        """
        value: Any = self._held[model_id, type_name].value
        scheduler = getattr(value, "scheduler", None)
        if not hasattr(scheduler, "set_timesteps"):
            return value
        view = copy.copy(value)
        view.scheduler = copy.deepcopy(scheduler)
        return view

    def load(self, message: LoadModel) -> None:
        """Load on the thread; answered with ModelLoaded."""
        self._order(message)

    def unload(self, message: UnloadModel) -> None:
        """Drop all objects of the model on the thread; answered with ModelUnloaded."""
        self._order(message)

    def _order(self, message: LoadModel | UnloadModel) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="models", daemon=True)
            self._thread.start()
        self._orders.put(message)

    def _work(self) -> None:
        while True:
            message = self._orders.get()
            self._send(self._load(message) if isinstance(message, LoadModel) else self._unload(message))

    # -- on the thread ------------------------------------------------------------------------

    def _load(self, message: LoadModel) -> ModelLoaded:
        key = (message.model_id, message.type_name)
        if key in self._held:
            return ModelLoaded(*key, self._held[key].device_bytes, 0.0)
        started = time.perf_counter()
        try:
            before = self._memory.allocated()
            held = self._return_from_host(key) or self._make(message)
            device_bytes = max(0, self._memory.allocated() - before)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # a loader may raise anything; it is the answer
            return self._load_failed(message, error, time.perf_counter() - started)
        held.device_bytes = device_bytes
        self._held[key] = held
        self._say_memory()
        return ModelLoaded(*key, device_bytes, time.perf_counter() - started)

    def _make(self, message: LoadModel) -> _Held:
        type_ = self._types.get(message.type_name)
        if type_ is None:
            known = ", ".join(sorted(self._types)) or "nothing"
            raise LookupError(f"no function injects {message.type_name}; injected here: {known}")
        root = Path(message.root_dir)
        files = {key: root / path for key, path in message.files.items()}  # an absolute path stays what it is
        artifacts = ModelArtifacts(message.model_id, root, files, message.metadata)
        held = _Held(load_object(type_, artifacts, self._device), artifacts)
        self._memory.track(held.value, artifacts)
        return held

    def _load_failed(self, message: LoadModel, error: BaseException, seconds: float) -> ModelLoaded:
        failure = failure_of(error)
        what = f"loading model {message.model_id!r} as {message.type_name} from {message.root_dir} failed"
        safe = f"model can't be loaded: {failure.safe_message}"[:SAFE_MESSAGE_MAX_CHARS]
        failure = msgspec.structs.replace(failure, safe_message=safe, detail=f"{what}: {failure.detail}")
        loaded = ModelLoaded(message.model_id, message.type_name, 0, seconds, failure)
        if is_poisoned(error):
            failure = msgspec.structs.replace(failure, error_type="retryable", retryable=True)
            self._send(msgspec.structs.replace(loaded, failure=failure, poisoned=True))
            self._on_poisoned(f"loading {message.model_id}", failure)
        drop_frames(error)
        self._drop_host_copies(message.model_id)
        self._release_cached()
        self._say_memory()
        return loaded

    def _unload(self, message: UnloadModel) -> ModelUnloaded:
        try:
            before = self._memory.allocated()
            for key in [key for key in self._held if key[0] == message.model_id]:
                held = self._held.pop(key)
                if message.to_host:
                    self._move_to_host(key, held)
                del held
            if not message.to_host:
                self._drop_host_copies(message.model_id)
            self._release_cached()
            self._say_memory()
            host_bytes = sum(held.host_bytes for key, held in self._in_host.items() if key[0] == message.model_id)
            freed = max(0, before - self._memory.allocated())
            return ModelUnloaded(message.model_id, freed, host_bytes=host_bytes)
        except Exception as error:  # noqa: BLE001  # what a model's destructor or CUDA raises is the answer
            poisoned = is_poisoned(error)
            unloaded = ModelUnloaded(message.model_id, 0, failure_of(error), poisoned=poisoned)
            if poisoned:
                self._send(unloaded)
                self._on_poisoned(f"unloading {message.model_id}", failure_of(error))
            return unloaded

    # -- host memory --------------------------------------------------------------------------

    def _move_to_host(self, key: tuple[str, str], held: _Held) -> None:
        """Keep the object with its tensors in host memory, if that can be; else it is dropped."""
        try:
            copy_ = host_copies.to_host(held.value, self._device) if held.device_bytes else None
        except (RuntimeError, MemoryError) as error:
            log.warning("model %s does not stay in host memory: %s", key[0], error)
            return
        if copy_ is None:
            return  # what takes nothing of the device is quickly loaded again
        self._memory.untrack(tensor for tensor, _ in copy_.tensors)
        held.copy = copy_
        self._in_host[key] = held

    def _return_from_host(self, key: tuple[str, str]) -> _Held | None:
        """The object, on the device again; None when it is not in host memory. Raises RuntimeError without room."""
        held = self._in_host.pop(key, None)
        if held is None or held.copy is None:
            return None
        copy_, held.copy = held.copy, None
        try:
            host_copies.to_device(copy_, self._device)
        except RuntimeError:
            host_copies.drop(copy_)  # the supervisor makes room, and has it loaded from disk
            raise
        self._drop_host_copies(key[0])  # of its other types: the supervisor counts the model as gone from host memory
        self._memory.track(held.value, held.artifacts)
        return held

    def _drop_host_copies(self, model_id: str) -> None:
        for key in [key for key in self._in_host if key[0] == model_id]:
            copy_ = self._in_host.pop(key).copy
            if copy_ is not None:
                host_copies.drop(copy_)

    # -- memory -------------------------------------------------------------------------------

    def _say_memory(self) -> None:
        """Before each answer, so that the supervisor can hold it against its probe."""
        host_bytes = sum(held.host_bytes for held in self._in_host.values())
        self._send(Memory(self._memory.allocated(), self._memory.reserved(), host_bytes))

    def _release_cached(self) -> None:
        """Give memory that nothing refers to back to the device."""
        gc.collect()
        cuda = initialized_cuda()
        if cuda is not None:
            cuda.empty_cache()
