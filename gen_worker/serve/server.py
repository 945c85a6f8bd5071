"""The development server as a whole: the worker, the files that are watched, and HTTP.

Owns: the order in which they start and stop, and the worker's life: it is started again when it ended and the code
changed since.

1. Listen; start the worker; serve the page at once, while the worker starts.
2. Python files changed: executors are renewed. pyproject.toml changed, or the worker had ended: the worker is started
   anew.
3. SIGINT or SIGTERM: watchers and open answers end, HTTP stops, the worker leaves. A second one cuts off what runs.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import urlencode

import uvicorn
from watchfiles import Change, DefaultFilter, awatch

from gen_worker.errors import ProjectError
from gen_worker.serve.access import is_loopback
from gen_worker.serve.app import build_app
from gen_worker.serve.local_worker import LocalWorker, WorkerStartError, project_name
from gen_worker.serve.state import DevState, Phase

ANSWERS_S: Final = 3
"""For open answers to end once the server stops."""
START_S: Final = 24 * 3600.0
"""The server waits for its worker as long as that lives."""
DEBOUNCE_MS: Final = 200
"""Of file changes: an editor writes several files, and each in several steps."""
_BACKLOG: Final = 128
_TOKEN: Final = re.compile(r"[!#-+\--:<-\[\]-~]+")
"""What a cookie's value may be made of (RFC 6265)."""


class AddressError(Exception):
    """The address can't be listened on, in one line."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """Where and how. `token` is "" when none is asked for."""

    host: str
    port: int
    token: str
    reload: bool
    say: Callable[[str], None]


class DevServer:
    """See the module. `run` returns when it was told to stop."""

    def __init__(self, project: Path, worker: LocalWorker, options: ServeOptions) -> None:
        self._project = project.resolve()
        self._options = options
        self._worker = worker
        self._state = DevState(project_name(self._project), worker)
        worker.listeners.append(self._state.take_line)
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._renew_when_ready = False

    async def run(self) -> None:
        """Raises AddressError, ProjectError, ListenError."""
        options = self._options
        with _listen(options.host, options.port) as listening, self._signal_handlers():
            async with self._worker:
                await self._worker.start()
                await self._serve(listening)

    async def _serve(self, listening: socket.socket) -> None:
        http = HttpServer(
            uvicorn.Config(
                build_app(self._state, token=self._options.token),
                lifespan="off",
                ws="websockets-sansio",
                access_log=False,
                log_level="warning",
                server_header=False,
                timeout_graceful_shutdown=ANSWERS_S,
            )
        )
        serving = asyncio.ensure_future(http.serve([listening]))
        keeping = asyncio.ensure_future(self._keep_worker())
        watching = asyncio.ensure_future(self._watch())
        stopping = asyncio.ensure_future(self._stopping.wait())
        self._options.say(f"serving {self._project} on {self._address(listening)}")
        try:
            await asyncio.wait((serving, keeping, watching, stopping), return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._state.enter(Phase.STOPPING)
            http.should_exit = True
            for task in (keeping, watching, stopping):
                task.cancel()
            await serving
        for task in (keeping, watching):
            if task.done() and not task.cancelled():
                task.result()  # one that ended by itself failed

    def _address(self, listening: socket.socket) -> str:
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        query = f"/?{urlencode({'token': self._options.token})}" if self._options.token else ""
        return f"http://{shown}:{port}{query}"

    # -- the worker ---------------------------------------------------------------------------------

    async def _keep_worker(self) -> None:
        """The worker is up as long as its code lets it."""
        while True:
            try:
                await self._worker.wait_ready(START_S)
                self._state.enter(Phase.SERVING)
                self._options.say(f"ready: {', '.join(self._state.functions())}")
                if self._renew_when_ready:
                    self._reload(has_settings=False)
                follow = asyncio.ensure_future(self._follow_registrations())
                try:
                    code = await self._worker.wait_ended()
                finally:
                    follow.cancel()
                problem = f"the worker ended with exit code {code}: {self._worker.last_error()}"
            except WorkerStartError as error:
                problem = str(error)
            self._state.enter(Phase.DOWN, problem)
            self._options.say(f"the worker is down: {problem}; a change of the code starts it again")
            await self._start_again()

    async def _start_again(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            self._state.enter(Phase.STARTING)
            try:
                await self._worker.start()
            except (ProjectError, OSError) as error:
                self._state.enter(Phase.DOWN, str(error))
                self._options.say(f"the worker can't be started: {error}")
            else:
                return

    async def _follow_registrations(self) -> None:
        """Each registration is a change to show; with functions in it, what was reloaded serves."""
        orchestrator, seen = self._worker.orchestrator, 0.0
        while True:
            registration = await orchestrator.wait_for_registration(lambda _: True, START_S, since=seen)
            seen = registration.at + 1e-6
            serves = bool(registration.resources.available_functions)
            if self._state.phase in (Phase.SERVING, Phase.RELOADING):
                self._state.enter(Phase.SERVING if serves else Phase.RELOADING, self._state.problem)

    # -- the code -----------------------------------------------------------------------------------

    async def _watch(self) -> None:
        if not self._options.reload:
            await self._stopping.wait()
            return
        async for changes in awatch(self._project, watch_filter=CodeFilter(), debounce=DEBOUNCE_MS):
            paths = sorted(Path(path) for _, path in changes)
            self._options.say(f"changed: {', '.join(str(path.relative_to(self._project)) for path in paths)}")
            self._reload(has_settings=any(path.name == "pyproject.toml" for path in paths))

    def _reload(self, *, has_settings: bool) -> None:
        self._renew_when_ready = False
        if self._worker.pid is None:
            self._changed.set()
        elif has_settings:  # the supervisor has read them
            self._changed.set()
            self._worker.terminate()
        elif self._state.phase is Phase.STARTING:
            self._renew_when_ready = True  # it may have read some of the code already, and does not know the signal yet
        else:
            self._state.enter(Phase.RELOADING)
            self._worker.renew()

    # -- signals ------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._stopping.is_set():
            self._worker.terminate()  # which it takes for a second signal, too
        self._stopping.set()


class CodeFilter(DefaultFilter):
    """Python files that may be a part of what executors import, and pyproject.toml."""

    def __call__(self, change: Change, path: str) -> bool:
        where = Path(path)
        is_code = where.suffix == ".py" and not where.name.startswith("test_") and where.name != "conftest.py"
        return (is_code or where.name == "pyproject.toml") and super().__call__(change, path)


class HttpServer(uvicorn.Server):
    """Leaves the signals to DevServer."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@contextlib.contextmanager
def _listen(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host.strip("[]"), port))
            listening.listen(_BACKLOG)  # from here on callers wait, until HTTP is up
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise AddressError(f"can't listen on {host}:{port}: {reason}; choose another with --port") from error
        yield listening


def check_address(host: str, token: str) -> None:
    """Raises AddressError for an address that others reach without a token, and for a token that can't be one."""
    if token and not _TOKEN.fullmatch(token):
        raise AddressError("the token has characters that a cookie can't have: use letters, digits, - and _")
    if not is_loopback(host) and not token:
        raise AddressError(
            f"{host} is not this machine alone, and the server runs what it is asked to: "
            "give --token, or serve on 127.0.0.1"
        )
