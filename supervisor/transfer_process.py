"""The transfer process as the rest of the supervisor sees it: ask, and get an answer.

Owns: the process, its replacement when it dies, and the requests that have no answer yet.

1. The first call starts it. It gets its settings, tokens included, over the pipe, so they are in no environment.
2. Calls made before it is ready, or while it is being replaced, wait in its pipe or here.
3. When it dies, what was under way is sent again to its successor: a download goes on from its `.part`, and whoever
   waits sees nothing. A request that may not be done twice fails as retryable, and so does one that has seen
   MAX_DEATHS processes die.
4. A process that can't even start BOOT_FAILURES times in a row fails all calls until one can.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from gen_worker.failures import sanitize
from gen_worker.pipe.messages import Failure
from supervisor.child import Child, ExitCause
from supervisor.output_log import OutputLog
from supervisor.respawn import Respawn
from supervisor.transfers.messages import (
    TRANSFER_PROTOCOL,
    Cancel,
    Failed,
    ModelsRemoved,
    Progress,
    Ready,
    Reply,
    ReplyBody,
    ReplyT,
    Request,
    RequestBody,
    Start,
    TransferSettings,
    Upward,
    decode_upward,
    encode,
)

log = logging.getLogger(__name__)

BOOT_FAILURES: Final = 3
MAX_DEATHS: Final = 5
"""A request that was under way at so many deaths may be their cause."""
STOP_S: Final = 5.0
QUIET: Final[Mapping[str, str]] = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_UPDATE_CHECK": "1",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",
    "PYTHONUNBUFFERED": "1",
}
"""For huggingface_hub, which reads them when it is imported; only the token of the settings counts."""

_LOGGED: Final = re.compile(r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) [\w.]+: (?P<message>.*)")

OnProgress = Callable[[int, int, float], None]
"""(bytes done, bytes in all or 0 while that is unknown, bytes per second), a few times a second."""


class TransferError(Exception):
    """A transfer did not succeed; `failure` says why, in the scheduler's terms."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(failure.detail or failure.safe_message)
        self.failure = failure


@dataclass(slots=True)
class _Call:
    id: int
    request: RequestBody
    answer: asyncio.Future[ReplyBody]
    on_progress: OnProgress | None
    sent: bool = False
    deaths: int = 0


class TransferProcess:
    """See the module. All methods belong to the event loop of the main thread."""

    def __init__(
        self,
        settings: TransferSettings,
        env: Mapping[str, str],
        *,
        module: str = "supervisor.transfers",
        cwd: str = "/",
    ) -> None:
        """`env` is the process's environment; `module` is what is run."""
        self._settings = settings
        self._env = {**env, **QUIET}
        self.on_models_removed: Callable[[tuple[str, ...]], None] = lambda _: None
        """Gets the refs of what was taken from disk to make room."""
        self._module = module
        self._cwd = cwd
        self._ids = itertools.count(1)
        self._calls: dict[int, _Call] = {}
        self.pid: int | None = None
        """None while there is no process."""
        self._child: Child | None = None
        self._ready = False
        self._started_at = 0.0
        self._respawn = Respawn()
        self._respawning: asyncio.TimerHandle | None = None
        self._boot_failures = 0
        self._broken = ""
        """Why it can't start, while it can't."""
        self._spawning: asyncio.Task[None] | None = None
        self._stopping = False
        self._gone = asyncio.Event()
        self._gone.set()
        self._output = OutputLog("", logger=logging.getLogger("transfers"))

    def start(self) -> None:
        """Start it now rather than at the first call."""
        if self._child is None and self._spawning is None and self._respawning is None and not self._stopping:
            self._spawn()

    async def call(self, request: RequestBody, reply: type[ReplyT], on_progress: OnProgress | None = None) -> ReplyT:
        """Have `request` done and return its answer, which is a `reply`. Raises TransferError.

        When the caller is canceled the work over there is stopped at once.
        """
        if self._stopping:
            raise TransferError(_lost("the worker is shutting down"))
        if self._broken:
            raise TransferError(_lost(f"the transfer process can't start: {self._broken}"))
        self.start()
        call = _Call(next(self._ids), request, asyncio.get_running_loop().create_future(), on_progress)
        self._calls[call.id] = call
        self._send(call)
        try:
            answer = await call.answer
        except asyncio.CancelledError:
            if call.sent and self._child is not None:
                self._child.send(encode(Cancel(call.id)))
            raise
        finally:
            self._calls.pop(call.id, None)
        if not isinstance(answer, reply):
            detail = f"{type(request).__name__} was answered by {type(answer).__name__}, not {reply.__name__}"
            raise TransferError(Failure("internal", "internal error", detail))
        return answer

    async def stop(self) -> None:
        """End it; what is under way fails as retryable, and is resumed by the next worker."""
        self._stopping = True
        if self._respawning is not None:
            self._respawning.cancel()
        if self._spawning is not None:
            await asyncio.wait([self._spawning])
        if self._child is not None:
            self._child.kill("the worker shuts down")
            try:
                await asyncio.wait_for(self._gone.wait(), STOP_S)
            except TimeoutError:
                log.warning("the transfer process is still there after %.0f s", STOP_S)
        self._fail_all("the worker is shutting down")

    # -- the process --------------------------------------------------------------------------

    def _spawn(self) -> None:
        self._respawning = None
        self._spawning = asyncio.get_running_loop().create_task(self._start_child())

    async def _start_child(self) -> None:
        child = Child(
            on_frame=self._on_frame,
            on_line=self._on_line,
            on_writable=lambda: None,
            on_exit=self._on_exit,
        )
        self._child = child
        self._started_at = asyncio.get_running_loop().time()
        # All of it waits in the child's buffer until its pipe is there.
        child.send(encode(Start(TRANSFER_PROTOCOL, self._settings)))
        for call in list(self._calls.values()):
            self._send(call)
        self._gone.clear()
        try:
            await child.spawn(self._module, [], self._env, self._cwd)
        except (OSError, ValueError) as error:  # ValueError: what can't be in an environment
            self._spawning = None
            self._ended(f"it can't be started: {error}")
            return
        self._spawning = None
        self.pid = child.pid if self._child is child else None
        log.info("transfer process started: pid %d", child.pid)

    def _send(self, call: _Call) -> None:
        if self._child is not None:
            self._child.send(encode(Request(call.id, call.request)))
            call.sent = True

    def _on_exit(self, cause: ExitCause) -> None:
        lines = [] if self._child is None else list(self._child.last_lines)
        self._ended(f"{cause}; its last line: {lines[-1]}" if lines else str(cause))

    def _ended(self, words: str) -> None:
        self._child = None
        self.pid = None
        self._gone.set()
        if not self._stopping:
            self._replace(words)

    def _replace(self, words: str) -> None:
        """It is gone: decide what becomes of the calls, and when the next one starts."""
        loop = asyncio.get_running_loop()
        self._boot_failures = 0 if self._ready else self._boot_failures + 1
        self._ready = False
        delay = self._respawn.delay_after_death(loop.time() - self._started_at)
        log.error("the transfer process died: %s; replaced in %.0f s, %d calls wait", words, delay, len(self._calls))
        if self._boot_failures >= BOOT_FAILURES:
            self._broken = words
            self._fail_all(f"the transfer process can't start: {words}")
        for call in list(self._calls.values()):
            if not call.sent:
                continue
            call.sent = False
            call.deaths += 1
            if not call.request.repeatable:
                self._fail(call, f"the transfer process died while it did this: {words}")
            elif call.deaths >= MAX_DEATHS:
                self._fail(call, f"the transfer process died {call.deaths} times while it did this: {words}")
        self._respawning = loop.call_later(delay, self._spawn)

    def _on_line(self, stream: str, line: str) -> None:
        """What it logs goes to the log at its own level; the format is that of its main module."""
        found = _LOGGED.fullmatch(line)
        if found is None:
            self._output.line(stream, line)
        else:
            self._output.line(stream, found["message"], logging.getLevelNamesMapping()[found["level"]])

    # -- its messages -------------------------------------------------------------------------

    def _on_frame(self, body: bytes) -> None:
        try:
            message = decode_upward(body)
        except ValueError as error:  # msgspec's errors and UnicodeDecodeError
            if self._child is not None:
                self._child.kill(f"it sent a message that is not one: {error}")
            return
        self._handle(message)

    def _handle(self, message: Upward) -> None:
        match message:
            case Ready():
                self._ready = True
                self._broken = ""
            case Progress():
                call = self._calls.get(message.id)
                if call is not None and call.on_progress is not None:
                    call.on_progress(message.done_bytes, message.total_bytes, message.bytes_per_s)
            case Reply():
                call = self._calls.get(message.id)
                if call is not None and not call.answer.done():
                    call.answer.set_result(message.body)
            case Failed():
                call = self._calls.get(message.id)
                if call is not None and not call.answer.done():
                    call.answer.set_exception(TransferError(message.failure))
            case ModelsRemoved():
                self.on_models_removed(message.refs)

    def _fail_all(self, detail: str) -> None:
        for call in list(self._calls.values()):
            self._fail(call, detail)

    def _fail(self, call: _Call, detail: str) -> None:
        self._calls.pop(call.id, None)
        if not call.answer.done():
            call.answer.set_exception(TransferError(_lost(detail)))


def _lost(detail: str) -> Failure:
    return Failure("retryable", sanitize(detail), detail, retryable=True)
