"""Functions that the executor's tests run."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from gen_worker import ActionContext, ResourceRequirements, worker_function, worker_websocket
from gen_worker.errors import RetryableError
from gen_worker.injection import ModelArtifacts, ModelRef, ModelRefSource, register_runtime_loader
from gen_worker.realtime import RealtimeSocket

print("imported", flush=False)


class Nothing(msgspec.Struct):
    pass


class Text(msgspec.Struct):
    text: str


class Count(msgspec.Struct):
    count: int
    size: int = 0
    path: str = ""


class Data(msgspec.Struct):
    data: bytes


class View(msgspec.Struct):
    data: memoryview


class Where(msgspec.Struct):
    thread: str
    run_id: str
    tenant_id: str
    user_id: str
    timeout_ms: int | None
    torch_imported: bool


@worker_function()
def echo(ctx: ActionContext, payload: Text) -> Text:
    return payload


@worker_function()
async def echo_async(ctx: ActionContext, payload: Text) -> Text:
    await asyncio.sleep(0)
    return payload


@worker_function()
def echo_data(ctx: ActionContext, payload: Data) -> Data:
    return payload


@worker_function()
def echo_view(ctx: ActionContext, payload: View) -> Data:
    return Data(bytes(payload.data))


@worker_function(ResourceRequirements(max_concurrency=3))
def where(ctx: ActionContext, payload: Nothing) -> Where:
    thread = threading.current_thread().name
    return Where(thread, ctx.run_id, ctx.tenant_id, ctx.user_id, ctx.timeout_ms, "torch" in sys.modules)


_meeting = threading.Barrier(8)


@worker_function()
def meet(ctx: ActionContext, payload: Nothing) -> Nothing:
    """Returns when 8 of them run at once."""
    _meeting.wait(15)
    return payload


@worker_function()
def fail(ctx: ActionContext, payload: Text) -> Text:
    raise {"value": ValueError, "retry": RetryableError, "memory": MemoryError}.get(payload.text, RuntimeError)("why")


@worker_function()
def wrong(ctx: ActionContext, payload: Nothing) -> Text:
    return payload  # type: ignore[return-value]


@worker_function()
def interrupt(ctx: ActionContext, payload: Nothing) -> Nothing:
    raise KeyboardInterrupt


@worker_function()
def leave(ctx: ActionContext, payload: Count) -> Nothing:
    sys.exit(payload.count)


@worker_function()
async def leave_async(ctx: ActionContext, payload: Text) -> Nothing:
    sys.exit(payload.text)


@worker_function()
async def leave_task(ctx: ActionContext, payload: Count) -> Nothing:
    async def left() -> None:
        sys.exit(payload.count)

    await asyncio.create_task(left())
    return Nothing()


@worker_function()
def poison(ctx: ActionContext, payload: Nothing) -> Nothing:
    try:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    except RuntimeError as error:
        raise ValueError("could not draw") from error


# -- streams --------------------------------------------------------------------------------------


def _closed(payload: Count) -> None:
    if payload.path:
        Path(payload.path).write_text("closed")


@worker_function()
def stream(ctx: ActionContext, payload: Count) -> Iterator[Text]:
    try:
        for number in range(payload.count):
            yield Text(f"{number}" + "x" * payload.size)
    finally:
        _closed(payload)


@worker_function()
async def stream_async(ctx: ActionContext, payload: Count) -> AsyncIterator[Text]:
    try:
        for number in range(payload.count):
            yield Text(f"{number}" + "x" * payload.size)
    finally:
        _closed(payload)


@worker_function()
def stream_list(ctx: ActionContext, payload: Count) -> Iterator[Data]:
    return iter([Data(b"\x00\xff")] * payload.count)


@worker_function()
def stream_broken(ctx: ActionContext, payload: Nothing) -> Iterator[Text]:
    yield Text("one")
    raise ValueError("broken at http://secret.example/x")


@worker_function()
def stream_wrong(ctx: ActionContext, payload: Nothing) -> Iterator[Text]:
    yield Nothing()  # type: ignore[misc]


# -- events ---------------------------------------------------------------------------------------


@worker_function()
def emit(ctx: ActionContext, payload: Count) -> Nothing:
    for number in range(payload.count):
        ctx.emit("my.event", {"number": number, "filler": "x" * payload.size})
    return Nothing()


@worker_function()
async def emit_async(ctx: ActionContext, payload: Count) -> Nothing:
    for number in range(payload.count):
        ctx.emit("my.event", {"number": number, "filler": "x" * payload.size})
    return Nothing()


@worker_function()
def report(ctx: ActionContext, payload: Nothing) -> Nothing:
    ctx.progress(0.5, "half")
    ctx.log("hello", "warning")
    return Nothing()


_kept: list[ActionContext] = []


@worker_function()
def keep_context(ctx: ActionContext, payload: Nothing) -> Nothing:
    _kept.append(ctx)
    return Nothing()


@worker_function()
def use_kept(ctx: ActionContext, payload: Nothing) -> Text:
    try:
        _kept[-1].log("late")
    except Exception as error:  # noqa: BLE001
        return Text(str(error))
    return Text("sent")


@worker_function()
def save(ctx: ActionContext, payload: Nothing) -> Nothing:
    ctx.save_bytes("out.bin", b"x")
    return Nothing()


# -- stopping -------------------------------------------------------------------------------------


@worker_function()
def cooperate(ctx: ActionContext, payload: Nothing) -> Nothing:
    ctx.log("started")
    ctx.done().wait(15)
    return Nothing()


@worker_function()
def spin(ctx: ActionContext, payload: Text) -> Nothing:
    """Ends only by what is raised into it; `stubborn` swallows the first."""
    ctx.log("started")
    try:
        while True:
            time.sleep(0.001)
    except BaseException:
        if payload.text != "stubborn":
            raise
    while True:
        time.sleep(0.001)


@worker_function()
def cleanup_error(ctx: ActionContext, payload: Nothing) -> Nothing:
    ctx.log("started")
    ctx.done().wait(15)
    raise ValueError("lost my state")


@worker_function()
async def sleep_async(ctx: ActionContext, payload: Text) -> Nothing:
    ctx.log("started")
    try:
        await asyncio.sleep(15)
    except asyncio.CancelledError:
        if payload.text != "stubborn":
            raise
    await asyncio.sleep(15)
    return Nothing()


@worker_function()
def cancel_myself(ctx: ActionContext, payload: Nothing) -> Nothing:
    ctx.cancel()
    return Nothing()


@worker_function()
def block(ctx: ActionContext, payload: Text) -> Nothing:
    """Until the file exists."""
    ctx.log("started")
    while not Path(payload.text).exists():
        time.sleep(0.002)
    return Nothing()


@worker_function()
def tick(ctx: ActionContext, payload: Nothing) -> Nothing:
    """Ends at about the time at which the test's cancel comes."""
    for _ in range(200):
        pass
    return Nothing()


# -- models ---------------------------------------------------------------------------------------


class Engine:
    def __init__(self, words: str, device: str) -> None:
        self.words = words
        self.device = device


def load_engine(ctx: ActionContext, artifacts: ModelArtifacts) -> Engine:
    words = artifacts.path("words").read_text()
    if words == "sys.exit":
        sys.exit(9)
    return Engine(words, str(ctx.device))


register_runtime_loader(Engine, load_engine)

Main = ModelRef(ModelRefSource.DEPLOYMENT, "main")


@worker_function()
def use_engine(ctx: ActionContext, engine: Annotated[Engine, Main], payload: Nothing) -> Text:
    return Text(f"{engine.words} on {engine.device}, object {id(engine)}")


@worker_function()
def use_files(
    ctx: ActionContext,
    payload: Text,
    files: Annotated[ModelArtifacts, ModelRef(ModelRefSource.PAYLOAD, "text")],
) -> Text:
    return Text(f"{files.model_id} {files.path('words').read_text()} {files.metadata['k']}")


@worker_websocket()
async def realtime(ctx: ActionContext, sock: RealtimeSocket) -> None:
    await sock.close()
