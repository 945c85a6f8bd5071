"""Models of WORKER_MODEL_ARTIFACTS_JSON: those that are there, and those that are not."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gen_worker.pipe.messages import Failure
from supervisor.config import load_settings
from supervisor.model_source import LocalArtifacts


class Events:
    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.failures: dict[str, Failure] = {}

    def model_fetched(self, model_id: str) -> None:
        self.fetched.append(model_id)

    def fetch_failed(self, model_id: str, failure: Failure) -> None:
        self.failures[model_id] = failure

    def fetch_progress(self, model_id: str, done_bytes: int, total_bytes: int, bytes_per_s: float) -> None:
        raise AssertionError("nothing is fetched here")

    def disk_changed(self) -> None:
        raise AssertionError("nothing changes here")


def source(root: Path) -> tuple[LocalArtifacts, Events]:
    (root / "here").mkdir()
    (root / "here" / "model.bin").write_bytes(b"x" * 1000)
    text = (
        f'{{"org/a": {{"root_dir": "{root}/here", "files": {{"w": "model.bin"}}}}, "b": {{"root_dir": "{root}/gone"}}}}'
    )
    found = LocalArtifacts(load_settings({"WORKER_MODEL_ARTIFACTS_JSON": text}).model_artifacts)
    found.events = events = Events()
    return found, events


A = "cozy:org/a:latest"


async def test_what_is_there(tmp_path: Path) -> None:
    local, _ = source(tmp_path)
    assert local.knows(A)
    assert local.knows("b")
    assert not local.knows("c")
    assert list(local.on_disk()) == [A]
    model = local.local(A)
    assert model is not None
    assert (model.root_dir, dict(model.files), model.weight_bytes) == (str(tmp_path / "here"), {"w": "model.bin"}, 1000)
    assert local.local("b") is None
    assert local.local("c") is None


async def test_a_directory_that_is_not_there_is_said(tmp_path: Path) -> None:
    local, events = source(tmp_path)
    local.fetch("b")
    local.fetch(A)
    assert events.failures == {}, "the answer comes after the call has returned"
    await asyncio.sleep(0)
    failure = events.failures["b"]
    assert (failure.error_type, failure.retryable) == ("fatal", False)
    assert f"there is no directory {tmp_path}/gone" in failure.detail
    assert str(tmp_path) not in failure.safe_message
    assert events.fetched == [A]
