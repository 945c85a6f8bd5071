"""What the worker says of itself: the fields, the schemas, and when heartbeats come."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import psutil
import pytest
import pytest_asyncio

from gen_worker.testing.mock_orchestrator import Registration
from tests.support.worker_process import TENANTS, WAIT_S, Chain, WorkerProcess, all_of, chain

pytestmark = pytest.mark.asyncio(loop_scope="module")

GIB = 2**30
BEAT_S = 0.3


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def gpus() -> AsyncIterator[Chain]:
    """Two simulated GPUs."""
    env = {
        "WORKER_FAKE_GPU_COUNT": "2",
        "WORKER_FAKE_GPU_MEMORY_BYTES": "80 GiB",
        "WORKER_FAKE_GPU_NAME": "Pretend 9000",
        "WORKER_ID": "worker-7",
        "DEPLOYMENT_ID": "deployment-3",
        "RUNPOD_POD_ID": "pod-5",
        "TENANT_ID": "acme",
        "WORKER_MAX_CONCURRENCY": "12",
        "HEARTBEAT_INTERVAL_SECONDS": str(BEAT_S),
    }
    async with chain(executors=2, env=env) as found:
        yield found


@pytest.fixture(scope="module")
def tenant() -> Any:
    """The tenant's module, in this process."""
    sys.path.insert(0, str(TENANTS / "basic"))
    try:
        return importlib.import_module("basic_functions")
    finally:
        sys.path.remove(str(TENANTS / "basic"))


# -- fields ---------------------------------------------------------------------------------------


async def test_names_are_those_of_the_environment(gpus: Chain) -> None:
    resources = gpus.resources
    assert resources.worker_id == "worker-7"
    assert resources.deployment_id == "deployment-3"
    assert resources.runpod_pod_id == "pod-5"


async def test_cores_and_memory_are_what_this_host_may_use(gpus: Chain) -> None:
    assert gpus.resources.cpu_cores == len(os.sched_getaffinity(0))
    assert 0 < gpus.resources.memory_bytes <= psutil.virtual_memory().total


async def test_gpu_fields_speak_of_one_gpu_and_the_count_of_all(gpus: Chain) -> None:
    resources = gpus.resources
    assert resources.gpu_count == 2
    assert resources.gpu_name == "Pretend 9000"
    assert resources.gpu_memory_bytes == 80 * GIB  # never the sum
    assert resources.gpu_memory_free_bytes + resources.gpu_memory_used_bytes == 80 * GIB
    assert resources.gpu_sm
    assert resources.gpu_driver


async def test_each_executor_sees_its_own_gpu_alone(gpus: Chain) -> None:
    blockers = [await gpus.started("one_at_a_time", {"seconds": 30}) for _ in range(2)]
    pids = {handle.events[0].payload["pid"] for handle in blockers}
    visible = {psutil.Process(pid).environ()["CUDA_VISIBLE_DEVICES"] for pid in pids}
    assert visible == {"0", "1"}
    for handle in blockers:
        await handle.cancel()
        await handle.result()


async def test_gpu_is_busy_while_every_gpu_has_a_run(gpus: Chain) -> None:
    first = await gpus.started("one_at_a_time", {"seconds": 30})
    seen = len(gpus.connection.registrations)
    await gpus.orchestrator.wait_until(lambda: len(gpus.connection.registrations) > seen)
    assert not gpus.resources.gpu_is_busy
    second = await gpus.started("one_at_a_time", {"seconds": 30})
    await gpus.orchestrator.wait_for_registration(lambda registration: registration.resources.gpu_is_busy, 5)
    await first.cancel()
    await first.result()
    await gpus.orchestrator.wait_for_registration(lambda registration: not registration.resources.gpu_is_busy, 5)
    await second.cancel()
    await second.result()


async def test_versions_are_those_that_are_installed(gpus: Chain) -> None:
    try:
        import torch
    except ImportError:
        expected = ""
    else:
        expected = torch.__version__
    assert gpus.resources.torch_version == expected


async def test_a_host_without_gpus_says_so() -> None:
    async with chain(executors=2, env={"CUDA_VISIBLE_DEVICES": "-1"}) as worker:
        resources = worker.resources
        assert resources.gpu_count == 0
        assert (resources.gpu_name, resources.gpu_memory_bytes, resources.gpu_is_busy) == ("", 0, False)


async def test_without_a_worker_id_one_is_made_up() -> None:
    async with chain(env={"WORKER_ID": ""}) as worker:
        assert worker.resources.worker_id.startswith(f"{os.uname().nodename}-")


# -- functions ------------------------------------------------------------------------------------


async def test_functions_are_named_with_their_schemas(gpus: Chain, tenant: Any) -> None:
    resources = gpus.resources
    assert list(resources.available_functions) == sorted(resources.available_functions)
    assert {"echo", "aecho", "count", "acount", "use_thing"} <= set(resources.available_functions)
    assert [schema.name for schema in resources.function_schemas] == list(resources.available_functions)
    schemas = {schema.name: schema for schema in resources.function_schemas}
    for name, input_type, output_type, incremental in [
        ("echo", tenant.Echo, tenant.Echo, False),
        ("aecho", tenant.Echo, tenant.Echo, False),
        ("sleep", tenant.Seconds, tenant.Answer, False),
        ("count", tenant.Count, tenant.Delta, True),
        ("acount", tenant.Count, tenant.Delta, True),
        ("use_chosen", tenant.Chosen, tenant.Used, False),
    ]:
        schema = schemas[name]
        assert schema.input_schema_json == compact(msgspec.json.schema(input_type))
        assert schema.output_schema_json == compact(msgspec.json.schema(output_type))
        assert schema.incremental_output is incremental
        assert schema.delta_schema_json == (compact(msgspec.json.schema(output_type)) if incremental else b"")


async def test_injections_are_named(gpus: Chain) -> None:
    schemas = {schema.name: schema for schema in gpus.resources.function_schemas}
    assert json.loads(schemas["echo"].injection_json) == []
    injections = [
        {"param": "thing", "type": "basic_functions.Thing", "model_ref": {"source": "deployment", "key": "small"}},
        {"param": "other", "type": "basic_functions.Thing", "model_ref": {"source": "deployment", "key": "other"}},
    ]
    assert schemas["use_two"].injection_json == compact(injections)
    (injection,) = json.loads(schemas["use_chosen"].injection_json)
    assert injection["model_ref"] == {"source": "payload", "key": "model"}
    assert gpus.resources.supports_model_loading


async def test_concurrency_is_summed_over_executors(gpus: Chain) -> None:
    resources = gpus.resources
    assert resources.max_concurrency == 12
    assert resources.function_concurrency["one_at_a_time"] == 2
    assert resources.function_concurrency["use_thing"] == 2  # a model: one at a time on each
    assert "echo" not in resources.function_concurrency


def compact(value: object) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


# -- heartbeats -----------------------------------------------------------------------------------


def lateness(registrations: list[Registration], interval_s: float) -> list[float]:
    """How far each heartbeat is from its place: interval_s, 2 * interval_s ... after the registration."""
    start, *beats = [registration.at for registration in registrations]
    return [(at - start) - interval_s * number for number, at in enumerate(beats, 1)]


async def test_heartbeats_come_on_their_beat_and_do_not_drift(gpus: Chain) -> None:
    connection = gpus.connection
    seen = len(connection.registrations)
    await gpus.orchestrator.wait_until(lambda: len(connection.registrations) >= seen + 5)
    registrations = connection.registrations
    assert [registration.is_heartbeat for registration in registrations] == [False] + [True] * (len(registrations) - 1)
    gaps = [
        later.at - earlier.at for earlier, later in zip(registrations[seen:], registrations[seen + 1 :], strict=False)
    ]
    assert sum(gaps) / len(gaps) == pytest.approx(BEAT_S, abs=0.05)


async def test_heartbeats_keep_their_beat_while_functions_hold_their_interpreters() -> None:
    """A drift would add up, and a supervisor that waits for its executor would be late each time.

    A busy machine may hold up this process or that one for a moment: two of ten beats may be late.
    """
    env = {"HEARTBEAT_INTERVAL_SECONDS": str(BEAT_S)}
    async with chain(executors=1, env=env) as worker:
        spinning = [await worker.run("spin", {"seconds": 3.3}) for _ in range(8)]
        connection = worker.connection
        await worker.orchestrator.wait_until(lambda: len(connection.registrations) > 10)
        late = lateness(connection.registrations[:11], BEAT_S)
        assert sum(abs(seconds) < 0.1 for seconds in late) >= 8, late
        assert not any(handle.done for handle in spinning)
        await all_of(*(handle.result(WAIT_S) for handle in spinning))


@pytest.mark.soak
@pytest.mark.timeout(120)
async def test_eight_spinning_runs_leave_the_ten_second_beat_within_a_tenth() -> None:
    async with chain(executors=1) as worker:
        spinning = [await worker.run("spin", {"seconds": 25}) for _ in range(8)]
        results = await all_of(*(handle.result(60) for handle in spinning))
        assert all(result.success for result in results)
        late = lateness(worker.connection.registrations, 10)
        assert len(late) >= 2
        assert max(map(abs, late)) < 0.1, late


async def test_a_lost_executor_is_announced_at_once_and_so_is_its_return() -> None:
    """With a beat of a minute, so that what comes is no ordinary heartbeat."""
    env = {"WORKER_FAKE_GPU_COUNT": "2", "HEARTBEAT_INTERVAL_SECONDS": "60"}
    async with chain(executors=2, env=env) as worker:
        killed_at = time.monotonic()
        os.kill(worker.worker.executors()[0].pid, signal.SIGKILL)
        lost = await worker.orchestrator.wait_for_registration(lambda it: it.resources.gpu_count == 1, since=killed_at)
        assert lost.at - killed_at < 1
        assert lost.is_heartbeat
        assert lost.resources.function_concurrency["one_at_a_time"] == 1
        assert "echo" in lost.resources.available_functions
        back = await worker.orchestrator.wait_for_registration(lambda it: it.resources.gpu_count == 2, since=lost.at)
        assert back.resources.function_concurrency["one_at_a_time"] == 2


async def test_a_worker_without_executors_serves_nothing_until_one_is_back() -> None:
    env = {"WORKER_FAKE_GPU_COUNT": "1", "HEARTBEAT_INTERVAL_SECONDS": "60"}
    async with chain(env=env) as worker:
        killed_at = time.monotonic()
        os.kill(worker.worker.executors()[0].pid, signal.SIGKILL)
        lost = await worker.orchestrator.wait_for_registration(lambda it: it.resources.gpu_count == 0, since=killed_at)
        assert list(lost.resources.available_functions) == []
        assert dict(lost.resources.function_concurrency) == {}
        waiting = await worker.run("echo", {"text": "waited for the replacement"})
        assert (await waiting.output())["text"] == "waited for the replacement"
        back = await worker.orchestrator.wait_for_registration(lambda it: it.resources.gpu_count == 1, since=lost.at)
        assert "echo" in back.resources.available_functions


async def test_several_workers_at_once_are_told_apart() -> None:
    """One scheduler, three workers: each gets its own runs."""
    async with chain() as first:
        others = [WorkerProcess(first.orchestrator.address, env={"WORKER_ID": f"other-{n}"}) for n in range(2)]
        async with others[0], others[1]:
            for other in ("other-0", "other-1"):
                await first.orchestrator.wait_for_worker(other)
            handles = [await first.run("wait", {"seconds": 30}) for _ in range(6)]
            assert sorted(Counter(handle.worker_id for handle in handles).values()) == [2, 2, 2]
            await all_of(*(first.event(handle, "started") for handle in handles))
            pids = {handle.events[0].payload["pid"]: handle.worker_id for handle in handles}
            assert sorted(pids.values()) == ["other-0", "other-1", "test-worker"]
            for handle in handles:
                await handle.cancel()
                assert (await handle.result()).error_type == "canceled"
