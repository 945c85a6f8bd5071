"""The devices of this host: which there are, and how much of their memory is used.

Owns: the probe. NVML tells the truth on a host with GPUs; the simulated probe stands in its place where there is none
(WORKER_FAKE_GPU_COUNT); a host with neither has CPU slots. Each slot gets one executor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

log = logging.getLogger(__name__)

FAKE_GPU_SM: Final = "90"


class DeviceError(Exception):
    """The devices asked for are not there; the message says which and what there is."""


class NoDriver(Exception):
    """NVML does not start: there is no NVIDIA driver here."""


@dataclass(frozen=True, slots=True)
class Device:
    """One executor's device. `uuid` is "" for a CPU slot."""

    uuid: str
    name: str
    memory_bytes: int
    sm: str
    """Compute capability without the dot, such as `90`; "" when unknown or not a GPU."""
    torch_device: str
    visible: str
    """What CUDA_VISIBLE_DEVICES is set to for its executor."""

    @property
    def is_gpu(self) -> bool:
        return bool(self.uuid)


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    used_bytes: int
    free_bytes: int


class DeviceProbe(Protocol):
    driver_version: str

    @property
    def devices(self) -> Sequence[Device]: ...
    def memory(self, device: Device) -> DeviceMemory:
        """What is used and free on a GPU now. Raises DeviceError."""
        ...

    def utilization(self, device: Device) -> float | None:
        """The share of the last moment in which a GPU computed, 0 to 1; None where that is not to be had."""
        ...


class CpuProbe:
    """A host without GPUs: `count` executors that share the CPU."""

    driver_version = ""

    def __init__(self, count: int) -> None:
        self.devices: Sequence[Device] = [Device("", "", 0, "", "cpu", "") for _ in range(count)]

    def memory(self, device: Device) -> DeviceMemory:
        raise DeviceError(f"{device} has no memory of its own")

    def utilization(self, device: Device) -> float | None:  # noqa: ARG002  (the protocol's)
        return None


class SimulatedProbe:
    """GPUs that are not there; their memory is what the executors say that they hold (`held`)."""

    driver_version = "simulated"

    def __init__(self, count: int, memory_bytes: int, name: str, held: Callable[[Device], int]) -> None:
        self._held = held
        self.devices: Sequence[Device] = [
            Device(f"GPU-FAKE-{index:04d}", name, memory_bytes, FAKE_GPU_SM, "cpu", str(index))
            for index in range(count)
        ]

    def memory(self, device: Device) -> DeviceMemory:
        used = min(self._held(device), device.memory_bytes)
        return DeviceMemory(used, device.memory_bytes - used)

    def utilization(self, device: Device) -> float | None:  # noqa: ARG002  (the protocol's)
        return None


class NvmlProbe:
    """Real GPUs, by UUID, since CUDA and NVML may count them in different orders."""

    def __init__(self, selection: Sequence[str], visible: str | None) -> None:
        """`selection`: WORKER_GPUS; `visible`: the host's own CUDA_VISIBLE_DEVICES, None when not set.

        Raises NoDriver, DeviceError when a GPU of the selection is not there or NVML can't be asked.
        """
        import pynvml  # noqa: PLC0415  (only on hosts that may have a GPU)

        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
        except pynvml.NVMLError as error:
            raise NoDriver(str(error)) from error
        try:
            self._find(selection, visible)
        except pynvml.NVMLError as error:
            raise DeviceError(f"NVML can't say which GPUs are here: {error}") from error

    def _find(self, selection: Sequence[str], visible: str | None) -> None:
        pynvml = self._nvml
        self.driver_version = _text(pynvml.nvmlSystemGetDriverVersion())
        self._handles: dict[str, Any] = {}
        found: list[Device] = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            for part in self._instances(handle):
                device = self._describe(part, handle)
                self._handles[device.uuid] = part
                found.append(device)
        self.devices: Sequence[Device] = select(select(found, _split(visible)), list(selection) or None)

    def memory(self, device: Device) -> DeviceMemory:
        try:
            info = self._nvml.nvmlDeviceGetMemoryInfo(self._handles[device.uuid])
        except self._nvml.NVMLError as error:
            raise DeviceError(f"NVML can't read the memory of {device.uuid}: {error}") from error
        return DeviceMemory(int(info.used), int(info.free))

    def utilization(self, device: Device) -> float | None:
        try:
            rates = self._nvml.nvmlDeviceGetUtilizationRates(self._handles[device.uuid])
        except self._nvml.NVMLError as error:  # not supported for MIG devices
            log.debug("NVML has no utilization of %s: %s", device.uuid, error)
            return None
        return float(rates.gpu) / 100

    def _instances(self, handle: Any) -> list[Any]:
        """The MIG devices of a card in MIG mode, else the card itself."""
        nvml = self._nvml
        try:
            current, _pending = nvml.nvmlDeviceGetMigMode(handle)
        except nvml.NVMLError_NotSupported:
            return [handle]
        if not current:
            return [handle]
        parts = []
        for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            try:
                parts.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index))
            except nvml.NVMLError_NotFound:
                continue  # a slot of the card with no MIG device in it
        return parts

    def _describe(self, handle: Any, card: Any) -> Device:
        nvml = self._nvml
        uuid = _text(nvml.nvmlDeviceGetUUID(handle))
        major, minor = nvml.nvmlDeviceGetCudaComputeCapability(card)
        total = int(nvml.nvmlDeviceGetMemoryInfo(handle).total)
        return Device(uuid, _text(nvml.nvmlDeviceGetName(handle)), total, f"{major}{minor}", "cuda:0", uuid)


def select(devices: Sequence[Device], wanted: Sequence[str] | None) -> list[Device]:
    """The devices that `wanted` names by index, UUID or the start of a UUID; None: all. Raises DeviceError."""
    if wanted is None:
        return list(devices)
    chosen: list[Device] = []
    for item in wanted:
        if item.isdecimal():
            matches = [devices[int(item)]] if int(item) < len(devices) else []
        else:
            matches = [device for device in devices if device.uuid.startswith(item)]
        if len(matches) != 1:
            names = ", ".join(f"{index}={device.uuid}" for index, device in enumerate(devices)) or "none"
            raise DeviceError(f"GPU {item!r} names {len(matches)} of the GPUs here: {names}")
        if matches[0] in chosen:
            raise DeviceError(f"GPU {item!r} is named twice")
        chosen.append(matches[0])
    return chosen


def open_probe(
    *,
    gpus: Sequence[str],
    visible: str | None,
    executors: int,
    fake_count: int,
    fake_memory_bytes: int,
    fake_name: str,
    held: Callable[[Device], int],
) -> DeviceProbe:
    """The probe for this host: simulated when asked for, NVML's where it finds a GPU, else the CPU.

    Raises DeviceError when the GPUs asked for are not there.
    """
    if fake_count:
        simulated = SimulatedProbe(fake_count, fake_memory_bytes, fake_name, held)
        if gpus:
            simulated.devices = select(simulated.devices, gpus)
        return simulated
    try:
        probe = NvmlProbe(gpus, visible)
    except NoDriver as error:
        if gpus:
            raise DeviceError(f"WORKER_GPUS={','.join(gpus)}, but NVML finds no driver: {error}") from error
        log.info("no NVIDIA driver here (%s): executors run on the CPU", error)
        return CpuProbe(executors)
    except ImportError as error:
        raise DeviceError(f"the package nvidia-ml-py is broken or missing: {error}") from error
    if probe.devices:
        return probe
    return CpuProbe(executors)


def _split(visible: str | None) -> list[str] | None:
    """CUDA_VISIBLE_DEVICES as a list; "-1" or anything after a negative index hides devices, as in CUDA."""
    if visible is None:
        return None
    items: list[str] = []
    for item in (part.strip() for part in visible.split(",")):
        if not item or item.startswith("-") or item == "NoDevFiles":  # the last: Slurm's word for no GPU
            break
        items.append(item)
    return items


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
