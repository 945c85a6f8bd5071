"""examples/images: as a tenant would test it, and served by a worker with the development scheduler's file store."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from PIL import Image

from gen_worker.testing import run_function
from tests.support.worker_process import WorkerProcess
from tests.unit.test_mock_orchestrator import tool

PROJECT = Path(__file__).parents[2] / "examples" / "images"
TOKEN = "token-of-the-run"


@pytest.fixture(scope="module")
def images() -> ModuleType:
    spec = importlib.util.spec_from_file_location("example_images", PROJECT / "images.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(width: int, height: int, color: str, kind: str = "png") -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (width, height), color).save(data, kind)
    return data.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_a_thumbnail(images: ModuleType, kind: str) -> None:
    payload = {"image": {"ref": "in.png"}, "side": 64, "format": kind}
    outcome = run_function(images.thumbnail, payload, files={"in.png": picture(200, 100, "red")}).check()
    assert (outcome.output.width, outcome.output.height) == (64, 32)
    assert outcome.output.image.mime_type == f"image/{kind}"
    (stored,) = outcome.files.values()
    small = opened(stored)
    assert (small.format, small.size) == (kind.upper(), (64, 32))
    red, green, blue = small.convert("RGB").tobytes()[:3]
    assert red > 200
    assert max(green, blue) < 60


def test_a_contact_sheet(images: ModuleType) -> None:
    files = {"a.png": picture(10, 10, "red"), "b.jpg": picture(30, 10, "blue", "jpeg")}
    payload = {"images": [{"ref": "a.png"}, {"ref": "b.jpg"}], "side": 32}
    outcome = run_function(images.contact_sheet, payload, files=files).check()
    sheet = opened(outcome.files["runs/test-run/outputs/sheet.png"])
    assert sheet.size == (64, 32)
    assert sheet.getpixel((16, 16)) == (255, 0, 0)
    assert sheet.getpixel((48, 2)) == (255, 255, 255)


@pytest.mark.parametrize("data", [b"text", picture(10, 10, "red")[:40]], ids=["text", "cut"])
def test_what_is_no_picture(images: ModuleType, data: bytes) -> None:
    outcome = run_function(images.thumbnail, {"image": {"ref": "in.png"}}, files={"in.png": data})
    assert outcome.failure is not None
    assert outcome.failure.error_type == "validation"
    assert outcome.failure.safe_message.startswith("0-in.png is not a picture that can be read")


def test_a_picture_that_is_too_large(images: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    outcome = run_function(images.thumbnail, {"image": {"ref": "a"}}, files={"a": picture(10, 10, "red")})
    assert outcome.failure is not None
    assert outcome.failure.safe_message == "10 x 10 pixels are more than 99"


async def test_served_by_a_worker(tmp_path: Path) -> None:
    """What docs/files.md shows: the scheduler's command line has the file store, the worker comes to it."""
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "in.jpg").write_bytes(picture(300, 200, "green", "jpeg"))
    payload = json.dumps({"image": {"ref": "photos/in.jpg"}, "side": 30})
    options = ("--run", "thumbnail", "--payload-json", payload, "--serve-files-dir", str(tmp_path))
    async with tool(*options, "--file-token", TOKEN) as running:
        address = await running.note("listening on ")
        env = {"WORKER_RUN_DIR": str(tmp_path / "run")}
        async with WorkerProcess(address, tenant=PROJECT, modules="images", env=env):
            code, lines, errors = await running.finish()
    assert code == 0, errors
    output = json.loads(lines[0].removeprefix("[output] "))
    assert (output["width"], output["height"], output["image"]["mime_type"]) == (30, 20, "image/png")
    assert opened((tmp_path / output["image"]["ref"]).read_bytes()).size == (30, 20)
