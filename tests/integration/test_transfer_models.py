"""The real transfer process with its real handlers: models of the hub and of Hugging Face, deaths, and their traces."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from supervisor.transfer_process import TransferError, TransferProcess
from supervisor.transfers.messages import (
    FetchModel,
    HuggingFaceOptions,
    ListModels,
    ModelFiles,
    ModelList,
    ModelRemoved,
    RemoveModel,
    RetrySettings,
    TransferSettings,
)
from tests.support.dev_hub import DevHub
from tests.support.dev_hugging_face import COMMIT, DevHuggingFace, safetensors
from tests.support.faulty_server import Answer, Asked
from tests.support.hf_listings import index
from tests.support.rig import until

ROOT = Path(__file__).parent.parent.parent
WAIT_S = 40.0
PIPELINE = {
    "README.md": b"# hello",
    "model_index.json": index(
        {"unet": ["diffusers", "X"], "scheduler": ["diffusers", "Y"], "safety_checker": ["a", "B"]}
    ),
    "scheduler/scheduler_config.json": b"{}",
    "safety_checker/model.safetensors": safetensors("F16", 100),
    "unet/config.json": b'{"a": 1}',
    "unet/diffusion_pytorch_model.bin": b"b" * 1000,
    "unet/diffusion_pytorch_model.safetensors": safetensors("BF16", 200_000),
    "unet/diffusion_pytorch_model.fp32.safetensors": safetensors("F32", 400_000),
}
SELECTED = {
    "model_index.json",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    "unet/diffusion_pytorch_model.safetensors",
}


@asynccontextmanager
async def process(
    tmp_path: Path, env: Mapping[str, str] | None = None, **settings: Any
) -> AsyncIterator[TransferProcess]:
    values = {"retry": RetrySettings(4, 0.01, 0.02), "hf_home": str(tmp_path / "hf_home"), **settings}
    transfers = TransferProcess(
        TransferSettings(model_cache_dir=str(tmp_path / "cache"), **values),
        {"PYTHONPATH": str(ROOT), "PATH": "/bin", "HOME": str(tmp_path), **(env or {})},
    )
    try:
        async with asyncio.timeout(WAIT_S):
            yield transfers
    finally:
        await transfers.stop()


def content(root: str) -> dict[str, bytes]:
    base = Path(root)
    return {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}


@pytest.fixture
def hub() -> Iterator[DevHub]:
    with DevHub(token="hub-token") as hub:
        yield hub


@pytest.fixture
def hugging_face() -> Iterator[DevHuggingFace]:
    with DevHuggingFace(token="hf-token") as server:
        yield server


async def test_a_killed_process_goes_on_from_its_part_and_nobody_sees_it(hub: DevHub, tmp_path: Path) -> None:
    data = os.urandom(3 * 2**20)
    hub.put("org/repo", {"f": data})

    def slow(asked: Asked) -> Answer | None:
        """The first half comes, then nothing: the process is killed while it waits."""
        if asked.is_store and asked.number == 1:
            return Answer(200, data, cut_at=len(data) // 2, stall=True)
        return None

    hub.on_request = slow
    async with process(tmp_path, hub_url=hub.url, hub_token="hub-token") as transfers:
        progress: list[int] = []
        call = asyncio.create_task(
            transfers.call(FetchModel("org/repo"), ModelFiles, lambda done, *_: progress.append(done))
        )
        cache = tmp_path / "cache"
        part: list[Path] = []

        def has_part() -> bool:
            part[:] = [path for path in cache.rglob("*.part") if path.stat().st_size >= 2**20]
            return bool(part)

        await until(has_part, WAIT_S)
        assert transfers.pid is not None
        os.kill(transfers.pid, signal.SIGKILL)
        found = await call
        assert content(found.root_dir) == {"f": data}
        ranges = [each.headers["Range"] for each in hub.requests("/store/") if "Range" in each.headers]
        assert len(ranges) == 1
        assert 2**20 <= int(ranges[0][6:-1]) <= len(data) // 2, "it went on from what was there"
        assert progress[-1] == len(data)

        # What is on disk is found by the next process too.
        listed = await transfers.call(ListModels(), ModelList)
        assert [model.ref for model in listed.models] == ["cozy:org/repo:latest"]
        await transfers.call(RemoveModel("org/repo"), ModelRemoved)
        assert (await transfers.call(ListModels(), ModelList)).models == ()


async def test_a_diffusers_pipeline_of_hugging_face(hugging_face: DevHuggingFace, tmp_path: Path) -> None:
    hugging_face.repos["org/pipe"] = PIPELINE
    env = {"HF_ENDPOINT": hugging_face.url}
    async with process(tmp_path, env, hf_token="hf-token") as transfers:
        told: list[tuple[int, int]] = []
        found = await transfers.call(
            FetchModel("hf:org/pipe"), ModelFiles, lambda done, total, _: told.append((done, total))
        )
        assert set(content(found.root_dir)) == SELECTED
        assert found.root_dir == str(tmp_path / "hf_home/hub/models--org--pipe/snapshots" / COMMIT)
        assert found.size_bytes == sum(len(PIPELINE[path]) for path in SELECTED)
        assert found.weight_bytes == len(PIPELINE["unet/diffusion_pytorch_model.safetensors"])
        assert found.metadata == {"quantization": "bf16"}
        assert told[-1] == (found.size_bytes, found.size_bytes)

        # A complete local snapshot makes no network call, however it came here.
        before = len(hugging_face.asked)
        again = await transfers.call(FetchModel("hf:org/pipe"), ModelFiles)
        assert again.root_dir == found.root_dir
        for record in (tmp_path / "cache/hf/refs").iterdir():
            record.unlink()
        pinned = await transfers.call(FetchModel(f"hf:org/pipe@{COMMIT}"), ModelFiles)
        assert pinned.root_dir == found.root_dir
        assert len(hugging_face.asked) == before

        # One that lacks a file is completed.
        (Path(found.root_dir) / "unet/diffusion_pytorch_model.safetensors").unlink()
        assert (await transfers.call(ListModels(), ModelList)).models == ()
        await transfers.call(FetchModel(f"hf:org/pipe@{COMMIT}"), ModelFiles)
        assert set(content(found.root_dir)) == SELECTED
        await transfers.call(RemoveModel(f"hf:org/pipe@{COMMIT}"), ModelRemoved)
        assert not Path(found.root_dir).exists()


async def test_models_of_both_kinds_share_the_budget(hub: DevHub, hugging_face: DevHuggingFace, tmp_path: Path) -> None:
    hugging_face.repos["org/pipe"] = PIPELINE
    for name in "ab":
        hub.put(f"org/{name}", {"f": name.encode() * 200_000})
    env = {"HF_ENDPOINT": hugging_face.url}
    settings = {"hub_url": hub.url, "hub_token": "hub-token", "hf_token": "hf-token", "model_cache_max_bytes": 450_000}
    async with process(tmp_path, env, **settings) as transfers:
        removed: list[str] = []
        transfers.on_models_removed = removed.extend
        await transfers.call(FetchModel("org/a"), ModelFiles)
        pipe = await transfers.call(FetchModel("hf:org/pipe"), ModelFiles)
        await transfers.call(FetchModel("org/b"), ModelFiles)
        assert removed == ["cozy:org/a:latest"]
        lock = os.open(pipe.lock_file, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_SH)
        await transfers.call(FetchModel("org/a"), ModelFiles)
        assert removed == ["cozy:org/a:latest", "cozy:org/b:latest"], "what is in use stays"
        os.close(lock)
        await transfers.call(FetchModel("org/b"), ModelFiles)
        assert removed[2:] == ["hf:org/pipe"]
        assert not Path(pipe.root_dir).exists()


async def test_what_hugging_face_refuses(hugging_face: DevHuggingFace, tmp_path: Path) -> None:
    hugging_face.repos["org/pipe"] = PIPELINE
    hugging_face.repos["org/old"] = {"config.json": b"{}", "pytorch_model.bin": b"b"}
    env = {"HF_ENDPOINT": hugging_face.url}
    async with process(tmp_path, env, hf_token="hf-token") as transfers:
        for ref, error_type, words in (
            ("hf:org/none", "validation", "no such repo"),
            ("hf:org/pipe@v9", "validation", "no such revision"),
            ("hf:org/old", "fatal", "has neither a safetensors file"),
        ):
            with pytest.raises(TransferError, match=words) as refused:
                await transfers.call(FetchModel(ref), ModelFiles)
            assert refused.value.failure.error_type == error_type
        hugging_face.on_request = lambda asked: Answer(503) if asked.number == 1 else None
        await transfers.call(FetchModel("hf:org/pipe"), ModelFiles)
    async with process(tmp_path / "other", env, hf_token="wrong") as transfers:
        with pytest.raises(TransferError, match="check HF_TOKEN") as refused:
            await transfers.call(FetchModel("hf:org/pipe"), ModelFiles)
        assert refused.value.failure.error_type == "auth"


async def test_a_full_repo_and_a_canceled_download(hugging_face: DevHuggingFace, tmp_path: Path) -> None:
    hugging_face.repos["org/pipe"] = PIPELINE
    env = {"HF_ENDPOINT": hugging_face.url}
    env["HF_HUB_DOWNLOAD_TIMEOUT"] = "1"  # the library's thread sees that it was stopped when its read ends
    options = HuggingFaceOptions(full_repo=True)
    async with process(tmp_path, env, hf_token="hf-token", hf=options) as transfers:
        data = PIPELINE["unet/diffusion_pytorch_model.bin"]
        hugging_face.on_request = lambda asked: (
            Answer(200, data, cut_at=10, stall=True) if asked.method == "GET" and asked.path.endswith(".bin") else None
        )
        call = asyncio.create_task(transfers.call(FetchModel("hf:org/pipe"), ModelFiles))
        await until(lambda: bool(hugging_face.requests(".bin", "GET")), WAIT_S)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        hugging_face.on_request = lambda _: None
        found = await transfers.call(FetchModel("hf:org/pipe"), ModelFiles)
        assert set(content(found.root_dir)) == set(PIPELINE)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    path = tmp_path / "cache"
    path.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], capture_output=True, text=True, check=False
    )
    if mount.returncode != 0:
        pytest.skip(f"a tmpfs can't be mounted here: {mount.stderr.strip()}")
    yield path
    subprocess.run(["umount", path], check=True)


async def test_a_full_disk_is_said_and_freed(hub: DevHub, small_disk: Path) -> None:
    hub.put("org/small", {"f": b"s" * 1000})
    hub.put("org/large", {"one": os.urandom(3 * 2**20), "two": os.urandom(3 * 2**20), "three": b"3"})
    async with process(
        small_disk.parent, hub_url=hub.url, hub_token="hub-token", model_cache_max_bytes=2**30
    ) as transfers:
        small = await transfers.call(FetchModel("org/small"), ModelFiles)
        with pytest.raises(TransferError, match=r"the disk of .* is full: No space left on device") as full:
            await transfers.call(FetchModel("org/large"), ModelFiles)
        assert full.value.failure.error_type == "resource"
        assert shutil.disk_usage(small_disk).used < 2**18, "what it had written is gone"
        assert content(small.root_dir) == {"f": b"s" * 1000}
    async with process(
        small_disk.parent, hub_url=hub.url, hub_token="hub-token"
    ) as transfers:  # without a budget it is told before
        with pytest.raises(TransferError, match=r"no room on disk: 0\.01 GB are needed, .*the disk is too full"):
            await transfers.call(FetchModel("org/large"), ModelFiles)
        listed = await transfers.call(ListModels(), ModelList)
        assert [model.ref for model in listed.models] == [small.ref], "nothing was removed in vain"


async def test_a_disk_that_hugging_face_fills_is_freed_too(hugging_face: DevHuggingFace, small_disk: Path) -> None:
    hugging_face.repos["org/small"] = PIPELINE
    large = safetensors("F16", 6 * 2**20)
    hugging_face.repos["org/large"] = {**PIPELINE, "unet/diffusion_pytorch_model.safetensors": large}
    env = {"HF_ENDPOINT": hugging_face.url}
    settings = {"hf_token": "hf-token", "hf_home": str(small_disk / "hf_home"), "model_cache_max_bytes": 2**30}
    async with process(small_disk.parent, env, **settings) as transfers:
        small = await transfers.call(FetchModel("hf:org/small"), ModelFiles)
        before = shutil.disk_usage(small_disk).used
        with pytest.raises(TransferError, match=r"the disk of .* is full") as full:
            await transfers.call(FetchModel("hf:org/large"), ModelFiles)
        assert full.value.failure.error_type == "resource"
        assert shutil.disk_usage(small_disk).used < before + 2**17
        assert set(content(small.root_dir)) == SELECTED
