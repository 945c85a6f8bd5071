"""Model memory on simulated GPUs, through the whole chain: eviction, refusals, leaks, what is said and remembered.

A GPU here has 10 GiB, of which 1 is the safety margin. The weights are sparse files, so they take no disk, and the
objects made of them none of the host's memory; the executor counts them as if they lay on its device.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from tests.support.weights import write_weights
from tests.support.worker_process import Chain, chain, eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

GIB = 2**30
SIZES = {"first": 4, "second": 4, "third": 4, "half": 5, "huge": 30}
SAID_WITHIN_S = 0.1
TORCH_S = 120.0
"""For torch to be imported: seconds, but many on a machine that does much else."""


def weights(root: Path) -> str:
    """WORKER_MODEL_ARTIFACTS_JSON for models of so many GiB."""
    written: dict[str, object] = {"gone": {"root_dir": str(root / "gone")}}
    for name, size in SIZES.items():
        folder = root / name
        folder.mkdir(parents=True)
        with (folder / "model.safetensors").open("wb") as file:
            file.truncate(size * GIB)
        written[name] = {"root_dir": str(folder)}
    return json.dumps(written)


def environment(root: Path) -> dict[str, str]:
    return {
        "WORKER_FAKE_GPU_MEMORY_BYTES": "10 GiB",
        "WORKER_VRAM_SAFETY_MARGIN_GB": "1",
        "WORKER_MODEL_ARTIFACTS_JSON": weights(root / "models"),
        "WORKER_MODEL_CACHE_DIR": str(root / "cache"),
        "HEARTBEAT_INTERVAL_SECONDS": "60",
    }


@contextlib.asynccontextmanager
async def on_gpus(env: dict[str, str], count: int = 1) -> AsyncIterator[Chain]:
    env = {**env, "WORKER_FAKE_GPU_COUNT": str(count)}
    async with chain(executors=count, env=env, tenant="memory", modules="memory_functions", ready="both") as found:
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Chain]:
    async with on_gpus(environment(tmp_path_factory.mktemp("memory"))) as found:
        yield found


def said(worker: Chain) -> tuple[list[str], int]:
    resources = worker.resources
    return list(resources.vram_models), resources.gpu_memory_used_bytes // GIB


async def test_idle_models_leave_for_others_and_all_is_said(worker: Chain) -> None:
    for name in ("first", "second"):
        assert (await worker.call("use", {"model": name}))["model"] == name
    await eventually(lambda: said(worker) == (["first", "second"], 8))
    await worker.call("use", {"model": "first"})
    await worker.call("use", {"model": "third"})
    await eventually(lambda: said(worker) == (["first", "third"], 8))
    assert worker.resources.gpu_memory_free_bytes == 2 * GIB
    assert worker.worker.lines("unloaded second: expected 4.00 GiB back", "shows 4.00 GiB")
    assert "second" in worker.resources.disk_models


async def test_a_model_in_use_stays_and_the_other_waits(worker: Chain) -> None:
    using = await worker.started("use", {"model": "first", "seconds": 60})
    waiting = await worker.run("use", {"model": "half"})
    await worker.worker.wait_for_log("third leaves", "half")
    await waiting.output()
    assert not using.done
    assert "first" in worker.resources.vram_models
    await using.cancel()
    await using.result()


async def test_a_model_that_no_gpu_holds_is_refused_with_both_sizes(worker: Chain) -> None:
    result = await worker.result("use", {"model": "huge"})
    assert (result.error_type, result.retryable) == ("resource", False)
    assert "30.00 GiB" in result.safe_message
    assert "10.00 GiB" in result.safe_message
    loaded = await worker.orchestrator.load_model("huge")
    assert "30.00 GiB" in loaded.error_message


async def test_files_that_are_not_there(worker: Chain) -> None:
    result = await worker.result("use", {"model": "gone"})
    assert (result.error_type, result.safe_message) == ("fatal", "model can't be loaded: its files are missing")
    assert "there is no directory" in result.error_message


async def test_a_change_is_said_within_100_ms(worker: Chain) -> None:
    """The best of some, since a machine that does much else can hold any single one up."""
    orchestrator, delays = worker.orchestrator, []
    for _ in range(4):
        await orchestrator.unload_model("second")
        waiting = await worker.run("use", {"model": "second"})
        await waiting.output()
        ended = next(event.at for event in waiting.events if event.payload == {**event.payload, "progress": 1.0})
        report = await orchestrator.wait_for_registration(lambda it: "second" in it.resources.vram_models)
        delays.append(report.at - ended)
        assert "second" not in report.resources.disk_models
    assert min(delays) < SAID_WITHIN_S


async def test_waiting_runs_hear_of_the_load(worker: Chain) -> None:
    await worker.orchestrator.unload_model("first")
    handle = await worker.run("use", {})
    await handle.output()
    progress = [event.payload for event in handle.events if event.type == "job.progress"]
    assert [(each["stage"], each["progress"]) for each in progress] == [("load", 0.0), ("load", 1.0)]


async def test_an_executor_that_keeps_memory_is_recycled(worker: Chain) -> None:
    """Last of those that share the worker: it gets a new executor."""
    leaking = await worker.call("use", {"model": "third", "keep": True})
    unloaded = await worker.orchestrator.unload_model("third")
    assert unloaded.success
    line = await worker.worker.wait_for_log("is recycled", "third")
    assert "expected 4.00 GiB back" in line
    assert "shows 0.00 GiB" in line
    after = await worker.call("use", {"model": "third"})
    assert after["pid"] != leaking["pid"]
    await eventually(lambda: said(worker) == (["third"], 4))
    assert worker.worker.lines("was recycled")


@pytest.mark.timeout(300)
async def test_an_evicted_model_returns_from_host_memory(tmp_path: Path) -> None:
    """Real tensors, on a device that is not there: two of three models fit, the third has its place in the host's."""
    if not all(importlib.util.find_spec(package) for package in ("torch", "safetensors")):
        pytest.skip("torch or safetensors is not installed")
    models = {}
    for value, name in enumerate("abc", 1):
        write_weights(tmp_path / name, 64 * 1024, value)
        models[name] = {"root_dir": str(tmp_path / name)}
    env = {
        "WORKER_FAKE_GPU_COUNT": "1",
        "WORKER_FAKE_GPU_MEMORY_BYTES": "150 KiB",
        "WORKER_VRAM_SAFETY_MARGIN_GB": "0",
        "WORKER_HOST_CACHE_GB": "1",
        "WORKER_MODEL_ARTIFACTS_JSON": json.dumps(models),
        "WORKER_MODEL_CACHE_DIR": str(tmp_path / "cache"),
    }
    async with chain(env=env, tenant="gpu", modules="gpu_functions", ready="trouble", start_s=TORCH_S) as worker:
        for value, name in enumerate("abc", 1):
            assert (await worker.call("use", {"model": name}))["checksum"] == 1024.0 * value
        (tmp_path / "a" / "model.safetensors").write_bytes(b"not read again")
        assert (await worker.call("use", {"model": "a"}))["checksum"] == 1024.0
        await eventually(lambda: list(worker.resources.vram_models) == ["a", "c"])
        assert "b" in worker.resources.disk_models, "in host memory it is as warm as on disk"


async def test_what_was_measured_is_remembered_by_the_next_worker(tmp_path: Path) -> None:
    env = environment(tmp_path)
    path = tmp_path / "cache" / "measured-sizes.json"
    path.parent.mkdir()
    path.write_text("{ not json")
    async with on_gpus(env, 2) as two:
        assert two.worker.lines("measured model sizes", "can't be read")
        outputs = await asyncio.gather(*(two.call("use", {"model": "first", "seconds": 0.2}) for _ in range(2)))
        assert len({output["pid"] for output in outputs}) in {1, 2}
        assert (await two.call("both"))["model"] == "first second"
        await eventually(lambda: b"second" in path.read_bytes())
    sizes = json.loads(path.read_text())["sizes"]
    key = "first as memory_functions.Weights"
    assert sizes[key] == {"weights": 4 * GIB, "device": 4 * GIB}
    sizes[key]["device"] = 9 * GIB + 1
    path.write_text(json.dumps({"version": 1, "sizes": sizes}))
    async with on_gpus(env) as again:
        result = await again.result("use", {"model": "first"})
        assert result.error_type == "resource"
        assert "9.00 GiB" in result.error_message
