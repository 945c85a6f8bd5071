"""A real worker beside this process: a scheduler on loopback in it, and `gen-worker-supervisor` as its child.

Owns: the child, its environment and its output, the scheduler and the file store that the child's runs use.

1. `start` listens, starts the child in the project's folder, and waits until it has registered functions.
2. `call` sends a run; `renew` has the executors replaced by ones with the code that is on disk now.
3. `stop` asks the child to leave, and ends it when it does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import secrets
import signal
import sys
import tempfile
import time
import tomllib
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

from gen_worker.errors import ProjectError, ValidationError, WorkerError
from gen_worker.manifest import Manifest
from gen_worker.project import load_project
from gen_worker.serve.functions import Function
from gen_worker.serve.worker_log import LogLine, read_line
from gen_worker.testing.mock_orchestrator import (
    FileStoreServer,
    MockOrchestrator,
    RealtimeSession,
    Registration,
    RunHandle,
    WorkerConnection,
)

log = logging.getLogger(__name__)

WORKER_ID: Final = "local"
LEAVE_S: Final = 15.0
"""For the child to leave by itself: its drain time and its own bounds are shorter."""
DRAIN_S: Final = "3"
KEPT_LINES: Final = 400
_LINE_BYTES: Final = 1024 * 1024
_NOT_FOR_LOCAL: Final = re.compile(
    r"SCHEDULER_.*|AUTH_TOKEN_FILE|WORKER_JWT|USE_TLS|WORKER_OUTBOX_DIR|MAX_RECONNECT_.*"
)
"""Settings of a deployed worker, which would keep this one from its scheduler."""


class WorkerStartError(WorkerError):
    """The worker ended before it served; the message is one line. `exit_code` is the supervisor's."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class LocalOptions:
    """How a local worker is started. `environ` is the environment that the child gets, less what is not for it."""

    project: Path
    environ: Mapping[str, str]
    executors: int | None = None
    """On a host without a GPU; None: the supervisor's default."""
    files_dir: Path | None = None
    """Where the file store keeps its files; None: a directory that is removed at the end."""


class LocalWorker:
    """See the module. An async context manager; the methods belong to one event loop."""

    def __init__(self, options: LocalOptions) -> None:
        self._options = options
        self.token = secrets.token_urlsafe()
        """What the worker shows its scheduler and the file store: other programs of this machine have none."""
        self._stack = contextlib.ExitStack()
        self._reader: asyncio.Task[None] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._functions: tuple[Registration | None, dict[str, Function]] = (None, {})
        """What was read of the latest registration: a page that watches asks often."""
        self.orchestrator = MockOrchestrator(required_token=self.token)
        self.listeners: list[Callable[[LogLine], None]] = []
        """Each is called with each line that the worker writes."""
        self.lines: deque[LogLine] = deque(maxlen=KEPT_LINES)
        """The end of what the worker wrote."""

    # -- life ---------------------------------------------------------------------------------------

    async def open(self) -> None:
        """Start the scheduler and the file store. Raises ListenError and OSError."""
        own = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="gen-worker-")))
        self._manifest = own / "manifest.json"
        self.files = self._stack.enter_context(
            FileStoreServer(self._options.files_dir or own / "files", token=self.token)
        )
        await self.orchestrator.start()

    async def start(self) -> None:
        """Start the child; it is not ready yet. Raises ProjectError and OSError."""
        self._write_manifest()
        self.lines.clear()
        self._started_at = time.monotonic()
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "gen_worker.serve.child", str(os.getpid())),
            cwd=self._options.project,
            env=self._environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            limit=_LINE_BYTES,
            start_new_session=True,  # a Ctrl-C is for this process, which tells the child what it means
        )
        self._reader = asyncio.create_task(self._read(self._process))

    async def wait_ready(self, timeout_s: float) -> None:
        """Until it serves functions. Raises WorkerStartError when it ends before, or does not in time."""
        ready = asyncio.ensure_future(
            self.orchestrator.wait_for_registration(
                lambda it: bool(it.resources.available_functions), timeout_s, since=self._started_at
            )
        )
        ended = asyncio.ensure_future(self.wait_ended())
        try:
            await asyncio.wait((ready, ended), return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                raise WorkerStartError(self.last_error() or f"the worker ended with {self.exit_code}", ended.result())
            if ready.exception() is not None:
                why = self.last_error()
                raise WorkerStartError(f"no function is served after {timeout_s:g} s{': ' if why else ''}{why}", 0)
        finally:
            ready.cancel()
            ended.cancel()

    async def wait_ended(self) -> int:
        """The child's exit code, once all that it wrote is here."""
        if self._process is None or self._reader is None:
            raise RuntimeError("the worker was not started")
        code = await self._process.wait()
        await asyncio.shield(self._reader)
        return code

    async def wait_gone(self) -> int:
        """The child's exit code; waits for its end even when it was not started yet."""
        if self._process is None:
            await asyncio.get_running_loop().create_future()
        return await self.wait_ended()

    @property
    def pid(self) -> int | None:
        """Of the child, while it lives."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    @property
    def exit_code(self) -> int | None:
        """Of the child; None while it lives and before it was started."""
        return self._process.returncode if self._process is not None else None

    def last_error(self) -> str:
        """What the child's log said last that is an error; else what it said last."""
        errors = [line.message for line in self.lines if line.is_error]
        return (errors or [line.message for line in self.lines] or [""])[-1]

    def renew(self) -> None:
        """Have all executors replaced. Raises ProcessLookupError when the child is gone."""
        if self._process is None or self._process.returncode is not None:
            raise ProcessLookupError("the worker is not running")
        self._process.send_signal(signal.SIGHUP)

    def terminate(self) -> None:
        """Ask the child to leave; `wait_ended` tells when it has."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()

    async def stop(self) -> None:
        """End the child, all that it started, and the scheduler. A `terminate` meanwhile cuts off what runs."""
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), LEAVE_S)
            except TimeoutError:
                log.warning("the worker (pid %d) did not leave in %g s: killed", process.pid, LEAVE_S)
                process.kill()
                await process.wait()
        if self._reader is not None:
            await self._reader
        await self.orchestrator.stop()
        self._stack.close()

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException:
            self._stack.close()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # -- work ---------------------------------------------------------------------------------------

    @property
    def connection(self) -> WorkerConnection | None:
        """The worker's stream, when it is registered."""
        return next((each for each in self.orchestrator.workers.values() if each.live), None)

    def functions(self) -> dict[str, Function]:
        """What it serves now, by name."""
        connection = self.connection
        if connection is None or not connection.registrations:
            return {}
        registration = connection.registrations[-1]
        if self._functions[0] is not registration:
            resources = registration.resources
            schemas = {schema.name: schema for schema in resources.function_schemas}
            read = {name: Function.of(name, schemas.get(name)) for name in sorted(resources.available_functions)}
            self._functions = (registration, read)
        return self._functions[1]

    async def call(self, function: str, payload: object, *, timeout_ms: int = 0) -> RunHandle:
        """Send a run. Raises ValidationError, NoWorkerError and StreamEndedError."""
        try:
            data = msgspec.msgpack.encode(payload)
        except (OverflowError, ValueError) as error:  # a number beyond 64 bits, half of a surrogate pair
            raise ValidationError(f"the payload can't be sent: {error}") from error
        return await self.orchestrator.run(
            function, data, timeout_ms=timeout_ms, file_base_url=self.files.url, file_token=self.token
        )

    async def open_realtime(self, function: str) -> RealtimeSession:
        """Open a session. Raises NoWorkerError and StreamEndedError."""
        return await self.orchestrator.open_realtime(function, file_base_url=self.files.url, file_token=self.token)

    # -- inside -------------------------------------------------------------------------------------

    def _write_manifest(self) -> None:
        """A manifest that names no module, so that executors look for them: one from an earlier build may be stale."""
        config = load_project(self._options.project)
        manifest = Manifest(deployment=config.deployment, models=config.models, build=config.build)
        self._manifest.write_bytes(msgspec.json.encode(manifest))

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in self._options.environ.items() if not _NOT_FOR_LOCAL.fullmatch(name)}
        if self._options.executors is not None:
            kept["WORKER_EXECUTORS"] = str(self._options.executors)
        return {
            "WORKER_HTTP_ADDR": "",
            "WORKER_DRAIN_TIMEOUT_SECONDS": DRAIN_S,
            "WORKER_CANCEL_GRACE_SECONDS": "2",
            **kept,
            "WORKER_MANIFEST": str(self._manifest),
            "AUTH_TOKEN": self.token,
            "SCHEDULER_ADDR": self.orchestrator.address,
            "WORKER_ID": WORKER_ID,
            "RECONNECT_DELAY": "0.2",
            "RECONNECT_MAX_DELAY": "1",
            "RECONNECT_JITTER_SECONDS": "0",
            "WORKER_LOG_FORMAT": "json",
            "PYTHONUNBUFFERED": "1",
            "PYTHONDONTWRITEBYTECODE": "1",  # a file saved twice within a second may look as if it had not changed
        }

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        if process.stdout is None:
            raise RuntimeError("the worker's output is not a pipe")
        while True:
            try:
                raw = await process.stdout.readline()
            except ValueError:  # longer than the limit: what asyncio had of it is dropped
                continue
            if not raw:
                return
            line = read_line(raw.decode(errors="replace").rstrip())
            self.lines.append(line)
            for listener in self.listeners:
                listener(line)


def check_project(root: Path) -> None:
    """Raises ProjectError, in one line that says what to do, when there is no project at `root`."""
    if not (root / "pyproject.toml").is_file():
        raise ProjectError(f"no pyproject.toml in {root.resolve()}: give --project, or begin one with gen-worker init")
    load_project(root)


def project_name(root: Path) -> str:
    """What pyproject.toml calls the project; else its folder's name."""
    project = tomllib.loads((root / "pyproject.toml").read_text("utf-8")).get("project", {})
    name = project.get("name") if isinstance(project, dict) else None
    return name if isinstance(name, str) else root.resolve().name
