"""A worker that is looked at over HTTP: from its start to its drain."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import AsyncIterator

import httpx
import msgspec
import psutil
import pytest

from gen_worker.testing.mock_orchestrator import MockOrchestrator
from supervisor.status import Status
from tests.support.worker_process import WAIT_S, WorkerProcess, chain

TOKEN = "s3cret-t0ken-of-the-monitoring-test"
IDLE_LIMIT = 60 * 2**20


async def url_of(worker: WorkerProcess) -> str:
    line = await worker.wait_for_log("health, metrics and status at")
    return line.rpartition(" at ")[2]


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(timeout=WAIT_S) as client:
        yield client


async def status_of(client: httpx.AsyncClient, url: str) -> Status:
    return msgspec.json.decode((await client.get(f"{url}/status")).content, type=Status)


async def readyz(client: httpx.AsyncClient, url: str, code: int) -> str:
    """Wait until /readyz answers `code`; its text."""
    async with asyncio.timeout(WAIT_S):
        while (answer := await client.get(f"{url}/readyz")).status_code != code:
            await asyncio.sleep(0.01)
    return answer.text


async def test_a_worker_from_ready_to_drained(client: httpx.AsyncClient) -> None:
    env = {"WORKER_HTTP_ADDR": "127.0.0.1:0", "WORKER_FAKE_GPU_COUNT": "2", "AUTH_TOKEN": TOKEN}
    async with chain(executors=2, env=env) as served:
        url = await url_of(served.worker)
        assert (await client.get(f"{url}/livez")).text == "ok\n"
        assert await readyz(client, url, 200) == "ready\n"
        assert psutil.Process(served.worker.pid).memory_info().rss < IDLE_LIMIT

        await served.call("echo", {"text": "hello"})
        await served.result("die", {"how": "SIGSEGV"})
        async with asyncio.timeout(WAIT_S):
            while len([each for each in (await status_of(client, url)).executors if each.state == "ready"]) < 2:
                await asyncio.sleep(0.01)
        status = await status_of(client, url)
        assert status.worker.ready
        assert status.scheduler.registered
        assert [gpu.uuid for gpu in status.gpus] == ["GPU-FAKE-0000", "GPU-FAKE-0001"]
        assert status.outcomes == {"success": 1, "crashed": 1}
        assert {fault.kind for fault in status.faults} == {"run", "executor"}
        text = (await client.get(f"{url}/metrics")).text
        assert 'gen_worker_runs_total{function="echo",outcome="success"} 1.0' in text
        assert 'gen_worker_executor_deaths_total{cause="SIGSEGV"} 1.0' in text
        assert "gen_worker_executor_restarts_total 1.0" in text
        assert "process_resident_memory_bytes" in text
        assert TOKEN not in text + (await client.get(f"{url}/status")).text

        await served.started("wait", {"seconds": 60})
        served.worker.signal(signal.SIGTERM)
        assert "draining" in await readyz(client, url, 503)
        assert (await client.get(f"{url}/livez")).status_code == 200
        assert [run.function for run in (await status_of(client, url)).runs] == ["wait"]
        served.worker.signal(signal.SIGTERM)
        await served.worker.exit_code()


async def test_readiness_follows_the_scheduler_and_a_taken_port_stops_nothing(client: httpx.AsyncClient) -> None:
    env = {"WORKER_HTTP_ADDR": "127.0.0.1:0"}
    with socket.create_server(("127.0.0.1", 0)) as listener:  # accepts, and never speaks HTTP/2
        async with WorkerProcess(f"127.0.0.1:{listener.getsockname()[1]}", env=env) as worker:
            url = await url_of(worker)
            assert (await client.get(f"{url}/livez")).status_code == 200
            assert "not registered at a scheduler" in await readyz(client, url, 503)
            await worker.wait_for_log("is ready")
            assert await readyz(client, url, 503) == f"{(await not_registered(client, url))}\n"
            address = url.removeprefix("http://")
            async with (
                MockOrchestrator() as orchestrator,
                WorkerProcess(orchestrator.address, env={"WORKER_HTTP_ADDR": address}) as second,
            ):
                await second.wait_for_log(f"WORKER_HTTP_ADDR: {address} can't be listened on")
                await orchestrator.wait_for_registration(lambda _: True, WAIT_S)


async def not_registered(client: httpx.AsyncClient, url: str) -> str:
    (reason,) = (await status_of(client, url)).worker.unready_because
    return reason
