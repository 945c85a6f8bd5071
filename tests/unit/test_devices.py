"""Which devices there are: selection, CUDA_VISIBLE_DEVICES, simulated GPUs, NVML and MIG."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from supervisor.devices import (
    CpuProbe,
    Device,
    DeviceError,
    DeviceMemory,
    DeviceProbe,
    NvmlProbe,
    SimulatedProbe,
    open_probe,
    select,
)

GIB = 2**30
DEVICES = [Device(uuid, "GPU", GIB, "90", "cuda:0", uuid) for uuid in ("GPU-aaaa-1", "GPU-aabb-2", "MIG-cccc-3")]


# -- select -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        (None, [0, 1, 2]),
        ([], []),
        (["0"], [0]),
        (["2", "0"], [2, 0]),
        (["GPU-aabb-2"], [1]),
        (["GPU-aab", "0"], [1, 0]),
        (["MIG-"], [2]),
    ],
)
def test_select(wanted: list[str] | None, found: list[int]) -> None:
    assert select(DEVICES, wanted) == [DEVICES[index] for index in found]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (["3"], "GPU '3' names 0 of the GPUs here: 0=GPU-aaaa-1, 1=GPU-aabb-2, 2=MIG-cccc-3"),
        (["GPU-aa"], "GPU 'GPU-aa' names 2 of the GPUs here"),
        (["GPU-x"], "GPU 'GPU-x' names 0 of"),
        (["-1"], "GPU '-1' names 0 of"),
        (["²"], "GPU '²' names 0 of"),
        (["0", "GPU-aaaa"], "GPU 'GPU-aaaa' is named twice"),
    ],
)
def test_select_refuses(wanted: list[str], words: str) -> None:
    with pytest.raises(DeviceError) as caught:
        select(DEVICES, wanted)
    assert words in str(caught.value)


def test_select_of_nothing() -> None:
    with pytest.raises(DeviceError, match="names 0 of the GPUs here: none"):
        select([], ["0"])


# -- NVML, by a module with the functions that the probe uses -----------------------------------


class NVMLError(Exception):
    pass


class NotSupportedError(NVMLError):
    pass


class NotFoundError(NVMLError):
    pass


class DriverNotLoadedError(NVMLError):
    pass


@dataclass
class Part:
    """A card or a MIG device of one."""

    uuid: str
    total: int = 80 * GIB
    used: int = 0
    sm: tuple[int, int] = (9, 0)
    mig: list[Part | None] | None = None
    """None: the card knows no MIG mode. Slots of the card else."""
    mig_on: bool = True
    lost: bool = False


@dataclass
class Host:
    cards: list[Part] = field(default_factory=list)
    driver: bool = True
    text_as_bytes: bool = False

    def module(self) -> ModuleType:
        nvml: Any = ModuleType("pynvml")
        nvml.NVMLError = NVMLError
        nvml.NVMLError_NotSupported = NotSupportedError
        nvml.NVMLError_NotFound = NotFoundError
        nvml.nvmlInit = self._init
        nvml.nvmlSystemGetDriverVersion = lambda: self._text("570.1")
        nvml.nvmlDeviceGetCount = lambda: len(self.cards)
        nvml.nvmlDeviceGetHandleByIndex = lambda index: self._alive(self.cards[index])
        nvml.nvmlDeviceGetUUID = lambda part: self._text(part.uuid)
        nvml.nvmlDeviceGetName = lambda part: self._text("NVIDIA H100")
        nvml.nvmlDeviceGetMigMode = self._mig_mode
        nvml.nvmlDeviceGetMaxMigDeviceCount = lambda part: len(part.mig)
        nvml.nvmlDeviceGetMigDeviceHandleByIndex = self._mig_part
        nvml.nvmlDeviceGetCudaComputeCapability = self._capability
        nvml.nvmlDeviceGetMemoryInfo = self._memory
        nvml.nvmlDeviceGetUtilizationRates = self._utilization
        return nvml  # type: ignore[no-any-return]

    def _init(self) -> None:
        if not self.driver:
            raise DriverNotLoadedError("Driver Not Loaded")

    def _text(self, text: str) -> str | bytes:
        return text.encode() if self.text_as_bytes else text

    def _alive(self, part: Part) -> Part:
        if part.lost:
            raise NVMLError("GPU is lost")
        return part

    def _mig_mode(self, part: Part) -> list[int]:
        if part.mig is None:
            raise NotSupportedError("Not Supported")
        return [int(part.mig_on), 1]

    def _mig_part(self, card: Part, index: int) -> Part:
        assert card.mig is not None
        part = card.mig[index]
        if part is None:
            raise NotFoundError("Not Found")
        return part

    def _capability(self, part: Part) -> tuple[int, int]:
        assert part in self.cards, "NVML gives it for cards only"
        return part.sm

    def _utilization(self, part: Part) -> SimpleNamespace:
        if self._alive(part) not in self.cards:
            raise NotSupportedError("Not Supported")
        return SimpleNamespace(gpu=37, memory=5)

    def _memory(self, part: Part) -> SimpleNamespace:
        self._alive(part)
        return SimpleNamespace(total=part.total, used=part.used, free=part.total - part.used)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setitem(sys.modules, "pynvml", host.module())
    return host


def open_here(gpus: tuple[str, ...] = (), visible: str | None = None, fake: int = 0) -> DeviceProbe:
    return open_probe(
        gpus=gpus,
        visible=visible,
        executors=3,
        fake_count=fake,
        fake_memory_bytes=24 * GIB,
        fake_name="Simulated",
        held=lambda _: 5 * GIB,
    )


def uuids(probe: DeviceProbe) -> list[str]:
    return [device.uuid for device in probe.devices]


@pytest.mark.parametrize("text_as_bytes", [False, True], ids=["str", "bytes"])
def test_cards(host: Host, text_as_bytes: bool) -> None:
    host.text_as_bytes = text_as_bytes
    host.cards = [Part("GPU-1", sm=(8, 6)), Part("GPU-2", used=GIB, mig=[], mig_on=False)]
    probe = open_here()
    assert probe.driver_version == "570.1"
    assert list(probe.devices) == [
        Device("GPU-1", "NVIDIA H100", 80 * GIB, "86", "cuda:0", "GPU-1"),
        Device("GPU-2", "NVIDIA H100", 80 * GIB, "90", "cuda:0", "GPU-2"),
    ]
    assert all(device.is_gpu for device in probe.devices)
    assert probe.memory(probe.devices[1]) == DeviceMemory(GIB, 79 * GIB)


def test_mig_devices_stand_for_their_card(host: Host) -> None:
    host.cards = [
        Part("GPU-1"),
        Part("GPU-2", sm=(8, 0), mig=[Part("MIG-a", 10 * GIB), None, Part("MIG-b", 20 * GIB, used=GIB)]),
    ]
    probe = open_here()
    assert uuids(probe) == ["GPU-1", "MIG-a", "MIG-b"]
    assert [device.sm for device in probe.devices] == ["90", "80", "80"]
    assert probe.memory(probe.devices[2]) == DeviceMemory(GIB, 19 * GIB)
    assert uuids(open_here(gpus=("MIG-b",))) == ["MIG-b"]


def test_utilization_is_told_of_cards_alone(host: Host) -> None:
    card, lost = Part("GPU-1"), Part("GPU-3")
    host.cards = [card, Part("GPU-2", mig=[Part("MIG-a", 10 * GIB)]), lost]
    probe = open_here()
    lost.lost = True
    assert [probe.utilization(device) for device in probe.devices] == [0.37, None, None]
    assert open_here(fake=1).utilization(DEVICES[0]) is None


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, ["GPU-1", "GPU-2", "GPU-3"]),
        ("0,2", ["GPU-1", "GPU-3"]),
        ("2,0", ["GPU-3", "GPU-1"]),
        (" GPU-2 , GPU-1", ["GPU-2", "GPU-1"]),
        ("1,-1,2", ["GPU-2"]),
        ("1,,2", ["GPU-2"]),
    ],
)
def test_cuda_visible_devices(host: Host, visible: str | None, found: list[str]) -> None:
    host.cards = [Part("GPU-1"), Part("GPU-2"), Part("GPU-3")]
    assert uuids(open_here(visible=visible)) == found


@pytest.mark.parametrize("visible", ["", "-1", "NoDevFiles"])
def test_a_host_that_hides_its_gpus_runs_on_the_cpu(host: Host, visible: str) -> None:
    host.cards = [Part("GPU-1")]
    probe = open_here(visible=visible)
    assert isinstance(probe, CpuProbe)
    assert len(probe.devices) == 3


def test_indices_of_worker_gpus_count_among_the_visible(host: Host) -> None:
    host.cards = [Part("GPU-1"), Part("GPU-2"), Part("GPU-3")]
    assert uuids(open_here(gpus=("1",), visible="2,0")) == ["GPU-1"]
    with pytest.raises(DeviceError, match="GPU 'GPU-2' names 0 of the GPUs here: 0=GPU-3, 1=GPU-1"):
        open_here(gpus=("GPU-2",), visible="2,0")


def test_memory_and_executor_go_by_uuid_in_whatever_order_gpus_are_counted(host: Host) -> None:
    host.cards = [Part("GPU-1", used=GIB), Part("GPU-2", used=2 * GIB), Part("GPU-3", used=3 * GIB)]
    probe = open_here(visible="2,0")
    assert [(device.visible, probe.memory(device).used_bytes) for device in probe.devices] == [
        ("GPU-3", 3 * GIB),
        ("GPU-1", GIB),
    ]
    assert {device.torch_device for device in probe.devices} == {"cuda:0"}, "each executor sees its one GPU alone"


def test_no_driver(host: Host) -> None:
    host.driver = False
    probe = open_here()
    assert isinstance(probe, CpuProbe)
    assert probe.driver_version == ""
    assert [device.torch_device for device in probe.devices] == ["cpu"] * 3
    with pytest.raises(DeviceError, match="WORKER_GPUS=0,1, but NVML finds no driver: Driver Not Loaded"):
        open_here(gpus=("0", "1"))


def test_a_driver_without_gpus(host: Host) -> None:
    assert isinstance(open_here(), CpuProbe)


def test_a_broken_gpu_is_an_error_and_not_a_worker_without_gpus(host: Host) -> None:
    host.cards = [Part("GPU-1"), Part("GPU-2", lost=True)]
    with pytest.raises(DeviceError, match="NVML can't say which GPUs are here: GPU is lost"):
        open_here()


def test_a_gpu_that_is_lost_later(host: Host) -> None:
    host.cards = [Part("GPU-1")]
    probe = open_here()
    host.cards[0].lost = True
    with pytest.raises(DeviceError, match="can't read the memory of GPU-1: GPU is lost"):
        probe.memory(probe.devices[0])


def test_pynvml_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(DeviceError, match="nvidia-ml-py is broken or missing"):
        open_here()


def test_the_real_module_has_what_the_fake_has() -> None:
    """The fake above stands for nvidia-ml-py: each of its names must be there."""
    import pynvml

    for name in vars(Host().module()):
        assert hasattr(pynvml, name), name
    assert issubclass(pynvml.NVMLError_NotSupported, pynvml.NVMLError)
    assert issubclass(pynvml.NVMLError_NotFound, pynvml.NVMLError)


# -- simulated GPUs and the CPU -----------------------------------------------------------------


def test_simulated_gpus_need_no_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    probe = open_here(fake=2)
    assert isinstance(probe, SimulatedProbe)
    assert list(probe.devices) == [
        Device("GPU-FAKE-0000", "Simulated", 24 * GIB, "90", "cpu", "0"),
        Device("GPU-FAKE-0001", "Simulated", 24 * GIB, "90", "cpu", "1"),
    ]
    assert probe.memory(probe.devices[0]) == DeviceMemory(5 * GIB, 19 * GIB)


def test_simulated_gpus_can_be_selected() -> None:
    assert uuids(open_here(gpus=("1",), fake=2)) == ["GPU-FAKE-0001"]
    with pytest.raises(DeviceError):
        open_here(gpus=("2",), fake=2)


def test_simulated_memory_never_goes_below_zero() -> None:
    probe = SimulatedProbe(1, 10, "Simulated", lambda _: 11)
    assert probe.memory(probe.devices[0]) == DeviceMemory(10, 0)


def test_cpu_slots_have_no_memory_of_their_own() -> None:
    probe = CpuProbe(2)
    assert [(device.is_gpu, device.visible) for device in probe.devices] == [(False, "")] * 2
    with pytest.raises(DeviceError):
        probe.memory(probe.devices[0])


def test_the_probe_can_be_opened_directly(host: Host) -> None:
    host.cards = [Part("GPU-1"), Part("GPU-2")]
    assert uuids(NvmlProbe(["GPU-2"], None)) == ["GPU-2"]
