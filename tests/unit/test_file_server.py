"""The development file store over real HTTP."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import pytest

from gen_worker.testing.mock_orchestrator import FileRequest, FileStoreServer, ListenError

TOKEN = "secret"
MIB = 1024 * 1024


@pytest.fixture
def store(tmp_path: Path) -> Iterator[FileStoreServer]:
    with FileStoreServer(tmp_path / "store", token=TOKEN) as store:
        yield store


@pytest.fixture
def root(tmp_path: Path, store: FileStoreServer) -> Path:
    return tmp_path / "store"


@pytest.fixture
def client(store: FileStoreServer) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with httpx.Client(base_url=f"{store.url}/api/v1/file/", headers=headers, timeout=20) as client:
        yield client


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_put_stores_and_head_and_get_tell_of_it(root: Path, client: httpx.Client) -> None:
    answer = client.put("runs/r1/outputs/a.png", content=b"pixels")
    assert answer.status_code == 200
    assert answer.json() == {
        "ref": "runs/r1/outputs/a.png",
        "size_bytes": 6,
        "sha256": sha256(b"pixels"),
        "mime_type": "image/png",
    }
    assert (root / "runs/r1/outputs/a.png").read_bytes() == b"pixels"
    for method in ("HEAD", "GET"):
        answer = client.request(method, "runs/r1/outputs/a.png")
        assert answer.status_code == 200
        assert answer.headers["X-Cozy-SHA256"] == sha256(b"pixels")
        assert answer.headers["X-Cozy-Size-Bytes"] == answer.headers["Content-Length"] == "6"
        assert answer.headers["X-Cozy-Mime-Type"] == "image/png"
        assert answer.content == (b"pixels" if method == "GET" else b"")


def test_put_replaces_and_post_creates_once(root: Path, client: httpx.Client) -> None:
    created = client.post("a", content=b"1", headers={"Content-Type": "text/x-special"})
    assert (created.status_code, created.json()["mime_type"]) == (201, "text/x-special")
    again = client.post("a", content=b"2")
    assert (again.status_code, again.json()) == (409, {"error": "'a' exists"})
    assert client.get("a").content == b"1"
    assert client.head("a").headers["X-Cozy-Mime-Type"] == "text/x-special"
    assert client.put("a", content=b"33").json()["sha256"] == sha256(b"33")
    assert client.get("a").content == b"33"
    assert [path.name for path in root.rglob("*") if path.is_file()] == ["a"]


def test_of_many_that_create_one_file_one_succeeds(store: FileStoreServer) -> None:
    statuses: list[int] = []
    start = threading.Barrier(8)

    def create(number: int) -> None:
        start.wait(20)
        headers = {"Authorization": f"Bearer {TOKEN}"}
        answer = httpx.post(f"{store.url}/api/v1/file/one", content=bytes([number]) * MIB, headers=headers, timeout=20)
        statuses.append(answer.status_code)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(statuses) == [201] + [409] * 7


def test_files_that_others_put_there_are_served_as_they_are_now(root: Path, client: httpx.Client) -> None:
    path = root / "in.txt"
    path.write_bytes(b"first")
    assert client.head("in.txt").headers["X-Cozy-SHA256"] == sha256(b"first")
    path.write_bytes(b"second, longer")
    answer = client.get("in.txt")
    assert answer.headers["X-Cozy-SHA256"] == sha256(b"second, longer")
    assert (answer.content, answer.headers["Content-Type"]) == (b"second, longer", "text/plain")
    path.write_bytes(b"")
    assert (client.get("in.txt").content, client.head("in.txt").headers["X-Cozy-Size-Bytes"]) == (b"", "0")


def test_refs_are_percent_decoded(root: Path, client: httpx.Client) -> None:
    assert client.put("d%20ir/%C3%A9%3F%23.bin", content=b"x").json()["ref"] == "d ir/é?#.bin"
    assert (root / "d ir" / "é?#.bin").read_bytes() == b"x"


@pytest.mark.parametrize(
    "ref",
    ["../out", "a/../../out", "%2e%2e/out", "a%2f..%2f..%2fout", "%2Fetc/passwd", "/etc/passwd", "a//b", "", "a/", ".",
     "a%00b", ".uploads/x", "link/out", "a/" + "b" * 5000],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "PUT", "POST"])
def test_refs_can_not_leave_the_directory(
    tmp_path: Path, store: FileStoreServer, root: Path, ref: str, method: str
) -> None:
    (root / "link").symlink_to(tmp_path)
    (tmp_path / "out").write_bytes(b"untouched")
    status, _ = raw_request(store, f"{method} /api/v1/file/{ref} HTTP/1.1", body=b"evil")
    assert status == 400
    assert (tmp_path / "out").read_bytes() == b"untouched"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "store"]


def raw_request(store: FileStoreServer, line: str, body: bytes = b"", *headers: str) -> tuple[int, bytes]:
    """A request that no client library has tidied up; the status and what follows the headers."""
    address = urlsplit(store.url)
    lines = [line, "Host: x", f"Authorization: Bearer {TOKEN}", "Connection: close", *headers]
    if not any(header.startswith(("Content-Length", "Transfer-Encoding")) for header in headers):
        lines.append(f"Content-Length: {len(body)}")
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=20) as connection:
        connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
        answer = b""
        while block := connection.recv(65536):
            answer += block
    head, _, rest = answer.partition(b"\r\n\r\n")
    return int(head.split()[1]), rest


@pytest.mark.parametrize("authorization", [None, "Bearer wrong", TOKEN, "Basic x"])
@pytest.mark.parametrize("method", ["HEAD", "GET", "PUT", "POST"])
def test_a_wrong_token_is_401(store: FileStoreServer, root: Path, method: str, authorization: str | None) -> None:
    headers = {"Authorization": authorization} if authorization else {}
    answer = httpx.request(method, f"{store.url}/api/v1/file/a", headers=headers)
    assert answer.status_code == 401
    assert list(root.iterdir()) == []


def test_without_a_token_nothing_is_asked_for(tmp_path: Path) -> None:
    with FileStoreServer(tmp_path) as store:
        assert httpx.put(f"{store.url}/api/v1/file/a", content=b"x").status_code == 200


def test_what_is_not_there_is_404(root: Path, client: httpx.Client, store: FileStoreServer) -> None:
    (root / "dir").mkdir()
    for ref in ("nothing", "dir", "no/such/file"):
        assert client.get(ref).status_code == client.head(ref).status_code == 404
    assert client.get(f"{store.url}/elsewhere").status_code == 404


def test_a_file_can_not_become_a_directory_or_the_other_way_round(client: httpx.Client) -> None:
    assert client.put("a/b", content=b"x").status_code == 200
    for ref in ("a", "a/b/c"):
        assert client.put(ref, content=b"y").status_code == 409
        assert client.post(ref, content=b"y").status_code == 409
    assert client.get("a/b").content == b"x"


def test_chunked_uploads(client: httpx.Client) -> None:
    blocks = [os.urandom(size) for size in (1, 70_000, 3 * MIB)]
    answer = client.put("c", content=iter(blocks))
    assert answer.request.headers["Transfer-Encoding"] == "chunked"
    assert answer.json()["sha256"] == sha256(b"".join(blocks))
    assert client.get("c").content == b"".join(blocks)


def test_broken_bodies_leave_nothing(store: FileStoreServer, root: Path) -> None:
    put = "PUT /api/v1/file/a HTTP/1.1"
    assert raw_request(store, put, b"zz\r\n", "Transfer-Encoding: chunked")[0] == 400
    assert raw_request(store, put, b"", "Content-Length: many")[0] == 400
    address = urlsplit(store.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=20) as connection:
        connection.sendall(f"{put}\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 100\r\n\r\nhalf".encode())
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""  # the store gave up
    assert [path for path in root.rglob("*") if path.is_file()] == []


def test_an_upload_without_a_length_is_411(store: FileStoreServer) -> None:
    address = urlsplit(store.url)
    with socket.create_connection((address.hostname or "", address.port or 0), timeout=20) as connection:
        connection.sendall(f"PUT /api/v1/file/a HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
        assert connection.recv(4096).startswith(b"HTTP/1.1 411 ")


def test_a_refused_body_does_not_spoil_the_connection(store: FileStoreServer) -> None:
    with httpx.Client(base_url=f"{store.url}/api/v1/file/", timeout=20) as client:
        refused = client.put("a", content=bytes(4 * MIB))
        client.headers["Authorization"] = f"Bearer {TOKEN}"
        accepted = client.put("a", content=b"x")
        assert (refused.status_code, accepted.status_code) == (401, 200)
        streams = [answer.extensions["network_stream"] for answer in (refused, accepted)]
        assert streams[0].get_extra_info("client_addr") == streams[1].get_extra_info("client_addr")


@pytest.mark.parametrize("chunked", [False, True])
def test_uploads_over_the_limit_are_413(tmp_path: Path, chunked: bool) -> None:
    with FileStoreServer(tmp_path, max_bytes=MIB) as store:
        url = f"{store.url}/api/v1/file/a"
        for size, status in ((MIB, 200), (8 * MIB, 413)):
            body = bytes(size)
            assert httpx.put(url, content=iter([body]) if chunked else body, timeout=20).status_code == status
        assert (tmp_path / "a").stat().st_size == MIB


def test_requests_are_seen_and_can_be_intercepted(store: FileStoreServer, client: httpx.Client) -> None:
    answers = iter([503, None])
    store.intercept = lambda _: next(answers)
    assert client.put("a", content=b"x", headers={"X-Cozy-Tenant-Id": "t1"}).status_code == 503
    assert client.put("a", content=b"x").status_code == 200
    assert list(store.requests) == [
        FileRequest("PUT", "a", "t1", f"Bearer {TOKEN}"),
        FileRequest("PUT", "a", "", f"Bearer {TOKEN}"),
    ]


def test_a_stopped_store_answers_nobody_and_starts_again_on_its_port(
    store: FileStoreServer, client: httpx.Client
) -> None:
    url = store.url
    assert client.put("a", content=b"x").status_code == 200
    store.stop()
    with pytest.raises(httpx.TransportError):
        client.get("a")
    store.start()
    assert store.url == url
    assert client.get("a").content == b"x"


def test_a_taken_port_is_a_clear_error(tmp_path: Path, store: FileStoreServer) -> None:
    address = store.url.removeprefix("http://")
    with pytest.raises(ListenError, match=f"can't serve files on {address}: Address already in use"):
        FileStoreServer(tmp_path, listen=address).start()


def test_large_files_are_streamed(root: Path, client: httpx.Client) -> None:
    block = os.urandom(MIB)
    answer = client.put("big", content=iter([block] * 64))
    digest = hashlib.sha256()
    for _ in range(64):
        digest.update(block)
    assert answer.json()["sha256"] == digest.hexdigest()
    assert answer.json()["size_bytes"] == (root / "big").stat().st_size == 64 * MIB
    received = hashlib.sha256()
    with client.stream("GET", "big") as download:
        for part in download.iter_raw():
            received.update(part)
    assert received.hexdigest() == digest.hexdigest()
