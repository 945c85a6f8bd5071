"""A tenant's functions for the tests of delivery and backpressure."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec

from gen_worker import ActionContext, ResourceRequirements, worker_function


class Blob(msgspec.Struct):
    data: bytes = b""


class Stream(msgspec.Struct):
    count: int
    size: int = 0
    pause_s: float = 0.0
    start_file: str = ""
    """Wait until it is there before the first delta."""


class Wait(msgspec.Struct):
    seconds: float = 0.0
    file: str = ""
    done_file: str = ""
    """Written at the end, so that a test knows of it without the scheduler."""


class Work(msgspec.Struct):
    file: str = ""
    """Wait until it is there."""
    data: bytes = b""


class Delta(msgspec.Struct):
    index: int
    text: str = ""


class Answer(msgspec.Struct):
    number: int = 0


@worker_function()
def echo(ctx: ActionContext, payload: Blob) -> Blob:
    return payload


@worker_function()
async def wait(ctx: ActionContext, payload: Wait) -> Answer:
    ctx.emit("started", {})
    await asyncio.sleep(payload.seconds)
    while payload.file and not Path(payload.file).exists():
        await asyncio.sleep(0.01)
    if payload.done_file:
        Path(payload.done_file).touch()
    return Answer(number=1)


@worker_function(resources=ResourceRequirements(max_concurrency=1))
def one_at_a_time(ctx: ActionContext, payload: Work) -> Answer:
    while payload.file and not Path(payload.file).exists():
        time.sleep(0.01)
    return Answer(number=len(payload.data))


@worker_function()
def stream(ctx: ActionContext, payload: Stream) -> Iterator[Delta]:
    while payload.start_file and not Path(payload.start_file).exists():
        time.sleep(0.01)
    text = "x" * payload.size
    for index in range(payload.count):
        yield Delta(index=index, text=text)
        if payload.pause_s:
            time.sleep(payload.pause_s)


@worker_function()
async def astream(ctx: ActionContext, payload: Stream) -> AsyncIterator[Delta]:
    while payload.start_file and not Path(payload.start_file).exists():
        await asyncio.sleep(0.01)
    text = "x" * payload.size
    for index in range(payload.count):
        yield Delta(index=index, text=text)
        if payload.pause_s:
            await asyncio.sleep(payload.pause_s)


@worker_function()
def talk(ctx: ActionContext, payload: Stream) -> Answer:
    """Log lines, as fast as they are taken."""
    for index in range(payload.count):
        ctx.log(f"line {index}")
    return Answer(number=payload.count)


@worker_function()
async def atalk(ctx: ActionContext, payload: Stream) -> Answer:
    for index in range(payload.count):
        ctx.log(f"line {index}")
    return Answer(number=payload.count)


@worker_function()
def shout(ctx: ActionContext, payload: Stream) -> Answer:
    """Prints `count` lines of `size` characters."""
    line = "x" * payload.size + "\n"
    for _ in range(payload.count):
        sys.stdout.write(line)
    return Answer(number=payload.count)


@worker_function()
def big(ctx: ActionContext, payload: Stream) -> Blob:
    """An output of `size` bytes."""
    return Blob(data=os.urandom(payload.size))
