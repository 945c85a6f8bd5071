"""A tenant whose functions take files and save files."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import time
from pathlib import Path

import msgspec

from gen_worker import ActionContext, Asset, ResourceRequirements, worker_function
from gen_worker.errors import AuthError, RetryableError, WorkerError


class Pictures(msgspec.Struct):
    first: Asset | None = None
    more: list[Asset] = []
    by_name: dict[str, Asset] = {}


class Seen(msgspec.Struct):
    ref: str
    path: str
    sha256: str
    size_bytes: int
    mime_type: str
    links: int
    mode: int
    uid: int


class Answer(msgspec.Struct):
    files: list[Seen] = []
    text: str = ""
    pid: int = 0


class Save(msgspec.Struct):
    ref: str = "out.bin"
    data: bytes = b""
    how: str = "save_bytes"
    path: str = ""


class Saved(msgspec.Struct):
    asset: Asset
    peak_kib: int = 0


class Nothing(msgspec.Struct):
    pass


def _seen(asset: Asset) -> Seen:
    data = asset.read_bytes()
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (asset.sha256, asset.size_bytes)
    found = Path(asset).stat()
    return Seen(
        asset.ref,
        os.fspath(asset),
        asset.sha256 or "",
        len(data),
        asset.mime_type or "",
        found.st_nlink,
        stat.S_IMODE(found.st_mode),
        found.st_uid,
    )


def _all(pictures: Pictures) -> list[Asset]:
    first = [] if pictures.first is None else [pictures.first]
    return first + pictures.more + list(pictures.by_name.values())


@worker_function()
def look(ctx: ActionContext, payload: Pictures) -> Answer:
    return Answer([_seen(asset) for asset in _all(payload)], pid=os.getpid())


@worker_function()
async def alook(ctx: ActionContext, payload: Pictures) -> Answer:
    return Answer([_seen(asset) for asset in _all(payload)], pid=os.getpid())


@worker_function(ResourceRequirements(max_concurrency=1))
def one_at_a_time(ctx: ActionContext, payload: Pictures) -> Answer:
    with Path(f"/tmp/{ctx.run_id}").open("x"):
        pass
    Path(f"/tmp/{ctx.run_id}").unlink()
    return Answer(text="ran")


@worker_function()
def save(ctx: ActionContext, payload: Save) -> Saved:
    call = getattr(ctx, payload.how)
    return Saved(call(payload.ref, payload.path or payload.data), _peak_kib())


@worker_function()
async def asave(ctx: ActionContext, payload: Save) -> Saved:
    return Saved(await asyncio.to_thread(getattr(ctx, payload.how), payload.ref, payload.path or payload.data))


@worker_function()
def save_and_catch(ctx: ActionContext, payload: Save) -> Answer:
    try:
        getattr(ctx, payload.how)(payload.ref, payload.path or payload.data)
    except (AuthError, RetryableError) as error:
        return Answer(text=f"{type(error).__name__}: {error}")
    except WorkerError as error:
        return Answer(text=f"{type(error).__name__}: {error}")
    return Answer(text="saved")


@worker_function()
def save_changing(ctx: ActionContext, payload: Save) -> Saved:
    """Saves a sparse file of 64 MiB; the test changes it meanwhile."""
    ctx.emit("started", {})
    return Saved(ctx.save_file(payload.ref, payload.path))


@worker_function()
def nap(ctx: ActionContext, payload: Nothing) -> Answer:
    time.sleep(0.01)
    return Answer(text="slept")


def _peak_kib() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
