"""Tells a poisoned CUDA context from an error that the next run survives.

Owns: the list of errors after which every later call in the process fails. CUDA's documentation names them "sticky":
the context is lost, and with it the process (CUDA Runtime API, cudaError: "leaves the process in an inconsistent state
and any further CUDA work will return the same error. To continue using CUDA, the process must be terminated").
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Final

from executor.torch_state import initialized_cuda
from gen_worker.failures import is_out_of_memory

log = logging.getLogger(__name__)

_STICKY: Final = (
    "an illegal memory access was encountered",
    "device-side assert triggered",
    "unspecified launch failure",
    "misaligned address",
    "an illegal instruction was encountered",
    "invalid program counter",
    "operation not supported on global/shared address space",
    "hardware stack error",
    "the launch timed out and was terminated",
    "uncorrectable ECC error encountered",
    "uncorrectable NVLink error",
)
"""Of cudaGetErrorString."""
_SUSPICIOUS: Final = ("CUDA error", "CUDA driver error", "CUBLAS_STATUS", "CUDNN_STATUS", "CUFFT", "NCCL error")
"""May be a sticky error seen through a library: the device is asked."""


def is_poisoned(error: BaseException) -> bool:
    """Whether the process must not take another run after `error`, or what it was raised from."""
    return any(_poisons(link) for link in _chain(error))


def _poisons(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError) or is_out_of_memory(error):
        return False
    try:
        text = str(error)
    except Exception as broken:  # noqa: BLE001  # a tenant's __str__ may raise anything
        log.warning("the message of a %s can't be read: %r", type(error).__name__, type(broken))
        return False
    if any(words in text for words in _STICKY):
        return True
    return any(words in text for words in _SUSPICIOUS) and _device_fails()


def _device_fails() -> bool:
    """Whether the context answers: a sticky error comes back at every call."""
    cuda = initialized_cuda()
    if cuda is None:
        return False
    try:
        cuda.synchronize()
    except RuntimeError as error:
        log.error("the CUDA context does not answer any more: %s", error)
        return True
    return False


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
