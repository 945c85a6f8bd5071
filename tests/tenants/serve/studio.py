"""The functions of a small studio: what the development server is tested and shown with."""

from __future__ import annotations

import struct
import time
import zlib
from collections.abc import Iterator
from typing import Annotated, Literal

import msgspec

from gen_worker import ActionContext, ModelArtifacts, ModelRef, ModelRefSource, worker_function
from gen_worker.errors import RetryableError, ValidationError
from gen_worker.types import Asset


class Size(msgspec.Struct):
    width: Annotated[int, msgspec.Meta(ge=8, le=1024)] = 320
    height: Annotated[int, msgspec.Meta(ge=8, le=1024)] = 200


class Paint(msgspec.Struct):
    """A picture of two colours that meet."""

    prompt: Annotated[str, msgspec.Meta(description="what it is called")]
    palette: Literal["dusk", "sea", "moss"] = "dusk"
    steps: Annotated[int, msgspec.Meta(ge=1, le=50, description="how long it takes")] = 4
    size: Size = msgspec.field(default_factory=Size)
    tags: list[str] = []


class Picture(msgspec.Struct):
    title: str
    image: bytes
    pixels: int


_PALETTES = {
    "dusk": ((255, 138, 92), (64, 40, 120)),
    "sea": ((120, 220, 232), (10, 60, 120)),
    "moss": ((220, 232, 140), (30, 90, 60)),
}


@worker_function()
def paint(ctx: ActionContext, payload: Paint) -> Picture:
    for step in range(payload.steps):
        if ctx.is_canceled():
            break
        ctx.progress((step + 1) / payload.steps, stage=f"step {step + 1} of {payload.steps}")
        time.sleep(0.02)
    print(f"painted {payload.prompt}")
    size = payload.size
    return Picture(payload.prompt, _png(size, *_PALETTES[payload.palette]), size.width * size.height)


class Tell(msgspec.Struct):
    """A story about a subject, word by word."""

    subject: str = "an astronaut"
    words: Annotated[int, msgspec.Meta(ge=0)] = 12


class Word(msgspec.Struct):
    text: str


@worker_function()
def tell(ctx: ActionContext, payload: Tell) -> Iterator[Word]:
    story = (
        f"Once there was {payload.subject} who planted tomatoes in the garden of the space station and waited".split()
    )
    for number in range(payload.words):
        ctx.progress((number + 1) / payload.words, stage="telling")
        yield Word(story[number % len(story)] + " ")
        time.sleep(0.02)


class Mirror(msgspec.Struct):
    """Gives back the file that it was given, and what came with it."""

    file: Asset
    note: str = ""
    data: bytes = b""


class Mirrored(msgspec.Struct):
    file: Asset
    note: str
    data_size: int


@worker_function()
def mirror(ctx: ActionContext, payload: Mirror) -> Mirrored:
    asset = Asset(payload.file.ref, mime_type=payload.file.mime_type)
    return Mirrored(asset, payload.note, len(payload.data))


class Fail(msgspec.Struct):
    """Fails in the way that is asked for."""

    how: Literal["validation", "retryable", "internal", "memory"]


class Nothing(msgspec.Struct):
    pass


@worker_function()
def fail(ctx: ActionContext, payload: Fail) -> Nothing:
    errors = {
        "validation": ValidationError("the width must be even"),
        "retryable": RetryableError("try again"),
        "internal": RuntimeError("a defect"),
        "memory": MemoryError(),
    }
    raise errors[payload.how]


class Ask(msgspec.Struct):
    """Looks into the model's files."""

    file: str = "words.txt"


class Answer(msgspec.Struct):
    text: str
    model: str


@worker_function()
def ask(
    ctx: ActionContext, payload: Ask, words: Annotated[ModelArtifacts, ModelRef(ModelRefSource.DEPLOYMENT, "words")]
) -> Answer:
    return Answer(words.path(payload.file).read_text(), words.model_id)


class Wait(msgspec.Struct):
    """Waits until it is canceled."""

    seconds: float = 60.0


@worker_function()
def wait(ctx: ActionContext, payload: Wait) -> Nothing:
    ctx.progress(0.25, stage="waiting")
    ctx.done().wait(payload.seconds)
    return Nothing()


def _png(size: Size, top: tuple[int, int, int], bottom: tuple[int, int, int]) -> bytes:
    rows = bytearray()
    for y in range(size.height):
        share = y / max(1, size.height - 1)
        color = bytes(round(a + (b - a) * share) for a, b in zip(top, bottom, strict=True))
        rows += b"\0" + color * size.width
    header = struct.pack(">IIBBBBB", size.width, size.height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(bytes(rows))), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
