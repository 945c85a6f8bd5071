"""The models of this host over a real transfer process: fetched, found again, held, fetched before they are needed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from gen_worker.pipe.messages import Failure
from gen_worker.testing.mock_orchestrator import MockOrchestrator
from supervisor.config_parse import LocalModel as Artifact
from supervisor.model_files import HostModels
from supervisor.model_source import ModelSource
from supervisor.transfer_process import TransferProcess
from supervisor.transfers.messages import RetrySettings, TransferSettings
from tests.support.dev_hub import DevHub
from tests.support.faulty_server import Answer
from tests.support.rig import until
from tests.support.worker_process import WorkerProcess, eventually

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 40.0


class Listener:
    """SourceEvents that are kept."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.failed: dict[str, Failure] = {}
        self.progress: list[tuple[str, int, int]] = []
        self.changes = 0

    def model_fetched(self, model_id: str) -> None:
        self.fetched.append(model_id)

    def fetch_failed(self, model_id: str, failure: Failure) -> None:
        self.failed[model_id] = failure

    def fetch_progress(self, model_id: str, done_bytes: int, total_bytes: int, bytes_per_s: float) -> None:
        self.progress.append((model_id, done_bytes, total_bytes))

    def disk_changed(self) -> None:
        self.changes += 1


class Host:
    def __init__(self, cache: Path, hub: DevHub, artifacts: dict[str, Artifact], **settings: Any) -> None:
        self.transfers = TransferProcess(
            TransferSettings(
                model_cache_dir=str(cache),
                hub_url=hub.url,
                hub_token=hub.token,
                retry=RetrySettings(3, 0.01, 0.02),
                **settings,
            ),
            {"PYTHONPATH": str(ROOT), "PATH": "/bin"},
        )
        self.models = HostModels(
            artifacts, self.transfers, hub=True, at_once=settings.get("max_concurrent_downloads", 2)
        )
        self.source: ModelSource = self.models
        self.events = Listener()
        self.models.events = self.events
        self.models.start(cache)

    async def fetch(self, model_id: str) -> None:
        before = len(self.events.fetched)
        self.models.fetch(model_id)
        assert len(self.events.fetched) == before, "the answer comes after the call"
        await until(lambda: len(self.events.fetched) > before, WAIT_S)


@asynccontextmanager
async def host(
    cache: Path, hub: DevHub, artifacts: dict[str, Artifact] | None = None, **settings: Any
) -> AsyncIterator[Host]:
    found = Host(cache, hub, artifacts or {}, **settings)
    try:
        async with asyncio.timeout(WAIT_S):
            yield found
    finally:
        await found.models.stop()
        await found.transfers.stop()


@pytest.fixture
def hub() -> Iterator[DevHub]:
    with DevHub(token="very-secret-hub-token") as hub:
        hub.put("org/a", {"a.safetensors": b"a" * 1000, "config.json": b"{}"})
        hub.put("org/b", {"b.safetensors": b"b" * 1000})
        hub.put("org/c", {"c.safetensors": b"c" * 1000})
        yield hub


A, B, C = (f"cozy:org/{name}:latest" for name in "abc")


async def test_local_artifacts_need_no_process(hub: DevHub, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "mine"
    root.mkdir()
    (root / "model.safetensors").write_bytes(b"12345")
    artifacts = {
        "mine": Artifact(str(root), {"weights": "model.safetensors", "vae": "vae.bin"}, {"a": "b"}),
        "org/a": Artifact(str(root)),
        "gone": Artifact(str(tmp_path / "gone")),
    }
    async with host(tmp_path / "cache", hub, artifacts) as our:
        assert set(our.source.on_disk()) == {"mine", A}
        found = our.source.local("mine")
        assert found is not None
        assert (found.root_dir, found.weight_bytes, found.metadata) == (str(root), 5, {"a": "b"})
        assert [our.source.knows(name) for name in ("mine", A, B, "hf:a/b", "gone", "no ref")] == [True] * 5 + [False]
        our.source.hold("mine")
        our.source.release("mine")
        our.models.prefetch(["mine", "org/a", "no ref"])
        assert our.transfers.pid is None
        our.models.fetch("gone")
        our.models.fetch("mine")
        assert our.events.failed == {}, "the answer comes after the call"
        await until(lambda: bool(our.events.failed and our.events.fetched), WAIT_S)
        assert our.events.fetched == ["mine"]
        assert our.events.failed["gone"].detail.endswith(f"there is no directory {tmp_path / 'gone'}")
        (tmp_path / "gone").mkdir()
        assert our.source.local("gone") is not None, "it was mounted later"
        (tmp_path / "gone").rmdir()
        assert our.source.local("gone") is None
        assert set(our.source.on_disk()) == {"mine", A}
    assert "model gone can't be loaded: there is no directory" in caplog.text
    assert f"model mine names {root}/vae.bin, which is not there" in caplog.text


async def test_fetched_found_again_held_and_removed(hub: DevHub, tmp_path: Path) -> None:
    async with host(tmp_path, hub, model_cache_max_bytes=2500) as our, host(tmp_path, hub) as other:
        assert our.source.local(A) is None
        await our.fetch(A)
        found = our.source.local(A)
        assert found is not None
        assert (Path(found.root_dir) / "a.safetensors").read_bytes() == b"a" * 1000
        assert (found.weight_bytes, found.metadata["file_type"]) == (1000, "safetensors")
        assert our.events.progress[-1] == (A, 1002, 1002)
        assert our.events.changes >= 1
        await our.fetch(B)

        # What another worker, or this one, uses is not removed to make room; what was used longest ago else is.
        await other.fetch(A)
        other.source.hold(A)
        other.source.hold(A)
        other.source.release(A)
        await our.fetch(C)
        assert set(our.source.on_disk()) == {A, C}
        other.source.release(A)
        our.source.hold(C)
        await our.fetch(B)
        assert set(our.source.on_disk()) == {B, C}
        our.source.release(C)

        # The other is told of what came and went by our doing.
        await until(lambda: set(other.source.on_disk()) == {B, C}, WAIT_S)
        told = other.events.changes
        assert other.source.local(A) is None
        await our.fetch(A)
        await until(lambda: other.events.changes > told, WAIT_S)
        # B was fetched, and then C given up: which of them is the one that was used last is not the point here.
        left = set(our.source.on_disk())
        assert A in left
        assert len(left) == 2
        await until(lambda: set(other.source.on_disk()) == left, WAIT_S)
        (gone,) = {B, C} - left
        await our.fetch(gone)
        left = set(our.source.on_disk())
        assert gone in left
        await until(lambda: set(other.source.on_disk()) == left, WAIT_S)
    async with host(tmp_path, hub) as later:
        await until(lambda: set(later.source.on_disk()) == left, WAIT_S)
        assert later.events.changes == 1
        assert later.source.local(gone) is not None


async def test_failures_and_those_that_nobody_waits_for(
    hub: DevHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.on_request = lambda asked: Answer(403) if "org/b" in asked.path else None
    async with host(tmp_path, hub) as our:
        our.models.fetch(B)
        await until(lambda: B in our.events.failed, WAIT_S)
        assert our.events.failed[B].error_type == "auth"
        our.models.fetch("nonsense")
        await until(lambda: "nonsense" in our.events.failed, WAIT_S)
        assert our.events.failed["nonsense"].error_type == "validation"
        our.events.failed.clear()
        our.models.prefetch(["org/b", "org/a"])
        await until(lambda: A in our.source.on_disk(), WAIT_S)
        assert our.events.failed == {}
        hub.on_request = lambda _: None
        await our.fetch(B)
    assert f"model {B} can't be fetched: the hub refuses {B} (403 Forbidden)" in caplog.text


async def test_prefetching_leaves_a_place_for_what_is_needed(hub: DevHub, tmp_path: Path) -> None:
    hub.on_request = lambda asked: Answer(hang=True) if "org/a" in asked.path else None
    async with host(tmp_path, hub) as our:
        our.models.prefetch(["org/a", "org/b"])
        await until(lambda: bool(hub.requests("org/a")), WAIT_S)
        await our.fetch(C)
        assert not hub.requests("org/b")
        our.models.prefetch(["org/c"])  # a newer plan replaces what has not begun
        assert list(our.models._to_prefetch) == [C], "a tag is looked up again"


async def test_a_prefetched_tag_that_has_moved_is_fetched_anew(hub: DevHub, tmp_path: Path) -> None:
    async with host(tmp_path, hub) as our:
        await our.fetch(A)
        before = our.source.local(A)
        our.source.hold(A)
        hub.put("org/a", {"a.safetensors": b"new"})
        our.models.prefetch([A])
        await until(lambda: our.source.local(A) != before, WAIT_S)
        assert len(our.models._lock_fds[A]) == 2, "what is loaded keeps its files"
        our.source.release(A)
        assert our.models._lock_fds == {}


async def test_nothing_is_begun_that_nobody_waits_for_once_the_worker_drains(
    hub: DevHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.on_request = lambda asked: Answer(hang=True) if "org/a" in asked.path else None
    async with host(tmp_path, hub) as our:
        our.models.prefetch([A, B])
        await until(lambda: bool(hub.requests("org/a")), WAIT_S)
        assert our.source.fetching().keys() == {A}
        our.models.drain()
        our.models.prefetch([B, C])
        await our.fetch(C)  # a run waits for this one
        assert our.source.fetching().keys() == {A}
        await our.models.stop()
        our.models.prefetch([B])
        assert our.source.fetching() == {}
        assert not hub.requests("org/b")
    assert "ERROR" not in caplog.text


FUNCTIONS = """
import msgspec
from gen_worker import ActionContext, worker_function

class In(msgspec.Struct):
    text: str = ""

@worker_function()
def echo(ctx: ActionContext, payload: In) -> In:
    return payload
"""


async def test_a_worker_fetches_what_its_project_and_its_deployment_name(hub: DevHub, tmp_path: Path) -> None:
    project = tmp_path / "project"
    project.mkdir()
    (project / "pyproject.toml").write_text('[project]\nname = "x"\n[tool.cozy.models]\nsd = "org/a"\n')
    (project / "functions.py").write_text(FUNCTIONS)
    cache = tmp_path / "cache"
    env = {"COZY_HUB_URL": hub.url, "COZY_HUB_TOKEN": hub.token, "WORKER_MODEL_CACHE_DIR": str(cache)}
    async with (
        MockOrchestrator() as orchestrator,
        WorkerProcess(orchestrator.address, tenant=project, modules="functions", env=env) as worker,
    ):
        await eventually(lambda: worker.lines(f"{A} is on disk"), WAIT_S)
        await orchestrator.wait_for_worker(timeout=WAIT_S)
        await orchestrator.configure_models(["org/b", "org/c"], {"x": "org/c"})
        await eventually(lambda: all(worker.lines(f"{ref} is on disk") for ref in (B, C)), WAIT_S)
        children = worker.descendants()
        transfers = next(child for child in children if "supervisor.transfers" in child.cmdline())
        for child in children:
            assert "very-secret-hub-token" not in " ".join(child.environ().values())
        assert "very-secret-hub-token" not in "\n".join(worker.log)
        # Killed with all that it knows, it is replaced; and it goes with the worker.
        os.kill(transfers.pid, signal.SIGKILL)
        await eventually(lambda: len(worker.lines("transfer process started")) == 2, WAIT_S)
        worker.process.send_signal(signal.SIGTERM)
        assert await worker.exit_code() == 0
        assert not [child for child in children if psutil.pid_exists(child.pid)]
