"""A development model hub over real HTTP: its API of both ages, and a presigned object store that misbehaves on order.

Owns: what it serves.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import parse_qs, urlsplit

from blake3 import blake3

from tests.support.faulty_server import Answer, Asked, FaultyServer, ranged

_REPO = re.compile(r"/api/v1/repos/([^/]+/[^/]+)/(.*)")

Files = Mapping[str, bytes]


class DevHub(FaultyServer):
    """Used by `with`. `token` is what the API asks for; "" asks for none."""

    def __init__(self, *, token: str = "", old: bool = False) -> None:
        super().__init__()
        self.token = token
        self.old = old
        self.tags: dict[str, dict[str, str]] = {}
        """org/repo -> tag -> snapshot digest."""
        self.snapshots: dict[str, Files] = {}
        self.nested: bool = False
        """Whether manifests have `root_files` and `objects`."""
        self.store: dict[str, bytes] = {}
        self.generation = 0
        """URLs of earlier generations have expired."""
        self.change_manifest: Callable[[list[dict[str, Any]]], None] = lambda _: None

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

    # -- answers ------------------------------------------------------------------------------

    def serve(self, asked: Asked) -> Answer:
        if asked.is_store:
            return self._store(asked)
        if self.token and asked.headers.get("Authorization") != f"Bearer {self.token}":
            return Answer(401, b'{"error":"token"}')
        found = self._api(asked)
        return Answer(404, b"{}") if found is None else Answer(body=json.dumps(found).encode())

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


def _object_name(folder: str) -> str:
    return blake3(folder.encode()).hexdigest()
