"""What the page of `gen-worker serve` is told of models that are on their way."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from gen_worker.serve.local_worker import LocalOptions, LocalWorker
from gen_worker.serve.state import DevState
from gen_worker.wire import worker_scheduler_pb2 as pb
from tests.support.rig import until
from tests.unit.test_mock_orchestrator import FakeWorker

WAIT_S = 20.0
A, B = "cozy:org/a:latest", "cozy:org/b:latest"


async def test_models_that_runs_wait_for_are_shown_while_they_come(tmp_path: Path) -> None:
    async with LocalWorker(LocalOptions(tmp_path, {})) as local:
        state = DevState("a project", local)
        async with FakeWorker(local.orchestrator.address, functions=("draw",), token=local.token) as worker:
            await worker.register(function_schemas=[pb.FunctionSchema(name="draw")], disk_models=[B])
            await local.orchestrator.wait_for_worker()

            def models() -> list[dict[str, Any]]:
                found: list[dict[str, Any]] = state.snapshot()["models"]
                return found

            call = await state.runs.start(state.functions()["draw"], {}, {}, 0)
            following = asyncio.ensure_future(_follow(call))
            run_id = (await worker.receive()).run_request.run_id
            on_disk = {"id": B, "where": "disk"}
            assert models() == [on_disk]
            progress = {"progress": 0.42, "stage": "download", "model": A}
            await worker.event(run_id, "job.progress", progress)
            await until(lambda: models() == [on_disk, {"id": A, "where": "downloading, 42%"}], WAIT_S)
            await worker.event(run_id, "job.progress", {**progress, "progress": 1.0})
            await until(lambda: models() == [on_disk], WAIT_S)
            await worker.event(run_id, "job.progress", progress)
            await until(lambda: len(models()) > 1, WAIT_S)
            await worker.event(run_id, "job.progress", {"progress": 0.5, "stage": "denoising"})
            await until(lambda: models() == [on_disk], WAIT_S)
            await worker.succeed(run_id, None)
            await following


async def _follow(call: Any) -> None:
    async for _ in call.events():
        pass
    call.close()
