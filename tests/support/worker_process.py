"""A real `gen-worker-supervisor` process for the tests, and the whole chain: scheduler, worker, executors, tenant.

Owns: the process, its environment, its log and its end. `WorkerProcess` is the process alone, `Chain` is one with a
MockOrchestrator that it is registered at.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Self

import psutil

from gen_worker.testing.mock_orchestrator import MockOrchestrator, RunHandle, WorkerConnection
from gen_worker.wire import worker_scheduler_pb2 as pb

TENANTS: Final = Path(__file__).parent.parent / "tenants"
PROGRAM: Final = Path(sys.executable).parent / "gen-worker-supervisor"
"""The console script that the wheel installs."""
WAIT_S: Final = 30.0
"""For what must happen; far above what it takes, so that a loaded machine fails no test."""
NO_MODELS: Final = "/tmp/gen-worker-tests/no-models"
"""Not the cache that a worker of this machine may have; nothing is ever put there."""
_INHERITED: Final = ("PATH", "HOME", "PYTHONPATH", "LANG")
_LINE_BYTES: Final = 1024 * 1024
_POLL_S: Final = 0.005

DEFAULT_TRANSPORT: Final = "grpcio"
transport = DEFAULT_TRANSPORT
"""WORKER_GRPC_TRANSPORT of the workers that are started from now on; tests/integration/conftest.py sets it."""


class WorkerProcess:
    """Started by `async with`; what is left of it at the end is killed."""

    known: ClassVar[list[WorkerProcess]] = []
    """Those whose log a failing test may want to show (tests/integration/conftest.py)."""

    def __init__(
        self,
        scheduler: str,
        *,
        tenant: str | Path = "basic",
        modules: str = "basic_functions",
        env: Mapping[str, str] | None = None,
        command: Sequence[str | Path] = (PROGRAM,),
    ) -> None:
        """`tenant` is a folder under tests/tenants, or a path. A variable of `env` that is "" is not set at all."""
        self._cwd = TENANTS / tenant
        self._command = command
        variables = {
            **{name: os.environ[name] for name in _INHERITED if name in os.environ},
            "SCHEDULER_ADDR": scheduler,
            "USER_MODULES": modules,
            "WORKER_ID": "test-worker",
            "WORKER_CANCEL_GRACE_SECONDS": "0.5",
            "RECONNECT_DELAY": "0.1",
            "RECONNECT_MAX_DELAY": "0.5",
            "RECONNECT_JITTER_SECONDS": "0.05",
            "WORKER_LOG_LEVEL": "debug",
            "WORKER_GRPC_TRANSPORT": transport,
            "WORKER_MODEL_CACHE_DIR": NO_MODELS,
            **(env or {}),
        }
        # The one variable to which empty means something: off.
        self._env = {"WORKER_HTTP_ADDR": "", **{name: value for name, value in variables.items() if value}}
        self.log: list[str] = []
        self._news = asyncio.Event()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *exc: object) -> None:
        await self.kill()

    async def start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *self._command,
            cwd=self._cwd,
            env=self._env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=_LINE_BYTES,
        )
        self._reader = asyncio.create_task(self._read())
        self.known.append(self)

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self.log.append(line.decode(errors="replace").rstrip())
            self._news.set()

    @property
    def pid(self) -> int:
        return self.process.pid

    def descendants(self) -> list[psutil.Process]:
        """All that it started and that lives, at any depth."""
        return [child for child in psutil.Process(self.pid).children(recursive=True) if is_alive(child.pid)]

    def executors(self) -> list[psutil.Process]:
        """The live executor processes, oldest first."""
        found = [child for child in psutil.Process(self.pid).children() if _is_executor(child)]
        return sorted(found, key=lambda child: child.create_time())

    def lines(self, *parts: str) -> list[str]:
        """The lines of the log so far that hold all of `parts`."""
        return [line for line in self.log if all(part in line for part in parts)]

    async def wait_for_log(self, *parts: str, timeout: float = WAIT_S) -> str:
        """The first line that holds all of `parts`."""
        async with asyncio.timeout(timeout):
            while not (found := self.lines(*parts)):
                self._news.clear()
                await self._news.wait()
        return found[0]

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    async def exit_code(self, timeout: float = WAIT_S) -> int:
        """Wait for its end; the whole log is there after this."""
        async with asyncio.timeout(timeout):
            code = await self.process.wait()
            await self._reader
        return code

    async def while_it_runs(self, step: Coroutine[Any, Any, Any]) -> None:
        """Await `step`; that the worker ends before it is a failure."""
        task, end = asyncio.create_task(step), asyncio.create_task(self.process.wait())
        await asyncio.wait([task, end], return_when=asyncio.FIRST_COMPLETED)
        end.cancel()
        if not task.done():
            task.cancel()
            raise AssertionError(f"the worker ended with {self.process.returncode}: {self.log[-1:]}")
        await task

    async def kill(self) -> None:
        if self.process.returncode is None:
            self.process.kill()
            await self.process.wait()
        await self._reader


@dataclass(frozen=True)
class Chain:
    """A scheduler and a worker that is registered at it, all executors ready."""

    orchestrator: MockOrchestrator
    worker: WorkerProcess

    @property
    def connection(self) -> WorkerConnection:
        """The worker's stream of now."""
        return self.orchestrator.find()

    @property
    def resources(self) -> pb.WorkerResources:
        """What the worker said of itself last."""
        return self.connection.registrations[-1].resources

    async def run(self, function: str, payload: object = None, **fields: Any) -> RunHandle:
        """Send a run (see MockOrchestrator.run)."""
        return await self.orchestrator.run(function, payload, **fields)

    async def call(self, function: str, payload: object = None, **fields: Any) -> Any:
        """Run and return the decoded output. Raises RunFailedError."""
        return await (await self.run(function, payload, **fields)).output(WAIT_S)

    async def result(self, function: str, payload: object = None, **fields: Any) -> pb.TaskExecutionResult:
        """Run and return the result, success or not."""
        return await (await self.run(function, payload, **fields)).result(WAIT_S)

    async def started(self, function: str, payload: object = None, **fields: Any) -> RunHandle:
        """Send a run of one of the tenant's functions that say when they have begun, and wait for that."""
        handle = await self.run(function, payload, **fields)
        await self.event(handle, "started")
        return handle

    async def event(self, handle: RunHandle, event_type: str) -> Any:
        """Wait for a run's first event of this type; its payload. A result that comes before it is a failure."""

        def found() -> tuple[Any] | None:
            for event in handle.events:
                if event.type == event_type:
                    return (event.payload,)
            assert not handle.done, f"no {event_type} before the result: {handle.results[0].message}"
            return None

        return (await self.orchestrator.wait_until(found, WAIT_S, what=f"{event_type} of {handle!r}"))[0]

    async def send_bytes(self, data: bytes) -> None:
        """Send the worker any bytes as one message."""
        await self.connection.send_raw(data)

    async def stray_result(self, run_id: str) -> pb.TaskExecutionResult:
        """Wait for the result of a run that the orchestrator was not asked for, and take it."""
        strays = self.orchestrator.stray_results

        def found() -> pb.TaskExecutionResult | None:
            return next((stray.message for stray in strays if stray.message.run_id == run_id), None)

        result = await self.orchestrator.wait_until(found, WAIT_S, what=f"a result of {run_id!r}")
        strays.clear()
        return result


@contextlib.asynccontextmanager
async def chain(
    *, executors: int = 1, env: Mapping[str, str] | None = None, tenant: str | Path = "basic",
    modules: str = "basic_functions", ready: str = "one_at_a_time", start_s: float = WAIT_S, **scheduler: Any,
) -> AsyncIterator[Chain]:  # fmt: skip
    """Start a chain; that must not take longer than `start_s`. `scheduler` are MockOrchestrator's arguments.

    It is given when all executors are ready, which the concurrency of the function `ready` tells: one per executor.
    At the end the worker must not have broken the protocol.
    """
    env = {"WORKER_EXECUTORS": str(executors), **(env or {})}
    async with (
        MockOrchestrator(**scheduler) as orchestrator,
        WorkerProcess(orchestrator.address, tenant=tenant, modules=modules, env=env) as worker,
    ):
        await worker.while_it_runs(wait_for_executors(orchestrator, executors, ready, timeout=start_s))
        yield Chain(orchestrator, worker)
        assert orchestrator.violations == []


async def wait_for_executors(
    orchestrator: MockOrchestrator, count: int, function: str = "one_at_a_time", *, since: float = 0.0,
    timeout: float = WAIT_S,
) -> None:  # fmt: skip
    """Wait until so many executors serve, as far as the scheduler is told; `since` is monotonic seconds."""
    await orchestrator.wait_for_registration(
        lambda registration: registration.resources.function_concurrency.get(function, 0) == count, timeout, since=since
    )


async def refused(scheduler: str = "127.0.0.1:1", **options: Any) -> tuple[int, list[str]]:
    """Start a worker that can't go on; its exit code and its log."""
    async with WorkerProcess(scheduler, **options) as worker:
        return await worker.exit_code(), worker.log


def is_alive(pid: int) -> bool:
    """Whether there is such a process and it is no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler of its own for a signal."""
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in status if line.startswith("SigCgt:"))
    return bool(caught >> (number - 1) & 1)


def _is_executor(process: psutil.Process) -> bool:
    try:
        return "executor" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def eventually(check: Callable[[], object], timeout: float = WAIT_S, what: str = "") -> None:
    """Wait until `check` is true; for states of other processes, which nothing announces to a test."""
    try:
        async with asyncio.timeout(timeout):
            while not check():
                await asyncio.sleep(_POLL_S)
    except TimeoutError:
        raise AssertionError(f"not within {timeout:g} s: {what or 'what was waited for'}") from None


async def freeze(pid: int) -> None:
    """SIGSTOP, and wait until each thread has stopped: until then one may go on with its work."""
    os.kill(pid, signal.SIGSTOP)
    threads = Path(f"/proc/{pid}/task")

    def is_frozen() -> bool:
        states = [(thread / "stat").read_text().rpartition(")")[2].split()[0] for thread in threads.iterdir()]
        return all(state == "T" for state in states)

    await eventually(is_frozen, what=f"process {pid} stands still")


async def all_of(*steps: Awaitable[Any]) -> list[Any]:
    """Await all at once; the first error cancels the rest."""

    async def step(awaitable: Awaitable[Any]) -> Any:
        return await awaitable

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(step(awaitable)) for awaitable in steps]
    return [task.result() for task in tasks]
