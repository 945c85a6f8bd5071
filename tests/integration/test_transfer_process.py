"""The real transfer process around handlers of the test's: answers, cancels, deaths, and its end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest

from supervisor import respawn
from supervisor.transfer_process import MAX_DEATHS, TransferError, TransferProcess
from supervisor.transfers.messages import FetchModel, ListModels, ModelFiles, ModelList, ModelRemoved, RemoveModel
from supervisor.transfers.messages import TransferSettings as Settings
from tests.support.rig import until

SUPPORT = Path(__file__).parent.parent / "support"
ROOT = Path(__file__).parent.parent.parent
WAIT_S = 30.0


@asynccontextmanager
async def process(tmp_path: Path, hub_url: str = "") -> AsyncIterator[TransferProcess]:
    transfers = TransferProcess(
        Settings(model_cache_dir=str(tmp_path), hub_token="very-secret-token", hub_url=hub_url),
        {"PYTHONPATH": f"{SUPPORT}:{ROOT}", "PATH": "/bin"},
        module="transfer_child",
    )
    try:
        async with asyncio.timeout(WAIT_S):
            yield transfers
    finally:
        await transfers.stop()


async def ask(transfers: TransferProcess, order: str) -> str:
    return (await transfers.call(FetchModel(order), ModelFiles)).root_dir


def steps(tmp_path: Path) -> list[str]:
    path = tmp_path / "log"
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(respawn, "BACKOFF_FIRST_S", 0.001)


async def test_answers_failures_progress_and_secrets(tmp_path: Path) -> None:
    async with process(tmp_path) as transfers:
        assert transfers.pid is None, "nothing is started before it is needed"
        seen: list[tuple[int, int, float]] = []
        answer = await transfers.call(FetchModel("answer x"), ModelFiles, lambda *told: seen.append(told))
        assert (answer.root_dir, seen) == ("x", [(1, 2, 3.0)])
        many = await asyncio.gather(*(ask(transfers, f"answer {number}") for number in range(50)))
        assert many == [str(number) for number in range(50)]

        with pytest.raises(TransferError, match="no right to org/repo") as refused:
            await ask(transfers, "refuse no right to org/repo")
        assert refused.value.failure.error_type == "auth"
        assert refused.value.failure.detail == "no right to org/repo", "an expected failure has no traceback"
        with pytest.raises(TransferError, match="LookupError: odd") as defect:
            await ask(transfers, "defect odd")
        assert defect.value.failure.error_type == "internal"
        with pytest.raises(TransferError, match="answered by ModelList, not ModelFiles"):
            await ask(transfers, "wrong")

        # Its tokens come over the pipe: no environment holds them, and no one of this user may look into its memory.
        assert await ask(transfers, "token") == "very-secret-token"
        assert "very-secret-token" not in await ask(transfers, "environment")
        assert transfers.pid is not None
        assert Path(f"/proc/{transfers.pid}/environ").stat().st_uid == 0
        assert "-m transfer_child" in " ".join(psutil.Process(transfers.pid).cmdline())


async def test_a_canceled_call_stops_the_work_at_once(tmp_path: Path) -> None:
    async with process(tmp_path) as transfers:
        call = asyncio.create_task(ask(transfers, "wait"))
        await until(lambda: steps(tmp_path) == ["wait"], WAIT_S)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: steps(tmp_path) == ["wait", "canceled"], WAIT_S)
        assert await ask(transfers, "answer still") == "still"


async def test_deaths_are_not_seen_by_those_who_wait(tmp_path: Path, no_backoff: None) -> None:
    async with process(tmp_path) as transfers:
        waiting = [asyncio.create_task(ask(transfers, f"die_until {number}")) for number in (2, 3)]
        assert await asyncio.gather(*waiting) == ["2", "3"]
        before = transfers.pid
        waits = asyncio.create_task(ask(transfers, "wait"))
        await until(lambda: "wait" in steps(tmp_path), WAIT_S)
        assert before is not None
        os.kill(before, signal.SIGKILL)
        await until(lambda: steps(tmp_path).count("wait") == 2, WAIT_S)
        assert transfers.pid != before
        waits.cancel()


async def test_what_must_not_be_done_twice_and_what_kills_too_often_fails(
    tmp_path: Path, no_backoff: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RemoveModel, "repeatable", False)
    async with process(tmp_path) as transfers:
        with pytest.raises(TransferError, match="died while it did this: killed by SIGKILL") as once:
            await transfers.call(RemoveModel("x"), ModelRemoved)
        assert (once.value.failure.error_type, once.value.failure.retryable) == ("retryable", True)
        assert steps(tmp_path) == ["remove"]
        with pytest.raises(TransferError, match=f"died {MAX_DEATHS} times.*last words"):
            await ask(transfers, "die_until 99")
        assert await ask(transfers, "answer fine") == "fine"


async def test_one_that_cannot_start_fails_its_calls_and_says_why(
    tmp_path: Path, no_backoff: None, caplog: pytest.LogCaptureFixture
) -> None:
    async with process(tmp_path, hub_url="broken") as transfers:
        with pytest.raises(TransferError, match=r"can't start.*RuntimeError: no disk") as failed:
            await ask(transfers, "answer")
        assert failed.value.failure.retryable
        with pytest.raises(TransferError, match="can't start"):
            await ask(transfers, "answer")
    with caplog.at_level(logging.ERROR):
        async with process(tmp_path) as transfers:
            transfers._module = "no_such_module"
            with pytest.raises(TransferError, match="No module named no_such_module"):
                await ask(transfers, "answer")
            transfers._module = "transfer_child"
            await until(lambda: transfers._ready, WAIT_S)
            assert await ask(transfers, "answer healed") == "healed"


async def test_stop_ends_it_and_fails_what_waits(tmp_path: Path) -> None:
    async with process(tmp_path) as transfers:
        call = asyncio.create_task(ask(transfers, "wait"))
        await until(lambda: steps(tmp_path) == ["wait"], WAIT_S)
        pid = transfers.pid
        assert pid is not None
        await transfers.stop()
        with pytest.raises(TransferError, match="shutting down"):
            await call
        with pytest.raises(TransferError, match="shutting down"):
            await ask(transfers, "answer")
        assert not psutil.pid_exists(pid)


async def test_news_without_a_request(tmp_path: Path) -> None:
    async with process(tmp_path) as transfers:
        removed: list[str] = []
        transfers.on_models_removed = removed.extend
        await ask(transfers, "removed")
        assert removed == ["a", "b"]
        assert (await transfers.call(ListModels(), ModelList)).models[0].ref == "x"


@pytest.mark.parametrize("end", ["close", "garbage"])
async def test_it_leaves_with_its_pipe(tmp_path: Path, end: str) -> None:
    async with process(tmp_path) as transfers:
        await ask(transfers, "answer")
        assert transfers._child is not None
        pipe = transfers._child._transport
        assert pipe is not None
        if end == "close":
            pipe.write_eof()
        else:
            pipe.write(b"\xff" * 8)
        await until(lambda: "closed" in steps(tmp_path), WAIT_S)
