"""A tenant's functions for the integration tests: the ordinary ones and those that hurt."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from gen_worker import ActionContext, ResourceRequirements, worker_function
from gen_worker.errors import AuthError, FatalError, ResourceError, RetryableError, ValidationError
from gen_worker.injection import ModelArtifacts, ModelRef, ModelRefSource, register_runtime_loader


class Echo(msgspec.Struct):
    text: str = ""
    data: bytes = b""


class Seconds(msgspec.Struct):
    seconds: float


class Count(msgspec.Struct):
    count: int
    size: int = 0


class Delta(msgspec.Struct):
    index: int
    text: str = ""


class How(msgspec.Struct):
    how: str


class Answer(msgspec.Struct):
    text: str = ""
    pid: int = 0
    number: int = 0


@worker_function()
def echo(ctx: ActionContext, payload: Echo) -> Echo:
    return payload


@worker_function()
async def aecho(ctx: ActionContext, payload: Echo) -> Echo:
    return payload


@worker_function()
def sleep(ctx: ActionContext, payload: Seconds) -> Answer:
    time.sleep(payload.seconds)
    return Answer(pid=os.getpid())


@worker_function()
async def asleep(ctx: ActionContext, payload: Seconds) -> Answer:
    await asyncio.sleep(payload.seconds)
    return Answer(pid=os.getpid())


@worker_function(resources=ResourceRequirements(max_concurrency=1))
def one_at_a_time(ctx: ActionContext, payload: Seconds) -> Answer:
    """Says how many of it ran at once."""
    global _inside  # noqa: PLW0603
    with _lock:
        _inside += 1
        seen = _inside
    time.sleep(payload.seconds)
    with _lock:
        _inside -= 1
    return Answer(number=seen, pid=os.getpid())


_inside = 0
_lock = threading.Lock()


@worker_function()
def wait_for_cancel(ctx: ActionContext, payload: Seconds) -> Answer:
    """A function that looks at its context, as it should."""
    ctx.done().wait(payload.seconds)
    return Answer(text="canceled" if ctx.is_canceled() else "waited")


@worker_function()
def spin(ctx: ActionContext, payload: Seconds) -> Answer:
    """Pure python that never looks at anything."""
    end = time.monotonic() + payload.seconds
    number = 0
    while time.monotonic() < end:
        number += 1
    return Answer(number=number, pid=os.getpid())


@worker_function()
def hold_gil(ctx: ActionContext, payload: Seconds) -> Answer:
    """Sleeps inside C without giving the interpreter back, as some native libraries do."""
    ctypes.PyDLL(None).usleep(ctypes.c_uint(int(payload.seconds * 1_000_000)))
    return Answer(pid=os.getpid())


@worker_function()
def swallow(ctx: ActionContext, payload: Seconds) -> Answer:
    """Swallows all that is raised into it."""
    end = time.monotonic() + payload.seconds
    while time.monotonic() < end:
        try:
            time.sleep(0.01)
        except BaseException:  # noqa: BLE001, S110
            pass
    return Answer(text="survived")


@worker_function()
async def aswallow(ctx: ActionContext, payload: Seconds) -> Answer:
    end = time.monotonic() + payload.seconds
    while time.monotonic() < end:
        try:
            await asyncio.sleep(0.01)
        except BaseException:  # noqa: BLE001, S110
            pass
    return Answer(text="survived")


@worker_function()
def count(ctx: ActionContext, payload: Count) -> Iterator[Delta]:
    for index in range(payload.count):
        yield Delta(index=index, text="x" * payload.size)


@worker_function()
async def acount(ctx: ActionContext, payload: Count) -> AsyncIterator[Delta]:
    for index in range(payload.count):
        await asyncio.sleep(0)
        yield Delta(index=index, text="x" * payload.size)


@worker_function()
def count_then_fail(ctx: ActionContext, payload: Count) -> Iterator[Delta]:
    for index in range(payload.count):
        yield Delta(index=index)
    raise ValidationError("no more deltas")


@worker_function()
def talk(ctx: ActionContext, payload: Count) -> Answer:
    """Progress, a log line and an event of its own, before the result."""
    for index in range(payload.count):
        ctx.progress((index + 1) / payload.count, stage="talking")
    ctx.log("said enough", level="warning")
    ctx.emit("tenant.own", {"count": payload.count})
    print("printed to stdout")
    print("printed to stderr", file=sys.stderr)
    return Answer(number=payload.count)


@worker_function()
def fail(ctx: ActionContext, payload: How) -> Answer:
    raise _ERRORS[payload.how]


_ERRORS: dict[str, BaseException] = {
    "value": ValueError("the value is bad"),
    "validation": ValidationError("the width must be even"),
    "retryable": RetryableError("try again"),
    "resource": ResourceError("no room"),
    "fatal": FatalError("never again"),
    "auth": AuthError("not you"),
    "interrupted": InterruptedError("stopped"),
    "memory": MemoryError(),
    "unknown": KeyError("/root/secret-path"),
}


@worker_function()
def wrong_output(ctx: ActionContext, payload: How) -> Answer:
    return {"text": "a dict"}  # type: ignore[return-value]


@worker_function()
def die(ctx: ActionContext, payload: How) -> Answer:
    print(f"last words before {payload.how}", file=sys.stderr, flush=True)
    match payload.how:
        case "exit":
            os._exit(7)
        case "sys_exit":
            sys.exit(9)
        case "garbage":
            _write_garbage()
        case "close_pipe":
            _close_pipe()
        case name:
            os.kill(os.getpid(), getattr(signal, name))
    time.sleep(30)
    return Answer()


def _pipe_fd() -> int:
    arguments = Path("/proc/self/cmdline").read_bytes().decode().split("\0")
    return int(arguments[arguments.index("--pipe-fd") + 1])


def _write_garbage() -> None:
    os.write(_pipe_fd(), b"\x7f\xff\xff\xff garbage")


def _close_pipe() -> None:
    os.closerange(3, 256)


@worker_function()
def spawn_child(ctx: ActionContext, payload: Seconds) -> Answer:
    """Leaves a process behind."""
    process = subprocess.Popen(["sleep", str(payload.seconds)])  # noqa: S603, S607
    return Answer(pid=process.pid)


@worker_function()
def environment(ctx: ActionContext, payload: How) -> Answer:
    """What tenant code can see of a variable."""
    return Answer(text=os.environ.get(payload.how, ""), pid=os.getpid())


@worker_function()
def threads(ctx: ActionContext, payload: How) -> Answer:
    return Answer(number=threading.active_count(), pid=os.getpid())


class Thing:
    """A model of the tests: made by a loader, of a directory's files."""

    loads = 0

    def __init__(self, text: str) -> None:
        self.text = text


def load_thing(ctx: ActionContext, artifacts: ModelArtifacts) -> Thing:
    Thing.loads += 1
    return Thing(artifacts.path("weights").read_text())


register_runtime_loader(Thing, load_thing)

Small = Annotated[Thing, ModelRef(ModelRefSource.DEPLOYMENT, "small")]
Files = Annotated[ModelArtifacts, ModelRef(ModelRefSource.DEPLOYMENT, "small")]


@worker_function()
def use_thing(ctx: ActionContext, thing: Small, payload: Seconds) -> Answer:
    time.sleep(payload.seconds)
    return Answer(text=thing.text, number=Thing.loads, pid=os.getpid())


@worker_function()
def use_files(ctx: ActionContext, files: Files, payload: How) -> Answer:
    return Answer(text=files.path(payload.how).read_text(), pid=os.getpid())


class Chosen(msgspec.Struct):
    model: str


@worker_function()
def use_chosen(
    ctx: ActionContext,
    payload: Chosen,
    thing: Annotated[Thing, ModelRef(ModelRefSource.PAYLOAD, "model")],
) -> Answer:
    return Answer(text=thing.text)
