"""Websocket handlers that behave and that misbehave."""

from __future__ import annotations

import asyncio
import ctypes
import os
import sys
from pathlib import Path
from typing import Annotated

import msgspec

from gen_worker import ActionContext, RealtimeSocket, ResourceRequirements, worker_function, worker_websocket
from gen_worker.errors import CanceledError, ValidationError
from gen_worker.injection import ModelArtifacts, ModelRef, ModelRefSource


class Nothing(msgspec.Struct):
    pass


class Text(msgspec.Struct):
    text: str = ""


class TenantsOwnError(Exception):
    pass


@worker_function(resources=ResourceRequirements(max_concurrency=1))
def one_at_a_time(ctx: ActionContext, payload: Nothing) -> Nothing:
    return payload


@worker_function()
def say(ctx: ActionContext, payload: Text) -> Text:
    return payload


@worker_websocket()
async def echo(ctx: ActionContext, sock: RealtimeSocket) -> None:
    async for frame in sock.iter_frames():
        if frame.is_text:
            await sock.send_text(frame.data.decode())
        else:
            await sock.send_bytes(frame.data)


@worker_websocket(resources=ResourceRequirements(max_concurrency=1))
async def alone(ctx: ActionContext, sock: RealtimeSocket) -> None:
    await sock.send_text("alone")
    async for _ in sock.iter_bytes():
        pass


@worker_websocket()
async def describe(ctx: ActionContext, sock: RealtimeSocket) -> None:
    """What it knows of its session, in a frame and in events."""
    ctx.progress(0.5)
    about = {
        "run_id": ctx.run_id, "tenant": ctx.tenant_id, "user": ctx.user_id, "timeout_ms": ctx.timeout_ms,
        "pid": os.getpid(),
    }  # fmt: skip
    await sock.send_json(about)
    ctx.emit("described", {})


@worker_websocket()
async def closes(ctx: ActionContext, sock: RealtimeSocket) -> None:
    """Closes, tries to send after that, and takes its time to end."""
    await sock.close()
    await sock.close()
    try:
        await sock.send_text("late")
    except CanceledError:
        print("a closed socket sends nothing")
    await asyncio.sleep(0.05)


@worker_websocket()
async def fails(ctx: ActionContext, sock: RealtimeSocket) -> None:
    async for data in sock.iter_bytes():
        if data == b"own":
            raise TenantsOwnError("as it was told")
        if data == b"bad":
            raise ValidationError("bad frame")
        if data == b"exit":
            sys.exit(3)
        if data == b"crash":
            ctypes.string_at(0)


@worker_websocket()
async def sends(ctx: ActionContext, sock: RealtimeSocket) -> None:
    """Sends as many bytes as each frame says, until it can't."""
    try:
        async for data in sock.iter_bytes():
            await sock.send_bytes(b"x" * int(data))
    except CanceledError as error:
        print(f"sends: {error}")
        raise


@worker_websocket()
async def floods(ctx: ActionContext, sock: RealtimeSocket) -> None:
    """Sends without end; the frames are numbered."""
    number, filler = 0, b"." * 16 * 1024
    while True:
        await sock.send_bytes(number.to_bytes(8, "big") + filler)
        number += 1


@worker_websocket()
async def deaf(ctx: ActionContext, sock: RealtimeSocket) -> None:
    """Takes no frame; waits until it is canceled."""
    await sock.send_text("here")
    try:
        await asyncio.sleep(3600)
    finally:
        print("deaf was canceled")


@worker_websocket()
async def stubborn(ctx: ActionContext, sock: RealtimeSocket) -> None:
    """Swallows every cancel."""
    await sock.send_text("here")
    while True:
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            print("not yet")


@worker_websocket()
async def holds_gil(ctx: ActionContext, sock: RealtimeSocket) -> None:
    """Stands in C code with the interpreter's lock."""
    await sock.send_text("here")
    await asyncio.sleep(0.05)
    ctypes.PyDLL(None).sleep(3600)


@worker_websocket()
async def cleans_up(ctx: ActionContext, sock: RealtimeSocket) -> None:
    """Writes a file when its session is over."""
    await sock.send_text("here")
    frames = []
    async for data in sock.iter_bytes():
        frames.append(data)
        await sock.send_text("got it")
    Path(frames[0].decode()).write_text(f"{len(frames)} {ctx.is_canceled()}")


@worker_websocket()
async def with_model(
    ctx: ActionContext,
    sock: RealtimeSocket,
    model: Annotated[ModelArtifacts, ModelRef(ModelRefSource.DEPLOYMENT, "m")],
) -> None:
    await sock.send_text(model.model_id)
    async for data in sock.iter_bytes():
        await sock.send_bytes(data)
