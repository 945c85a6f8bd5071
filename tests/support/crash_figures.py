"""What many crashes of children cost a process: a program of its own, so that it measures nothing but that.

`python -m tests.support.crash_figures children|executors` prints one JSON object: descriptors, resident bytes and dead
children before and after, and how the children ended.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

from supervisor import respawn
from supervisor.child import Child, ExitCause
from tests.support.executor_pool import Listener, executor_pool
from tests.support.worker_process import eventually

SUPPORT = Path(__file__).parent
FEW, MANY = 20, 200
Figures = dict[str, int]


def figures() -> Figures:
    """Of this process, now."""
    gc.collect()
    me = psutil.Process()
    dead = [child for child in me.children() if child.status() == psutil.STATUS_ZOMBIE]
    return {"fds": me.num_fds(), "rss": me.memory_info().rss, "zombies": len(dead)}


async def measured(crash: Callable[[int], Awaitable[None]], few: int, many: int) -> tuple[Figures, Figures]:
    """Before and after `many` crashes; the first few are for what a process allocates once."""
    await crash(few)
    before = figures()
    await crash(many)
    return before, figures()


async def children() -> dict[str, object]:
    """Children that write to their pipe and die, four at a time."""
    causes: set[str] = set()

    async def one() -> None:
        ended: asyncio.Future[ExitCause] = asyncio.get_running_loop().create_future()
        child = Child(
            on_frame=lambda _: None, on_line=lambda *_: None, on_writable=lambda: None, on_exit=ended.set_result
        )
        await child.spawn("pipe_child", ["write_and_die 3"], {"PYTHONPATH": str(SUPPORT)}, "/")
        causes.add(str(await ended))

    async def crash(count: int) -> None:
        for _ in range(count // 4):
            await asyncio.gather(*(one() for _ in range(4)))

    before, after = await measured(crash, FEW, MANY)
    return {"before": before, "after": after, "causes": sorted(causes)}


async def executors() -> dict[str, object]:
    """Two slots of a pool whose executors are killed as soon as they are ready."""
    respawn.BACKOFF_FIRST_S = 0.0  # type: ignore[misc]  # this process is for the measurement alone
    listener = Listener()
    pool = executor_pool(listener, 2)
    pool.start()

    async def crash(count: int) -> None:
        wanted = len(listener.causes) + count
        listener.killing = True
        for handle in pool.ready:
            os.kill(handle.pid, signal.SIGKILL)
        await eventually(lambda: len(listener.causes) >= wanted, 120, f"{wanted} deaths")
        listener.killing = False
        await eventually(lambda: len(pool.ready) == 2, what="both slots serve again")

    before, after = await measured(crash, 4, 20)
    causes = sorted(set(listener.causes))
    await pool.stop("it is measured", 2.0)
    return {"before": before, "after": after, "causes": causes, "left": len(psutil.Process().children())}


if __name__ == "__main__":
    print(json.dumps(asyncio.run({"children": children, "executors": executors}[sys.argv[1]]())))
