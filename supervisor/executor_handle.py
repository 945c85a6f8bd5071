"""One executor as the rest of the supervisor sees it: its state, what it serves, its runs, its messages.

Owns: one incarnation. A handle starts once, ends once and is replaced, never repaired; messages of a dead
incarnation reach no one, since each handle has a pipe of its own.

    STARTING -> READY -> DRAINING -> DEAD        (any state -> DEAD)
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Mapping
from enum import Enum
from typing import Final, Protocol

from gen_worker.pipe.arena import BLOB_THRESHOLD_BYTES, ArenaError
from gen_worker.pipe.frames import FrameError
from gen_worker.pipe.messages import (
    PIPE_PROTOCOL,
    Blob,
    Cancel,
    CancelCause,
    Credit,
    Downward,
    Event,
    Fatal,
    Free,
    FunctionInfo,
    Init,
    LoadModel,
    Memory,
    ModelLoaded,
    ModelUnloaded,
    Payload,
    Ready,
    Result,
    Shutdown,
    UnloadModel,
    Upward,
    decode_upward,
    encode,
)
from gen_worker.pipe.messages import Run as RunMessage
from gen_worker.wire import TRANSPORT_LIMIT_BYTES
from supervisor.child import Child, ExitCause
from supervisor.devices import Device
from supervisor.executor_user import ExecutorUser
from supervisor.output_log import OutputLog
from supervisor.runs import Run, invalid

log = logging.getLogger(__name__)


LEAVE_S: Final = 5.0
"""An executor that said that it leaves (Fatal) has this long; a driver in disorder can hold a process up."""
LOOP_RUNS: Final = 8192
"""Runs of async functions at once, far more than one event loop serves well; the rest waits in the supervisor."""
OUTPUT_CAP_BYTES: Final = TRANSPORT_LIMIT_BYTES - 1024 * 1024
"""No stream takes a larger result, so one that was let through would break every stream it is sent on."""


class HandleState(Enum):
    STARTING = "starting"
    READY = "ready"
    DRAINING = "draining"
    DEAD = "dead"

    @property
    def is_terminal(self) -> bool:
        return self is HandleState.DEAD


class HandleEvents(Protocol):
    """Who is told of what an executor says and of its end."""

    def executor_ready(self, handle: ExecutorHandle) -> None: ...
    def executor_writable(self, handle: ExecutorHandle) -> None: ...
    def executor_draining(self, handle: ExecutorHandle) -> None: ...
    def executor_died(self, handle: ExecutorHandle, cause: ExitCause) -> None: ...
    def run_event(self, handle: ExecutorHandle, event: Event) -> None: ...
    def run_result(self, handle: ExecutorHandle, result: Result, output: bytes) -> None: ...
    def model_loaded(self, handle: ExecutorHandle, loaded: ModelLoaded) -> None: ...
    def model_unloaded(self, handle: ExecutorHandle, unloaded: ModelUnloaded) -> None: ...


class ExecutorHandle:
    """See the module. `events` is told of everything; a handle decides nothing."""

    def __init__(self, slot: int, incarnation: int, device: Device, threads: int, events: HandleEvents) -> None:
        self.slot = slot
        self.incarnation = incarnation
        self.device = device
        self.state = HandleState.STARTING
        self.functions: dict[str, FunctionInfo] = {}
        self.versions: dict[str, str] = {}
        self.fatal: Fatal | None = None
        """What it said before it left, if it did."""
        self.was_killed = False
        """Whether this supervisor ended it, for a deadline, a cancel or its own end."""
        self.poisoned = False
        """Whether one of its runs cost it the device context."""
        self.recycled = ""
        """Why it is to be replaced, by no fault of a run; "" when it is not."""
        self.memory = Memory(0, 0, 0)
        """What it said last that it holds."""
        self.runs: dict[int, Run] = {}
        """The runs it has, by key."""
        self._threads = threads
        self._thread_runs = 0
        self._leaving: asyncio.TimerHandle | None = None
        self._running: Counter[str] = Counter()
        self._events = events
        self._output = OutputLog(self.name)
        self._child = Child(
            on_frame=self._on_frame,
            on_line=self._output.line,
            on_writable=lambda: events.executor_writable(self),
            on_exit=self._on_exit,
        )

    @property
    def name(self) -> str:
        """`0` for the first executor of slot 0, `0.1` for its first replacement."""
        return f"{self.slot}.{self.incarnation}" if self.incarnation else str(self.slot)

    @property
    def pid(self) -> int:
        return self._child.pid

    @property
    def load(self) -> int:
        """How many runs it has."""
        return len(self.runs)

    # -- its life -----------------------------------------------------------------------------

    async def start(self, init: Init, env: Mapping[str, str], user: ExecutorUser | None = None) -> None:
        """Start the process, as `user` if there is one. Raises OSError when it can't be started."""
        await self._child.spawn("executor", [], env, init.project_root, user)
        log.info("executor %s started: pid %d on %s", self.name, self.pid, self.device.name or "the CPU")
        self._send(init)

    def drain(self) -> None:
        """Take no runs any more: STARTING or READY -> DRAINING."""
        if self.state is not HandleState.DEAD:
            self.state = HandleState.DRAINING

    def shutdown(self) -> None:
        """Ask it to leave; for an executor without runs."""
        self.drain()
        self._send(Shutdown())

    def recycle(self, reason: str) -> None:
        """Have it replaced: it takes no more runs, and leaves when it has none left."""
        if self.recycled or self.state is not HandleState.READY:
            return
        self.recycled = reason
        self.drain()
        self._events.executor_draining(self)
        self._leave_if_recycled()

    def kill(self, reason: str) -> None:
        """End it now; its exit arrives as any other, with `reason` in its cause."""
        self.drain()
        self.was_killed = True
        self._child.kill(reason)

    # -- its work -----------------------------------------------------------------------------

    def can_take(self, function: str, limit: int) -> bool:
        """Whether it has room for one more run of a function that may run `limit` times at once (0: any number)."""
        if self.state is not HandleState.READY or not self._child.writable:
            return False
        info = self.functions.get(function)
        if info is None or (limit and self._running[function] >= limit):
            return False
        if _takes_thread(info):
            return self._thread_runs < self._threads
        return len(self.runs) - self._thread_runs < LOOP_RUNS

    def send_run(self, run: Run, payload: bytes, deadline: float, window: int) -> None:
        """Give it a run.

        Raises OSError when there is no shared memory for a large payload, FrameError when the request is too large
        without it.
        """
        where: Payload = payload
        if len(payload) >= BLOB_THRESHOLD_BYTES:
            where = self._child.arena_down.put(payload)
        message = RunMessage(
            run.key, run.run_id, run.function, where, dict(run.models),
            run.timeout_ms, deadline, run.tenant_id, run.user_id, window,
        )  # fmt: skip
        try:
            self._send(message)
        except FrameError:
            if isinstance(where, Blob):
                self._child.arena_down.free(where.offset)
            raise
        self.runs[run.key] = run
        self._running[run.function] += 1
        if _takes_thread(self.functions[run.function]):
            self._thread_runs += 1

    def release(self, run: Run) -> None:
        """The run has ended: its place is free."""
        if self.runs.pop(run.key, None) is None:
            return
        self._running[run.function] -= 1
        if _takes_thread(self.functions[run.function]):
            self._thread_runs -= 1
        self._leave_if_recycled()

    def send_cancel(self, key: int, cause: CancelCause) -> None:
        self._send(Cancel(key, cause))

    def send_credit(self, key: int, size: int) -> None:
        self._send(Credit(key, size))

    def send_load(self, message: LoadModel) -> None:
        self._send(message)

    def send_unload(self, model_id: str, *, to_host: bool = False) -> None:
        self._send(UnloadModel(model_id, to_host))

    def last_lines(self) -> list[str]:
        """The last lines that it printed, oldest first."""
        return list(self._child.last_lines)

    # -- inside -------------------------------------------------------------------------------

    def _send(self, message: Downward) -> None:
        if self.state is not HandleState.DEAD:
            self._child.send(encode(message))

    def _break(self, reason: str) -> None:
        """End an executor that broke its side of the pipe; unlike a kill, that counts against its runs."""
        self.drain()
        self._child.kill(reason)

    def _leave_if_recycled(self) -> None:
        if self.recycled and not self.runs and self._leaving is None and self.state is HandleState.DRAINING:
            self.shutdown()
            loop = asyncio.get_running_loop()
            self._leaving = loop.call_later(LEAVE_S, self.kill, "it stayed after it was asked to leave")

    def _leaves(self) -> None:
        """It said that it can't serve: it takes no more runs, and is helped when it stays."""
        if self._leaving is None:
            self.drain()
            loop = asyncio.get_running_loop()
            self._leaving = loop.call_later(LEAVE_S, self.kill, "it stayed after it said that it leaves")
            self._events.executor_draining(self)

    def _on_frame(self, body: bytes) -> None:
        try:
            message = decode_upward(body)
        except ValueError as error:  # msgspec's errors and UnicodeDecodeError
            self._break(f"it sent a message that is not one: {error}")
            return
        try:
            self._handle(message)
        except ArenaError as error:
            self._break(f"it broke its shared memory: {error}")

    def _handle(self, message: Upward) -> None:
        match message:
            case Event():
                self._events.run_event(self, message)
            case Result():
                self._result(message)
            case Free():
                self._child.arena_down.free(message.offset)
            case Ready():
                self._ready(message)
            case ModelLoaded():
                self._note_poison(message.poisoned)
                self._events.model_loaded(self, message)
            case ModelUnloaded():
                self._note_poison(message.poisoned)
                self._events.model_unloaded(self, message)
            case Memory():
                self.memory = message
            case Fatal():
                self.fatal = message
                self._leaves()

    def _result(self, result: Result) -> None:
        self._note_poison(result.poisoned)
        output = result.output
        if isinstance(output, bytes):
            self._events.run_result(self, result, output)
            return
        if output.size > OUTPUT_CAP_BYTES:
            self._send(Free(output.offset))
            detail = f"an output of {output.size} bytes is over the transport's limit of {OUTPUT_CAP_BYTES}"
            self._events.run_result(self, Result(result.key, failure=invalid("output too large", detail)), b"")
            return
        data = self._child.arena_up.read(output)
        self._send(Free(output.offset))
        self._events.run_result(self, result, data)

    def _note_poison(self, poisoned: bool) -> None:  # noqa: FBT001  (a field of messages)
        """Before what the message frees or brings is given to the next run."""
        if poisoned:
            self.poisoned = True
            self._leaves()

    def _ready(self, ready: Ready) -> None:
        if ready.protocol != PIPE_PROTOCOL:
            self.kill(f"it speaks pipe protocol {ready.protocol}, this supervisor {PIPE_PROTOCOL}")
            return
        if self.state is HandleState.DRAINING:
            return  # it was told to leave before it got here
        if self.state is not HandleState.STARTING:
            self.kill("it said twice that it is ready")
            return
        self.functions = {function.name: function for function in ready.functions}
        self.versions = ready.versions
        self.state = HandleState.READY
        self._events.executor_ready(self)

    def _on_exit(self, cause: ExitCause) -> None:
        if self.state is HandleState.DEAD:
            return
        self.state = HandleState.DEAD
        self._output.say_left_out()
        self._events.executor_died(self, cause)


def _takes_thread(info: FunctionInfo) -> bool:
    return info.mode in ("sync", "generator")
