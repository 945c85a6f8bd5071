"""As much of Hugging Face's HTTP API as huggingface_hub needs to list and download a model.

Owns: the repos that it serves, each at one commit.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.support.faulty_server import Answer, Asked, FaultyServer, ranged

COMMIT = "a" * 40
_API = re.compile(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?")
_FILE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.*)")


class DevHuggingFace(FaultyServer):
    """`token` is what private repos ask for; "" asks for none."""

    def __init__(self, *, token: str = "") -> None:
        super().__init__()
        self.token = token
        self.repos: dict[str, Mapping[str, bytes]] = {}

    def serve(self, asked: Asked) -> Answer:
        path = unquote(urlsplit(asked.path).path)
        if (
            self.token
            and asked.headers.get("Authorization", asked.headers.get("authorization")) != f"Bearer {self.token}"
        ):
            return Answer(401, b'{"error": "Invalid credentials"}')
        if found := _API.fullmatch(path):
            return self._api(*found.groups())
        if (found := _FILE.fullmatch(path)) and (data := self.repos.get(found[1], {}).get(found[3])) is not None:
            if found[2] not in (COMMIT, "main"):
                return Answer(404, headers={"X-Error-Code": "RevisionNotFound"})
            answer = ranged(data, asked.headers.get("Range", asked.headers.get("range", "")))
            etag = f'"{hashlib.sha256(data).hexdigest()}"'
            answer.headers |= {"ETag": etag, "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            return answer
        return Answer(404, headers={"X-Error-Code": "RepoNotFound"})

    def _api(self, repo: str, kind: str | None, revision: str | None) -> Answer:
        if repo not in self.repos:
            return Answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        if revision not in (None, "main", COMMIT):
            return Answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = self.repos[repo]
        listed: Any
        if kind == "tree":
            listed = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha256(data).hexdigest()}
                for path, data in files.items()
            ]
        else:
            siblings = [
                {"rfilename": path, "size": len(data), "blobId": hashlib.sha256(data).hexdigest()}
                for path, data in files.items()
            ]
            listed = {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        return Answer(200, json.dumps(listed).encode(), {"Content-Type": "application/json"})


def safetensors(dtype: str, size: int) -> bytes:
    """A file of weights: one tensor of so many bytes."""
    width = {"F32": 4, "F16": 2, "BF16": 2}[dtype]
    tensor = {"dtype": dtype, "shape": [size // width], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {"format": "pt"}, "weight": tensor}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(size)
