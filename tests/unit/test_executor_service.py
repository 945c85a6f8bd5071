"""What a run that stays on the reader's thread leaves behind there: nothing."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from executor.files import StoreSettings
from executor.pace import PROOF_RUNS
from executor.run import ActiveRun
from executor.service import Service
from gen_worker.pipe.messages import Run, encode

USER: contextvars.ContextVar[str] = contextvars.ContextVar("USER", default="nobody")


class Runner:
    """Its functions set USER, and say what it was before; where `called` is false they are paused before they begin."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.seen: asyncio.Queue[str] = asyncio.Queue()
        self.called = True

    def run_in_thread(self, run: ActiveRun) -> None:
        run.claim()
        if self.called:
            run.attach(cast("Any", SimpleNamespace(cancel=lambda _: None)))
            USER.set("alice")
        self.loop.call_soon_threadsafe(self.seen.put_nowait, "sync")

    async def run_on_loop(self, run: ActiveRun) -> None:
        self.seen.put_nowait(USER.get())


Make = Callable[[], tuple[Service, Runner]]


@pytest.fixture
def make() -> Make:
    def make() -> tuple[Service, Runner]:
        runner = Runner(asyncio.get_running_loop())
        specs = {
            "brief": SimpleNamespace(name="brief", mode="sync"),
            "user": SimpleNamespace(name="user", mode="async"),
        }
        service = Service(
            cast("Any", specs),
            send=lambda _: None,
            blobs=cast("Any", None),
            models=cast("Any", SimpleNamespace(load=None, unload=None)),
            runner=cast("Any", runner),
            threads=1,
            cancel_grace_s=1.0,
            loop=runner.loop,
            loop_thread=0,
            store=StoreSettings(),
            on_shutdown=lambda: None,
        )
        return service, runner

    return make


async def prove_brief(service: Service, runner: Runner) -> None:
    for key in range(PROOF_RUNS):
        assert service.handle([frame(key, "brief")]) is None, "it has not proved to be brief"
        assert await asyncio.wait_for(runner.seen.get(), 20) == "sync"


def frame(key: int, function: str) -> bytes:
    return encode(Run(key, f"run-{key}", function, b"{}", {}, 0, 0.0, "", "", 1 << 18))


async def test_what_a_run_sets_in_its_context_is_not_seen_by_the_next(make: Make) -> None:
    service, runner = make()
    await prove_brief(service, runner)
    work = None
    for key in range(100, 200):  # the pool's thread may still be counting the last one
        work = service.handle([frame(key, "brief")])
        if work is not None:
            break
        await asyncio.wait_for(runner.seen.get(), 20)
    assert work is not None
    work()
    assert await asyncio.wait_for(runner.seen.get(), 20) == "sync"
    assert service.handle([frame(999, "user")]) is None
    assert await asyncio.wait_for(runner.seen.get(), 20) == "nobody"


async def test_runs_whose_function_was_not_called_prove_nothing(make: Make) -> None:
    service, runner = make()
    runner.called = False
    for key in range(PROOF_RUNS * 3):
        assert service.handle([frame(key, "brief")]) is None
        assert await asyncio.wait_for(runner.seen.get(), 20) == "sync"
