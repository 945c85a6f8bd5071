"""gen_worker.testing: one function run in this process, with the executor's checks and failure mapping."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import msgspec
import pytest

from gen_worker import (
    ActionContext,
    Asset,
    ModelArtifacts,
    ModelRef,
    ModelRefSource,
    RealtimeSocket,
    RetryableError,
    worker_function,
    worker_websocket,
)
from gen_worker.errors import RunCanceled, SignatureError
from gen_worker.testing import RecordedEvent, RunFailedError, run_function, run_function_async, run_websocket


class In(msgspec.Struct):
    text: str
    times: Annotated[int, msgspec.Meta(ge=0, le=5)] = 2
    image: Asset | None = None


class Out(msgspec.Struct):
    text: str
    thread: str = ""


@worker_function()
def sync(ctx: ActionContext, payload: In) -> Out:
    return Out(payload.text * payload.times, threading.current_thread().name)


@worker_function()
async def coroutine(ctx: ActionContext, payload: In) -> Out:
    await asyncio.sleep(0)
    return Out(payload.text * payload.times, threading.current_thread().name)


@worker_function()
def generator(ctx: ActionContext, payload: In) -> Iterator[Out]:
    for index in range(payload.times):
        ctx.progress(index / payload.times)
        yield Out(f"{payload.text}{index}")


@worker_function()
async def async_generator(ctx: ActionContext, payload: In) -> AsyncIterator[Out]:
    for index in range(payload.times):
        ctx.progress(index / payload.times)
        yield Out(f"{payload.text}{index}")


@pytest.mark.parametrize("func", [sync, coroutine])
@pytest.mark.parametrize("payload", [In("ab"), {"text": "ab"}, {"text": "ab", "times": 2}])
def test_single_output(func: Callable[..., Any], payload: Any) -> None:
    outcome = run_function(func, payload).check()
    assert outcome.output.text == "abab"
    assert (outcome.deltas, outcome.events, outcome.files, outcome.failure) == ([], [], {}, None)


@pytest.mark.parametrize("func", [generator, async_generator])
def test_incremental_output(func: Callable[..., Any]) -> None:
    outcome = run_function(func, In("a")).check()
    assert outcome.output is None
    assert outcome.deltas == [Out("a0"), Out("a1")]
    assert [(event.type, event.payload["progress"]) for event in outcome.events] == [
        ("job.progress", 0.0),
        ("job.progress", 0.5),
    ]


@pytest.mark.parametrize("func", [sync, coroutine, generator, async_generator])
async def test_on_a_running_loop(func: Callable[..., Any]) -> None:
    outcome = (await run_function_async(func, In("a", 1))).check()
    assert (outcome.output or outcome.deltas[0]).text in {"a", "a0"}


async def test_sync_functions_leave_the_loop_free() -> None:
    in_thread = (await run_function_async(sync, In("a"))).output.thread
    on_loop = (await run_function_async(coroutine, In("a"))).output.thread
    assert on_loop == threading.current_thread().name
    assert in_thread != on_loop


async def test_an_async_function_inside_a_loop_needs_the_async_variant() -> None:
    with pytest.raises(RuntimeError, match="use run_function_async"):
        run_function(coroutine, In("a"))
    assert run_function(sync, In("a")).output.text == "aa"


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        ({}, "missing required field `text`"),
        ({"text": 3}, "Expected `str`, got `int` - at `$.text`"),
        ({"text": "a", "times": 6}, "`int` <= 5 - at `$.times`"),
        (In("a", times=6), "`int` <= 5 - at `$.times`"),
        (Out("a", thread="b"), None),
    ],
)
def test_payloads_are_checked_as_on_the_wire(payload: Any, field: str | None) -> None:
    failure = run_function(sync, payload).failure
    if field is None:
        assert failure is None  # a map with the fields that are needed fits, whatever made it
        return
    assert failure is not None
    assert (failure.error_type, failure.retryable) == ("validation", False)
    assert failure.safe_message.startswith("payload of sync: ")
    assert field in failure.safe_message


def test_what_the_context_says() -> None:
    @worker_function()
    def tell(ctx: ActionContext, payload: In) -> Out:
        assert ctx.time_remaining_s() is not None
        return Out(f"{ctx.run_id} {ctx.tenant_id} {ctx.user_id} {ctx.timeout_ms} {ctx.device}")

    arguments = {"run_id": "r", "tenant_id": "t", "user_id": "u"}
    assert run_function(tell, In(""), timeout_ms=9000, **arguments).check().output.text == "r t u 9000 cpu"  # type: ignore[arg-type]


def test_events() -> None:
    @worker_function()
    def noisy(ctx: ActionContext, payload: In) -> Out:
        ctx.log("hi")
        ctx.emit("my.event", {"n": 1})
        return Out("")

    events = run_function(noisy, In("")).check().events
    assert [event.type for event in events] == ["job.log", "my.event"]
    assert events[0].payload["message"] == "hi"
    assert events[1] == RecordedEvent("my.event", {"n": 1})


def test_saved_files(tmp_path: Path) -> None:
    (tmp_path / "video.mp4").write_bytes(b"mp4")

    @worker_function()
    def save(ctx: ActionContext, payload: In) -> Out:
        asset = ctx.save_bytes("a.png", b"png")
        ctx.save_bytes("a.png", b"png2")
        ctx.save_file("video.mp4", tmp_path / "video.mp4")
        assert (asset.mime_type, asset.size_bytes) == ("image/png", 3)
        assert asset.sha256 == hashlib.sha256(b"png").hexdigest()
        return Out(asset.ref)

    outcome = run_function(save, In(""), run_id="r9").check()
    assert outcome.output.text == "runs/r9/outputs/a.png"
    assert outcome.files == {"runs/r9/outputs/a.png": b"png2", "runs/r9/outputs/video.mp4": b"mp4"}


def test_creating_a_file_twice() -> None:
    @worker_function()
    def save(ctx: ActionContext, payload: In) -> Out:
        ctx.save_bytes_create("a", b"1")
        ctx.save_bytes_create("a", b"2")
        return Out("")

    outcome = run_function(save, In(""))
    assert outcome.failure is not None
    assert outcome.failure.error_type == "validation"
    assert outcome.failure.safe_message == "output 'a': it exists already"
    assert outcome.files == {"runs/test-run/outputs/a": b"1"}


def test_a_payload_with_an_asset(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"pixels")

    @worker_function()
    def read(ctx: ActionContext, payload: In) -> Out:
        assert payload.image is not None
        return Out(payload.image.read_bytes().decode())

    payload = In("", image=Asset("in", local_path=str(tmp_path / "in")))
    assert run_function(read, payload).check().output.text == "pixels"
    for given in (b"bytes", tmp_path / "in", str(tmp_path / "in")):
        outcome = run_function(read, {"text": "", "image": {"ref": "photos/in"}}, files={"photos/in": given})
        assert outcome.check().output.text == ("bytes" if isinstance(given, bytes) else "pixels")


async def test_the_files_of_assets_are_described_and_gone_after_the_run() -> None:
    seen: list[Asset] = []

    @worker_function()
    async def look(ctx: ActionContext, payload: In) -> Out:
        assert payload.image is not None
        seen.append(payload.image)
        return Out(str(payload.image.exists()))

    files = {"a/b.txt": b"\x89PNG\r\n\x1a\n"}
    outcome = await run_function_async(look, {"text": "", "image": {"ref": "a/b.txt"}}, files=files)
    assert outcome.check().output.text == "True"
    (asset,) = seen
    assert (asset.mime_type, asset.size_bytes) == ("image/png", 8)
    assert asset.sha256 == hashlib.sha256(files["a/b.txt"]).hexdigest()
    assert Path(asset).name == "0-b.txt"
    assert not asset.exists()


def test_a_file_that_the_test_does_not_give() -> None:
    outcome = run_function(sync, {"text": "", "image": {"ref": "a.png"}})
    assert outcome.failure is not None
    assert outcome.failure.error_type == "validation"
    assert outcome.failure.safe_message.startswith("input image ('a.png'): the test gives no such file: pass files=")


@worker_function()
def with_models(
    ctx: ActionContext,
    files: Annotated[ModelArtifacts, ModelRef(ModelRefSource.DEPLOYMENT, "sdxl")],
    payload: In,
) -> Out:
    return Out(files.model_id)


def test_models() -> None:
    files = ModelArtifacts("hf:a/b", Path("/m"))
    assert run_function(with_models, In(""), models={"files": files}).check().output.text == "hf:a/b"
    with pytest.raises(TypeError, match=r"with_models needs models=\{'files': \.\.\.\}"):
        run_function(with_models, In(""))
    with pytest.raises(TypeError, match="with_models has no injected parameter 'pipe'"):
        run_function(with_models, In(""), models={"files": files, "pipe": 1})


def failing(error: BaseException, kind: str) -> Callable[..., Any]:
    @worker_function()
    def plain(ctx: ActionContext, payload: In) -> Out:
        raise error

    @worker_function()
    async def async_plain(ctx: ActionContext, payload: In) -> Out:
        raise error

    @worker_function()
    def stream(ctx: ActionContext, payload: In) -> Iterator[Out]:
        yield Out("first")
        raise error

    @worker_function()
    async def async_stream(ctx: ActionContext, payload: In) -> AsyncIterator[Out]:
        yield Out("first")
        raise error

    return {"plain": plain, "async_plain": async_plain, "stream": stream, "async_stream": async_stream}[kind]


@pytest.mark.parametrize("kind", ["plain", "async_plain", "stream", "async_stream"])
@pytest.mark.parametrize(
    ("error", "error_type"),
    [
        (ValueError("bad"), "validation"),
        (RetryableError("later"), "retryable"),
        (KeyError("x"), "internal"),
        (RunCanceled(), "canceled"),
    ],
)
def test_failures(kind: str, error: BaseException, error_type: str) -> None:
    outcome = run_function(failing(error, kind), In(""))
    assert outcome.failure is not None
    assert outcome.failure.error_type == error_type
    assert outcome.failure.retryable is (error_type == "retryable")
    assert outcome.exception is error
    assert outcome.output is None
    assert outcome.deltas == ([Out("first")] if "stream" in kind else [])
    with pytest.raises(RunFailedError, match=error_type) as caught:
        outcome.check()
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("kind", ["plain", "stream"])
def test_a_tenants_exit_is_not_swallowed(kind: str) -> None:
    with pytest.raises(SystemExit):
        run_function(failing(SystemExit(1), kind), In(""))


def test_a_wrong_output() -> None:
    @worker_function()
    def wrong(ctx: ActionContext, payload: In) -> Out:
        return payload  # type: ignore[return-value]

    @worker_function()
    def wrong_delta(ctx: ActionContext, payload: In) -> Iterator[Out]:
        yield None  # type: ignore[misc]

    @worker_function()
    def unencodable(ctx: ActionContext, payload: In) -> Out:
        return Out(object())  # type: ignore[arg-type]

    for func, message in (
        (wrong, "wrong returned a In, its annotation says Out"),
        (wrong_delta, "wrong_delta yielded a NoneType, its annotation says Out"),
        (
            unencodable,
            "unencodable returned a Out that can't be encoded: Encoding objects of type object is unsupported",
        ),
    ):
        failure = run_function(func, In("")).failure
        assert failure is not None
        assert (failure.error_type, failure.safe_message) == ("fatal", message)


@pytest.mark.parametrize("func", [generator, async_generator])
def test_canceling_in_the_middle(func: Callable[..., Any]) -> None:
    def cancel(ctx: ActionContext, event: RecordedEvent) -> None:
        if event.type == "output.delta" and event.payload["text"] == "a1":
            ctx.cancel()

    outcome = run_function(func, In("a", 5), on_event=cancel)
    assert outcome.deltas == [Out("a0"), Out("a1")]
    assert outcome.failure is not None
    assert outcome.failure.error_type == "canceled"


def test_a_canceled_generator_is_closed() -> None:
    closed = []

    @worker_function()
    def careful(ctx: ActionContext, payload: In) -> Iterator[Out]:
        try:
            while True:
                ctx.cancel("timeout")
                yield Out("")
        finally:
            closed.append(True)

    outcome = run_function(careful, In(""))
    assert closed == [True]
    assert outcome.failure is not None
    assert outcome.failure.error_type == "timeout"


async def test_the_tests_own_cancellation_goes_through() -> None:
    started = asyncio.Event()

    @worker_function()
    async def endless(ctx: ActionContext, payload: In) -> Out:
        started.set()
        await asyncio.Event().wait()
        return Out("")

    task = asyncio.create_task(run_function_async(endless, In("")))
    await asyncio.wait_for(started.wait(), 5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


def test_a_broken_signature_is_raised() -> None:
    @worker_function()
    def broken(ctx: ActionContext) -> Out:
        return Out("")

    with pytest.raises(SignatureError, match="has no payload"):
        run_function(broken, {})


# -- websockets -----------------------------------------------------------------------------------


@worker_websocket()
async def echo(ctx: ActionContext, sock: RealtimeSocket) -> None:
    async for data in sock.iter_bytes():
        if data == b"stop":
            await sock.send_json({"bye": ctx.run_id})
            await sock.close()
            await sock.close()
        else:
            await sock.send_bytes(data.upper())


async def test_a_websocket_handler() -> None:
    outcome = await run_websocket(echo, [b"a", "text"])
    assert (outcome.sent, outcome.closed, outcome.failure) == ([b"A", b"TEXT"], False, None)


async def test_a_handler_that_closes() -> None:
    outcome = await run_websocket(echo, ["stop", "never read"], session_id="s1")
    assert (outcome.sent, outcome.closed) == (['{"bye":"s1"}'], True)


async def test_a_handler_that_fails() -> None:
    @worker_websocket()
    async def late(ctx: ActionContext, sock: RealtimeSocket) -> None:
        await sock.close()
        await sock.send_bytes(b"too late")

    outcome = await run_websocket(late, [])
    assert outcome.sent == []
    assert outcome.failure is not None
    assert outcome.failure.error_type == "canceled"


async def test_the_wrong_way_to_run() -> None:
    with pytest.raises(TypeError, match="echo: use run_websocket for it"):
        await run_function_async(echo, {})
    with pytest.raises(TypeError, match="sync: use run_function for it"):
        await run_websocket(sync, [])
