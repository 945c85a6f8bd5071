"""A tenant whose functions take files and save files."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import tempfile
from pathlib import Path

import msgspec

from gen_worker import ActionContext, Asset, RealtimeSocket, ResourceRequirements, worker_function, worker_websocket


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


class Sparse(msgspec.Struct):
    size: int


class Saved(msgspec.Struct):
    asset: Asset


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
    return Answer(text=ctx.run_id)


@worker_function()
def save(ctx: ActionContext, payload: Save) -> Saved:
    return Saved(getattr(ctx, payload.how)(payload.ref, payload.path or payload.data))


@worker_function()
async def asave(ctx: ActionContext, payload: Save) -> Saved:
    return Saved(await asyncio.to_thread(getattr(ctx, payload.how), payload.ref, payload.path or payload.data))


@worker_function()
def save_and_catch(ctx: ActionContext, payload: Save) -> Answer:
    try:
        getattr(ctx, payload.how)(payload.ref, payload.path or payload.data)
    except Exception as error:  # noqa: BLE001  (which one it is is what the test asks)
        return Answer(text=f"{type(error).__name__}: {error}")
    return Answer(text="saved")


@worker_function()
def save_temporary(ctx: ActionContext, payload: Sparse) -> Saved:
    """Save a file of this size that takes no space on the disk."""
    with tempfile.NamedTemporaryFile() as file:
        file.truncate(payload.size)
        return Saved(ctx.save_file("big.bin", file.name))


@worker_function()
def write_to_input(ctx: ActionContext, payload: Pictures) -> Answer:
    """What the file system says to a function that wants to change its input."""
    (asset,) = _all(payload)
    attempts = {
        "write": lambda: Path(asset).open("r+b").close(),
        "chmod": lambda: Path(asset).chmod(0o777),
        "replace": lambda: Path(asset).unlink(),
        "cache": lambda: list(Path(asset).parents[2].joinpath("cache", "inputs").iterdir()),
        "runs": lambda: list(Path(asset).parents[2].iterdir()),
    }
    said = []
    for name, attempt in attempts.items():
        try:
            attempt()
        except OSError as error:
            said.append(f"{name}: {type(error).__name__}")
        else:
            said.append(f"{name}: done")
    return Answer(text=", ".join(said), pid=os.getuid())


@worker_function()
def nap(ctx: ActionContext, payload: Nothing) -> Answer:
    return Answer(text="slept", pid=os.getpid())


@worker_websocket()
async def keep(ctx: ActionContext, sock: RealtimeSocket) -> None:
    """Stores each frame, and the number of them once the other end has closed."""
    count = 0
    async for data in sock.iter_bytes():
        count += 1
        asset = await asyncio.to_thread(ctx.save_bytes, f"{count}.bin", data)
        await sock.send_json({"ref": asset.ref, "tenant": asset.tenant_id})
    await asyncio.to_thread(ctx.save_bytes, "count.txt", str(count).encode())
