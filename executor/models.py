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

from executor.cuda_faults import is_poisoned
from executor.loaders import load_object
from executor.torch_state import initialized_cuda
from executor.tracebacks import drop_frames
from gen_worker.failures import SAFE_MESSAGE_MAX_CHARS, failure_of
from gen_worker.injection import ModelArtifacts
from gen_worker.pipe.messages import Failure, LoadModel, ModelLoaded, ModelUnloaded, UnloadModel, Upward

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Held:
    value: object
    device_bytes: int


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
        self._held: dict[tuple[str, str], _Held] = {}
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
            before = self._allocated()
            value = self._make(message)
            device_bytes = max(0, self._allocated() - before)
        except (Exception, SystemExit) as error:  # noqa: BLE001  # a loader may raise anything; it is the answer
            return self._load_failed(message, error, time.perf_counter() - started)
        self._held[key] = _Held(value, device_bytes)
        return ModelLoaded(*key, device_bytes, time.perf_counter() - started)

    def _make(self, message: LoadModel) -> object:
        type_ = self._types.get(message.type_name)
        if type_ is None:
            known = ", ".join(sorted(self._types)) or "nothing"
            raise LookupError(f"no function injects {message.type_name}; injected here: {known}")
        root = Path(message.root_dir)
        files = {key: root / path for key, path in message.files.items()}  # an absolute path stays what it is
        artifacts = ModelArtifacts(message.model_id, root, files, message.metadata)
        return load_object(type_, artifacts, self._device)

    def _load_failed(self, message: LoadModel, error: BaseException, seconds: float) -> ModelLoaded:
        failure = failure_of(error)
        what = f"loading model {message.model_id!r} as {message.type_name} from {message.root_dir} failed"
        safe = f"model can't be loaded: {failure.safe_message}"[:SAFE_MESSAGE_MAX_CHARS]
        failure = msgspec.structs.replace(failure, safe_message=safe, detail=f"{what}: {failure.detail}")
        loaded = ModelLoaded(message.model_id, message.type_name, 0, seconds, failure)
        if is_poisoned(error):
            failure = msgspec.structs.replace(failure, error_type="retryable", retryable=True)
            self._send(msgspec.structs.replace(loaded, failure=failure))
            self._on_poisoned(f"loading {message.model_id}", failure)
        drop_frames(error)
        self._release_cached()
        return loaded

    def _unload(self, message: UnloadModel) -> ModelUnloaded:
        try:
            before = self._allocated()
            for key in [key for key in self._held if key[0] == message.model_id]:
                del self._held[key]
            self._release_cached()
            return ModelUnloaded(message.model_id, max(0, before - self._allocated()))
        except Exception as error:  # noqa: BLE001  # what a model's destructor or CUDA raises is the answer
            return ModelUnloaded(message.model_id, 0, failure_of(error))

    def _allocated(self) -> int:
        """Bytes that torch's allocator holds on the device; runs that go on meanwhile are in it too."""
        cuda = initialized_cuda() if self._device.startswith("cuda") else None
        return 0 if cuda is None else int(cuda.memory_allocated(self._device))

    def _release_cached(self) -> None:
        """Give memory that nothing refers to back to the device."""
        gc.collect()
        cuda = initialized_cuda()
        if cuda is not None:
            cuda.empty_cache()
