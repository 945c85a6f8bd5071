"""A tenant's functions for the integration tests: the ordinary ones and those that hurt.

Those that a test does something to while they run emit `started` first.
"""

from __future__ import annotations

import asyncio
import ctypes
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, NoReturn

import msgspec

from gen_worker import ActionContext, ResourceRequirements, worker_function
from gen_worker.errors import (
    AuthError,
    CanceledError,
    FatalError,
    ResourceError,
    RetryableError,
    ValidationError,
    WorkerError,
)
from gen_worker.injection import ModelArtifacts, ModelRef, ModelRefSource, register_runtime_loader


class Echo(msgspec.Struct):
    text: str = ""
    data: bytes = b""


class Seconds(msgspec.Struct):
    seconds: float = 30.0


class Count(msgspec.Struct):
    count: int
    size: int = 0


class Delta(msgspec.Struct):
    index: int
    text: str = ""


class How(msgspec.Struct):
    how: str = ""


class Answer(msgspec.Struct):
    text: str = ""
    pid: int = 0
    number: int = 0


def say_started(ctx: ActionContext) -> None:
    ctx.emit("started", {"pid": os.getpid()})


def until_written() -> None:
    """Until no thread writes to the pipe: one that does takes along what this one said, and needs the interpreter."""
    while any(writes(frame) for frame in sys._current_frames().values()):
        time.sleep(0.001)


def writes(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.endswith("link.py") and frame.f_code.co_name in ("send", "_write_all"):
            return True
        frame = frame.f_back
    return False


# -- ordinary ones --------------------------------------------------------------------------------


@worker_function()
def echo(ctx: ActionContext, payload: Echo) -> Echo:
    return payload


@worker_function()
async def aecho(ctx: ActionContext, payload: Echo) -> Echo:
    return payload


@worker_function()
def digest(ctx: ActionContext, payload: Echo) -> Answer:
    return Answer(text=hashlib.sha256(payload.data).hexdigest(), number=len(payload.data))


@worker_function()
def make(ctx: ActionContext, payload: Count) -> Echo:
    return Echo(data=bytes(payload.size))


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
def talk(ctx: ActionContext, payload: Count) -> Answer:
    """Progress, a log line and an event of its own, before the result."""
    for index in range(payload.count):
        ctx.progress((index + 1) / payload.count, stage="talking")
    ctx.log("said enough", level="warning")
    ctx.emit("tenant.own", {"count": payload.count})
    return Answer(number=payload.count)


@worker_function()
def say(ctx: ActionContext, payload: How) -> Answer:
    print(f"stdout: {payload.how}")
    print(f"stderr: {payload.how}", file=sys.stderr)
    return Answer()


class Circumstances(msgspec.Struct):
    run_id: str
    tenant_id: str
    user_id: str
    timeout_ms: int | None
    remaining_s: float | None
    until_deadline_s: float | None
    device: str


@worker_function()
def circumstances(ctx: ActionContext, payload: How) -> Circumstances:
    """What the context says."""
    until = None if ctx.deadline is None else ctx.deadline - time.time()
    remaining = ctx.time_remaining_s()
    return Circumstances(ctx.run_id, ctx.tenant_id, ctx.user_id, ctx.timeout_ms, remaining, until, str(ctx.device))


@worker_function()
def environment(ctx: ActionContext, payload: How) -> Answer:
    """What tenant code can see of a variable."""
    return Answer(text=os.environ.get(payload.how, ""), pid=os.getpid())


# -- those that take time -------------------------------------------------------------------------


@worker_function()
def sleep(ctx: ActionContext, payload: Seconds) -> Answer:
    time.sleep(payload.seconds)
    return Answer(pid=os.getpid())


@worker_function()
async def asleep(ctx: ActionContext, payload: Seconds) -> Answer:
    say_started(ctx)
    await asyncio.sleep(payload.seconds)
    return Answer(pid=os.getpid())


@worker_function()
def wait(ctx: ActionContext, payload: Seconds) -> Answer:
    """A function that looks at its context, as it should."""
    say_started(ctx)
    ctx.done().wait(payload.seconds)
    return Answer(text="canceled" if ctx.is_canceled() else "waited", pid=os.getpid())


class Crowd:
    """Counts how many are inside at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0

    def enter(self) -> int:
        with self._lock:
            self._inside += 1
            return self._inside

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1


_crowd = Crowd()


@worker_function(resources=ResourceRequirements(max_concurrency=1))
def one_at_a_time(ctx: ActionContext, payload: Seconds) -> Answer:
    """Says how many of it ran at once."""
    inside = _crowd.enter()
    try:
        say_started(ctx)
        ctx.done().wait(payload.seconds)
    finally:
        _crowd.leave()
    return Answer(number=inside, pid=os.getpid())


@worker_function()
def ticks(ctx: ActionContext, payload: Seconds) -> Iterator[Delta]:
    """Deltas until it is canceled."""
    for index in range(int(payload.seconds * 100)):
        yield Delta(index)
        time.sleep(0.01)


@worker_function()
async def aticks(ctx: ActionContext, payload: Seconds) -> AsyncIterator[Delta]:
    for index in range(int(payload.seconds * 100)):
        yield Delta(index)
        await asyncio.sleep(0.01)


@worker_function()
def wait_for_file(ctx: ActionContext, payload: How) -> Answer:
    say_started(ctx)
    while not Path(payload.how).exists():
        time.sleep(0.002)
    return Answer(text="seen")


# -- those that ignore a cancel -------------------------------------------------------------------


@worker_function()
def spin(ctx: ActionContext, payload: Seconds) -> Answer:
    """Pure python that never looks at anything."""
    say_started(ctx)
    end = time.monotonic() + payload.seconds
    number = 0
    while time.monotonic() < end:
        number += 1
    return Answer(number=number, pid=os.getpid())


@worker_function()
def block(ctx: ActionContext, payload: Seconds) -> Answer:
    """Waits inside C, having given the interpreter back: an exception reaches it only when it returns."""
    say_started(ctx)
    time.sleep(payload.seconds)
    return Answer(pid=os.getpid())


@worker_function()
def hold_gil(ctx: ActionContext, payload: Seconds) -> Answer:
    """Sleeps inside C without giving the interpreter back, as some native libraries do."""
    say_started(ctx)
    until_written()
    ctypes.PyDLL(None).usleep(ctypes.c_uint(int(payload.seconds * 1_000_000)))
    return Answer(pid=os.getpid())


@worker_function()
def swallow(ctx: ActionContext, payload: Seconds) -> Answer:
    """Swallows all that is raised into it."""
    say_started(ctx)
    end = time.monotonic() + payload.seconds
    while time.monotonic() < end:
        try:
            time.sleep(0.01)
        except BaseException:  # noqa: BLE001
            pass
    return Answer(text="survived")


@worker_function()
async def aswallow(ctx: ActionContext, payload: Seconds) -> Answer:
    say_started(ctx)
    end = time.monotonic() + payload.seconds
    while time.monotonic() < end:
        try:
            await asyncio.sleep(0.01)
        except BaseException:  # noqa: BLE001
            pass
    return Answer(text="survived")


@worker_function()
async def ablock(ctx: ActionContext, payload: Seconds) -> Answer:
    """Blocks the event loop, as async functions should not."""
    say_started(ctx)
    time.sleep(payload.seconds)  # noqa: ASYNC251
    return Answer()


# -- those that fail ------------------------------------------------------------------------------


class OutOfMemoryError(RuntimeError):
    """Named as torch's is."""


class OwnRetryable(RetryableError):
    """A tenant's own kind."""


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


_SECRETS = (
    "GET https://user:hunter2@store.internal/a?sig=abc failed, token=supersecretvalue, see /srv/tenant/models/x.bin "
    "and hf_abcdefghijklmnopqrstuvwx"
)


def _group_of_one() -> ExceptionGroup:
    """What a TaskGroup makes of the one error of one of its tasks."""
    try:
        raise ValueError("the only one")
    except ValueError as error:
        return ExceptionGroup("unhandled errors in a TaskGroup", [error])


_ERRORS: dict[str, Callable[[], BaseException]] = {
    "value": lambda: ValueError("the value is bad"),
    "unicode": lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    "validation": lambda: ValidationError("the width must be even"),
    "secrets": lambda: ValidationError(_SECRETS),
    "long": lambda: ValidationError("very " * 500 + "long"),
    "empty": ValidationError,
    "retryable": lambda: RetryableError("try again"),
    "own_retryable": lambda: OwnRetryable("try mine again"),
    "resource": lambda: ResourceError("no room"),
    "canceled": lambda: CanceledError("gave up"),
    "fatal": lambda: FatalError("never again"),
    "auth": lambda: AuthError("not you"),
    "worker_error": lambda: WorkerError("plainly wrong"),
    "interrupted": lambda: InterruptedError("stopped"),
    "memory": MemoryError,
    "cuda_memory": lambda: RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "torch_memory": lambda: OutOfMemoryError("CUDA out of memory"),
    "timeout": lambda: TimeoutError("the tenant's own"),
    "key": lambda: KeyError("/root/secret-path"),
    "runtime": lambda: RuntimeError(_SECRETS),
    "group": lambda: ExceptionGroup("several", [ValueError("one"), KeyError("two")]),
    "group_of_one": _group_of_one,
    "keyboard": KeyboardInterrupt,
    "base": lambda: BaseException("base"),
    "generator_exit": GeneratorExit,
    "stop_iteration": StopIteration,
    "unspeakable": Unspeakable,
}


def _fail(how: str) -> NoReturn:
    error = _ERRORS[how]()
    raise error


@worker_function()
def fail(ctx: ActionContext, payload: How) -> Answer:
    _fail(payload.how)


@worker_function()
async def afail(ctx: ActionContext, payload: How) -> Answer:
    await asyncio.sleep(0)
    _fail(payload.how)


@worker_function()
def fail_after_deltas(ctx: ActionContext, payload: How) -> Iterator[Delta]:
    yield from (Delta(index) for index in range(3))
    _fail(payload.how)


@worker_function()
async def afail_after_deltas(ctx: ActionContext, payload: How) -> AsyncIterator[Delta]:
    for index in range(3):
        yield Delta(index)
    _fail(payload.how)


@worker_function()
def wrong_output(ctx: ActionContext, payload: How) -> Answer:
    values: dict[str, object] = {"dict": {"text": "a dict"}, "none": None, "other": Echo(text="of another type")}
    if payload.how == "surrogate":
        return Answer(text="\udc80")
    return values[payload.how]  # type: ignore[return-value]


@worker_function()
def wrong_delta(ctx: ActionContext, payload: How) -> Iterator[Delta]:
    yield Delta(0)
    yield {"index": 1}  # type: ignore[misc]


@worker_function()
def not_an_iterator(ctx: ActionContext, payload: How) -> Iterator[Delta]:
    return 3  # type: ignore[return-value]


# -- those that end the process -------------------------------------------------------------------


@worker_function()
def die(ctx: ActionContext, payload: How) -> Answer:
    say_started(ctx)
    print(f"last words before {payload.how}", file=sys.stderr, flush=True)
    _die(payload.how)
    time.sleep(30)
    return Answer()


@worker_function()
async def adie(ctx: ActionContext, payload: How) -> Answer:
    print(f"last words before {payload.how}", file=sys.stderr, flush=True)
    _die(payload.how)
    return Answer()


def _die(how: str) -> None:
    match how:
        case "exit":
            os._exit(7)
        case "sys_exit":
            sys.exit(9)
        case "garbage":
            os.write(_pipe_fd(), b"\x7f\xff\xff\xff garbage")
        case "nonsense":
            os.write(_pipe_fd(), b"\x00\x00\x00\x03abc")  # a whole frame that is no message
        case "close_pipe":
            os.closerange(3, 256)
        case "shut_pipe":
            socket.socket(fileno=_pipe_fd()).shutdown(socket.SHUT_RDWR)
        case "null":
            ctypes.string_at(0)
        case name:
            os.kill(os.getpid(), getattr(signal, name))


def _pipe_fd() -> int:
    arguments = Path("/proc/self/cmdline").read_bytes().decode().split("\0")
    return int(arguments[arguments.index("--pipe-fd") + 1])


@worker_function()
def die_after_others(ctx: ActionContext, payload: How) -> Answer:
    """Waits for a file, then long enough for those that wait for it too to be answered, and dies."""
    say_started(ctx)
    while not Path(payload.how).exists():
        time.sleep(0.002)
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
    return Answer()


@worker_function()
def spawn_child(ctx: ActionContext, payload: Seconds) -> Answer:
    """Leaves a process behind."""
    process = subprocess.Popen(["sleep", str(payload.seconds)])
    return Answer(pid=process.pid)


# -- models ---------------------------------------------------------------------------------------


class Thing:
    """A model of the tests: made by a loader, of a directory's files."""

    loads = 0

    def __init__(self, text: str) -> None:
        self.text = text


def load_thing(ctx: ActionContext, artifacts: ModelArtifacts) -> object:
    """What it does is in the model's metadata."""
    Thing.loads += 1
    time.sleep(float(artifacts.metadata.get("seconds", "0")))
    if how := artifacts.metadata.get("fail"):
        _fail(how)
    if how := artifacts.metadata.get("die"):
        print(f"last words of the loader before {how}", file=sys.stderr, flush=True)
        _die(how)
    if "wrong" in artifacts.metadata:
        return "a string"
    return Thing(artifacts.path("weights").read_text())


register_runtime_loader(Thing, load_thing)


class Pretrained:
    """A type that loads itself, as those of transformers and diffusers do."""

    def __init__(self, text: str) -> None:
        self.text = text

    @classmethod
    def from_pretrained(cls, path: str, *, local_files_only: bool = False) -> Pretrained:
        return cls(f"{(Path(path) / 'weights.txt').read_text()} local={local_files_only}")


class Configured:
    """A type whose loader the operator names in WORKER_RUNTIME_LOADERS_JSON."""

    text = ""


def load_configured(ctx: ActionContext, artifacts: ModelArtifacts) -> Configured:
    configured = Configured()
    configured.text = f"{artifacts.model_id} by the operator's loader"
    return configured


Small = Annotated[Thing, ModelRef(ModelRefSource.DEPLOYMENT, "small")]
Other = Annotated[Thing, ModelRef(ModelRefSource.DEPLOYMENT, "other")]
Files = Annotated[ModelArtifacts, ModelRef(ModelRefSource.DEPLOYMENT, "small")]

_using = Crowd()


class Used(msgspec.Struct):
    text: str
    other: str = ""
    object_id: int = 0
    loads: int = 0
    at_once: int = 0
    pid: int = 0


@worker_function()
def use_thing(ctx: ActionContext, thing: Small, payload: Seconds) -> Used:
    at_once = _using.enter()
    try:
        say_started(ctx)
        ctx.done().wait(payload.seconds)
    finally:
        _using.leave()
    return Used(thing.text, "", id(thing), Thing.loads, at_once, os.getpid())


@worker_function()
def use_two(ctx: ActionContext, thing: Small, other: Other, payload: How) -> Used:
    return Used(thing.text, other.text, pid=os.getpid())


@worker_function()
def use_files(ctx: ActionContext, files: Files, payload: How) -> Used:
    missing = files.get_path("no such key")
    return Used(files.path(payload.how).read_text(), f"{files.model_id} {files.root_dir} {missing}", pid=os.getpid())


class Chosen(msgspec.Struct):
    model: str


@worker_function()
def use_chosen(
    ctx: ActionContext,
    payload: Chosen,
    thing: Annotated[Thing, ModelRef(ModelRefSource.PAYLOAD, "model")],
) -> Used:
    return Used(thing.text, pid=os.getpid())


@worker_function()
def use_pretrained(
    ctx: ActionContext, payload: How, model: Annotated[Pretrained, ModelRef(ModelRefSource.DEPLOYMENT, "small")]
) -> Used:
    return Used(model.text, pid=os.getpid())


@worker_function()
def use_configured(
    ctx: ActionContext, payload: How, model: Annotated[Configured, ModelRef(ModelRefSource.DEPLOYMENT, "small")]
) -> Used:
    return Used(model.text, pid=os.getpid())
