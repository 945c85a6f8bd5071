"""A real `gen-worker-supervisor` process for the tests: its environment, its log, its children, its end."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Self

import psutil

TENANTS = Path(__file__).parent.parent / "tenants"
START_S = 30.0


class WorkerProcess:
    """Started by `async with`; what is left of it at the end is killed."""

    def __init__(
        self,
        scheduler: str,
        *,
        tenant: str | Path = "basic",
        modules: str = "basic_functions",
        env: Mapping[str, str] | None = None,
    ) -> None:
        self._cwd = TENANTS / tenant
        self._env = {
            "PATH": os.environ["PATH"],
            "HOME": os.environ.get("HOME", "/"),
            "SCHEDULER_ADDR": scheduler,
            "USER_MODULES": modules,
            "WORKER_HTTP_ADDR": "",
            "WORKER_ID": "test-worker",
            "RECONNECT_DELAY": "0.1",
            "RECONNECT_MAX_DELAY": "0.5",
            "RECONNECT_JITTER_SECONDS": "0.05",
            "WORKER_LOG_LEVEL": "debug",
            **(env or {}),
        }
        self.log: list[str] = []
        self._news = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.kill()
        if exc[0] is not None:
            print("\n".join(self.log[-200:]))

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gen_worker.entrypoint",
            cwd=self._cwd,
            env=self._env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.log.append(line.decode(errors="replace").rstrip())
            self._news.set()

    @property
    def pid(self) -> int:
        return self.process.pid

    def executors(self) -> list[psutil.Process]:
        """The live executor processes, oldest first."""
        children = psutil.Process(self.pid).children()
        found = [child for child in children if _is_executor(child)]
        return sorted(found, key=lambda child: child.create_time())

    async def wait_for_log(self, *parts: str, timeout: float = START_S) -> str:  # noqa: ASYNC109
        """The first line that holds all of `parts`."""

        def line() -> str | None:
            return next((line for line in self.log if all(part in line for part in parts)), None)

        async with asyncio.timeout(timeout):
            while (found := line()) is None:
                self._news.clear()
                await self._news.wait()
        return found

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def exit_code(self, timeout: float = START_S) -> int:  # noqa: ASYNC109
        """Wait for its end; the whole log is there after this."""
        async with asyncio.timeout(timeout):
            code = await self.process.wait()
            await self._reader
        return code

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        await self._reader


def _is_executor(process: psutil.Process) -> bool:
    try:
        return "executor" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def eventually(check: Callable[[], object], timeout: float = 10.0, what: str = "") -> None:  # noqa: ASYNC109
    """Wait until `check` is true; for states of other processes, which nothing announces to a test."""
    async with asyncio.timeout(timeout):
        while not check():
            await asyncio.sleep(0.01)
