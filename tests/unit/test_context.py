"""ActionContext: events, files, deadlines and the cancel flag."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gen_worker.context import ActionContext, PlainDevice, output_ref
from gen_worker.errors import ValidationError
from gen_worker.types import Asset

PREFIX = "runs/r1/outputs/"


class Host:
    def __init__(self) -> None:
        self.events: list[tuple[str, Any]] = []
        self.stored: list[tuple[str, bytes | Path, bool]] = []

    def emit(self, event_type: str, payload_json: bytes) -> None:
        self.events.append((event_type, msgspec.json.decode(payload_json)))

    def store(self, ref: str, source: bytes | Path, *, create: bool) -> Asset:
        self.stored.append((ref, source, create))
        return Asset(ref)


def context(host: Host | None = None, **arguments: Any) -> ActionContext:
    return ActionContext(run_id="r1", host=host or Host(), clock=lambda: 1000.0, **arguments)


def test_identity_and_deadline() -> None:
    ctx = context(tenant_id="t", user_id="u", timeout_ms=2500)
    assert (ctx.run_id, ctx.tenant_id, ctx.user_id, ctx.timeout_ms) == ("r1", "t", "u", 2500)
    assert ctx.deadline == 1002.5
    assert ctx.time_remaining_s() == 2.5


def test_no_deadline() -> None:
    ctx = context(timeout_ms=0, deadline=0.0)
    assert (ctx.timeout_ms, ctx.deadline, ctx.time_remaining_s()) == (None, None, None)


def test_a_given_deadline_wins_and_remaining_time_is_never_negative() -> None:
    ctx = context(timeout_ms=2500, deadline=999.0)
    assert ctx.deadline == 999.0
    assert ctx.time_remaining_s() == 0.0


def test_cancel_keeps_the_first_cause() -> None:
    ctx = context()
    assert not ctx.is_canceled()
    assert ctx.cancel_cause is None
    ctx.cancel("timeout")
    ctx.cancel()
    assert ctx.is_canceled()
    assert ctx.done().is_set()
    assert ctx.cancel_cause == "timeout"


def test_who_waits_is_woken_by_a_cancel_that_comes_later() -> None:
    ctx = context(Host())
    event = ctx.done()
    assert not event.is_set()
    ctx.cancel()
    assert event.is_set()
    assert ctx.done() is event


def test_events() -> None:
    host = Host()
    ctx = context(host)
    ctx.progress(0.5, "denoise")
    ctx.progress(1)
    ctx.log("hello", "WARNING")
    ctx.emit("my.event", {"a": [1, None]})
    assert host.events == [
        ("job.progress", {"progress": 0.5, "stage": "denoise", "timestamp": 1000.0}),
        ("job.progress", {"progress": 1.0, "timestamp": 1000.0}),
        ("job.log", {"message": "hello", "level": "warning", "timestamp": 1000.0}),
        ("my.event", {"a": [1, None]}),
    ]


@pytest.mark.parametrize("fraction", [-0.01, 1.01, float("nan"), float("inf")])
def test_progress_outside_of_0_to_1(fraction: float) -> None:
    with pytest.raises(ValidationError, match="progress must be from 0 to 1"):
        context().progress(fraction)


@pytest.mark.parametrize("event_type", ["", "output.delta", "output.completed"])
def test_event_types_that_the_worker_keeps_to_itself(event_type: str) -> None:
    host = Host()
    with pytest.raises(ValidationError, match="can't be emitted"):
        context(host).emit(event_type, {})
    assert not host.events


def test_an_event_that_is_not_json() -> None:
    with pytest.raises(ValidationError, match="event 'x' can't be JSON"):
        context().emit("x", object())


@pytest.mark.parametrize(
    ("ref", "whole"),
    [
        ("output.png", PREFIX + "output.png"),
        ("frames/1.png", PREFIX + "frames/1.png"),
        (PREFIX + "a/b.png", PREFIX + "a/b.png"),
        ("runs.csv", PREFIX + "runs.csv"),
        ("a..b", PREFIX + "a..b"),
        ("bild ä.png", PREFIX + "bild ä.png"),
    ],
)
def test_refs_that_are_stored(ref: str, whole: str) -> None:
    assert output_ref("r1", ref) == whole


@pytest.mark.parametrize(
    "ref",
    [
        "", ".", "..", "/etc/passwd", "../x", "a/../b", "a//b", "a/", "./a", "runs/r2/outputs/x", "runs/r1/inputs/x",
        "runs/r1/outputs/../../r2/x", PREFIX, PREFIX + "/x", "runs/x", "a\\b", "a\x00b", "a\nb", "https://host/x",
    ],
)  # fmt: skip
def test_refs_that_are_refused(ref: str) -> None:
    with pytest.raises(ValidationError, match=r"use a plain name such as 'output\.png'"):
        output_ref("r1", ref)


def test_saving(tmp_path: Path) -> None:
    host, file = Host(), tmp_path / "f"
    file.write_bytes(b"file")
    ctx = context(host)
    assert ctx.save_bytes("a", b"1").ref == PREFIX + "a"
    ctx.save_bytes_overwrite("b", bytearray(b"2"))
    ctx.save_bytes_create("c", memoryview(b"3"))
    ctx.save_file("d", file)
    ctx.save_file_overwrite("e", str(file))
    ctx.save_file_create("f", file)
    assert host.stored == [
        (PREFIX + "a", b"1", False), (PREFIX + "b", b"2", False), (PREFIX + "c", b"3", True),
        (PREFIX + "d", file, False), (PREFIX + "e", file, False), (PREFIX + "f", file, True),
    ]  # fmt: skip


def test_saving_what_is_not_there(tmp_path: Path) -> None:
    ctx = context()
    with pytest.raises(FileNotFoundError, match="can't save 'x': there is no file"):
        ctx.save_file("x", tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        ctx.save_file("x", tmp_path)
    with pytest.raises(ValidationError, match="needs bytes, got str"):
        ctx.save_bytes("x", "text")  # type: ignore[arg-type]


def test_device_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    device = context(device="cuda:1").device
    assert isinstance(device, PlainDevice)
    assert (device.type, device.index, str(device)) == ("cuda", 1, "cuda:1")
    assert (context().device.index, str(context().device)) == (None, "cpu")


def test_device_with_torch() -> None:
    torch = pytest.importorskip("torch")
    assert context().device == torch.device("cpu")
