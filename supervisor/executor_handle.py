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
    Deltas,
    Downward,
    Event,
    Fatal,
    FetchFile,
    FileReply,
    Free,
    FunctionInfo,
    Init,
    LoadModel,
    Memory,
    ModelLoaded,
    ModelUnloaded,
    Parked,
    Payload,
    Ready,
    Result,
    Shutdown,
    SocketClose,
    SocketCredit,
    SocketFrame,
    SocketOpen,
    StoreFile,
    Take,
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
from supervisor.held_output import HeldOutput
from supervisor.input_arena import InputArena
from supervisor.input_arena import Payload as RunPayload
from supervisor.output_log import OutputLog
from supervisor.runs import Run, invalid

log = logging.getLogger(__name__)


LEAVE_S: Final = 5.0
"""An executor that said that it leaves (Fatal) has this long; a driver in disorder can hold a process up."""
TAKE_S: Final = 3.0
"""For a spare to say that it serves its slot: it has nothing left to do for it but to make an event loop."""
LOOP_RUNS: Final = 8192
"""Runs of async functions at once, far more than one event loop serves well; the rest waits in the supervisor."""
UNREAD_BYTES: Final = 8 * 1024 * 1024
"""Large payloads that an executor was given and has not read; past that it gets no run. It reads one before it runs."""
PAUSED_RUNS: Final = 64
"""Runs that wait for their inputs; their payloads lie in the executor. With so many it takes no more."""
OUTPUT_CAP_BYTES: Final = TRANSPORT_LIMIT_BYTES
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
    def executor_writable(self, handle: ExecutorHandle) -> None:
        """It reads again, or has read what was too much: it may take runs."""

    def executor_draining(self, handle: ExecutorHandle) -> None: ...
    def executor_died(self, handle: ExecutorHandle, cause: ExitCause) -> None: ...
    def run_event(self, handle: ExecutorHandle, event: Event | Deltas) -> None: ...
    def run_file(self, handle: ExecutorHandle, request: FetchFile | StoreFile) -> None: ...
    def run_result(self, handle: ExecutorHandle, result: Result, output: bytes | HeldOutput) -> None: ...
    def socket_frame(self, handle: ExecutorHandle, frame: SocketFrame, data: bytes) -> None: ...
    def socket_close(self, handle: ExecutorHandle, close: SocketClose) -> None: ...
    def socket_credit(self, handle: ExecutorHandle, credit: SocketCredit) -> None: ...
    def model_loaded(self, handle: ExecutorHandle, loaded: ModelLoaded) -> None: ...
    def model_unloaded(self, handle: ExecutorHandle, unloaded: ModelUnloaded) -> None: ...


class ExecutorHandle:
    """See the module. `events` is told of everything; a handle decides nothing. Large payloads lie in `inputs`."""

    def __init__(
        self,
        slot: int,
        incarnation: int,
        device: Device,
        threads: int,
        events: HandleEvents,
        inputs: InputArena | None = None,
    ) -> None:
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
        self.adopted = False
        """Whether it was a spare before."""
        self.recycled = ""
        """Why it is to be replaced, by no fault of a run; "" when it is not."""
        self.memory = Memory(0, 0, 0)
        """What it said last that it holds."""
        self.runs: dict[int, Run] = {}
        """The runs it has, by key."""
        self._threads = threads
        self._thread_runs = 0
        self._sessions = 0
        self._paused: set[int] = set()
        """Keys of runs that take no place: they wait for their inputs."""
        self._leaving: asyncio.TimerHandle | None = None
        self._taking: asyncio.TimerHandle | None = None
        self._idle = asyncio.Event()
        self._idle.set()
        self._running: Counter[str] = Counter()
        self._events = events
        self._inputs = inputs
        self._output = OutputLog(self.name)
        self._given: dict[int, int] = {}
        """Offset and size of the blocks in the arena to it that it has not given back."""
        self._child = Child(
            on_frame=self._on_frame,
            on_line=self._output.line,
            on_writable=lambda: events.executor_writable(self),
            on_exit=self._on_exit,
            inputs=inputs,
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

    @property
    def brief_load(self) -> int:
        """How many runs it has that end by themselves: not realtime sessions, which may go on for hours."""
        return len(self.runs) - self._sessions

    # -- its life -----------------------------------------------------------------------------

    async def start(self, init: Init, env: Mapping[str, str], user: ExecutorUser | None = None) -> None:
        """Start the process, as `user` if there is one. Raises OSError when it can't be started."""
        await self._child.spawn("executor", [], env, init.project_root, user)
        log.info("executor %s started: pid %d on %s", self.name, self.pid, self.device.name or "the CPU")
        self._send(init)

    def adopt(self, child: Child) -> None:
        """Take a spare, parked, instead of starting a process."""
        self.adopted = True
        self._child = child
        child.hand_over(
            on_frame=self._on_frame,
            on_line=self._output.line,
            on_writable=lambda: self._events.executor_writable(self),
            on_exit=self._on_exit,
        )
        log.info("executor %s is the spare: pid %d on %s", self.name, self.pid, self.device.name or "the CPU")
        reason = f"as a spare it had {TAKE_S:g} s to serve its slot"
        self._taking = asyncio.get_running_loop().call_later(TAKE_S, self.kill, reason)
        self._send(Take(self.slot, self.device.torch_device, self.device.visible))

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
        if self.state is not HandleState.READY or not self._child.writable or self._is_behind:
            return False
        return len(self._paused) < PAUSED_RUNS and self.has_place(function, limit)

    def has_place(self, function: str, limit: int) -> bool:
        """Whether one more run of the function may run now."""
        info = self.functions.get(function)
        if info is None or (limit and self._running[function] >= limit):
            return False
        if _takes_thread(info):
            return self._thread_runs < self._threads
        return len(self.runs) - len(self._paused) - self._thread_runs < LOOP_RUNS

    def pause(self, run: Run) -> None:
        """The run waits for its inputs and takes no place meanwhile."""
        if run.key in self.runs and run.key not in self._paused:
            self._paused.add(run.key)
            self._count(run, -1)

    def resume(self, run: Run) -> None:
        """Its inputs are there: it takes its place again."""
        if run.key in self._paused:
            self._paused.remove(run.key)
            self._count(run, 1)

    def send_run(self, run: Run, payload: RunPayload, deadline: float, window: int) -> None:
        """Give it a run.

        Raises OSError when there is no shared memory for a large payload, FrameError when the request is too large
        without it.
        """
        where = self._place(payload)
        message = RunMessage(
            run.key, run.run_id, run.function, where, dict(run.models),
            run.timeout_ms, deadline, run.tenant_id, run.user_id, window,
        )  # fmt: skip
        try:
            self._send(message)
        except FrameError:
            if isinstance(where, Blob):
                self._take_back(where.offset)
            raise
        self._took(run)

    def open_socket(self, session: Run, deadline: float, window: int, max_frame_bytes: int) -> None:
        """Give it a realtime session. Raises FrameError when the request is too large."""
        self._send(
            SocketOpen(
                session.key, session.run_id, session.function, dict(session.models), session.timeout_ms, deadline,
                session.tenant_id, session.user_id, window, max_frame_bytes,
            )
        )  # fmt: skip
        self._took(session)

    def _took(self, run: Run) -> None:
        self.runs[run.key] = run
        self._idle.clear()
        self._count(run, 1)

    def release(self, run: Run) -> None:
        """The run has ended: its place is free."""
        if self.runs.pop(run.key, None) is None:
            return
        if run.key in self._paused:
            self._paused.remove(run.key)
        else:
            self._count(run, -1)
        if not self.runs:
            self._idle.set()
        self._leave_if_recycled()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Whether it has no run within timeout_s."""
        if self._idle.is_set():
            return True
        try:
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def send_cancel(self, key: int, cause: CancelCause) -> None:
        self._send(Cancel(key, cause))

    def send_credit(self, key: int, size: int) -> None:
        self._send(Credit(key, size))

    def send_socket_frame(self, key: int, data: bytes, *, is_text: bool) -> None:
        """Raises OSError when there is no shared memory for a large one."""
        self._send(SocketFrame(key, self._place(data), is_text))

    def send_socket_close(self, key: int, reason: str) -> None:
        self._send(SocketClose(key, reason))

    def send_socket_credit(self, key: int, size: int) -> None:
        self._send(SocketCredit(key, size))

    def send_files(self, reply: FileReply) -> None:
        self._send(reply)

    def send_load(self, message: LoadModel) -> None:
        self._send(message)

    def send_unload(self, model_id: str, *, to_host: bool = False) -> None:
        self._send(UnloadModel(model_id, to_host))

    def last_lines(self) -> list[str]:
        """The last lines that it printed, oldest first."""
        return list(self._child.last_lines)

    # -- inside -------------------------------------------------------------------------------

    def _place(self, payload: RunPayload) -> Payload:
        """Where it will find a payload; a large one is in shared memory already, or put there. Raises OSError."""
        arena = self._child.arena_down
        if isinstance(payload, bytes):
            if len(payload) < BLOB_THRESHOLD_BYTES:
                return payload
            blob = arena.put(payload)
        else:
            blob = payload.hand_over(arena) or arena.put(payload.view())
        self._given[blob.offset] = blob.size
        return blob

    @property
    def _is_behind(self) -> bool:
        """Whether so much lies unread that more would only start threads, each with a payload, that wait for a turn."""
        return sum(self._given.values()) >= UNREAD_BYTES

    def _take_back(self, offset: int) -> None:
        """It is done with the block at `offset`. Raises ArenaError when it was given none."""
        if offset not in self._given:
            raise ArenaError(f"no block at offset {offset} is in use")
        del self._given[offset]
        self._child.arena_down.free(offset)

    def _count(self, run: Run, places: int) -> None:
        info = self.functions[run.function]
        self._running[run.function] += places
        self._thread_runs += places * _takes_thread(info)
        self._sessions += places * (info.mode == "websocket")

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
            case Event() | Deltas():
                self._events.run_event(self, message)
            case SocketFrame() | SocketCredit() | SocketClose():
                self._socket(message)
            case Result():
                self._result(message)
            case Free():
                self._has_read(message.offset)
            case FetchFile() | StoreFile():
                self._events.run_file(self, message)
            case Ready() | Parked():
                self._ready(message)
            case Memory():
                self.memory = message
            case ModelLoaded() | ModelUnloaded():
                self._model(message)
            case Fatal():
                self.fatal = message
                self._leaves()

    def _has_read(self, offset: int) -> None:
        was_behind = self._is_behind
        self._take_back(offset)
        if was_behind and not self._is_behind:
            self._events.executor_writable(self)

    def _model(self, message: ModelLoaded | ModelUnloaded) -> None:
        self._note_poison(message.poisoned)
        if isinstance(message, ModelLoaded):
            self._events.model_loaded(self, message)
        else:
            self._events.model_unloaded(self, message)

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
        held = HeldOutput(self._child.arena_up, output, lambda offset: self._send(Free(offset)))
        self._events.run_result(self, result, held)

    def _socket(self, message: SocketFrame | SocketCredit | SocketClose) -> None:
        match message:
            case SocketFrame():
                self._socket_frame(message)
            case SocketCredit():
                self._events.socket_credit(self, message)
            case SocketClose():
                self._events.socket_close(self, message)

    def _socket_frame(self, frame: SocketFrame) -> None:
        data = frame.data
        if not isinstance(data, bytes):
            where, data = data, b""
            if where.size <= OUTPUT_CAP_BYTES:  # a larger one is over any limit, so nobody needs its bytes
                data = self._child.arena_up.read(where)
            self._send(Free(where.offset))
            if where.size > OUTPUT_CAP_BYTES:
                self._events.socket_close(self, SocketClose(frame.key, "frame_too_large"))
                return
        self._events.socket_frame(self, frame, data)

    def _note_poison(self, poisoned: bool) -> None:  # noqa: FBT001  (a field of messages)
        """Before what the message frees or brings is given to the next run."""
        if poisoned:
            self.poisoned = True
            self._leaves()

    def _ready(self, ready: Ready | Parked) -> None:
        self._took_slot()
        if isinstance(ready, Parked):
            self._break("it said that it waits for a slot, and has one")
            return
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

    def _took_slot(self) -> None:
        """Nothing waits for it to do so any more."""
        if self._taking is not None:
            self._taking.cancel()

    def _on_exit(self, cause: ExitCause) -> None:
        if self.state is HandleState.DEAD:
            return
        self.state = HandleState.DEAD
        self._took_slot()
        if self._inputs is not None:
            for offset in self._given:
                try:
                    self._inputs.writer.free(offset)
                except (ArenaError, OSError):  # whatever it is, the runs must be answered
                    log.exception("executor %s: its block at %d of the inputs is lost", self.name, offset)
        self._given.clear()
        self._output.say_left_out()
        self._events.executor_died(self, cause)


def _takes_thread(info: FunctionInfo) -> bool:
    return info.mode in ("sync", "generator")
