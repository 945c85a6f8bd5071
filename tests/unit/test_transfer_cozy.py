"""Models of the hub: real HTTP, real files, in the test's own process; waits between attempts are next to nothing."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import resource
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from blake3 import blake3

from gen_worker.errors import AuthError, FatalError, ResourceError, RetryableError, ValidationError, WorkerError
from supervisor.transfers.budget import Budget
from supervisor.transfers.cozy import CozyModels
from supervisor.transfers.http import open_session
from supervisor.transfers.hub import Hub
from supervisor.transfers.messages import FetchModel, ModelFiles, RemoveModel, RetrySettings, TransferSettings
from supervisor.transfers.models import Models
from supervisor.transfers.store import Store
from tests.support.dev_hub import DevHub
from tests.support.faulty_server import Answer, Asked
from tests.support.rig import until

FAST = RetrySettings(4, 0.001, 0.002)
WAIT_S = 20.0
FILES = {"model_index.json": b"{}", "unet/weights.safetensors": b"w" * 5000, "vae/config.json": b'{"a": 1}'}


class Rig:
    """The models part of a transfer process; what it tells of removed refs is in `removed`."""

    def __init__(self, hub: DevHub, cache: Path, session: Any, **settings: Any) -> None:
        values = {"hub_url": hub.url, "hub_token": hub.token, "retry": FAST, "http_timeout_s": 10.0, **settings}
        disk_usage = values.pop("disk_usage", None)
        self.settings = TransferSettings(model_cache_dir=str(cache), **values)
        self.store = Store(str(cache))
        self.removed: list[str] = []
        more = {"disk_usage": disk_usage} if disk_usage else {}
        self.budget = Budget(self.store, self.settings.model_cache_max_bytes, self.removed.extend, **more)
        self.cozy = CozyModels(self.settings, session, Hub(session, self.settings), self.store, self.budget)
        self.models = Models({"cozy": self.cozy}, self.settings.max_concurrent_downloads)

    async def fetch(self, ref: str, progress: Callable[[int, int, float], None] = lambda *_: None) -> ModelFiles:
        return await self.models.fetch(FetchModel(ref), progress)

    def parts(self) -> list[Path]:
        return sorted(self.store.blobs.rglob("*.part"))

    def blobs(self) -> list[str]:
        return sorted(path.name for path in self.store.blobs.glob("??/??/*"))


@asynccontextmanager
async def rig(hub: DevHub, cache: Path, **settings: Any) -> AsyncIterator[Rig]:
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(open_session(settings.get("http_timeout_s", 10.0)))
        async with asyncio.timeout(WAIT_S):
            yield Rig(hub, cache, session, **settings)


@pytest.fixture
def hub() -> Iterator[DevHub]:
    with DevHub(token="hub-token") as hub:
        yield hub


def content(root: str) -> dict[str, bytes]:
    base = Path(root)
    return {str(path.relative_to(base)): path.read_bytes() for path in base.rglob("*") if path.is_file()}


# -- the way it should go ----------------------------------------------------------------------------


async def test_a_model_arrives_whole_and_is_laid_out_as_promised(hub: DevHub, tmp_path: Path) -> None:
    digest = hub.put("org/repo", FILES)
    async with rig(hub, tmp_path, gpu_sm=90) as our:
        told: list[tuple[int, int]] = []
        found = await our.fetch("org/repo", lambda done, total, _: told.append((done, total)))
        assert content(found.root_dir) == FILES
        assert found.root_dir == str(tmp_path / "cozy/snapshots" / digest)
        assert found.ref == "cozy:org/repo:latest"
        assert (found.size_bytes, found.weight_bytes) == (sum(map(len, FILES.values())), 5000)
        assert found.metadata["quantization"] == "fp16"
        assert told[0][1] == told[-1][1] == told[-1][0] == found.size_bytes
        for data in FILES.values():
            name = blake3(data).hexdigest()
            blob = tmp_path / "cozy/blobs/blake3" / name[:2] / name[2:4] / name
            assert blob.read_bytes() == data
            assert blob.stat().st_nlink == 2
        assert our.parts() == []
        assert list((tmp_path / "cozy/staging").iterdir()) == []
        assert [model.ref for model in our.cozy.models()] == ["cozy:org/repo:latest"]

    resolve = hub.requests("resolve_artifact")[0]
    assert resolve.method == "POST"
    assert resolve.headers["Authorization"] == "Bearer hub-token"
    body = json.loads(resolve.body)
    assert (body["tag"], body["include_urls"]) == ("latest", True)
    assert body["preferences"] == {
        "file_type_preference": ["safetensors"],  # flashpack is not installed here
        "quantization_preference": ["fp8", "bf16", "fp16"],
        "file_layout_preference": ["diffusers"],
    }
    assert set(body["capabilities"]) == {"cuda_version", "gpu_sm", "torch_version", "installed_libs"}
    assert (body["capabilities"]["gpu_sm"], body["capabilities"]["installed_libs"]) == (90, [])
    assert all("Authorization" not in each.headers for each in hub.requests("/store/"))


async def test_snapshots_share_blobs_and_what_is_here_is_not_fetched_again(hub: DevHub, tmp_path: Path) -> None:
    first = hub.put("org/repo", FILES)
    async with rig(hub, tmp_path) as our:
        await our.fetch("org/repo")
        fetched = len(hub.requests("/store/"))
        assert fetched == len(FILES)
        await our.fetch("org/repo")
        pinned = await our.fetch(f"org/repo@sha256:{first}")
        assert pinned.root_dir.endswith(first)
        changed = {**FILES, "vae/config.json": b"changed", "copy.json": b"{}"}
        hub.put("org/repo", changed)
        found = await our.fetch("org/repo")
        assert content(found.root_dir) == changed
        assert len(hub.requests("/store/")) == fetched + 1
        # A pinned one that is here asks nobody; a tag does when the hub is there, and else takes what is here.
        before = len(hub.asked)
        await our.fetch(f"org/repo@sha256:{first}")
        assert len(hub.asked) == before
        hub.on_request = lambda _: Answer(503)
        assert (await our.fetch("org/repo")).root_dir == found.root_dir


async def test_older_hubs(tmp_path: Path) -> None:
    with DevHub(old=True, token="t") as hub:
        digest = hub.put("org/repo", FILES, tag="v1")
        for nested in (False, True):
            hub.nested = nested
            async with rig(hub, tmp_path / str(nested)) as our:
                found = await our.fetch("org/repo:v1")
                assert content(found.root_dir) == FILES
                assert found.root_dir.endswith(digest)
        with pytest.raises(ValidationError, match="no cozy:org/repo:v2"):
            async with rig(hub, tmp_path / "x") as our:
                await our.fetch("org/repo:v2")
        assert [(each.method, each.path.rpartition("/")[2]) for each in hub.requests("repos")][:3] == [
            ("POST", "resolve_artifact"),
            ("GET", "resolve?tag=v1"),
            ("GET", "manifest"),
        ]


async def test_a_pinned_digest_goes_to_its_manifest(hub: DevHub, tmp_path: Path) -> None:
    hub.nested = True
    digest = hub.put("org/repo", FILES)
    async with rig(hub, tmp_path) as our:
        found = await our.fetch(f"org/repo@sha256:{digest}")
        assert content(found.root_dir) == FILES
        assert not hub.requests("resolve")


# -- what the hub may do -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (Answer(401), AuthError, "COZY_HUB_TOKEN"),
        (Answer(403), AuthError, "403"),
        (Answer(409, b'{"debug": {"sm": "needs 90"}}'), ResourceError, 'fits this worker: {"sm":"needs 90"}'),
        (Answer(409, b'{"debug": "no fp8"}'), ResourceError, "no fp8"),
        (Answer(400, b"bad tag"), FatalError, "400 Bad Request: bad tag"),
        (Answer(200, b"{"), FatalError, "broken"),
        (Answer(200, b"[]"), FatalError, "broken"),
        (Answer(200, b'{"snapshot_digest": 5}'), FatalError, "broken"),
        (Answer(302, b"", {"Location": "/elsewhere"}), FatalError, "302"),
    ],
    ids=lambda value: str(getattr(value, "status", "")),
)
async def test_what_the_hub_refuses_is_reported_once(
    hub: DevHub, tmp_path: Path, answer: Answer, kind: type[WorkerError], words: str
) -> None:
    hub.put("org/repo", FILES)
    hub.on_request = lambda _: answer
    async with rig(hub, tmp_path) as our:
        with pytest.raises(kind) as error:
            await our.fetch("org/repo")
    assert words in str(error.value)
    assert "org/repo" in str(error.value)
    assert len(hub.asked) == 1, "neither tried again nor asked through the old API"


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
async def test_what_may_pass_is_tried_again(hub: DevHub, tmp_path: Path, status: int) -> None:
    hub.put("org/repo", FILES)
    hub.on_request = lambda asked: Answer(status, headers={"Retry-After": "0"}) if asked.number <= 2 else None
    async with rig(hub, tmp_path) as our:
        assert content((await our.fetch("org/repo")).root_dir) == FILES
    assert len(hub.requests("resolve_artifact")) == 3


async def test_a_hub_that_stays_away_is_given_up(hub: DevHub, tmp_path: Path) -> None:
    hub.on_request = lambda _: Answer(503)
    async with rig(hub, tmp_path) as our:
        with pytest.raises(RetryableError, match="503 Service Unavailable; given up after 4 attempts"):
            await our.fetch("org/repo")
    hub.on_request = lambda _: Answer(hang=True)
    async with rig(hub, tmp_path, http_timeout_s=0.1) as our:
        with pytest.raises(RetryableError, match="no answer in time"):
            await our.fetch("org/repo")
    async with rig(hub, tmp_path, hub_url="http://127.0.0.1:1") as our:
        with pytest.raises(RetryableError, match="connection failed"):
            await our.fetch("org/repo")
    async with rig(hub, tmp_path, hub_url="") as our:
        with pytest.raises(FatalError, match="COZY_HUB_URL is not set"):
            await our.fetch("org/repo")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": "../evil"}, "leaves the model's directory"),
        ({"path": "/etc/passwd"}, "not a plain relative one"),
        ({"path": "a/../../b"}, "leaves"),
        ({"path": ""}, "empty parts"),
        ({"path": "a//b"}, "empty parts"),
        ({"path": "..\\b"}, "not a plain relative"),
        ({"path": "a\x00b"}, "not a plain relative"),
        ({"path": "vae"}, "a file and a directory"),
        ({"path": "vae/config.json"}, "there twice"),
        ({"size_bytes": -1}, "its size is -1"),
        ({"url": ""}, "no URL"),
        ({"url": "file:///etc/passwd"}, "no URL"),
        ({"blake3": "zz"}, "not 64 hex digits"),
        ({"blake3": "../../../../x"}, "not 64 hex digits"),
        ({"size_bytes": "many"}, "broken"),
    ],
)
async def test_bad_manifests_are_refused(hub: DevHub, tmp_path: Path, change: dict[str, Any], words: str) -> None:
    hub.put("org/repo", FILES)
    hub.change_manifest = lambda files: files[0].update(change)
    async with rig(hub, tmp_path / "cache") as our:
        with pytest.raises(FatalError, match=words):
            await our.fetch("org/repo")
    assert not hub.requests("/store/")
    assert [path.name for path in tmp_path.rglob("*")] in ([], ["cache"])


@pytest.mark.parametrize("digest", ["../../x", "", "g" * 64, "a/b"])
async def test_bad_snapshot_digests_are_refused(hub: DevHub, tmp_path: Path, digest: str) -> None:
    hub.snapshots[digest] = FILES
    hub.tags["org/repo"] = {"latest": digest}
    async with rig(hub, tmp_path) as our:
        with pytest.raises(FatalError, match="not a hex digest"):
            await our.fetch("org/repo")


# -- what the store may do ---------------------------------------------------------------------------


async def test_cut_at_every_offset(hub: DevHub, tmp_path: Path) -> None:
    data = bytes(range(64))
    cuts: list[int] = []

    def cut(asked: Asked) -> Answer | None:
        start = int(asked.headers.get("Range", "bytes=0-")[6:-1])
        if not asked.is_store or start >= len(data) or len(cuts) > len(data):
            return None
        cuts.append(start)
        status, headers = (206, {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}) if start else (200, {})
        return Answer(status, data[start:], headers, cut_at=1)

    hub.put("org/repo", {"f": data})
    hub.on_request = cut
    async with rig(hub, tmp_path) as our:
        found = await our.fetch("org/repo")
        assert content(found.root_dir) == {"f": data}
    assert cuts == list(range(64)), "each attempt went on where the last one ended, however many there were"


async def test_each_single_cut_is_resumed_by_a_range(hub: DevHub, tmp_path: Path) -> None:
    files = {f"f{number}": bytes([number]) * 20 for number in range(20)}

    def cut(asked: Asked) -> Answer | None:
        if not asked.is_store or asked.number > 1:
            return None
        data = hub.store[asked.path.partition("/store/")[2].partition("?")[0]]
        return Answer(200, data, cut_at=data[0])

    hub.put("org/repo", files)
    hub.on_request = cut
    async with rig(hub, tmp_path) as our:
        assert content((await our.fetch("org/repo")).root_dir) == files
    ranges = [each.headers["Range"] for each in hub.requests("/store/") if "Range" in each.headers]
    assert sorted(ranges) == sorted(f"bytes={number}-" for number in range(1, 20))


async def test_a_cut_that_never_gets_on_is_given_up(hub: DevHub, tmp_path: Path) -> None:
    hub.put("org/repo", {"f": b"w" * 5000})
    hub.on_request = lambda asked: Answer(200, b"w" * 5000, cut_at=0) if asked.is_store else None
    async with rig(hub, tmp_path) as our:
        with pytest.raises(RetryableError, match="given up after 4 attempts"):
            await our.fetch("org/repo")
        assert our.cozy.models() == []


async def leave_part(our: Rig, data: bytes, part: bytes) -> Path:
    blob = our.store.blob(blake3(data).hexdigest())
    blob.parent.mkdir(parents=True)
    path = blob.with_name(f"{blob.name}.part")
    path.write_bytes(part)
    return path


DATA = bytes(range(256)) * 40


@pytest.mark.parametrize(
    ("part", "ranges"),
    [
        (DATA[:1000], ["bytes=1000-"]),
        (DATA, []),
        (DATA + b"x", [""]),
        (b"another version of it", ["bytes=21-", ""]),
        (b"z" * len(DATA), [""]),
        (b"", [""]),
    ],
    ids=["resumed", "whole", "larger", "other version", "other version, same size", "empty"],
)
async def test_a_part_that_was_left(hub: DevHub, tmp_path: Path, part: bytes, ranges: list[str]) -> None:
    hub.put("org/repo", {"f": DATA})
    async with rig(hub, tmp_path) as our:
        await leave_part(our, DATA, part)
        found = await our.fetch("org/repo")
        assert content(found.root_dir) == {"f": DATA}
        assert our.parts() == []
    assert [each.headers.get("Range", "") for each in hub.requests("/store/")] == ranges


@pytest.mark.parametrize(
    "answer",
    [
        Answer(200, DATA),
        Answer(416),
        Answer(206, DATA[5:], {"Content-Range": f"bytes 5-{len(DATA) - 1}/{len(DATA)}"}),
        Answer(206, DATA[1000:]),
    ],
    ids=["200 for a range", "416", "another range", "no Content-Range"],
)
async def test_a_range_that_is_not_granted_starts_from_zero(hub: DevHub, tmp_path: Path, answer: Answer) -> None:
    hub.put("org/repo", {"f": DATA})
    hub.on_request = lambda asked: answer if asked.is_store and "Range" in asked.headers else None
    async with rig(hub, tmp_path) as our:
        await leave_part(our, DATA, DATA[:1000])
        assert content((await our.fetch("org/repo")).root_dir) == {"f": DATA}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"z" * len(DATA), "f of cozy:org/repo:latest is corrupt: blake3 is "),
        (DATA[:-1], f"another size: {len(DATA) - 1} bytes, the manifest says {len(DATA)}"),
        (DATA + b"x", "another size"),
    ],
    ids=["wrong digest", "too short", "too long"],
)
async def test_what_is_not_as_promised_is_never_served(hub: DevHub, tmp_path: Path, body: bytes, words: str) -> None:
    hub.put("org/repo", {"f": DATA, "g": b"fine"})
    name = blake3(DATA).hexdigest()
    hub.on_request = lambda asked: Answer(200, body) if name in asked.path else None
    async with rig(hub, tmp_path) as our:
        with pytest.raises(RetryableError, match=words):
            await our.fetch("org/repo")
        assert len(hub.requests(name)) == 3
        assert [each for each in our.blobs() if name in each] == []
        assert our.cozy.models() == []
        hub.on_request = lambda asked: Answer(200, body) if name in asked.path and asked.number == 4 else None
        assert content((await our.fetch("org/repo")).root_dir)["f"] == DATA, "one bad answer is got over"


async def test_an_endless_body_is_cut_off(hub: DevHub, tmp_path: Path) -> None:
    hub.put("org/repo", {"f": DATA})
    chunked = Answer(200, b"2800\r\n" + DATA + b"\r\n5\r\nmore!\r\n0\r\n\r\n", {"Transfer-Encoding": "chunked"})
    hub.on_request = lambda asked: chunked if asked.is_store else None
    async with rig(hub, tmp_path) as our:
        with pytest.raises(RetryableError, match=f"larger than the {len(DATA)} bytes|connection failed"):
            await our.fetch("org/repo")


@pytest.mark.parametrize("status", [400, 403])
async def test_expired_urls_are_resolved_again(hub: DevHub, tmp_path: Path, status: int) -> None:
    files = {f"f{number}": bytes([number]) * 100 for number in range(6)}
    hub.put("org/repo", files)
    expired: list[str] = []

    def answer(asked: Asked) -> Answer | None:
        if asked.is_store and "generation=0" in asked.path:
            expired.append(asked.path)
            hub.generation = 1
            return Answer(status)
        return None

    hub.on_request = answer
    async with rig(hub, tmp_path) as our:
        assert content((await our.fetch("org/repo")).root_dir) == files
    assert expired
    assert len(hub.requests("resolve_artifact")) == 2, "files that expired together ask once"


async def test_a_moved_tag_does_not_mix_versions(hub: DevHub, tmp_path: Path) -> None:
    first = hub.put("org/repo", FILES)

    def move(asked: Asked) -> Answer | None:
        if asked.is_store and hub.generation == 0:
            hub.put("org/repo", {"other": b"other"})
            hub.generation = 1
        return None

    hub.on_request = move
    async with rig(hub, tmp_path) as our:
        found = await our.fetch("org/repo")
        assert found.root_dir.endswith(first)
        assert content(found.root_dir) == FILES


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (401, AuthError, "fresh URLs too"),
        (403, AuthError, "fresh URLs too"),
        (404, FatalError, "404"),
        (451, FatalError, "451"),
    ],
)
async def test_what_the_store_refuses_for_good(
    hub: DevHub, tmp_path: Path, status: int, kind: type[WorkerError], words: str
) -> None:
    hub.put("org/repo", {"f": DATA})
    hub.on_request = lambda asked: Answer(status) if asked.is_store else None
    async with rig(hub, tmp_path) as our:
        with pytest.raises(kind, match=words):
            await our.fetch("org/repo")


@pytest.mark.parametrize("status", [408, 429, 500, 503])
async def test_a_store_that_has_a_bad_moment(hub: DevHub, tmp_path: Path, status: int) -> None:
    hub.put("org/repo", FILES)
    hub.on_request = lambda asked: (
        Answer(status, headers={"Retry-After": "0"}) if asked.is_store and asked.number <= 3 else None
    )
    async with rig(hub, tmp_path) as our:
        assert content((await our.fetch("org/repo")).root_dir) == FILES


async def test_a_store_that_hangs_is_left_and_resumed(hub: DevHub, tmp_path: Path) -> None:
    hub.put("org/repo", {"f": DATA})
    hub.on_request = lambda asked: Answer(hang=True) if asked.is_store and asked.number == 1 else None
    async with rig(hub, tmp_path, http_timeout_s=0.2) as our:
        assert content((await our.fetch("org/repo")).root_dir) == {"f": DATA}


# -- together ----------------------------------------------------------------------------------------


async def test_requests_for_one_model_share_one_download(hub: DevHub, tmp_path: Path) -> None:
    hub.put("org/repo", FILES)
    async with rig(hub, tmp_path) as our:
        found = await asyncio.gather(*(our.fetch(ref) for ref in ("org/repo", "cozy:org/repo", "org/repo:latest") * 3))
        assert len({each.root_dir for each in found}) == 1
    assert len(hub.requests("resolve_artifact")) == 1
    assert len(hub.requests("/store/")) == len(FILES)


async def test_it_is_stopped_when_the_last_waiter_leaves(hub: DevHub, tmp_path: Path) -> None:
    hub.put("org/repo", FILES)
    hub.on_request = lambda asked: Answer(hang=True) if asked.is_store else None
    async with rig(hub, tmp_path) as our:
        waiters = [asyncio.create_task(our.fetch("org/repo")) for _ in range(2)]
        await until(lambda: len(hub.requests("/store/")) == 3, WAIT_S)
        flight = our.models._flights["cozy:org/repo:latest"]
        waiters[0].cancel()
        await asyncio.wait([waiters[0]])
        assert not flight.task.done()
        waiters[1].cancel()
        await asyncio.wait([waiters[1]])
        assert flight.task.cancelled()
        assert our.models._flights == {}
        hub.on_request = lambda _: None
        await our.fetch("org/repo")


async def test_no_more_models_at_once_than_allowed(hub: DevHub, tmp_path: Path) -> None:
    for number in range(4):
        hub.put(f"org/r{number}", {"f": bytes([number]) * 10})
    hub.on_request = lambda asked: Answer(hang=True) if asked.is_store else None
    async with rig(hub, tmp_path, max_concurrent_downloads=2) as our:
        waiters = [asyncio.create_task(our.fetch(f"org/r{number}")) for number in range(4)]
        await until(lambda: len(hub.requests("/store/")) == 2, WAIT_S)
        await asyncio.sleep(0.05)  # for a third to show, if it did start
        assert len(hub.requests("resolve_artifact")) == 2
        for waiter in waiters:
            waiter.cancel()
        await asyncio.wait(waiters)


async def test_workers_that_share_a_cache_share_downloads(hub: DevHub, tmp_path: Path) -> None:
    hub.put("org/repo", FILES)
    hub.put("org/other", {**FILES, "more": b"more"})
    async with rig(hub, tmp_path) as first, rig(hub, tmp_path) as second:
        refs = ("org/repo", "org/other")
        await asyncio.gather(*(worker.fetch(ref) for worker in (first, second) for ref in refs))
        assert content((await second.fetch("org/other")).root_dir) == {**FILES, "more": b"more"}
    gets = [each.path for each in hub.requests("/store/")]
    assert len(gets) == len(set(gets)) == len(FILES) + 1, "each blob came once"


# -- later -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["truncated", "overwritten", "longer", "missing"])
async def test_a_blob_that_is_corrupted_later_is_found_and_replaced(hub: DevHub, tmp_path: Path, harm: str) -> None:
    hub.put("org/repo", FILES)
    async with rig(hub, tmp_path) as our:
        found = await our.fetch("org/repo")
        victim = Path(found.root_dir) / "unet/weights.safetensors"
        if harm == "missing":
            victim.unlink()
        else:
            with victim.open("r+b") as file:  # root may, though it is read-only
                file.truncate(10) if harm == "truncated" else file.seek(0, 2 if harm == "longer" else 0)
                file.write(b"x")
        assert our.cozy.models() == [], "it is not called whole"
        assert content((await our.fetch("org/repo")).root_dir) == FILES
        assert len(our.cozy.models()) == 1


async def test_a_blob_that_was_only_touched_is_verified_and_kept(hub: DevHub, tmp_path: Path) -> None:
    hub.put("org/repo", FILES)
    async with rig(hub, tmp_path) as our:
        found = await our.fetch("org/repo")
        os.utime(Path(found.root_dir) / "model_index.json", ns=(1, 1))
        await our.fetch("org/repo")
        assert len(hub.requests("/store/")) == len(FILES)
        assert len(our.cozy.models()) == 1


async def test_removal(hub: DevHub, tmp_path: Path) -> None:
    hub.put("org/repo", FILES)
    hub.put("org/other", {**FILES, "more": b"12345"})
    async with rig(hub, tmp_path) as our:
        found = await our.fetch("org/repo")
        await our.fetch("org/other")
        with in_use(found), pytest.raises(ResourceError, match="it is in use"):
            await our.models.remove(RemoveModel("org/repo"), lambda *_: None)
        assert (await our.models.remove(RemoveModel("org/other"), lambda *_: None)).freed_bytes == 5
        assert content(found.root_dir) == FILES
        assert (await our.models.remove(RemoveModel("org/repo"), lambda *_: None)).freed_bytes == found.size_bytes
        assert our.blobs() == []
        with pytest.raises(ValidationError, match="cozy:org/repo:latest is not on this disk"):
            await our.models.remove(RemoveModel("org/repo"), lambda *_: None)


@contextmanager
def in_use(model: ModelFiles) -> Iterator[None]:
    fd = os.open(model.lock_file, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_SH)
        yield
    finally:
        os.close(fd)


async def test_the_least_recently_used_goes_first_and_what_is_in_use_never(hub: DevHub, tmp_path: Path) -> None:
    for number in range(5):
        hub.put(f"org/r{number}", {"f": bytes([number]) * 1000, "shared": b"s" * 100})
    async with rig(hub, tmp_path, model_cache_max_bytes=3200) as our:
        models = [await our.fetch(f"org/r{number}") for number in range(3)]
        for age, model in zip((30, 20, 10), models, strict=True):
            os.utime(model.lock_file, (1000 - age, 1000 - age))
        with in_use(models[0]):
            await our.fetch("org/r3")
            assert our.removed == ["cozy:org/r1:latest"]
            assert content(models[0].root_dir)["f"] == bytes(1000)
        assert our.store.used_bytes() <= 3200
        await our.fetch("org/r4")
        assert our.removed == ["cozy:org/r1:latest", "cozy:org/r0:latest"]
        hub.put("org/huge", {"f": b"h" * 4000})
        with pytest.raises(ResourceError, match=r"no room on disk: .*WORKER_MODEL_CACHE_MAX_GB"):
            await our.fetch("org/huge")
        assert len(our.cozy.models()) == 3, "nothing is removed in vain"
        hub.put("org/large", {"f": b"l" * 2500})
        with in_use(our.cozy.models()[0]), pytest.raises(ResourceError, match="1 models that are in use were not"):
            await our.fetch("org/large")


async def test_without_a_budget_the_disk_is_the_limit(hub: DevHub, tmp_path: Path) -> None:
    hub.put("org/a", {"f": b"a" * 1000})
    hub.put("org/b", {"f": b"b" * 1000})
    store = Store(str(tmp_path))

    def disk_usage(_: Path) -> SimpleNamespace:
        used = 8000 + store.used_bytes()
        return SimpleNamespace(total=10_000, used=used, free=10_000 - used)

    async with rig(hub, tmp_path, disk_usage=disk_usage) as our:
        await our.fetch("org/a")
        await our.fetch("org/b")
        assert our.removed == ["cozy:org/a:latest"], "1000 more bytes would be over 95 %"
        hub.put("org/c", {"f": b"c" * 1600})
        with pytest.raises(ResourceError, match="the disk is too full"):
            await our.fetch("org/c")


async def test_what_interrupted_downloads_left_goes_before_models(hub: DevHub, tmp_path: Path) -> None:
    hub.put("org/a", {"f": b"a" * 1000})
    hub.put("org/b", {"f": b"b" * 1000})
    async with rig(hub, tmp_path, model_cache_max_bytes=2500) as our:
        await our.fetch("org/a")
        part = await leave_part(our, b"gone", b"p" * 1000)
        stale = our.store.staging / ("1" * 64)
        stale.mkdir()
        (stale / "f").write_bytes(b"x")
        await our.fetch("org/b")
        assert our.removed == []
        assert not part.exists()
        assert not stale.exists()


# -- a full disk -------------------------------------------------------------------------------------


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """No file of this process may grow beyond it: the kernel's own way to refuse a write."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


async def test_a_write_that_is_refused_frees_what_was_written(hub: DevHub, tmp_path: Path) -> None:
    hub.put("org/kept", {"small": b"kept"})
    hub.put("org/repo", {"big": b"b" * 300_000, "small": b"kept", "own": b"own"})
    async with rig(hub, tmp_path) as our:
        await our.fetch("org/kept")
        with file_size_limit(100_000), pytest.raises(ResourceError, match="is full: File too large"):
            await our.fetch("org/repo")
        assert our.blobs() == [blake3(b"kept").hexdigest()]
        assert list(our.store.staging.iterdir()) == []
        await our.fetch("org/repo")
