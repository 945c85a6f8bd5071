"""The functions that a tortured worker serves: ordinary ones, and every way that tenant code can hurt its process.

Owns: the ledger, a file in the working directory with the run_id of each start. It outlives the process, so that a
run that began and was never answered is told from one that never reached the worker.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Final

import msgspec

from gen_worker import ActionContext, RealtimeSocket, ResourceRequirements, worker_function, worker_websocket
from gen_worker.errors import AuthError, FatalError, ResourceError, RetryableError, ValidationError
from gen_worker.injection import ModelRef, ModelRefSource

LEDGER: Final = "torture-started"
ENDS: Final = "torture-ended"
"""Where functions that end by themselves say when (monotonic seconds, which are the system's): `run_id time`."""
CHILD_PROGRAM: Final = "/bin/sleep"
MODEL: Final = "torture-model"
"""The label of the model, and its id."""
WEIGHTS_FILE: Final = "weights.txt"
CHILD_S: Final = 3600
"""How long a process that a function left behind would live."""


class Echo(msgspec.Struct):
    nonce: str
    data: bytes = b""


class Parts(msgspec.Struct):
    nonce: str
    count: int
    size: int = 0
    pause_s: float = 0.0


class Part(msgspec.Struct):
    index: int
    nonce: str
    text: str = ""
    made_at: float = 0.0
    """Monotonic seconds, which all processes of a machine share."""


class Wait(msgspec.Struct):
    nonce: str
    seconds: float


class Litter(msgspec.Struct):
    nonce: str
    escapes: bool


class How(msgspec.Struct):
    nonce: str
    how: str


class Done(msgspec.Struct):
    nonce: str


class Weights:
    """A model: one file, and a moment to load it."""

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def from_pretrained(cls, path: str, *, local_files_only: bool = True) -> Weights:  # noqa: ARG003  (the convention's)
        time.sleep(0.02)
        return cls(Path(path, WEIGHTS_FILE).read_text())


@lru_cache(maxsize=1)
def _ledger() -> int:
    return os.open(LEDGER, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def _begin(ctx: ActionContext) -> None:
    # One short write to a file that is only appended to is never cut or interleaved.
    os.write(_ledger(), f"{ctx.run_id}\n".encode())


@lru_cache(maxsize=1)
def _ends() -> int:
    return os.open(ENDS, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)


def _end(ctx: ActionContext) -> None:
    os.write(_ends(), f"{ctx.run_id} {time.monotonic()}\n".encode())


@worker_function()
def torture_echo(ctx: ActionContext, payload: Echo) -> Echo:
    _begin(ctx)
    _end(ctx)
    return payload


@worker_function()
async def torture_aecho(ctx: ActionContext, payload: Echo) -> Echo:
    _begin(ctx)
    await asyncio.sleep(0)
    _end(ctx)
    return payload


@worker_function()
def torture_count(ctx: ActionContext, payload: Parts) -> Iterator[Part]:
    _begin(ctx)
    for index in range(payload.count):
        time.sleep(payload.pause_s)
        yield Part(index, payload.nonce, "x" * payload.size, time.monotonic())


@worker_function()
async def torture_acount(ctx: ActionContext, payload: Parts) -> AsyncIterator[Part]:
    _begin(ctx)
    for index in range(payload.count):
        await asyncio.sleep(payload.pause_s)
        yield Part(index, payload.nonce, "x" * payload.size, time.monotonic())


@worker_function()
def torture_count_then_fail(ctx: ActionContext, payload: Parts) -> Iterator[Part]:
    _begin(ctx)
    for index in range(payload.count):
        yield Part(index, payload.nonce)
    raise ValidationError("no more parts")


@worker_function()
def torture_rest(ctx: ActionContext, payload: Wait) -> Done:
    """Waits as a function should: it looks at its context."""
    _begin(ctx)
    ctx.done().wait(payload.seconds)
    _end(ctx)
    return Done(payload.nonce)


@worker_function()
def torture_sleep(ctx: ActionContext, payload: Wait) -> Done:
    _begin(ctx)
    end = time.monotonic() + payload.seconds
    while time.monotonic() < end:
        time.sleep(0.01)
    return Done(payload.nonce)


@worker_function()
async def torture_asleep(ctx: ActionContext, payload: Wait) -> Done:
    _begin(ctx)
    await asyncio.sleep(payload.seconds)
    return Done(payload.nonce)


@worker_function(resources=ResourceRequirements(max_concurrency=1))
def torture_alone(ctx: ActionContext, payload: Wait) -> Done:
    _begin(ctx)
    if not _only_one.acquire():
        raise FatalError("two runs of a function with max_concurrency=1 are in one executor")
    try:
        time.sleep(payload.seconds)
    finally:
        _only_one.release()
    return Done(payload.nonce)


class _OnlyOne:
    """Who is inside of `torture_alone`; set by whoever enters, so a cancel may leave no trace of its own."""

    def __init__(self) -> None:
        self._inside = 0

    def acquire(self) -> bool:
        self._inside += 1
        return self._inside == 1

    def release(self) -> None:
        self._inside -= 1


_only_one = _OnlyOne()


@worker_function()
def torture_talk(ctx: ActionContext, payload: Parts) -> Done:
    """Progress, log lines, events of its own, and output on both pipes."""
    _begin(ctx)
    for index in range(payload.count):
        ctx.progress((index + 1) / payload.count, stage="talking")
        ctx.log(f"line {index}")
        ctx.emit("torture.own", {"index": index})
        print(f"{payload.nonce} {'o' * payload.size}")  # noqa: T201  (what a tenant does)
        print(f"{payload.nonce} {'e' * payload.size}", file=sys.stderr)  # noqa: T201
    return Done(payload.nonce)


@worker_function()
def torture_litter(ctx: ActionContext, payload: Litter) -> Done:
    """Leaves a process behind, which must not outlive its executor, not even from a session of its own."""
    _begin(ctx)
    subprocess.Popen(  # noqa: S603
        [CHILD_PROGRAM, str(CHILD_S)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=payload.escapes,
    )
    return Done(payload.nonce)


@worker_function()
def torture_model(
    ctx: ActionContext, payload: Done, weights: Annotated[Weights, ModelRef(ModelRefSource.DEPLOYMENT, MODEL)]
) -> Done:
    """Needs a model, which is loaded and unloaded under it all the time."""
    _begin(ctx)
    if weights.text != MODEL:
        raise FatalError(f"the model has {weights.text!r} in it")
    return payload


@worker_function()
def torture_fail(ctx: ActionContext, payload: How) -> Done:
    _begin(ctx)
    raise FAILURES[payload.how][1]


FAILURES: Final[dict[str, tuple[str, Exception]]] = {
    "value": ("validation", ValueError("the value is bad")),
    "validation": ("validation", ValidationError("the width must be even")),
    "retryable": ("retryable", RetryableError("try again")),
    "resource": ("resource", ResourceError("no room")),
    "memory": ("resource", MemoryError()),
    "fatal": ("fatal", FatalError("never again")),
    "auth": ("auth", AuthError("not you")),
    "interrupted": ("canceled", InterruptedError("stopped")),
    "unknown": ("internal", KeyError("/root/secret-path")),
}
"""How `torture_fail` fails: the error_type that must come of it, and what is raised."""


SOCKET_ENDS: Final = {"return": "completed", "hang up": "closed", "fail": "error:ValueError"}
"""What a text frame has `torture_socket` do, and the reason that must come of it."""


@worker_websocket()
async def torture_socket(ctx: ActionContext, sock: RealtimeSocket) -> None:  # noqa: ARG001  (a handler's signature)
    """Sends binary frames back; a text frame says how to end."""
    async for frame in sock.iter_frames():
        if not frame.is_text:
            await sock.send_bytes(frame.data)
            continue
        if frame.data == b"hang up":
            await sock.close()
        elif frame.data == b"fail":
            raise ValueError("as it was told")
        return


# -- what costs the process -------------------------------------------------------------------------


@worker_function()
def torture_stubborn(ctx: ActionContext, payload: Wait) -> Done:
    """Swallows everything that is raised into it: only the end of its process stops it."""
    _begin(ctx)
    end = time.monotonic() + payload.seconds
    while time.monotonic() < end:
        try:
            time.sleep(0.01)
        except BaseException:  # noqa: BLE001, S112  # on purpose
            continue
    return Done(payload.nonce)


@worker_function()
def torture_hold_gil(ctx: ActionContext, payload: Wait) -> Done:
    """Stays inside C without giving the interpreter back, as some native libraries do."""
    _begin(ctx)
    ctypes.PyDLL(None).usleep(ctypes.c_uint(int(payload.seconds * 1_000_000)))
    return Done(payload.nonce)


DEATHS: Final = ("exit", "sys_exit", "garbage", "close_pipe", "SIGKILL", "SIGSEGV", "SIGABRT", "SIGBUS")
"""How `torture_die` takes its process down."""


@worker_function()
def torture_die(ctx: ActionContext, payload: How) -> Done:
    _begin(ctx)
    print(f"last words before {payload.how}", file=sys.stderr, flush=True)  # noqa: T201
    match payload.how:
        case "exit":
            os._exit(7)
        case "sys_exit":
            sys.exit(9)
        case "garbage":
            os.write(_pipe_fd(), b"\x7f\xff\xff\xff garbage")
        case "close_pipe":
            os.closerange(3, 256)
        case name:
            os.kill(os.getpid(), signal.Signals[name])
    time.sleep(CHILD_S)
    return Done(payload.nonce)


def _pipe_fd() -> int:
    arguments = Path("/proc/self/cmdline").read_bytes().decode().split("\0")
    return int(arguments[arguments.index("--pipe-fd") + 1])
