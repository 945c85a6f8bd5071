"""Which models runs need, and which executor holds them.

Owns: the names (labels, allowlist, local artifacts) and, per executor, which models are hot or being loaded. It
decides nothing about runs: the dispatcher asks it what is missing where, and tells it what executors report.

A model object is named by its id and by the type it was loaded as, since one directory may serve as pipeline for one
function and as tokenizer for another.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import NamedTuple, Protocol

import msgspec

from gen_worker.model_refs import canonical_ref
from gen_worker.pipe.messages import Failure, FunctionInfo, InjectionInfo, LoadModel
from supervisor.devices import Device
from supervisor.executor_handle import ExecutorHandle
from supervisor.runs import invalid

log = logging.getLogger(__name__)

Models = tuple[tuple[str, str], ...]
"""(injected parameter, model id), in the order of the function's parameters."""

ModelKey = tuple[str, str]
"""(model id, qualified type name)."""

_FIELDS = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_TEXT = msgspec.msgpack.Decoder(str)


class ModelRefused(Exception):
    """A run names a model that it can't have; `failure` is its answer."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail)
        self.failure = failure


class Artifacts(Protocol):
    """A local model directory, as WORKER_MODEL_ARTIFACTS_JSON gives it."""

    @property
    def root_dir(self) -> str: ...
    @property
    def files(self) -> Mapping[str, str]: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...


class HeldModel(NamedTuple):
    """A model object that an executor has, or is about to have or to drop."""

    handle: ExecutorHandle
    model_id: str
    state: Residence
    device_bytes: int
    """As the executor measured it; 0 while it is not known."""


class Residence(Enum):
    LOADING = "loading"
    HOT = "hot"
    UNLOADING = "unloading"


class Residency:
    """See the module."""

    def __init__(self, labels: Mapping[str, str], artifacts: Mapping[str, Artifacts]) -> None:
        self._own_labels = dict(labels)
        self._labels = self._own_labels
        self._artifacts = {_canonical(model_id): found for model_id, found in artifacts.items()}
        self._allowed: frozenset[str] = frozenset()
        self._held: dict[ExecutorHandle, dict[ModelKey, Residence]] = {}
        self._failed: dict[ExecutorHandle, set[ModelKey]] = {}
        """What could not be loaded there last time."""
        self._device_bytes: dict[ExecutorHandle, dict[ModelKey, int]] = {}
        self._measured: dict[ModelKey, int] = {}
        """What each took when it was loaded last, on whichever device."""

    # -- names --------------------------------------------------------------------------------

    def configure(self, supported: Sequence[str], labels: Mapping[str, str]) -> None:
        """What deployment_model_config says, in place of the last. An empty `supported` lifts the allowlist."""
        self._allowed = frozenset(_canonical(model_id) for model_id in supported)
        self._labels = {**self._own_labels, **labels}

    def resolve(self, info: FunctionInfo, required: Sequence[str], payload: bytes) -> Models:
        """The model of each injected parameter. Raises ModelRefused.

        `required` (the request's required_models) overrides by position. The payload is only looked into for a
        function whose model is named by a payload field.
        """
        return tuple(
            (injection.param, self._choose(info, injection, position, required, payload))
            for position, injection in enumerate(info.injections)
        )

    def model_id(self, name: str) -> str:
        """The id that a label or ref stands for. Raises ModelRefused."""
        ref = self._labels.get(name, name)
        model_id = _canonical(ref)
        if self._allowed and model_id not in self._allowed:
            raise ModelRefused(invalid("model not allowed", f"model {model_id} is not on this deployment's allowlist"))
        if model_id not in self._artifacts:
            detail = f"model {model_id} is not on this host: WORKER_MODEL_ARTIFACTS_JSON does not name it"
            raise ModelRefused(invalid("model not available", detail))
        return model_id

    def _choose(
        self, info: FunctionInfo, injection: InjectionInfo, position: int, required: Sequence[str], payload: bytes
    ) -> str:
        if position < len(required) and required[position]:
            return self.model_id(required[position])
        if injection.source == "deployment":
            return self.model_id(injection.key)
        try:
            name = _TEXT.decode(_FIELDS.decode(payload)[injection.key])
        except (ValueError, KeyError, RecursionError) as error:  # ValueError: msgspec's and UnicodeDecodeError
            safe = f"payload field '{injection.key}' must name a model"
            raise ModelRefused(invalid(safe, f"{info.name}: {safe}: {error!r}")) from error
        return self.model_id(name)

    def types_of(self, model_id: str, functions: Mapping[str, FunctionInfo]) -> set[str]:
        """The types that functions inject this model as."""
        exact, any_type = set(), set()
        for info in functions.values():
            for injection in info.injections:
                any_type.add(injection.type_name)
                label = injection.key
                if injection.source == "deployment" and _canonical(self._labels.get(label, label)) == model_id:
                    exact.add(injection.type_name)
        return exact or any_type

    # -- what is where ------------------------------------------------------------------------

    def keys(self, info: FunctionInfo, models: Models) -> list[ModelKey]:
        types = {injection.param: injection.type_name for injection in info.injections}
        return [(model_id, types[param]) for param, model_id in models]

    def state(self, handle: ExecutorHandle, keys: Sequence[ModelKey]) -> Residence | None:
        """HOT when it holds all of them, None when something was not asked for yet, else LOADING.

        What is being unloaded counts as under way: when it is gone it has not been asked for.
        """
        held = self._held.get(handle, {})
        states = [held.get(key) for key in keys]
        if any(state is None for state in states):
            return None
        return Residence.HOT if all(state is Residence.HOT for state in states) else Residence.LOADING

    def load(self, handle: ExecutorHandle, keys: Sequence[ModelKey]) -> None:
        """Have `handle` load what it lacks of `keys`."""
        held = self._held.setdefault(handle, {})
        for key in keys:
            if key in held:
                continue
            held[key] = Residence.LOADING
            model_id, type_name = key
            found = self._artifacts[model_id]
            log.info("loading %s as %s", model_id, type_name, extra={"executor": handle.name})
            handle.send_load(LoadModel(model_id, type_name, found.root_dir, dict(found.files), dict(found.metadata)))

    def loaded(self, handle: ExecutorHandle, key: ModelKey, device_bytes: int) -> None:
        self._held.setdefault(handle, {})[key] = Residence.HOT
        self._failed.get(handle, set()).discard(key)
        self._device_bytes.setdefault(handle, {})[key] = device_bytes
        self._measured[key] = device_bytes

    def load_failed(self, handle: ExecutorHandle, key: ModelKey) -> None:
        self._held.get(handle, {}).pop(key, None)
        self._failed.setdefault(handle, set()).add(key)

    def has_failed(self, handle: ExecutorHandle, keys: Sequence[ModelKey]) -> bool:
        """Whether `handle` could not load one of them last time."""
        return not self._failed.get(handle, set()).isdisjoint(keys)

    def bytes_on(self, device: Device) -> int:
        """What the executors of `device` say that their models hold there."""
        return sum(
            sum(sizes.values()) for handle, sizes in self._device_bytes.items() if handle.device.uuid == device.uuid
        )

    def reserved_on(self, device: Device) -> int:
        """What loads under way on `device` will take, as far as earlier ones tell."""
        return sum(
            self._measured.get(key, 0)
            for handle in self._held
            if handle.device.uuid == device.uuid
            for key in self.loading(handle)
        )

    def held(self) -> list[HeldModel]:
        """All that executors have, whatever its state."""
        return [
            HeldModel(handle, key[0], state, self._device_bytes.get(handle, {}).get(key, 0))
            for handle, models in self._held.items()
            for key, state in models.items()
        ]

    def holders(self, model_id: str) -> list[ExecutorHandle]:
        """The executors that have it in memory."""
        return [
            handle
            for handle, held in self._held.items()
            if any(key[0] == model_id and state is not Residence.LOADING for key, state in held.items())
        ]

    def unload(self, handle: ExecutorHandle, model_id: str) -> None:
        """Have `handle` drop a model; no run is given to it for that from here on."""
        held = self._held.get(handle, {})
        hot = [key for key, state in held.items() if key[0] == model_id and state is Residence.HOT]
        held.update(dict.fromkeys(hot, Residence.UNLOADING))
        if hot:
            handle.send_unload(model_id)

    def unloaded(self, handle: ExecutorHandle, model_id: str) -> None:
        held = self._held.get(handle, {})
        for key in [key for key, state in held.items() if key[0] == model_id and state is not Residence.LOADING]:
            del held[key]
            self._device_bytes.get(handle, {}).pop(key, None)

    def unload_failed(self, handle: ExecutorHandle, model_id: str) -> None:
        """It still has the model."""
        held = self._held.get(handle, {})
        for key in [key for key, state in held.items() if key[0] == model_id and state is Residence.UNLOADING]:
            held[key] = Residence.HOT

    def loading(self, handle: ExecutorHandle) -> set[ModelKey]:
        return {key for key, state in self._held.get(handle, {}).items() if state is Residence.LOADING}

    def is_loading(self, model_id: str) -> bool:
        """Whether any executor loads it now."""
        return any(model_id == loading for handle in self._held for loading, _ in self.loading(handle))

    def forget(self, handle: ExecutorHandle) -> None:
        """The executor is gone, and all that it held with it."""
        self._held.pop(handle, None)
        self._failed.pop(handle, None)
        self._device_bytes.pop(handle, None)

    def hot_models(self) -> list[str]:
        """The union over executors, sorted."""
        return sorted({key[0] for held in self._held.values() for key, state in held.items() if state is Residence.HOT})

    def disk_models(self) -> list[str]:
        """What is whole on disk and not hot, sorted."""
        return sorted(set(self._artifacts) - set(self.hot_models()))


def _canonical(ref: str) -> str:
    """The canonical form of a ref; a name that is no ref (a local model may have any) stays as it is."""
    try:
        return canonical_ref(ref)
    except ValueError:
        return ref
