"""What one executor's device shows of its memory, and what may be made of it.

Owns: the reading at the executor's start, against which later ones are held; the limits; and the words for models that
do not fit.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Final

from gen_worker.model_cache import GB
from gen_worker.pipe.messages import Failure
from supervisor.devices import Device, DeviceError, DeviceMemory, DeviceProbe

log = logging.getLogger(__name__)

TOLERANCE_BYTES: Final = 256 * 2**20
"""What an unload may leave behind and be called clean: a library's workspace, a kernel, a fragment of a segment."""
TOLERANCE_SHARE: Final = 0.1
"""The same, as a part of what was expected; the larger of the two counts."""


@dataclass(frozen=True, slots=True)
class MemoryLimits:
    """In GB of 2**30 bytes: the cap and the margin per GPU, the host cache per executor."""

    max_vram_gb: float | None
    margin_gb: float
    host_gb: float = 0.0

    def usable(self, device: Device) -> int:
        """Bytes of the device that models may take: all but the margin, and no more than the cap."""
        usable = device.memory_bytes - self.margin_gb * GB
        return max(0, int(usable if self.max_vram_gb is None else min(usable, self.max_vram_gb * GB)))


class DeviceMeter:
    """Reads one device; a CPU slot has nothing to read."""

    def __init__(self, device: Device, probe: DeviceProbe) -> None:
        self._device = device
        self._probe = probe
        self._at_start = self.read()

    def read(self) -> DeviceMemory | None:
        """Used and free now; None for a CPU slot, and where it can't be read, which is logged."""
        if not self._device.is_gpu:
            return None
        try:
            return self._probe.memory(self._device)
        except DeviceError as error:
            log.error("the memory of %s can't be read: %s", self._device.name, error)
            return None

    def beyond(self, known: int) -> int:
        """Bytes in use beyond those at the start and `known`; 0 when that can't be told."""
        now = self.read()
        return 0 if now is None or self._at_start is None else now.used_bytes - self._at_start.used_bytes - known


def stayed_out(expected: int, actual: int) -> bool:
    """Whether an unload that should have given back `expected` bytes and gave `actual` has left memory behind."""
    return expected - actual > max(TOLERANCE_BYTES, TOLERANCE_SHARE * expected)


def too_large(model_id: str, need: int, largest: Device, usable: int) -> Failure:
    """The answer to a run whose model no GPU here can ever hold."""
    safe = f"the model needs {gib(need)} of GPU memory, the largest GPU here has {gib(largest.memory_bytes)}"
    may = f"of which models may take {gib(usable)} (WORKER_MAX_VRAM_GB, WORKER_VRAM_SAFETY_MARGIN_GB)"
    detail = (
        f"model {model_id} needs {gib(need)}; the largest GPU, {largest.name}, has {gib(largest.memory_bytes)}, {may}"
    )
    return Failure("resource", safe, detail)


def no_room(model_id: str, need: int, device: Device, memory: DeviceMemory) -> Failure:
    """The answer to a run whose model would fit, were it not for what is not this worker's to remove."""
    safe = f"the model needs {gib(need)} of GPU memory, {gib(memory.free_bytes)} are free"
    detail = (
        f"model {model_id} needs {gib(need)} beside the safety margin; {device.name} has {gib(memory.free_bytes)} free "
        f"of {gib(device.memory_bytes)}, and no model of this worker can leave: see what else uses it (nvidia-smi)"
    )
    return Failure("resource", safe, detail)


def gib(size: float) -> str:
    return f"{size / GB:.2f} GiB"
