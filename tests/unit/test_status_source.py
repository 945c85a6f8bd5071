"""What /status and /metrics show of the parts that own it, and when the worker is ready."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from gen_worker.pipe.messages import PIPE_PROTOCOL, Event, Ready
from supervisor.config import load_settings
from supervisor.devices import Device, DeviceError, DeviceMemory
from supervisor.model_source import FetchProgress
from supervisor.pool import SlotView
from supervisor.spare import SpareView
from supervisor.status import Status
from supervisor.status_source import MAX_RUNS, StatusSource
from supervisor.telemetry import Telemetry
from tests.support.rig import Rig, function, use_recording_children

A, B = "cozy:org/a:latest", "cozy:org/b:latest"
TOKEN = "s3cret-token-of-the-test"


@dataclass
class Session:
    registered: bool = True
    target: str = "scheduler:8080"
    epoch: int = 3
    failed_dials: int = 0


class Pool:
    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.closed = False
        self.spare: SpareView | None = None

    @property
    def ready(self) -> list[Any]:
        return list(self._rig.dispatcher._executors())

    @property
    def slots(self) -> list[SlotView]:
        handles = [executor.handle for executor in self._rig.executors]
        slots = [SlotView(handle.slot, handle.device, handle, 1, False) for handle in handles]
        empty = Device("", "", 0, "", "cpu", "")
        return [*slots, SlotView(len(slots), empty, None, 4, self.closed)]


class Probe:
    driver_version = "570.1"
    devices: Any = ()
    lost = False

    def memory(self, device: Device) -> DeviceMemory:
        if self.lost:
            raise DeviceError("GPU is lost")
        return DeviceMemory(700, device.memory_bytes - 700)

    def utilization(self, device: Device) -> float | None:
        return None if self.lost else 0.25


class Bench:
    def __init__(self, rig: Rig, telemetry: Telemetry) -> None:
        self.rig, self.telemetry = rig, telemetry
        self.session, self.pool, self.probe = Session(), Pool(rig), Probe()
        self.now = rig.dispatcher._loop.time
        self.source = StatusSource(
            settings=load_settings({"WORKER_ID": "w1", "AUTH_TOKEN": TOKEN}),
            pool=self.pool,
            dispatcher=rig.dispatcher,
            session=self.session,
            ledger=rig.residency,
            probe=self.probe,
            record=telemetry,
            loop_lag=lambda: 0.5,
            redact=lambda text: text.replace(TOKEN, "***"),
            now=self.now,
            started=self.now(),
        )
        telemetry.metrics.pull_from(self.source.status)

    def status(self) -> Status:
        """As a reader gets it."""
        return msgspec.json.decode(msgspec.json.encode(self.source.status()), type=Status)

    def metric(self, name: str, **labels: str) -> float | None:
        return self.telemetry.metrics.registry.get_sample_value(f"gen_worker_{name}", labels)


@pytest.fixture
async def bench(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    use_recording_children(monkeypatch.setattr)
    telemetry = Telemetry()
    functions = [function("g", "generator"), function("f", models=["a"]), function("h", "async")]
    rig = Rig(functions, executors=2, models=[A, B], labels={"a": A}, ready=False, observer=telemetry)
    yield Bench(rig, telemetry)
    rig.close()


def make_ready(bench: Bench) -> None:
    for executor in bench.rig.executors:
        executor.say(Ready(PIPE_PROTOCOL, bench.rig.functions, {}))


async def test_readiness(bench: Bench) -> None:
    bench.session.registered = False
    assert bench.source.unready() == [
        "not registered at a scheduler; scheduler:8080 is dialed",
        "no executor is ready",
    ]
    bench.session.registered = True
    make_ready(bench)
    assert bench.source.unready() == []
    assert bench.metric("ready") == 1
    bench.rig.dispatcher.drain()
    assert bench.source.unready() == ["draining: the worker was told to stop"]
    assert bench.status().worker.unready_because == bench.source.unready()
    assert (bench.metric("ready"), bench.metric("draining")) == (0, 1)


async def test_a_full_queue_is_no_reason(bench: Bench) -> None:
    make_ready(bench)
    for number in range(MAX_RUNS + 50):
        bench.rig.submit(f"r{number}", "f")  # they wait for the model
    bench.rig.dispatcher.backlog.run_waits(2**40)
    status = bench.status()
    assert status.worker.ready
    assert not status.queue.reading
    assert len(status.runs) == MAX_RUNS
    assert status.queue.runs == {"waiting_model": MAX_RUNS + 50}
    assert bench.metric("runs_active", state="waiting_model") == MAX_RUNS + 50
    assert bench.metric("reading") == 0
    bench.rig.dispatcher.backlog.run_left(2**40)


async def test_executors_and_gpus(bench: Bench) -> None:
    bench.rig.executors[0].say(Ready(PIPE_PROTOCOL, bench.rig.functions, {}))
    status = bench.status()
    assert [(each.name, each.state, each.pid) for each in status.executors] == [
        ("0", "ready", 4711), ("1", "starting", 4711), ("2", "replaced", 0),
    ]  # fmt: skip
    bench.pool.closed = True
    assert bench.status().executors[2].state == "given_up"
    gpu = status.gpus[1]
    assert (gpu.index, gpu.uuid, gpu.total_bytes, gpu.used_bytes, gpu.utilization) == (1, "GPU-1", 2**30, 700, 0.25)
    assert bench.metric("executors", state="ready") == 1
    assert bench.metric("gpu_memory_used_bytes", gpu="1", uuid="GPU-1") == 700
    assert bench.metric("gpu_utilization_ratio", gpu="0", uuid="GPU-0") == 0.25


async def test_the_spare_is_no_executor(bench: Bench) -> None:
    executors = bench.status().executors
    assert bench.status().spare is None
    for parked, state in ((False, "starting"), (True, "parked")):
        bench.pool.spare = SpareView(os.getpid(), parked)
        status = bench.status()
        assert status.spare is not None
        assert (status.spare.pid, status.spare.state) == (os.getpid(), state)
        assert status.spare.resident_bytes > 2**20
        assert status.executors == executors
    bench.pool.spare = SpareView(2**22 + 1, True)  # beyond any pid
    assert bench.status().spare is None, "its death is about to be noticed"


async def test_a_gpu_that_can_not_be_asked(bench: Bench) -> None:
    bench.probe.lost = True
    assert (bench.status().gpus[0].used_bytes, bench.status().gpus[0].utilization) == (None, None)
    assert bench.metric("gpu_memory_used_bytes", gpu="0", uuid="GPU-0") is None
    assert bench.metric("gpu_memory_bytes", gpu="0", uuid="GPU-0") == 2**30


async def test_models(bench: Bench) -> None:
    make_ready(bench)
    assert [(model.id, model.state) for model in bench.status().models] == [(A, "disk"), (B, "disk")]
    bench.rig.submit("r1", "f")
    assert bench.status().models[0].state == "loading"
    assert bench.status().gpus[0].reserved_bytes == 0  # it was never loaded: nobody knows
    bench.rig.executors[0].load_done(A, device_bytes=500)
    model = bench.status().models[0]
    assert (model.state, model.executors, model.device_bytes) == ("hot", ["0"], 500)
    assert bench.status().gpus[0].models_bytes == 500
    bench.rig.submit("r2", "f")  # the other executor gets the model too
    assert bench.status().gpus[1].reserved_bytes == 500
    assert bench.metric("models", state="hot") == 1
    assert bench.metric("gpu_memory_reserved_bytes", gpu="1", uuid="GPU-1") == 500


async def test_models_on_their_way(bench: Bench) -> None:
    make_ready(bench)
    bench.rig.source.under_way = {A: FetchProgress(1, 2), "hf:a/b": FetchProgress(5, 10), "hf:a/c": FetchProgress(7)}
    shown = [(model.id, model.state, model.done_bytes, model.total_bytes) for model in bench.status().models]
    assert shown == [
        (A, "disk", 0, 0),  # its tag is looked up again; what is here can serve
        (B, "disk", 0, 0),
        ("hf:a/b", "downloading", 5, 10),
        ("hf:a/c", "downloading", 7, 0),
    ]
    assert bench.metric("models", state="downloading") == 2
    bench.rig.source.under_way = {}
    assert bench.metric("models", state="downloading") == 0


async def test_a_run_and_its_progress(bench: Bench) -> None:
    make_ready(bench)
    bench.rig.submit("r1", "h", payload=b"\x81\xa1p\xa6SECRET")
    executor = bench.rig.executors[0]
    key = executor.key_of("r1")
    (run,) = bench.status().runs
    assert (run.id, run.function, run.state, run.executor, run.progress) == ("r1", "h", "running", "0", None)
    stage = f"step {TOKEN} {'x' * 200}"
    executor.say(Event(key, "job.progress", msgspec.json.encode({"progress": 0.5, "stage": stage, "timestamp": 1})))
    (run,) = bench.status().runs
    assert run.progress == 0.5
    assert run.stage.startswith("step ***")
    assert len(run.stage) == 80
    assert b"SECRET" not in msgspec.json.encode(bench.source.status())
    assert TOKEN.encode() not in msgspec.json.encode(bench.source.status())
    executor.succeed("r1")
    assert bench.status().runs == []
    assert bench.status().outcomes == {"success": 1}


@pytest.mark.parametrize(
    ("payload", "shown"),
    [
        (b'{"progress":7}', 1.0),
        (b'{"progress":-1}', 0.0),
        (b'{"progress":"half"}', None),
        (b"not JSON \xff", None),
        (b"[" * 4000, None),
        (b'{"progress":0.5,"stage":"' + b"x" * 5000 + b'"}', None),
    ],
)
async def test_progress_may_be_anything(bench: Bench, payload: bytes, shown: float | None) -> None:
    make_ready(bench)
    bench.rig.submit("r1", "h")
    executor = bench.rig.executors[0]
    executor.say(Event(executor.key_of("r1"), "job.progress", payload))
    assert bench.status().runs[0].progress == shown


async def test_a_reader_ignores_fields_that_it_does_not_know(bench: Bench) -> None:
    later = msgspec.json.decode(msgspec.json.encode(bench.source.status()))
    later["new_field"] = 1
    later["worker"]["another"] = 2
    assert msgspec.json.decode(msgspec.json.encode(later), type=Status).worker.id == "w1"
