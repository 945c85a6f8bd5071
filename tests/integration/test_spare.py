"""WORKER_WARM_SPARE with real processes: who serves after a death, and that no spare outlives its worker."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import pytest
import pytest_asyncio

from gen_worker.testing.mock_orchestrator import MockOrchestrator
from supervisor.status import Status
from tests.support.other_user import UID, worker_command
from tests.support.worker_process import (
    WAIT_S,
    Chain,
    WorkerProcess,
    chain,
    eventually,
    freeze,
    is_alive,
    wait_for_executors,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

MODULE = """
import asyncio
import os
import threading
import time

import msgspec

from gen_worker import ActionContext, ResourceRequirements, worker_function

EDITION = 1
VISIBLE_AT_IMPORT = os.environ.get("CUDA_VISIBLE_DEVICES")


class Hold(msgspec.Struct):
    until: str = ""
    data: bytes = b""


class Found(msgspec.Struct):
    pid: int
    visible: str | None
    at_import: str | None
    nice: int
    policy: int
    edition: int
    main_thread: bool


def found() -> Found:
    return Found(
        os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES"), VISIBLE_AT_IMPORT,
        os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0), EDITION,
        threading.current_thread() is threading.main_thread(),
    )


@worker_function(resources=ResourceRequirements(max_concurrency=1))
def look(ctx: ActionContext, payload: Hold) -> Found:
    ctx.emit("started", {})
    while payload.until and not os.path.exists(payload.until):
        time.sleep(0.01)
    return found()


@worker_function()
async def look_on_loop(ctx: ActionContext, payload: Hold) -> Found:
    await asyncio.sleep(0)
    return found()
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("spare")
    (root / "looks.py").write_text(MODULE)
    return root


def spares(project: Path, executors: int = 1, **env: str) -> Any:
    env = {"WORKER_WARM_SPARE": "1", "WORKER_HTTP_ADDR": "127.0.0.1:0", **env}
    return chain(executors=executors, env=env, tenant=project, modules="looks", ready="look")


async def status_of(worker: Chain) -> Status:
    line = await worker.worker.wait_for_log("health, metrics and status at")
    async with httpx.AsyncClient(timeout=30) as client:
        answer = await client.get(f"{line.rpartition(' at ')[2]}/status")
    return msgspec.json.decode(answer.content, type=Status)


async def parked_pid(worker: Chain, count: int = 1) -> int:
    """The pid of the `count`th spare, once it waits."""
    await eventually(lambda: len(worker.worker.lines("the spare is ready")) >= count, what=f"spare {count}")
    return int(worker.worker.lines("the spare is ready")[count - 1].rpartition(" ")[2])


def priority_of(pid: int) -> tuple[int, int]:
    return os.getpriority(os.PRIO_PROCESS, pid), os.sched_getscheduler(pid)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def two(project: Path) -> AsyncIterator[Chain]:
    """Two simulated GPUs, and a spare."""
    async with spares(project, 2, WORKER_FAKE_GPU_COUNT="2") as found:
        yield found


async def test_the_spare_serves_the_slot_of_the_dead(two: Chain, tmp_path: Path) -> None:
    spare = await parked_pid(two)
    before = await status_of(two)
    assert before.spare is not None
    assert (before.spare.pid, before.spare.state) == (spare, "parked")
    assert before.spare.resident_bytes > 2**20
    assert [executor.slot for executor in before.executors] == [0, 1]
    assert two.resources.function_concurrency["look"] == 2, "it is no executor to the scheduler"
    (victim,) = [executor.pid for executor in before.executors if executor.slot == 1]

    os.kill(victim, signal.SIGKILL)
    await two.worker.wait_for_log("executor 1.1 is the spare")
    # Each executor takes one at once.
    handles = [await two.started("look", {"until": str(tmp_path / "go")}) for _ in range(2)]
    (tmp_path / "go").touch()
    outcomes = [await handle.output(WAIT_S) for handle in handles]
    seen = {outcome["pid"]: outcome for outcome in outcomes}
    assert (seen[spare]["at_import"], seen[spare]["visible"]) == ("0", "1"), "its device came with the slot"
    assert (seen[spare]["nice"], seen[spare]["policy"]) == priority_of(two.worker.pid)

    second = await parked_pid(two, 2)
    assert second not in {victim, spare}
    after = await status_of(two)
    assert [(executor.name, executor.pid) for executor in after.executors][1] == ("1.1", spare)
    assert after.spare is not None
    assert after.spare.pid == second


async def test_a_spare_that_dies_with_a_large_payload_costs_only_its_runs(project: Path, tmp_path: Path) -> None:
    """What it was given lies in memory that all executors share: its own goes back, and nobody else's."""
    data = os.urandom(2 * 2**20)
    async with spares(project) as worker:
        spare = await parked_pid(worker)
        os.kill(worker.worker.executors()[0].pid, signal.SIGKILL)
        await worker.worker.wait_for_log("executor 0.1 is the spare")
        assert (await worker.call("look", {"data": data}))["pid"] == spare
        second = await parked_pid(worker, 2)
        await freeze(spare)  # so that the payload is still its own when it dies
        doomed = await worker.run("look", {"data": data})

        async def is_given() -> bool:
            return any(run.executor == "0.1" for run in (await status_of(worker)).runs)

        while not await is_given():
            pass
        os.kill(spare, signal.SIGKILL)
        result = await doomed.result(WAIT_S)
        assert (result.error_type, result.safe_message) == ("retryable", "worker process crashed")
        assert (await worker.call("look", {"data": data}))["pid"] == second
        assert not worker.worker.lines("of the inputs is lost")


async def test_what_runs_on_the_loop_has_its_priority_back(project: Path) -> None:
    async with spares(project) as worker:
        spare = await parked_pid(worker)
        os.kill(worker.worker.executors()[0].pid, signal.SIGKILL)
        await worker.worker.wait_for_log("is the spare")
        outcome = await worker.call("look_on_loop", {})
        assert outcome["pid"] == spare
        assert outcome["main_thread"]
        assert (outcome["nice"], outcome["policy"]) == priority_of(worker.worker.pid)


async def test_a_spare_that_is_killed_or_stopped_harms_nobody(project: Path) -> None:
    async with spares(project) as worker:
        first = await parked_pid(worker)
        os.kill(first, signal.SIGKILL)
        await worker.worker.wait_for_log("the spare was lost: killed by SIGKILL")
        assert (await worker.call("look", {}))["pid"] != first
        second = await parked_pid(worker, 2)

        (serving,) = [child for child in worker.worker.executors() if child.pid != second]
        await freeze(second)  # it will not hear that it has a slot
        serving.send_signal(signal.SIGKILL)
        await worker.worker.wait_for_log("a spare, was lost before it served")
        outcome = await worker.call("look", {})
        assert outcome["pid"] not in {first, second, serving.pid}
        assert not worker.worker.lines("failed to start")


async def test_new_code_is_what_the_next_spare_has(tmp_path: Path) -> None:
    (tmp_path / "looks.py").write_text(MODULE)
    async with spares(tmp_path) as worker:
        old = await parked_pid(worker)
        (tmp_path / "looks.py").write_text(MODULE.replace("EDITION = 1", "EDITION = 22"))
        worker.worker.signal(signal.SIGHUP)
        await worker.worker.wait_for_log("all executors are new")
        await eventually(lambda: not is_alive(old))
        new = await parked_pid(worker, 2)
        (serving,) = [child for child in worker.worker.executors() if child.pid != new]
        serving.send_signal(signal.SIGKILL)
        await worker.worker.wait_for_log("is the spare")
        outcome = await worker.call("look", {})
        assert (outcome["pid"], outcome["edition"]) == (new, 22)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("parked", [True, False])
async def test_no_spare_outlives_its_worker(tmp_path: Path, number: signal.Signals, parked: bool) -> None:
    slow = "" if parked else "\nimport time, sys\nif os.path.exists('slow'): time.sleep(60)\n"
    (tmp_path / "looks.py").write_text(MODULE + slow)
    async with spares(tmp_path) as worker:
        if parked:
            await parked_pid(worker)
        else:
            # The first spare may be too fast to be caught: the one after it is slow.
            first = await parked_pid(worker)
            (tmp_path / "slow").touch()
            os.kill(first, signal.SIGKILL)
            await eventually(lambda: len(worker.worker.lines("a spare started")) == 2)
        # One that starts does not look like an executor before its exec.
        await eventually(lambda: len(worker.worker.executors()) == 2)
        family = worker.worker.descendants()
        worker.worker.signal(number)
        code = await worker.worker.exit_code()
        assert code == (0 if number is signal.SIGTERM else -signal.SIGKILL)
        await eventually(lambda: not [process for process in family if is_alive(process.pid)], what="no process left")


async def test_modules_that_fail_in_the_spare_alone(tmp_path: Path) -> None:
    """A second import that fails costs the worker nothing, and is tried again later and later."""
    once = "\nif os.path.exists('imported'): raise RuntimeError('only once')\nopen('imported', 'w').close()\n"
    (tmp_path / "looks.py").write_text(MODULE + once)
    async with spares(tmp_path) as worker:
        await worker.worker.wait_for_log("the spare was lost", "only once", "another one starts in 1 s")
        assert (await worker.call("look", {}))["edition"] == 1
        (tmp_path / "imported").unlink()
        await parked_pid(worker)


async def test_with_executors_that_are_another_user(tmp_path: Path) -> None:
    """The spare is that user from its start on; and a priority that it can't get back is not given away."""
    with tempfile.TemporaryDirectory(prefix="gen-worker-spare-") as name:
        root = Path(name)
        root.chmod(0o755)
        (root / "looks.py").write_text(MODULE)
        env = {"WORKER_WARM_SPARE": "1", "WORKER_EXECUTOR_UID": str(UID), "WORKER_RUN_DIR": str(root / "run")}
        async with (
            MockOrchestrator() as orchestrator,
            WorkerProcess(
                orchestrator.address, tenant=root, modules="looks", env=env, command=worker_command(root)
            ) as worker,
        ):
            await worker.while_it_runs(wait_for_executors(orchestrator, 1, "look"))
            found = Chain(orchestrator, worker)
            spare = await parked_pid(found)
            assert psutil.Process(spare).uids().real == UID
            (serving,) = [child for child in worker.executors() if child.pid != spare]
            serving.send_signal(signal.SIGKILL)
            await worker.wait_for_log("is the spare")
            outcome = await found.call("look_on_loop", {})
            assert outcome["pid"] == spare
            assert (outcome["nice"], outcome["policy"]) == priority_of(worker.pid)


async def test_without_the_setting_there_is_one_process_per_slot(project: Path) -> None:
    async with spares(project, WORKER_WARM_SPARE="0") as worker:
        await wait_for_executors(worker.orchestrator, 1, "look")
        assert (await status_of(worker)).spare is None
        assert len(worker.worker.executors()) == 1
        assert not worker.worker.lines("spare")
