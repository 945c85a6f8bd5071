"""What a model consists of: files with sizes, digests and places; checked before anything of it touches the disk.

Owns: which manifests are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from gen_worker.errors import FatalError

WEIGHT_SUFFIXES: Final = (".safetensors", ".flashpack", ".bin", ".pt", ".pth", ".ckpt", ".gguf")
RECORDS: Final = ("cozy/refs", "hf/refs")
"""Where, under WORKER_MODEL_CACHE_DIR, the records of what was downloaded are: `<ref, URL-quoted>.json`."""
_BLAKE3: Final = re.compile(r"[0-9a-f]{64}")
_DIGEST: Final = re.compile(r"[0-9a-f]{1,128}")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a snapshot. `url` is presigned: whoever has it may read, and it expires."""

    path: str
    size_bytes: int
    blake3: str
    url: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Snapshot:
    digest: str
    files: tuple[RemoteFile, ...]
    metadata: Mapping[str, str]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def check_digest(digest: str, whose: str) -> str:
    """A snapshot's digest as the name of its directory, without the algorithm's. Raises FatalError."""
    bare = digest.lower().rpartition(":")[2]
    if not _DIGEST.fullmatch(bare):
        raise FatalError(f"the manifest of {whose} is wrong: {digest[:100]!r} is not a hex digest")
    return bare


def check_files(files: Iterable[RemoteFile], whose: str) -> tuple[RemoteFile, ...]:
    """The files, safe to write under one directory. Raises FatalError that names the file and what is wrong."""
    checked = tuple(files)
    paths: set[str] = set()
    for file in checked:
        wrong = _wrong(file) or ("it is there twice" if file.path in paths else "")
        if wrong:
            raise FatalError(f"the manifest of {whose} is wrong: file {file.path[:200]!r}: {wrong}")
        paths.add(file.path)
    for path in paths:
        parent = path
        while parent := parent.rpartition("/")[0]:
            if parent in paths:
                raise FatalError(f"the manifest of {whose} is wrong: {parent!r} is a file and a directory")
    if not checked:
        raise FatalError(f"the manifest of {whose} is wrong: it has no files")
    return checked


def _wrong(file: RemoteFile) -> str:
    segments = file.path.split("/")
    if file.path.startswith("/") or "\\" in file.path or not file.path.isprintable():
        return "its path is not a plain relative one"
    if any(segment in ("", ".", "..") for segment in segments):
        return "its path leaves the model's directory or has empty parts"
    if file.size_bytes < 0:
        return f"its size is {file.size_bytes}"
    if not _BLAKE3.fullmatch(file.blake3):
        return "its blake3 is not 64 hex digits"
    if not file.url.startswith(("https://", "http://")):
        return "it has no URL to get it from"
    return ""
