"""Runs' files as the transfer process moves them: the real handlers, a real store over HTTP, real descriptors."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from gen_worker.errors import AuthError, RetryableError, ValidationError
from gen_worker.pipe.messages import LocalFile
from gen_worker.testing.mock_orchestrator import FileRequest, FileStoreServer
from supervisor.transfers import descriptors as descriptors_module
from supervisor.transfers.clients import open_client
from supervisor.transfers.descriptors import Descriptors
from supervisor.transfers.files import Files
from supervisor.transfers.messages import (
    FetchInputs,
    FileAccess,
    FileSettings,
    InputsFetched,
    RemoveInputs,
    RetrySettings,
    StoreOutput,
)
from supervisor.transfers.upload_source import UploadSource
from supervisor.transfers.web import PublicWeb
from tests.support.tcp_proxy import Cut, TcpProxy
from tests.unit.test_web import Names, Server, loopback_too

TOKEN = "secret-token"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40
QUICK = RetrySettings(first_s=0.001, max_s=0.002)
KIB = 1024


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStoreServer]:
    with FileStoreServer(tmp_path / "store", token=TOKEN) as store:
        yield store


@pytest.fixture
def root(tmp_path: Path, store: FileStoreServer) -> Path:
    return tmp_path / "store"


class Rig:
    """The handlers of one transfer process, and an executor's side of the descriptor socket."""

    def __init__(self, files: Files, name: str, tmp_path: Path) -> None:
        self.files = files
        self.name = name
        self.cache = tmp_path / "cache" / "inputs"
        self.run_dir = tmp_path / "run"

    async def fetch(self, access: FileAccess, *refs: str, directory: str = "run-1", number: int = 1) -> InputsFetched:
        return await self.files.fetch(FetchInputs(directory, number, refs, access), no_progress)

    async def fetch_one(self, access: FileAccess, ref: str, **where: Any) -> LocalFile:
        got = await self.fetch(access, ref, **where)
        assert got.failure is None, got.failure
        return got.files[0]

    async def failure(self, access: FileAccess, *refs: str) -> tuple[str, str]:
        got = await self.fetch(access, *refs)
        assert got.failure is not None
        return got.failure.error_type, got.failure.safe_message

    async def save(self, access: FileAccess, ref: str, path: Path, *, create: bool = False) -> LocalFile:
        with hand_over(self.name, path) as ticket:
            return (await self.files.store(StoreOutput(ref, ticket, create, access), no_progress)).file

    def cached(self) -> list[Path]:
        return [path for path in self.cache.rglob("*") if path.is_file()]


class hand_over:  # noqa: N801  (used as a function)
    """Open a file and send it, as an executor does."""

    def __init__(self, name: str, path: Path | int) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.connect(f"\0{name}")
        self._ticket = secrets.token_bytes(16)
        fd = path if isinstance(path, int) else os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        socket.send_fds(self._socket, [self._ticket], [fd])
        os.close(fd)

    def __enter__(self) -> bytes:
        return self._ticket

    def __exit__(self, *exc: object) -> None:
        self._socket.close()


def no_progress(_done: int, _total: int, _rate: float) -> None:
    pass


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@asynccontextmanager
async def make(tmp_path: Path, *, max_input: int = 0, max_upload: int = 0, **web: Any) -> AsyncIterator[Rig]:
    name = f"test-{secrets.token_hex(8)}"
    settings = FileSettings(str(tmp_path / "cache"), str(tmp_path / "run"), max_input, max_upload, name, os.geteuid())
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(open_client(20, keep=4))
        public = PublicWeb(timeout_s=20, **web)
        stack.push_async_callback(public.close)
        descriptors = Descriptors(name, settings.executor_uid)
        stack.callback(descriptors.close)
        yield Rig(Files(settings, QUICK, client=client, web=public, descriptors=descriptors), name, tmp_path)


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with make(tmp_path) as rig:
        yield rig


@pytest.fixture
def access(store: FileStoreServer) -> FileAccess:
    return FileAccess(store.url, TOKEN, "tenant")


# -- inputs ---------------------------------------------------------------------------------------


async def test_an_input(rig: Rig, root: Path, store: FileStoreServer, access: FileAccess) -> None:
    (root / "in").mkdir()
    (root / "in" / "ä b?.png").write_bytes(PNG)
    file = await rig.fetch_one(access, "in/ä b?.png")
    path = rig.run_dir / "run-1" / "inputs" / "1-0-ä_b_.png"
    assert file == LocalFile(str(path), len(PNG), sha256(PNG), "image/png")
    assert path.read_bytes() == PNG
    (cached,) = rig.cached()
    assert cached.samefile(path)
    assert (cached.name, cached.stat().st_mode & 0o777) == (sha256(PNG), 0o444)
    assert {(request.method, request.tenant_id, request.authorization) for request in store.requests} == {
        ("HEAD", "tenant", f"Bearer {TOKEN}"), ("GET", "tenant", f"Bearer {TOKEN}"),
    }  # fmt: skip
    await rig.files.remove(RemoveInputs("run-1"), no_progress)
    assert list(rig.run_dir.iterdir()) == []
    assert cached.read_bytes() == PNG


async def test_many_inputs_in_parallel(rig: Rig, root: Path, store: FileStoreServer, access: FileAccess) -> None:
    """Each GET is answered only when several are there: one after the other none would ever be."""
    together = threading.Barrier(4)
    for number in range(8):
        (root / f"{number}.txt").write_bytes(bytes([number]) * 100)

    def intercept(request: FileRequest) -> None:
        if request.method == "GET":
            together.wait(20)

    store.intercept = intercept
    got = await rig.fetch(access, *(f"{number}.txt" for number in range(8)))
    assert [Path(file.path).read_bytes()[0] for file in got.files] == list(range(8))
    assert {file.mime_type for file in got.files} == {"text/plain"}


async def test_what_was_fetched_before_is_not_fetched_again(
    rig: Rig, root: Path, store: FileStoreServer, access: FileAccess
) -> None:
    (root / "a.png").write_bytes(PNG)
    (root / "b.dat").write_bytes(PNG)
    await rig.fetch_one(access, "a.png")
    for directory, ref in (("run-2", "a.png"), ("run-3", "b.dat")):
        file = await rig.fetch_one(access, ref, directory=directory)
        assert (Path(file.path).read_bytes(), file.mime_type) == (PNG, "image/png")
    assert [request.method for request in store.requests] == ["HEAD", "GET", "HEAD", "HEAD"]
    (root / "a.png").write_bytes(b"new")
    assert (await rig.fetch_one(access, "a.png", directory="run-4")).sha256 == sha256(b"new")


async def test_two_at_once_share_one_download(rig: Rig, root: Path, store: FileStoreServer, access: FileAccess) -> None:
    (root / "a.png").write_bytes(PNG)
    files = await asyncio.gather(*(rig.fetch_one(access, "a.png", directory=f"run-{n}") for n in range(5)))
    assert [Path(file.path).read_bytes() for file in files] == [PNG] * 5
    assert [request.method for request in store.requests].count("GET") == 1


async def test_a_cached_file_that_somebody_changed_is_fetched_again(
    rig: Rig, root: Path, store: FileStoreServer, access: FileAccess
) -> None:
    (root / "a.png").write_bytes(PNG)
    await rig.fetch_one(access, "a.png")
    (cached,) = rig.cached()
    cached.chmod(0o644)
    cached.write_bytes(b"poisoned")
    file = await rig.fetch_one(access, "a.png", directory="run-2")
    assert Path(file.path).read_bytes() == PNG
    assert [request.method for request in store.requests].count("GET") == 2


@pytest.mark.parametrize("digest_header", [True, False])
async def test_no_tenant_gets_what_another_has_cached(
    tmp_path: Path, rig: Rig, root: Path, store: FileStoreServer, digest_header: bool
) -> None:
    """Whatever the store says of a file, it is fetched anew for each tenant, with that tenant's own token."""
    (root / "secret.txt").write_bytes(b"of one")
    one, other = (FileAccess(store.url, TOKEN, tenant) for tenant in ("one", "other"))
    await rig.fetch_one(one, "secret.txt")
    if not digest_header:
        store.intercept = lambda request: 405 if request.method == "HEAD" else None
    gets = [request.method for request in store.requests].count("GET")
    file = await rig.fetch_one(other, "secret.txt", directory="run-2")
    assert [request.method for request in store.requests].count("GET") == gets + 1
    assert len(rig.cached()) == 2
    assert len({path.parents[1] for path in rig.cached()}) == 2
    assert Path(file.path).read_bytes() == b"of one"
    store.intercept = lambda request: 403 if request.tenant_id == "other" else None
    assert await rig.failure(other, "secret.txt") == ("auth", "the file store refused access (403)")


async def test_a_store_that_lies_about_the_digest_can_not_hand_out_another_tenants_file(
    rig: Rig, root: Path, access: FileAccess
) -> None:
    """A store of the tenant's own that names the digest of another's file gets nothing out of the cache."""
    (root / "secret.txt").write_bytes(b"secret")
    await rig.fetch_one(access, "secret.txt")
    headers = {"X-Cozy-SHA256": sha256(b"secret"), "X-Cozy-Size-Bytes": "6"}
    server = Server()
    server.answers["/api/v1/file/x"] = (200, headers, b"public")
    await server.start()
    liar = FileAccess(f"http://127.0.0.1:{server.port}", "", "other")
    kind, words = await rig.failure(liar, "x")
    server.server.close()
    assert kind == "retryable"
    assert words.startswith(f"its bytes have SHA-256 {sha256(b'public')}, the file store says {sha256(b'secret')}")
    assert len(rig.cached()) == 1


@pytest.mark.parametrize("size_header", [True, False])
async def test_an_input_over_the_limit(
    tmp_path: Path, root: Path, store: FileStoreServer, access: FileAccess, size_header: bool
) -> None:
    (root / "big").write_bytes(b"x" * 1001)
    (root / "fits").write_bytes(b"x" * 1000)
    if not size_header:
        store.intercept = lambda request: 405 if request.method == "HEAD" else None
    async with make(tmp_path, max_input=1000) as rig:
        await rig.fetch_one(access, "fits")
        words = "it has 1001 bytes or more, over the limit WORKER_MAX_INPUT_FILE_BYTES=1000"
        assert await rig.failure(access, "big") == ("validation", words)
        assert len(rig.cached()) == 1
    assert any(request.method == "GET" and request.ref == "big" for request in store.requests) != size_header


async def test_the_first_failure_is_told_with_its_file(rig: Rig, root: Path, access: FileAccess) -> None:
    (root / "a").write_bytes(b"a")
    got = await rig.fetch(access, "a", "none", "a")
    assert got.failure is not None
    assert (got.files, got.failed, got.failure.error_type) == ((), 1, "validation")
    assert got.failure.safe_message == "the file store has no such file"


@pytest.mark.parametrize("ref", ["", "/etc/passwd", "../x", "a//b", "a/../b", "a\\b", "a\nb", "x" * 5000])
async def test_refs_that_are_none(rig: Rig, store: FileStoreServer, access: FileAccess, ref: str) -> None:
    kind, words = await rig.failure(access, ref)
    assert kind == "validation"
    assert words.startswith("its ref ")
    assert not store.requests


async def test_without_a_store(rig: Rig) -> None:
    words = "the run names no file store, and this worker has none"
    assert await rig.failure(FileAccess(""), "a") == ("validation", words)


async def test_a_connection_that_is_cut_is_tried_again(
    rig: Rig, root: Path, store: FileStoreServer, access: FileAccess
) -> None:
    data = os.urandom(2 * KIB * KIB)
    (root / "a.bin").write_bytes(data)
    cuts = Cut(down=0), Cut(down=100), Cut(down=KIB * KIB)
    async with TcpProxy(store.url, *cuts) as proxy:
        file = await rig.fetch_one(FileAccess(proxy.url, TOKEN), "a.bin")
    assert Path(file.path).read_bytes() == data
    assert [path.name for path in rig.cached()] == [sha256(data)]


async def test_a_store_that_stays_broken(rig: Rig, store: FileStoreServer, access: FileAccess) -> None:
    store.intercept = lambda _: 503
    assert await rig.failure(access, "a") == ("retryable", "the file store answered 503")
    assert len(store.requests) == 5


async def test_an_input_from_the_web(tmp_path: Path) -> None:
    server = Server()
    await server.start()
    server.answers["/p/a.png?sig=1"] = (200, {"X-Cozy-SHA256": sha256(b"?"), "Content-Type": "text/html"}, PNG)
    async with make(tmp_path, resolve=Names(a_example=[["127.0.0.1"]]), allowed=loopback_too) as rig:
        url = f"http://a.example:{server.port}/p/a.png?sig=1"
        for run in ("run-1", "run-2"):
            file = await rig.fetch_one(FileAccess("", "", "tenant"), url, directory=run)
            assert (Path(file.path).name, file.mime_type, file.sha256) == ("1-0-a.png", "image/png", sha256(PNG))
            assert Path(file.path).read_bytes() == PNG
        assert len(server.requests) == 2  # nothing that its server says spares a fetch
    server.server.close()


async def test_a_private_url(rig: Rig, access: FileAccess, store: FileStoreServer) -> None:
    kind, words = await rig.failure(access, f"{store.url}/api/v1/file/a")
    assert (kind, words) == ("validation", "its host 127.0.0.1 is not on the public internet")
    assert not store.requests


async def test_a_cancel_stops_a_download_at_once(
    rig: Rig, root: Path, store: FileStoreServer, access: FileAccess
) -> None:
    (root / "a").write_bytes(PNG)
    reached, release = threading.Event(), threading.Event()

    def intercept(request: FileRequest) -> None:
        if request.method == "GET":
            reached.set()
            release.wait(20)

    store.intercept = intercept
    task = asyncio.create_task(rig.fetch(access, "a"))
    assert await asyncio.to_thread(reached.wait, 20)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    release.set()
    await rig.files.remove(RemoveInputs("run-1"), no_progress)
    assert rig.cached() == []


async def test_what_a_killed_worker_left_is_swept_away(rig: Rig, root: Path, access: FileAccess) -> None:
    """Runs of the worker that lives are not: neither this process's nor those of its predecessor."""
    (root / "a").write_bytes(b"a")
    for run in ("dead", "young", "locked"):
        await rig.fetch_one(access, "a", directory=run)
    for run in ("dead", "young"):
        os.close(rig.files._runs._own.pop(run))
    for run in ("dead", "locked"):
        os.utime(rig.run_dir / run, (1000, 1000))
    (rig.run_dir / "not-a-run").mkdir()
    part = rig.files._cache.new_file("tenant")
    part.write_bytes(b"half")
    os.utime(part, (1000, 1000))
    assert rig.files._runs.sweep(2000.0) == 1
    rig.files._cache.sweep(2000.0)
    assert sorted(path.name for path in rig.run_dir.iterdir()) == ["locked", "not-a-run", "young"]
    assert [path.read_bytes() for path in rig.cached()] == [b"a"]


async def test_a_web_server_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervisor.transfers.files.WEB_S", 0.05)
    server = Server()
    await server.start()
    server.answers["/a"] = (200, {"Content-Length": "10"}, b"")
    server.hold = asyncio.Event()
    async with make(tmp_path, resolve=Names(a_example=[["127.0.0.1"]]), allowed=loopback_too) as rig:
        kind, words = await rig.failure(FileAccess(""), f"http://a.example:{server.port}/a")
    assert (kind, words) == ("retryable", "its server took longer than 0 s")
    server.hold.set()
    while server.open:
        await asyncio.sleep(0.001)
    server.server.close()


async def test_the_disk_is_not_filled(
    rig: Rig, root: Path, access: FileAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a disk of 1000 bytes, 950 of which may be used, what was not used for longest goes."""
    for name in "abc":
        (root / name).write_bytes(name.encode() * 300)

    def usage(_: object) -> Any:
        used = sum(path.stat().st_size for path in rig.cached() if path.suffix != ".part")
        return type("Usage", (), {"total": 1000, "free": 1000 - used})

    monkeypatch.setattr("shutil.disk_usage", usage)
    for number, name in enumerate("abc"):
        file = await rig.fetch_one(access, name)
        os.utime(file.path, (number, number))
    assert {path.read_bytes()[:1] for path in rig.cached()} == {b"a", b"b", b"c"}
    (root / "d").write_bytes(b"d" * 300)
    await rig.fetch_one(access, "d")
    assert {path.read_bytes()[:1] for path in rig.cached()} == {b"b", b"c", b"d"}


# -- outputs --------------------------------------------------------------------------------------


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture"
    path.write_bytes(PNG)
    return path


async def test_an_output(rig: Rig, root: Path, store: FileStoreServer, access: FileAccess, picture: Path) -> None:
    assert await rig.save(access, "runs/r/outputs/ä.x", picture) == LocalFile("", len(PNG), sha256(PNG), "image/png")
    assert (root / "runs/r/outputs/ä.x").read_bytes() == PNG
    (request,) = store.requests
    assert (request.method, request.tenant_id, request.authorization) == ("PUT", "tenant", f"Bearer {TOKEN}")
    empty = picture.with_name("empty")
    empty.touch()
    assert await rig.save(access, "e.txt", empty) == LocalFile("", 0, sha256(b""), "text/plain")


async def test_create_and_overwrite(rig: Rig, root: Path, access: FileAccess, picture: Path) -> None:
    await rig.save(access, "a", picture, create=True)
    other = picture.with_name("other")
    other.write_bytes(b"other")
    for path in (other, picture):  # the same bytes are no excuse: this create did not store them
        with pytest.raises(ValidationError, match="it exists already"):
            await rig.save(access, "a", path, create=True)
    assert (root / "a").read_bytes() == PNG
    await rig.save(access, "a", other)
    assert (root / "a").read_bytes() == b"other"


@pytest.mark.parametrize("create", [False, True])
async def test_an_upload_that_is_cut_in_the_middle(
    rig: Rig, root: Path, store: FileStoreServer, tmp_path: Path, create: bool
) -> None:
    data = os.urandom(2 * KIB * KIB)
    path = tmp_path / "data"
    path.write_bytes(data)
    async with TcpProxy(store.url, Cut(up=KIB * KIB), Cut(up=KIB * KIB + 9)) as proxy:
        stored = await rig.save(FileAccess(proxy.url, TOKEN), "a", path, create=create)
    assert (stored.sha256, stored.size_bytes) == (sha256(data), len(data))
    assert (root / "a").read_bytes() == data


@pytest.mark.parametrize(("create", "methods"), [(False, ["PUT", "PUT"]), (True, ["POST", "HEAD"])])
async def test_an_upload_whose_answer_is_lost(
    rig: Rig, root: Path, store: FileStoreServer, picture: Path, create: bool, methods: list[str]
) -> None:
    """A create must not be told that its own file is in its way."""
    async with TcpProxy(store.url, Cut(down=0)) as proxy:
        stored = await rig.save(FileAccess(proxy.url, TOKEN), "a", picture, create=create)
    assert (stored.sha256, stored.mime_type) == (sha256(PNG), "image/png")
    assert [request.method for request in store.requests] == methods
    assert (root / "a").read_bytes() == PNG


async def test_a_create_whose_answer_is_lost_at_a_store_without_head(
    rig: Rig, store: FileStoreServer, picture: Path
) -> None:
    """Then nothing tells the own file from another's: the honest answer is the store's."""
    store.intercept = lambda request: 405 if request.method == "HEAD" else None
    async with TcpProxy(store.url, Cut(down=0)) as proxy:
        with pytest.raises(ValidationError, match="it exists already"):
            await rig.save(FileAccess(proxy.url, TOKEN), "a", picture, create=True)


async def test_a_create_whose_answer_was_lost_while_another_took_the_ref(
    rig: Rig, root: Path, store: FileStoreServer, access: FileAccess, picture: Path
) -> None:
    def intercept(request: FileRequest) -> int | None:
        if request.method == "POST":
            (root / "a").write_bytes(b"another's")
            return 500
        return None

    store.intercept = intercept
    with pytest.raises(ValidationError, match="it exists already"):
        await rig.save(access, "a", picture, create=True)
    assert (root / "a").read_bytes() == b"another's"


@pytest.mark.parametrize(
    ("status", "error", "words", "requests"),
    [
        (401, AuthError, r"the file store refused access \(401\)", 1),
        (403, AuthError, r"the file store refused access \(403\)", 1),
        (413, ValidationError, r"too large for the file store \(413\)", 1),
        (400, ValidationError, "the file store answered 400", 1),
        (302, ValidationError, "the file store answered 302", 1),
        (500, RetryableError, "the file store answered 500", 5),
        (429, RetryableError, "the file store answered 429", 5),
    ],
)
async def test_answers_of_the_store(
    rig: Rig, store: FileStoreServer, access: FileAccess, picture: Path, status: int, error: type[Exception],
    words: str, requests: int,
) -> None:  # fmt: skip
    store.intercept = lambda _: status
    with pytest.raises(error, match=words):
        await rig.save(access, "a", picture)
    assert len(store.requests) == requests


async def test_a_store_that_recovers(
    rig: Rig, root: Path, store: FileStoreServer, access: FileAccess, picture: Path
) -> None:
    statuses = iter([503, 500, 429])
    store.intercept = lambda _: next(statuses, None)
    await rig.save(access, "a", picture)
    assert (root / "a").read_bytes() == PNG


async def test_a_store_that_is_not_there(rig: Rig, picture: Path) -> None:
    with pytest.raises(RetryableError, match="the file store can't be reached"):
        await rig.save(FileAccess("http://127.0.0.1:1"), "a", picture)
    with pytest.raises(ValidationError, match="the run names no file store"):
        await rig.save(FileAccess(""), "a", picture)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b'{"ref":"a","size_bytes":3,"sha256":"%s"}', "the file store has 3 bytes with SHA-256"),
        (b'{"ref":"a","size_bytes":5,"sha256":"00"}', "the file store has 5 bytes with SHA-256 00, 5 bytes with"),
        (b"<html>", "the file store's answer can't be read"),
        (b'{"size_bytes":"many"}', "the file store's answer can't be read"),
        (b" " * 70000, "the file store's answer is too long"),
    ],
)
async def test_answers_that_do_not_fit(rig: Rig, tmp_path: Path, answer: bytes, words: str) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer):  # also when the test is over before it
            await reader.readexactly(len(await reader.readuntil(b"\r\n\r\n")) and 5)
            body = answer.replace(b"%s", sha256(b"12345").encode())
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
            await writer.drain()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    path = tmp_path / "five"
    path.write_bytes(b"12345")
    with pytest.raises(RetryableError, match=words):
        await rig.save(FileAccess(url), "a", path)
    server.close()


async def test_limit(tmp_path: Path, store: FileStoreServer, access: FileAccess, picture: Path) -> None:
    async with make(tmp_path, max_upload=len(PNG) - 1) as rig:
        with pytest.raises(ValidationError, match="over the limit WORKER_MAX_UPLOAD_BYTES"):
            await rig.save(access, "a", picture)
    assert not store.requests


async def test_what_is_no_regular_file(rig: Rig, tmp_path: Path, access: FileAccess, store: FileStoreServer) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path, Path("/dev/zero")):
        with pytest.raises(ValidationError, match="it is not a regular file"):
            await rig.save(access, "a", path)
    with pytest.raises(ValidationError, match=r"it has more than the 0 bytes that it says"):
        await rig.save(access, "a", Path("/proc/self/status"))
    write_only = os.open(tmp_path / "w", os.O_WRONLY | os.O_CREAT)
    os.write(write_only, b"x")
    with (
        hand_over(rig.name, write_only) as ticket,
        pytest.raises(ValidationError, match="it can't be read: Bad file descriptor"),
    ):
        await rig.files.store(StoreOutput("a", ticket, False, access), no_progress)
    assert all(request.method != "PUT" or request.ref != "b" for request in store.requests)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda fd: os.ftruncate(fd, KIB * KIB), "it shrank from 3145728 to 1048576 bytes while it was stored"),
        (lambda fd: os.ftruncate(fd, 9 * KIB * KIB), "it was written to while it was stored"),
        (lambda fd: os.pwrite(fd, b"x", 0), "it was written to while it was stored"),
    ],
    ids=["shrinks", "grows", "changes"],
)
async def test_a_file_that_changes_while_it_is_read(tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * KIB * KIB))
    os.utime(path, (1, 1))
    with UploadSource(os.open(path, os.O_RDONLY), 0) as source:
        blocks = source.blocks()
        assert await anext(blocks) == bytes(KIB * KIB)
        fd = os.open(path, os.O_RDWR)
        change(fd)
        os.close(fd)
        rest = b""
        with pytest.raises(ValidationError, match=words):  # noqa: PT012  (the blocks before the last are fine)
            async for block in blocks:
                rest += block
    assert len(rest) < 2 * KIB * KIB  # so no store can take it for whole


async def test_an_upload_of_a_changed_file_leaves_nothing(
    rig: Rig, root: Path, tmp_path: Path, access: FileAccess, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(3 * KIB * KIB))
    check = UploadSource._check_unchanged

    def grow_first(source: UploadSource) -> None:
        with path.open("ab") as file:
            file.write(b"more")
        check(source)

    monkeypatch.setattr(UploadSource, "_check_unchanged", grow_first)
    with pytest.raises(ValidationError, match="it was written to while it was stored"):
        await rig.save(access, "a", path)
    assert not (root / "a").exists()


# -- descriptors ----------------------------------------------------------------------------------


async def test_a_file_may_come_after_it_is_asked_for(rig: Rig, access: FileAccess, picture: Path, root: Path) -> None:
    ticket = bytes(16)
    storing = asyncio.create_task(rig.files.store(StoreOutput("a", ticket, False, access), no_progress))
    await asyncio.sleep(0)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.connect(f"\0{rig.name}")
        with picture.open("rb") as file:
            socket.send_fds(connection, [ticket], [file.fileno()])
        await storing
    assert (root / "a").read_bytes() == PNG


async def test_files_that_nobody_asks_for_do_not_stay(rig: Rig, picture: Path) -> None:
    descriptors = rig.files._descriptors
    assert descriptors is not None
    before = set(Path("/proc/self/fd").iterdir())  # threads of an earlier test's server may still close some
    for _ in range(3):
        with hand_over(rig.name, picture):
            while not any(descriptors._waiting.values()):
                await asyncio.sleep(0.001)
        while descriptors._waiting:
            await asyncio.sleep(0.001)
    for message, fds in ((b"short", [0]), (b"x" * 17, [0]), (b"x" * 16, [0, 0]), (b"x" * 16, [])):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.connect(f"\0{rig.name}")
            socket.send_fds(connection, [message], fds)
            connection.setblocking(False)
            assert await asyncio.wait_for(asyncio.get_running_loop().sock_recv(connection, 1), 20) == b""
    # Listing them takes one, for a moment; it has the same number each time unless one of the others is new.
    assert set(Path("/proc/self/fd").iterdir()) <= before


async def test_a_file_that_does_not_come(rig: Rig) -> None:
    descriptors = rig.files._descriptors
    assert descriptors is not None
    with pytest.raises(RetryableError, match="did not reach the transfer process"):
        await descriptors.take(bytes(16), timeout_s=0.01)
    assert not descriptors._asked


async def test_files_of_another_user_are_refused(tmp_path: Path, picture: Path) -> None:
    name = f"test-other-user-{os.getpid()}"  # the names are those of the machine
    descriptors = Descriptors(name, os.geteuid() + 1)
    with hand_over(name, picture) as ticket:
        with pytest.raises(RetryableError, match="did not reach"):
            await descriptors.take(ticket, timeout_s=0.2)
        assert not descriptors._waiting
    descriptors.close()


def test_the_ticket_has_one_length() -> None:
    from executor import files as executor_files

    assert executor_files.TICKET_BYTES == descriptors_module.TICKET_BYTES


async def test_clients_read_no_environment_and_keep_no_cookies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    server = Server()
    await server.start()
    server.answers["/a"] = (200, {"Set-Cookie": "of=a-tenant"}, b"")
    async with open_client(20, keep=4) as client:
        for _ in range(2):
            assert (await client.get(f"http://127.0.0.1:{server.port}/a")).status_code == httpx.codes.OK
    server.server.close()
    assert all("cookie" not in headers for _, headers in server.requests)
