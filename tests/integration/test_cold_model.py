"""Cold models through the whole chain: hub, transfer process, supervisor, executor, run, and what is said on the way.

A worker with one simulated GPU that has room for two of the models, and a disk budget that has room for three.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio

from gen_worker.testing.mock_orchestrator import RunHandle
from supervisor.model_news import PROGRESS_GAP_S
from supervisor.status import ModelStatus, Status
from supervisor.transfers.store import Store
from tests.support.dev_hub import DevHub
from tests.support.faulty_server import Answer, Asked
from tests.support.worker_process import WAIT_S, Chain, chain, eventually

TOKEN = "the-hub-token-of-the-cold-models"
MIB = 2**20
WEIGHTS = 4 * MIB
NAMES = ("first", "second", "third", "fourth", "fifth", "other")


def ref(name: str) -> str:
    return f"cozy:org/{name}:latest"


@pytest.fixture
def hub() -> Iterator[DevHub]:
    with DevHub(token=TOKEN) as hub:
        for number, name in enumerate(NAMES):
            hub.put(f"org/{name}", {"model.safetensors": bytes([number]) * WEIGHTS, "config.json": b"{}"})
        yield hub


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest_asyncio.fixture
async def worker(hub: DevHub, cache: Path) -> AsyncIterator[Chain]:
    env = {
        "COZY_HUB_URL": hub.url,
        "COZY_HUB_TOKEN": TOKEN,
        "WORKER_MODEL_CACHE_DIR": str(cache),
        "WORKER_MODEL_CACHE_MAX_GB": str(3.5 * WEIGHTS / 2**30),
        "WORKER_FAKE_GPU_COUNT": "1",
        "WORKER_FAKE_GPU_MEMORY_BYTES": "10 MiB",
        "WORKER_VRAM_SAFETY_MARGIN_GB": "0",
        "WORKER_HTTP_ADDR": "127.0.0.1:0",
        "HEARTBEAT_INTERVAL_SECONDS": "60",  # what changes is said at once
    }
    async with chain(env=env, tenant="memory", modules="memory_functions", ready="both") as found:
        yield found


def weights_of(hub: DevHub, asked: Asked) -> str:
    """Whose weights a request to the object store is for; "" when it is for something else."""
    digest = asked.path.partition("?")[0].rpartition("/")[2]
    data = hub.store.get(digest, b"")
    return NAMES[data[0]] if len(data) == WEIGHTS else ""


def progress_of(run: RunHandle) -> list[dict[str, Any]]:
    return [event.payload for event in run.events if event.type == "job.progress"]


def said(worker: Chain) -> tuple[set[str], set[str]]:
    """Hot, and whole on disk."""
    return set(worker.resources.vram_models), set(worker.resources.disk_models)


def refs(*names: str) -> set[str]:
    return {ref(name) for name in names}


async def fetched(worker: Chain, path: str) -> bytes:
    line = await worker.worker.wait_for_log("health, metrics and status at")
    async with httpx.AsyncClient(timeout=WAIT_S) as client:
        return (await client.get(line.rpartition(" at ")[2] + path)).content


async def status_of(worker: Chain) -> Status:
    return msgspec.json.decode(await fetched(worker, "/status"), type=Status)


async def shown(worker: Chain) -> tuple[dict[str, ModelStatus], str]:
    """What an operator sees of the models, and the metrics."""
    status = await status_of(worker)
    return {model.id: model for model in status.models}, (await fetched(worker, "/metrics")).decode()


async def test_a_cold_model_comes_although_its_transfer_process_is_killed(worker: Chain, hub: DevHub) -> None:
    def break_off(asked: Asked) -> Answer | None:
        if weights_of(hub, asked) != "first" or asked.number > 1:
            return None
        time.sleep(1.1 * PROGRESS_GAP_S)  # so that the progress after that of the beginning is told
        return Answer(200, hub.store[asked.path.partition("?")[0].rpartition("/")[2]], cut_at=3 * MIB, stall=True)

    hub.on_request = break_off
    assert said(worker) == (set(), set())
    waiting = await worker.run("use", {"model": "org/first"})
    await eventually(lambda: any(each.get("bytes", 0) > 0 for each in progress_of(waiting)), what="progress")
    (shown_run,) = (await status_of(worker)).runs
    assert (shown_run.state, shown_run.stage, bool(shown_run.progress)) == ("waiting_model", "download", True)
    first = (await shown(worker))[0][ref("first")]
    assert (first.state, first.total_bytes) == ("downloading", WEIGHTS + 2)
    assert 0 < first.done_bytes < WEIGHTS
    assert not waiting.done
    transfers = next(child for child in worker.worker.descendants() if "supervisor.transfers" in child.cmdline())
    os.kill(transfers.pid, signal.SIGKILL)
    assert (await waiting.output(WAIT_S))["model"] == ref("first")

    told = progress_of(waiting)
    assert {each["model"] for each in told} == {ref("first")}
    stages = [(each["stage"], each["progress"]) for each in told]
    # A load that is over at once has no beginning that a waiting run could hear of.
    assert [each for each in stages if each != ("load", 0.0)][-2:] == [("download", 1.0), ("load", 1.0)], stages
    assert sorted(stage for stage, _ in stages) == [stage for stage, _ in stages], "download, then load"
    downloaded = [each["progress"] for each in told if each["stage"] == "download"]
    assert downloaded == sorted(downloaded), "though the process began anew"
    assert any(0 < each["bytes"] < each["total_bytes"] == WEIGHTS + 2 for each in told if "bytes" in each)
    again = [asked for asked in hub.requests("/store/") if weights_of(hub, asked) == "first" and asked.number > 1]
    assert again, "it was asked for again"
    assert all(asked.headers.get("Range", "bytes=0-") != "bytes=0-" for asked in again), "and not from its beginning"
    await eventually(lambda: said(worker) == (refs("first"), set()))
    models, metrics = await shown(worker)
    assert (models[ref("first")].state, models[ref("first")].device_bytes) == ("hot", WEIGHTS)
    assert 'gen_worker_model_downloads_total{outcome="success"} 1.0' in metrics
    assert 'gen_worker_model_loads_total{outcome="success"} 1.0' in metrics
    for child in worker.worker.descendants():
        assert TOKEN not in " ".join(child.environ().values())
    assert TOKEN not in "\n".join(worker.worker.log)


async def test_others_leave_the_device_for_it_and_the_disk_when_nobody_uses_them(worker: Chain) -> None:
    for name in ("first", "second", "third"):
        await worker.call("use", {"model": f"org/{name}"})
    await eventually(lambda: said(worker) == (refs("second", "third"), refs("first")))
    using = await worker.started("use", {"model": "org/second", "seconds": 60})
    await worker.call("use", {"model": "org/fourth"})
    # The first was used longest ago, and it is all that the disk has to give: the others were loaded just now.
    await eventually(lambda: said(worker) == (refs("second", "fourth"), refs("third")))
    assert not using.done
    await using.cancel()
    await using.result()
    models, metrics = await shown(worker)
    assert {name: model.state for name, model in models.items()} == {
        ref("second"): "hot", ref("third"): "disk", ref("fourth"): "hot",
    }  # fmt: skip
    assert 'gen_worker_model_evictions_total{reason="room"} 2.0' in metrics


async def test_what_the_hub_does_not_have_is_its_runs_answer(worker: Chain) -> None:
    result = await worker.result("use", {"model": "org/nothing"})
    assert (result.error_type, result.retryable) == ("validation", False)
    assert f"the hub has no {ref('nothing')} (404)" in result.error_message
    loaded = await worker.orchestrator.load_model("org/nothing")
    assert not loaded.success
    assert "(404)" in loaded.error_message
    assert 'gen_worker_model_downloads_total{outcome="failure"} 2.0' in (await shown(worker))[1]


async def test_a_hub_that_hangs_holds_nobody_else_up(worker: Chain, hub: DevHub) -> None:
    hub.on_request = lambda asked: Answer(hang=True) if "org/fifth" in asked.path else None
    canceled = await worker.run("use", {"model": "org/fifth"})
    late = await worker.run("use", {"model": "org/fifth"}, timeout_ms=300)
    await eventually(lambda: bool(hub.requests("org/fifth")))
    assert (await worker.call("use", {"model": "org/second"}))["model"] == ref("second")
    assert (await worker.call("use", {"model": "org/third"}))["model"] == ref("third")
    assert (await late.result(WAIT_S)).error_type == "timeout"
    await canceled.cancel()
    assert (await canceled.result(WAIT_S)).error_type == "canceled"


async def test_commands_fetch_load_and_unload(worker: Chain) -> None:
    loaded = await worker.orchestrator.load_model("org/first")
    assert (loaded.success, loaded.error_message) == (True, "")
    await eventually(lambda: ref("first") in said(worker)[0])
    unloaded = await worker.orchestrator.unload_model("org/first")
    assert (unloaded.success, unloaded.error_message) == (True, "")
    await eventually(lambda: ref("first") in said(worker)[1])
    assert 'gen_worker_model_evictions_total{reason="command"} 1.0' in (await shown(worker))[1]


async def test_what_another_worker_removes_from_the_shared_disk_is_told_at_once(worker: Chain, cache: Path) -> None:
    assert (await worker.orchestrator.load_model("org/first")).success
    assert (await worker.orchestrator.unload_model("org/first")).success
    await eventually(lambda: ref("first") in said(worker)[1])
    store = Store(str(cache))
    record = store.record(ref("first"))
    assert record is not None
    assert store.remove_snapshot(record.snapshot) == (ref("first"),)
    await eventually(lambda: ref("first") not in said(worker)[1])
    assert ref("first") not in (await shown(worker))[0]


async def test_what_the_deployment_names_is_fetched_before_it_is_asked_for(worker: Chain, hub: DevHub) -> None:
    await worker.orchestrator.configure_models([ref("other")], {"label": ref("other")})
    await eventually(lambda: ref("other") in said(worker)[1])
    count = len(hub.requests("/store/"))
    run = await worker.run("use", {"model": "label"})
    assert (await run.output(WAIT_S))["model"] == ref("other")
    assert len(hub.requests("/store/")) == count
    assert {each["stage"] for each in progress_of(run)} == {"load"}
    refused = await worker.result("use", {"model": "org/second"})
    assert (refused.error_type, refused.safe_message) == ("validation", "model not allowed")


async def test_a_drain_waits_for_no_download(worker: Chain, hub: DevHub) -> None:
    hub.on_request = lambda asked: Answer(hang=True) if "org/fourth" in asked.path else None
    waiting = await worker.run("use", {"model": "org/fourth"})
    await eventually(lambda: bool(hub.requests("org/fourth")))
    worker.worker.signal(signal.SIGTERM)
    result = await waiting.result(WAIT_S)
    assert (result.error_type, result.retryable, result.safe_message) == ("retryable", True, "worker busy")
    assert await worker.worker.exit_code() == 0
