"""`gen-worker torture`: a short one with a fixed seed, longer ones as soak tests, and the ways in which it says no."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from gen_worker.testing.torture.driver import torture
from gen_worker.testing.torture.options import Options
from gen_worker.testing.torture.report import Report, render
from tests.support.worker_process import TENANTS

SHORT_SEEDS = (3999,)
SHORT_S = 12.0
SOAK_SEEDS = (101, 102)
SOAK_S = 180.0


@pytest.fixture(autouse=True)
def each_transport(worker_transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tortured worker inherits the environment."""
    monkeypatch.setenv("WORKER_GRPC_TRANSPORT", worker_transport)


async def _tortured(seed: int, seconds: float, log_file: Path) -> Report:
    report = await torture(Options(seed=seed, seconds=seconds, log_file=log_file), print)
    print(render(report))
    return report


@pytest.mark.timeout(180)
@pytest.mark.parametrize("seed", SHORT_SEEDS)
async def test_a_short_torture_breaks_no_guarantee(seed: int, tmp_path: Path) -> None:
    report = await _tortured(seed, SHORT_S, tmp_path / "log")
    assert report.violations == ()
    assert report.lost == 0
    # It was a torture: this seed has many ends of streams, and one that is not read and then cut.
    assert report.accepted > 100
    assert report.results["success"] > 50
    assert report.redelivered > 0
    assert report.deltas > 500
    assert report.sessions["completed"] > 0
    assert report.sessions["stream ended"] > 0
    assert report.streams > 4
    assert report.executors_lost > 2
    assert len(report.faults) > 8


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", SOAK_SEEDS)
async def test_a_long_torture_breaks_no_guarantee(seed: int, tmp_path: Path) -> None:
    report = await _tortured(seed, SOAK_S, tmp_path / "log")
    assert report.violations == ()
    assert report.executors_lost > 15
    assert report.streams > 150


async def _command(*arguments: object) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gen_worker.cli", "torture", *map(str, arguments),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE, env=os.environ | {"NO_COLOR": "1"},
    )  # fmt: skip
    out, err = await process.communicate()
    return process.returncode or 0, out.decode(), err.decode()


@pytest.mark.timeout(120)
async def test_a_project_of_ones_own_and_a_guarantee_that_does_not_hold(tmp_path: Path) -> None:
    payloads, log = tmp_path / "payloads.jsonl", tmp_path / "log"
    payloads.write_text(
        '{"function": "echo", "payload": {"text": "a"}}\n{"function": "count", "payload": {"count": 20, "size": 10}}\n'
    )
    code, out, err = await _command(
        "--project", TENANTS / "basic", "--payloads", payloads, "--seed", 5, "--minutes", 0.08, "--log", log,
        "--memory-mib", 1,
    )  # fmt: skip
    assert code == 1, err
    violations = [line for line in out.splitlines() if line.startswith("VIOLATION")]
    assert len(violations) == 1
    assert violations[0].startswith("VIOLATION memory: the executor took")
    assert f"reproduce with: gen-worker torture --seed 5 --minutes 0.08 --project {TENANTS / 'basic'}" in out
    assert f"--payloads {payloads} --memory-mib 1\n" in out
    assert f"the worker's log: {log}" in out
    assert "seed 5: 3 executors serve" in err


async def test_a_worker_that_does_not_start(tmp_path: Path) -> None:
    (tmp_path / ".cozy").mkdir()
    (tmp_path / ".cozy" / "manifest.json").write_text("no manifest")
    code, out, err = await _command("--project", tmp_path, "--log", tmp_path / "log")
    assert (code, out) == (2, "")
    assert err.startswith("error: the worker did not register; the end of its log:")
    assert "manifest.json" in err


async def test_payloads_without_a_project(tmp_path: Path) -> None:
    payloads = tmp_path / "payloads.jsonl"
    payloads.write_text('{"function": "echo", "payload": {}}\n')
    code, _, err = await _command("--payloads", payloads)
    assert code == 2
    assert err == "error: --payloads goes with --project: the built-in functions have payloads of their own\n"
