"""What the worker says of itself."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import msgspec
import pytest

from gen_worker.pipe.messages import PIPE_PROTOCOL, Ready
from gen_worker.wire import worker_scheduler_pb2 as pb
from supervisor import registration as module
from supervisor.config import load_settings
from supervisor.devices import DeviceError, DeviceMemory
from supervisor.registration import Registration, memory_limit
from tests.support.rig import Rig, function, use_recording_children

A, B = "cozy:org/a:latest", "cozy:org/b:latest"


class Probe:
    driver_version = "570.1"
    devices: Any = ()

    def __init__(self) -> None:
        self.used = {"GPU-0": 100, "GPU-1": 20}
        self.lost = False

    def memory(self, device: Any) -> DeviceMemory:
        if self.lost:
            raise DeviceError("GPU is lost")
        return DeviceMemory(self.used[device.uuid], device.memory_bytes - self.used[device.uuid])


class RigPool:
    def __init__(self, rig: Rig) -> None:
        self._rig = rig

    @property
    def ready(self) -> list[Any]:
        return list(self._rig.dispatcher._executors())


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    use_recording_children(monkeypatch.setattr)
    functions = [function("g", "generator", limit=3), function("f", models=["a"]), function("h", "async", limit=2**40)]
    rig = Rig(functions, executors=2, models=[A, B], labels={"a": A}, ready=False)
    yield rig
    rig.close()


def encoded(rig: Rig, probe: Probe, *, is_heartbeat: bool = False, **env: str) -> pb.WorkerResources:
    settings = load_settings({"WORKER_ID": "w1", "DEPLOYMENT_ID": "d1", "RUNPOD_POD_ID": "p1", **env})
    registration = Registration(settings, cast("Any", RigPool(rig)), rig.dispatcher, rig.residency, cast("Any", probe))
    message = pb.WorkerSchedulerMessage.FromString(registration.encode(is_heartbeat)).worker_registration
    assert message.is_heartbeat is is_heartbeat
    return message.resources


def make_ready(rig: Rig, count: int) -> None:
    for executor in rig.executors[:count]:
        executor.say(Ready(PIPE_PROTOCOL, rig.functions, {"torch": "2.13.0", "cuda": "12.8", "python": "3.11"}))


async def test_before_an_executor_is_ready(rig: Rig) -> None:
    resources = encoded(rig, Probe())
    assert (resources.worker_id, resources.deployment_id, resources.runpod_pod_id) == ("w1", "d1", "p1")
    assert resources.cpu_cores >= 1
    assert resources.memory_bytes == memory_limit()
    assert list(resources.available_functions) == []
    assert resources.gpu_count == 0
    assert list(resources.disk_models) == [A, B]


async def test_functions_and_schemas(rig: Rig) -> None:
    make_ready(rig, 2)
    resources = encoded(rig, Probe(), WORKER_MAX_CONCURRENCY="7")
    assert list(resources.available_functions) == ["f", "g", "h"]
    assert resources.max_concurrency == 7
    assert dict(resources.function_concurrency) == {"f": 2, "g": 6, "h": 2**31 - 1}
    assert resources.supports_model_loading
    assert (resources.torch_version, resources.cuda_version) == ("2.13.0", "12.8")
    schemas = {schema.name: schema for schema in resources.function_schemas}
    assert [schemas[name].incremental_output for name in "fgh"] == [False, True, False]
    assert msgspec.json.decode(schemas["f"].injection_json) == [
        {"param": "p0", "type": "t.T", "model_ref": {"source": "deployment", "key": "a"}}
    ]


async def test_the_gpu_with_the_most_free_memory_speaks(rig: Rig) -> None:
    make_ready(rig, 2)
    resources = encoded(rig, Probe())
    assert (resources.gpu_count, resources.gpu_driver, resources.gpu_sm) == (2, "570.1", "90")
    assert (resources.gpu_memory_used_bytes, resources.gpu_memory_free_bytes) == (20, 2**30 - 20)
    assert resources.gpu_memory_bytes == 2**30


async def test_gpus_are_busy_when_each_has_a_run(rig: Rig) -> None:
    make_ready(rig, 2)
    for run_id, busy in [("r1", False), ("r2", True)]:
        rig.submit(run_id, "h")
        assert encoded(rig, Probe(), is_heartbeat=True).gpu_is_busy is busy
    rig.executors[0].die()
    assert encoded(rig, Probe()).gpu_count == 1


async def test_a_gpu_that_can_not_be_asked_costs_no_heartbeat(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    make_ready(rig, 2)
    probe = Probe()
    probe.lost = True
    resources = encoded(rig, probe)
    assert resources.gpu_count == 2
    assert resources.gpu_memory_bytes == 0
    assert "GPU is lost" in caplog.text


async def test_models(rig: Rig) -> None:
    make_ready(rig, 2)
    rig.submit("r1", "f")
    rig.executors[0].load_done(A)
    resources = encoded(rig, Probe())
    assert (list(resources.vram_models), list(resources.disk_models)) == ([A], [B])


@pytest.mark.parametrize(("text", "limit"), [("1048576\n", 1048576), ("max\n", None), (None, None), (f"{2**62}", None)])
def test_memory_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Any, text: str | None, limit: int | None) -> None:
    import psutil

    path = tmp_path / "memory.max"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(module, "CGROUP_MEMORY_LIMITS", (path,))
    assert memory_limit() == (limit or psutil.virtual_memory().total)
