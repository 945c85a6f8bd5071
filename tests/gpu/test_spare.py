"""A spare on a real GPU: it holds none of the device's memory, and computes on it once it has a slot."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.gpu.test_vram import MIB, NOISE, START_S, used
from tests.support.worker_process import chain, eventually

__all__ = ["used"]  # the fixture
pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

MODULE = """
import os

import msgspec
import torch

from gen_worker import ActionContext, ResourceRequirements, worker_function

AVAILABLE = torch.cuda.is_available()
{at_import}


class Nothing(msgspec.Struct):
    pass


class Found(msgspec.Struct):
    pid: int
    available: bool
    total: float


@worker_function(resources=ResourceRequirements(max_concurrency=1))
def add(ctx: ActionContext, payload: Nothing) -> Found:
    return Found(os.getpid(), AVAILABLE, float(torch.ones(8, device="cuda").sum()))
"""
ENV = {"WORKER_WARM_SPARE": "1", "WORKER_GPUS": "0"}


async def test_it_takes_no_memory_of_the_device_and_then_its_slot(used: Callable[[], int], tmp_path: Path) -> None:
    (tmp_path / "adds.py").write_text(MODULE.format(at_import=""))
    async with chain(env=ENV, tenant=tmp_path, modules="adds", ready="add", start_s=START_S) as worker:
        first = await (await worker.run("add", {})).output(START_S)
        one = used()
        line = await worker.worker.wait_for_log("the spare is ready", timeout=START_S)
        assert used() - one < 100 * MIB, "no second context"
        os.kill(first["pid"], signal.SIGKILL)
        await worker.worker.wait_for_log("is the spare")
        second = await (await worker.run("add", {})).output(START_S)
        assert second == {"pid": int(line.rpartition(" ")[2]), "available": True, "total": 8.0}


async def test_modules_that_use_the_device_at_import_have_none(used: Callable[[], int], tmp_path: Path) -> None:
    (tmp_path / "adds.py").write_text(MODULE.format(at_import="HELD = torch.ones(8, device='cuda')"))
    async with chain(env=ENV, tenant=tmp_path, modules="adds", ready="add", start_s=START_S) as worker:
        one = used()
        await worker.worker.wait_for_log("no spare is kept", timeout=START_S)
        await eventually(lambda: used() - one < NOISE, what="the spare's memory to be free again")
        assert (await (await worker.run("add", {})).output(START_S))["total"] == 8.0
