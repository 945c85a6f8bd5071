"""What this executor holds on its device, by its own count.

Owns: the count where there is no GPU, for the CPU and for simulated devices: the tensors of every object that was
loaded, for as long as anybody holds them. So what a function keeps of a model that was unloaded still counts, as it
would on a real device. On a GPU torch's allocator knows.
"""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from executor.torch_state import initialized_cuda
from gen_worker.injection import ModelArtifacts
from gen_worker.weights import WeightsError, weight_bytes

log = logging.getLogger(__name__)

_LIGHT_LIBRARIES = ("transformers.", "diffusers.", "tokenizers.")
"""Their objects without tensors (tokenizers, processors, schedulers) take nothing of a device."""


class DeviceMemory:
    """See the module. `device` is a torch device string."""

    def __init__(self, device: str) -> None:
        self._device = device
        self._on_gpu = device.startswith("cuda")
        self._tracked: list[tuple[weakref.ref[Any], int]] = []

    def allocated(self) -> int:
        """Bytes held on the device; on a GPU, runs that go on are in it too."""
        if self._on_gpu:
            cuda = initialized_cuda()
            return 0 if cuda is None else int(cuda.memory_allocated(self._device))
        self._tracked = [(ref, size) for ref, size in self._tracked if ref() is not None]
        return sum(size for _, size in self._tracked)

    def reserved(self) -> int:
        """Bytes of the GPU that torch's allocator keeps, given out or not."""
        cuda = initialized_cuda() if self._on_gpu else None
        return 0 if cuda is None else int(cuda.memory_reserved(self._device))

    def track(self, value: object, artifacts: ModelArtifacts) -> None:
        """Count an object that was loaded from `artifacts`."""
        if self._on_gpu:
            return
        tensors = list(tensors_of(value))
        if tensors:
            self._tracked += [(weakref.ref(tensor), tensor.nbytes) for tensor in tensors]
        elif (size := _bytes_without_tensors(value, artifacts)) > 0:
            try:
                self._tracked.append((weakref.ref(value), size))
            except TypeError:
                log.info("a %s can't be watched: what it holds is not counted", type(value).__name__)

    def untrack(self, tensors: Iterable[Any]) -> None:
        """These are not on the device any more, though somebody holds them."""
        gone = {id(tensor) for tensor in tensors}
        self._tracked = [(ref, size) for ref, size in self._tracked if id(ref()) not in gone]


def modules_of(value: object) -> list[Any]:
    """The torch modules that an object is or has: a model, the components of a pipeline, anybody's attributes."""
    torch = sys.modules.get("torch")
    module_type = getattr(getattr(torch, "nn", None), "Module", None)
    if module_type is None:
        return []
    if isinstance(value, module_type):
        return [value]
    found = (item for item in _parts(value) if isinstance(item, module_type))
    return list({id(module): module for module in found}.values())


def tensors_of(value: object) -> Iterator[Any]:
    """The parameters and buffers of its modules, and the tensors that it has itself, each once."""
    seen: set[int] = set()
    tensor_type = getattr(sys.modules.get("torch"), "Tensor", None)
    if tensor_type is None:
        return
    own = (item for item in (value, *_parts(value)) if isinstance(item, tensor_type))
    of_modules = (tensor for module in modules_of(value) for tensor in (*module.parameters(), *module.buffers()))
    for tensor in (*own, *of_modules):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _parts(value: object) -> Iterator[object]:
    """The values of an object's attributes, or of a container, and of lists and dicts among them."""
    attributes = value if isinstance(value, Mapping) else getattr(value, "__dict__", {})
    parts = value if isinstance(value, list | tuple) else attributes.values()
    for part in parts:
        if isinstance(part, Mapping):
            yield from part.values()
        elif isinstance(part, list | tuple):
            yield from part
        else:
            yield part


def _bytes_without_tensors(value: object, artifacts: ModelArtifacts) -> int:
    """For an object of another library: its weights, as if they lay on the device as they lie on disk."""
    names = [f"{base.__module__}." for base in type(value).__mro__]
    if isinstance(value, ModelArtifacts) or any(name.startswith(_LIGHT_LIBRARIES) for name in names):
        return 0
    try:
        return weight_bytes(artifacts.root_dir)
    except (OSError, WeightsError) as error:
        log.warning("the weights of %s can't be counted: %s", artifacts.model_id, error)
        return 0
