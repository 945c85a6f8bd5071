"""Models evicted from the device that stay in host memory, whole and ready to return.

Owns: how an object's tensors leave and return. They lie in one flat buffer, which is page-locked when the device is a
GPU: only from there does the copy engine read at the speed of the bus, and one copy for all does not wait between
thousands. The object itself stays as it is; only what its parameters point to changes.

torch's own pinned allocator rounds each size up to a power of two, so the buffer is an ordinary one that is registered.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from dataclasses import dataclass
from typing import Any

from executor.device_memory import modules_of

log = logging.getLogger(__name__)

_ALIGN = 256
"""As torch's CUDA allocator aligns: kernels may expect it of what they are given."""


@dataclass(frozen=True, slots=True)
class HostCopy:
    """The tensors of one object in host memory; `tensors` point into `buffer` until `to_device`."""

    buffer: Any
    tensors: list[tuple[Any, int]]
    """(tensor, offset of its data in the buffer)."""
    is_pinned: bool

    @property
    def size(self) -> int:
        return int(self.buffer.nbytes)


def to_host(value: object, device: str) -> HostCopy | None:
    """Move an object's parameters and buffers to host memory; None when it has none, or some that must not be moved.

    Raises RuntimeError or MemoryError when there is no memory for that; the object is as it was then.
    """
    import torch

    tensors = _movable(value, device, torch)
    if not tensors:
        return None
    offsets, size = [], 0
    for tensor in tensors:
        offsets.append(size)
        size += -(-tensor.nbytes // _ALIGN) * _ALIGN
    buffer = torch.empty(size, dtype=torch.uint8)
    is_pinned = device.startswith("cuda") and _pin(buffer, device, torch)
    moved = []
    for tensor, offset in zip(tensors, offsets, strict=True):
        place = _place(buffer, offset, tensor)
        place.copy_(tensor.data, non_blocking=is_pinned)
        moved.append(place)
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    for tensor, place in zip(tensors, moved, strict=True):
        tensor.data = place
    return HostCopy(buffer, list(zip(tensors, offsets, strict=True)), is_pinned)


def to_device(copy: HostCopy, device: str) -> None:
    """Move the tensors back, in one copy, and give the host's memory back. Raises RuntimeError when they do not fit."""
    import torch

    on_device = torch.empty(copy.size, dtype=torch.uint8, device=device)
    on_device.copy_(copy.buffer, non_blocking=copy.is_pinned)
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    for tensor, offset in copy.tensors:
        tensor.data = _place(on_device, offset, tensor)
    drop(copy)


def drop(copy: HostCopy) -> None:
    """Undo the registration; the memory goes when the tensors do."""
    if not copy.is_pinned:
        return
    torch: Any = importlib.import_module("torch")
    try:
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(copy.buffer.data_ptr())))
    except RuntimeError as error:
        log.error("host memory of %d bytes stays page-locked: %s", copy.size, error)


def _movable(value: object, device: str, torch: Any) -> list[Any]:
    """Each tensor once; none when the data of one can't simply be replaced (quantized), or is elsewhere (offloaded)."""
    tensors: dict[int, Any] = {}
    where = torch.device(device).type
    for module in modules_of(value):
        for tensor in (*module.parameters(), *module.buffers()):
            plain = type(tensor) in {torch.nn.Parameter, torch.Tensor} and tensor.layout == torch.strided
            if not plain or tensor.device.type != where:
                return []
            tensors[id(tensor)] = tensor
    return list(tensors.values())


def _place(buffer: Any, offset: int, like: Any) -> Any:
    """The bytes of the buffer that are `like`'s, as a tensor of its dtype, shape and memory format."""
    typed = buffer[offset : offset + like.nbytes].view(like.dtype)
    strides = like.stride() if _is_dense(like) else _contiguous_strides(like.shape)
    return typed.as_strided(like.shape, strides)


def _is_dense(tensor: Any) -> bool:
    """Whether its elements fill one block, in whatever order: then its strides can be kept."""
    pairs = sorted(zip(tensor.stride(), tensor.shape, strict=True))
    expected = 1
    for stride, length in pairs:
        if length == 1:
            continue
        if stride != expected:
            return False
        expected *= length
    return True


def _contiguous_strides(shape: Any) -> list[int]:
    strides, step = [], 1
    for length in reversed(shape):
        strides.append(step)
        step *= max(1, length)
    return strides[::-1]


def _pin(buffer: Any, device: str, torch: Any) -> bool:
    """Register the buffer; false, with a line in the log, when the system does not allow that (ulimit -l)."""
    try:
        torch.cuda.check_error(int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)))
    except RuntimeError as error:
        log.warning("host memory can't be page-locked, so models return slower: %s", error)
        # The refusal stays behind as CUDA's last error, and the next kernel would be blamed for it: let this one be.
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device=device)
        return False
    return True
