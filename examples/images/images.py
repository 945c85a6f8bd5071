"""Pictures in, pictures out: `thumbnail` takes an image file and stores a smaller one, `contact_sheet` takes several.

The worker fetches each Asset of the payload before the function runs, from the file store or from a public URL, and
stores what `ctx.save_file` is given with the run's own token.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Literal

import msgspec
from PIL import Image, ImageOps, UnidentifiedImageError

from gen_worker import ActionContext, Asset, worker_function
from gen_worker.errors import ValidationError

MAX_SIDE = 4096
MAX_PIXELS = 64 * 1024 * 1024
"""A small file can be a huge picture: this much is decoded, at four bytes each."""

Side = Annotated[int, msgspec.Meta(ge=1, le=MAX_SIDE)]


class ThumbnailInput(msgspec.Struct):
    image: Asset
    side: Side = 256
    """Of the square that the thumbnail fits in, in pixels."""
    format: Literal["png", "jpeg", "webp"] = "png"


class SheetInput(msgspec.Struct):
    images: Annotated[list[Asset], msgspec.Meta(min_length=1, max_length=64)]
    side: Side = 128


class Picture(msgspec.Struct):
    image: Asset
    width: int
    height: int


@worker_function()
def thumbnail(ctx: ActionContext, payload: ThumbnailInput) -> Picture:
    """The picture, upright and no larger than a square of `side` pixels."""
    picture = _opened(payload.image)
    picture.thumbnail((payload.side, payload.side))
    return _saved(ctx, picture, f"thumbnail.{payload.format}")


@worker_function()
def contact_sheet(ctx: ActionContext, payload: SheetInput) -> Picture:
    """All pictures in one, a row of squares."""
    side, count = payload.side, len(payload.images)
    sheet = Image.new("RGB", (side * count, side), "white")
    for number, asset in enumerate(payload.images):
        tile = ImageOps.contain(_opened(asset), (side, side))
        sheet.paste(tile, (number * side + (side - tile.width) // 2, (side - tile.height) // 2))
        ctx.progress((number + 1) / count, stage="paste")
    return _saved(ctx, sheet, "sheet.png")


def _opened(asset: Asset) -> Image.Image:
    try:
        with Image.open(asset) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise ValidationError(f"{picture.width} x {picture.height} pixels are more than {MAX_PIXELS}")
            return ImageOps.exif_transpose(picture).convert("RGB")
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError) as error:
        raise ValidationError(f"{Path(asset).name} is not a picture that can be read ({asset.mime_type})") from error


def _saved(ctx: ActionContext, picture: Image.Image, name: str) -> Picture:
    with tempfile.NamedTemporaryFile(suffix=Path(name).suffix) as file:
        picture.save(file.name)
        return Picture(ctx.save_file(name, file.name), picture.width, picture.height)
