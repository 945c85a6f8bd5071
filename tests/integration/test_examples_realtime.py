"""The realtime example, served by a worker and talked to through a WebSocket, as its documentation says."""

from __future__ import annotations

import json
from pathlib import Path

from websockets.asyncio.client import connect

from gen_worker.testing.mock_orchestrator import MockOrchestrator, RealtimeBridge
from tests.support.worker_process import WAIT_S, WorkerProcess

EXAMPLE = Path(__file__).parents[2] / "examples" / "realtime"


async def test_the_example() -> None:
    async with (
        MockOrchestrator() as orchestrator,
        RealtimeBridge(orchestrator) as bridge,
        WorkerProcess(orchestrator.address, tenant=EXAMPLE, modules="talk") as worker,
    ):
        registered = orchestrator.wait_for_registration(lambda r: "echo" in r.resources.available_functions, WAIT_S)
        await worker.while_it_runs(registered)
        async with connect(f"{bridge.url}/echo") as client:
            await client.send("hello")
            await client.send(b"\x00\x01")
            assert [await client.recv(), await client.recv()] == ["hello", b"\x00\x01"]
        async with connect(f"{bridge.url}/uppercase") as client:
            assert json.loads(await client.recv())["say"] == "bye to leave"
            await client.send("grüße")
            assert json.loads(await client.recv()) == {"text": "GRÜSSE"}
            await client.send("bye")
            await client.wait_closed()
            assert (client.close_code, client.close_reason) == (1000, "completed")
        async with connect(f"{bridge.url}/uppercase") as client:
            await client.send("x" * (64 * 1024 + 1))
            await client.recv()
            assert "error" in json.loads(await client.recv())
            await client.wait_closed()
            assert client.close_reason == "closed"
        assert orchestrator.violations == []
