"""Model memory on a real GPU: what NVML shows of loads, evictions, unloads and faults. `make gpu-test` runs these.

The worker is given one GPU. Models are of 1 GiB each, and the cap lets two of them stay.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import pytest_asyncio

from gen_worker.torch_build import cuda_version
from tests.support.weights import write_weights
from tests.support.worker_process import Chain, chain, eventually

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.timeout(300),  # CUDA's start and torch's import, on any machine
]

GIB: Final = 2**30
MIB: Final = 2**20
START_S: Final = 120.0
NOISE: Final = 300 * MIB
"""What a context, its kernels and workspaces may add between two readings."""
CYCLES: Final = 50

Used = Callable[[], int]


@pytest.fixture(scope="module")
def used() -> Iterator[Used]:
    """Bytes in use on GPU 0, in NVML's order, which is WORKER_GPUS's too. Skips where there is none."""
    import pynvml

    for package in ("torch", "safetensors"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if cuda_version() is None:
        pytest.skip("the installed torch is a build without CUDA")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        pytest.skip(f"no NVIDIA GPU: {error}")
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    if pynvml.nvmlDeviceGetMemoryInfo(handle).free < 6 * GIB:
        pytest.skip("GPU 0 has less than 6 GiB free")
    yield lambda: int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    pynvml.nvmlShutdown()


@contextlib.asynccontextmanager
async def on_gpu(root: Path, **env: str) -> AsyncIterator[Chain]:
    models = {}
    for value, name in enumerate("abc", 1):
        write_weights(root / name, GIB, value)
        models[name] = {"root_dir": str(root / name)}
    environment = {
        "WORKER_GPUS": "0",
        "WORKER_MAX_VRAM_GB": "2.5",
        "WORKER_VRAM_SAFETY_MARGIN_GB": "1",
        "WORKER_MODEL_ARTIFACTS_JSON": json.dumps(models),
        "WORKER_MODEL_CACHE_DIR": str(root / "cache"),
        "HEARTBEAT_INTERVAL_SECONDS": "60",
        **env,
    }
    async with chain(env=environment, tenant="gpu", modules="gpu_functions", ready="trouble", start_s=START_S) as found:
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(used: Used, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Chain]:
    async with on_gpu(tmp_path_factory.mktemp("gpu")) as found:
        yield found


async def call(worker: Chain, function: str, payload: dict[str, Any]) -> Any:
    """A run that may be the first on its executor, and start CUDA."""
    return await (await worker.run(function, payload)).output(START_S)


async def unload_all(worker: Chain) -> None:
    for name in "abc":
        assert (await worker.orchestrator.unload_model(name)).success


async def test_a_load_is_what_nvml_shows_and_the_scheduler_is_told(worker: Chain, used: Used) -> None:
    await call(worker, "use", {"model": "a"})  # CUDA's context is there from here on
    await unload_all(worker)
    empty = used()
    output = await call(worker, "use", {"model": "b"})
    assert (output["checksum"], output["device"]) == (2 * 1024.0, "cuda:0")
    assert GIB <= used() - empty <= GIB + NOISE
    await eventually(lambda: list(worker.resources.vram_models) == ["b"])
    assert abs(worker.resources.gpu_memory_used_bytes - used()) <= NOISE
    assert worker.resources.gpu_count == 1


async def test_eviction_and_reload(worker: Chain, used: Used) -> None:
    await unload_all(worker)
    empty = used()
    for name in "abc":
        await call(worker, "use", {"model": name})
    await eventually(lambda: list(worker.resources.vram_models) == ["b", "c"])
    assert 2 * GIB <= used() - empty <= 2 * GIB + NOISE, "two fit under the cap"
    assert worker.worker.lines("unloaded a: expected 1.00 GiB back")
    assert (await call(worker, "use", {"model": "a"}))["checksum"] == 1024.0
    await eventually(lambda: list(worker.resources.vram_models) == ["a", "c"])


async def test_an_unload_gives_back_what_the_load_took(worker: Chain, used: Used) -> None:
    await unload_all(worker)
    empty = used()
    await call(worker, "use", {"model": "a"})
    await unload_all(worker)
    assert abs(used() - empty) <= 64 * MIB
    assert not worker.worker.lines("is recycled")


async def test_many_cycles_end_at_the_baseline(worker: Chain, used: Used) -> None:
    before = await call(worker, "use", {"model": "a"})
    await unload_all(worker)
    baseline = used()
    for _ in range(CYCLES):
        assert (await worker.orchestrator.load_model("a")).success
        assert (await worker.orchestrator.unload_model("a")).success
    assert abs(used() - baseline) <= 64 * MIB
    assert (await call(worker, "trouble", {}))["pid"] == before["pid"], "the executor is the same"


async def test_out_of_memory_is_the_runs_fault_alone(worker: Chain, used: Used) -> None:
    before = await call(worker, "use", {"model": "a"})
    result = await worker.result("trouble", {"how": "memory"})
    assert (result.error_type, result.retryable, result.safe_message) == ("resource", False, "out of memory")
    after = await call(worker, "use", {"model": "a"})
    assert after == before


async def test_a_device_assert_costs_the_executor(worker: Chain, used: Used) -> None:
    before = await call(worker, "use", {"model": "a"})
    result = await (await worker.run("trouble", {"how": "assert"})).result(START_S)
    assert (result.error_type, result.retryable) == ("retryable", True)
    after = await call(worker, "use", {"model": "a"})
    assert after["pid"] != before["pid"]
    assert after["checksum"] == 1024.0


async def test_a_leak_costs_the_executor_and_the_memory_comes_back(worker: Chain, used: Used) -> None:
    before = await call(worker, "use", {"model": "b"})
    await unload_all(worker)
    empty = used()
    await call(worker, "use", {"model": "b", "keep": True})
    await unload_all(worker)
    line = await worker.worker.wait_for_log("is recycled", "expected 1.00 GiB back")
    assert "shows 0.0" in line
    after = await call(worker, "use", {"model": "c"})
    assert after["pid"] != before["pid"]
    await unload_all(worker)
    assert abs(used() - empty) <= NOISE


async def test_a_model_returns_from_host_memory(used: Used, tmp_path: Path) -> None:
    async with on_gpu(tmp_path, WORKER_HOST_CACHE_GB="2") as worker:
        first = await call(worker, "use", {"model": "a"})
        await call(worker, "use", {"model": "b"})
        await call(worker, "use", {"model": "c"})
        (tmp_path / "a" / "model.safetensors").write_bytes(b"not read again")
        again = await call(worker, "use", {"model": "a"})
        assert again == first
        assert not worker.worker.lines("can't be page-locked")
