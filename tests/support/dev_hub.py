"""A development model hub over real HTTP: its API of both ages, and a presigned object store that misbehaves on order.

Owns: the server and what it serves. `on_request` sees each request first and may answer it in its own way.
"""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import parse_qs, urlsplit

from blake3 import blake3

_REPO = re.compile(r"/api/v1/repos/([^/]+/[^/]+)/(.*)")


@dataclass(frozen=True)
class Asked:
    """One request as it came; `number` counts those of the same method and path, from 1."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    number: int

    @property
    def is_store(self) -> bool:
        return self.path.startswith("/store/")


@dataclass
class Answer:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut_at: int | None = None
    """The connection is closed after so many bytes of the body, whatever Content-Length says."""
    hang: bool = False
    """Nothing is said until the server ends."""


Files = Mapping[str, bytes]


class DevHub:
    """Used by `with`. `token` is what the API asks for; "" asks for none."""

    def __init__(self, *, token: str = "", old: bool = False) -> None:
        self.token = token
        self.old = old
        self.on_request: Callable[[Asked], Answer | None] = lambda _: None
        self.asked: list[Asked] = []
        self.tags: dict[str, dict[str, str]] = {}
        """org/repo -> tag -> snapshot digest."""
        self.snapshots: dict[str, Files] = {}
        self.nested: bool = False
        """Whether manifests have `root_files` and `objects`."""
        self.store: dict[str, bytes] = {}
        self.generation = 0
        """URLs of earlier generations have expired."""
        self.change_manifest: Callable[[list[dict[str, Any]]], None] = lambda _: None
        self._counts: Counter[tuple[str, str]] = Counter()
        self._over = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def put(self, repo: str, files: Files, tag: str = "latest") -> str:
        """Serve a snapshot; returns its digest."""
        for data in files.values():
            self.store[blake3(data).hexdigest()] = data
        digest = blake3(b"".join(name.encode() + data for name, data in sorted(files.items()))).hexdigest()
        self.snapshots[digest] = files
        self.tags.setdefault(repo, {})[tag] = digest
        return digest

    def expire_urls(self) -> None:
        self.generation += 1

    def requests(self, part: str = "", method: str = "") -> list[Asked]:
        """Those so far whose path holds `part`."""
        return [each for each in list(self.asked) if part in each.path and method in ("", each.method)]

    # -- answers ------------------------------------------------------------------------------

    def answer(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> Answer:
        with self._lock:
            self._counts[method, path] += 1
            asked = Asked(method, path, headers, body, self._counts[method, path])
            self.asked.append(asked)
        if (own := self.on_request(asked)) is not None:
            return own
        if asked.is_store:
            return self._store(asked)
        if self.token and headers.get("Authorization") != f"Bearer {self.token}":
            return Answer(401, b'{"error":"token"}')
        found = self._api(asked)
        return Answer(404, b"{}") if found is None else Answer(body=json.dumps(found).encode())

    def wait_over(self) -> None:
        self._over.wait()

    def _api(self, asked: Asked) -> dict[str, Any] | None:
        parts = urlsplit(asked.path)
        if matched := re.fullmatch(r"/api/v1/objects/([^/]+)/manifest", parts.path):
            return self._object(matched[1])
        matched = _REPO.fullmatch(parts.path)
        if matched is None or matched[1] not in self.tags:
            return None
        repo, rest = matched.groups()
        if asked.method == "POST" and rest == "resolve_artifact" and not self.old:
            return self._resolve(repo, json.loads(asked.body)["tag"])
        if asked.method == "GET" and rest == "resolve" and self.old:
            digest = self.tags[repo].get(parse_qs(parts.query)["tag"][0])
            return None if digest is None else {"digest": digest}
        if asked.method == "GET" and (found := re.fullmatch(r"snapshots/([^/]+)/manifest", rest)):
            return self._manifest(found[1])
        return None

    def _resolve(self, repo: str, tag: str) -> dict[str, Any] | None:
        digest = self.tags[repo].get(tag)
        if digest is None:
            return None
        artifact = {"label": "fp16", "file_layout": "diffusers", "file_type": "safetensors", "quantization": "fp16"}
        return {
            "repo_revision_seq": 3,
            "snapshot_digest": digest,
            "artifact": artifact,
            "snapshot_manifest": {"version": 1, "files": self._files(self.snapshots[digest])},
        }

    def _manifest(self, digest: str) -> dict[str, Any] | None:
        files = self.snapshots.get(digest)
        if files is None:
            return None
        if not self.nested:
            return {"files": self._files(files)}
        root = {path: data for path, data in files.items() if "/" not in path}
        folders = sorted({path.partition("/")[0] for path in files if "/" in path})
        return {"root_files": self._files(root), "objects": {name: _object_name(name) for name in folders}}

    def _object(self, digest: str) -> dict[str, Any] | None:
        for files in self.snapshots.values():
            for name in {path.partition("/")[0] for path in files if "/" in path}:
                if _object_name(name) == digest:
                    own = {path.partition("/")[2]: data for path, data in files.items() if path.startswith(f"{name}/")}
                    return {"files": self._files(own)}
        return None

    def _files(self, files: Files) -> list[dict[str, Any]]:
        listed = [
            {
                "path": path,
                "size_bytes": len(data),
                "blake3": blake3(data).hexdigest(),
                "url": f"{self.url}/store/{blake3(data).hexdigest()}?generation={self.generation}",
            }
            for path, data in files.items()
        ]
        self.change_manifest(listed)
        return listed

    def _store(self, asked: Asked) -> Answer:
        parts = urlsplit(asked.path)
        if "Authorization" in asked.headers:
            return Answer(400, b"a bearer token was sent to the object store")
        if parse_qs(parts.query).get("generation") != [str(self.generation)]:
            return Answer(403, b"expired")
        data = self.store.get(parts.path.rpartition("/")[2])
        if data is None:
            return Answer(404)
        return ranged(data, asked.headers.get("Range", ""))


def ranged(data: bytes, wanted: str) -> Answer:
    """The answer of a store that knows ranges."""
    found = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted)
    if not found:
        return Answer(200, data)
    start, end = int(found[1]), min(int(found[2] or len(data)), len(data) - 1)
    if start >= len(data):
        return Answer(416, headers={"Content-Range": f"bytes */{len(data)}"})
    return Answer(206, data[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(data)}"})


def _object_name(folder: str) -> str:
    return blake3(folder.encode()).hexdigest()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    hub: DevHub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the base class's name)
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        answer = self.server.hub.answer(self.command, self.path, dict(self.headers.items()), body)
        if answer.hang:
            self.server.hub.wait_over()
            self.close_connection = True
            return
        try:
            self.send_response(answer.status)
            for name, value in {"Content-Length": str(len(answer.body)), **answer.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(answer.body[: answer.cut_at])
        except ConnectionError:
            self.close_connection = True
        if answer.cut_at is not None:
            self.close_connection = True
