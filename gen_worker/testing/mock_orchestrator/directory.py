"""The directory behind the development file store.

Owns: its write side (uploads appear by one atomic step, whole or not at all) and what it remembers of files: digests,
and the mime types that uploads named. Refs are confined to it. All tenants share it; it is no store for production.
"""

from __future__ import annotations

import hashlib
import mimetypes
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import BinaryIO

DEFAULT_MIME_TYPE = "application/octet-stream"

_UPLOADS = ".uploads"
"""Under the root, so that a rename never crosses file systems; no ref may begin with it."""
_MAX_REF_BYTES = 4096


class RefusedError(Exception):
    """A request that is answered with an error."""

    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class FileInfo:
    """What the store tells of one file."""

    ref: str
    size_bytes: int
    sha256: str
    mime_type: str

    def headers(self) -> dict[str, str]:
        return {
            "X-Cozy-SHA256": self.sha256,
            "X-Cozy-Size-Bytes": str(self.size_bytes),
            "X-Cozy-Mime-Type": self.mime_type,
        }

    def body(self) -> dict[str, object]:
        return {
            "ref": self.ref,
            "size_bytes": self.size_bytes,
            "sha256": self.sha256,
            "mime_type": self.mime_type,
        }


class FileDirectory:
    """The files. Thread-safe: the file system's own atomic steps do it, and a lock guards what is remembered."""

    def __init__(self, root: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self._root = root.resolve()
        self._uploads = self._root / _UPLOADS
        self._lock = threading.Lock()
        self._digests: dict[Path, tuple[tuple[int, int, int], str]] = {}
        self._mime_types: dict[Path, str] = {}

    def locate(self, ref: str) -> Path:
        """Where a decoded ref lies. Raises RefusedError when it is not a path inside the directory."""
        segments = ref.split("/")
        bad = any(segment in ("", ".", "..") or "\0" in segment for segment in segments)
        if bad or segments[0] == _UPLOADS or len(os.fsencode(ref)) > _MAX_REF_BYTES:
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"{ref!r} is not a ref: give a relative path without '..'")
        path = self._root.joinpath(*segments)
        try:
            inside = path.resolve().is_relative_to(self._root)
        except OSError as error:
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"{ref!r} is not a ref: {error.strerror}") from error
        if not inside:
            raise RefusedError(HTTPStatus.BAD_REQUEST, f"{ref!r} leads out of the store")
        return path

    def open(self, ref: str) -> tuple[BinaryIO, FileInfo]:
        """The file for reading, and what is told of it: both of the same file, also while it is being replaced."""
        path = self.locate(ref)
        try:
            file = path.open("rb")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise RefusedError(HTTPStatus.NOT_FOUND, f"there is no file {ref!r}") from None
        try:
            status = os.fstat(file.fileno())
            version = (status.st_ino, status.st_mtime_ns, status.st_size)
            with self._lock:
                known = self._digests.get(path)
                mime_type = self._mime_types.get(path) or mimetypes.guess_type(path.name)[0] or DEFAULT_MIME_TYPE
            if known is None or known[0] != version:
                known = (version, hashlib.file_digest(file, "sha256").hexdigest())
                file.seek(0)
                with self._lock:
                    self._digests[path] = known
        except BaseException:
            file.close()
            raise
        return file, FileInfo(ref, status.st_size, known[1], mime_type)

    def store(self, ref: str, blocks: Iterator[bytes], mime_type: str, *, create: bool) -> FileInfo:
        """Write an upload beside the files, then put it in its place in one step."""
        path = self.locate(ref)
        if create and path.exists():
            raise RefusedError(HTTPStatus.CONFLICT, f"{ref!r} exists")
        self._uploads.mkdir(exist_ok=True)
        digest = hashlib.sha256()
        descriptor, name = tempfile.mkstemp(dir=self._uploads)
        temporary = Path(name)
        try:
            with os.fdopen(descriptor, "wb") as file:
                for block in blocks:
                    digest.update(block)
                    file.write(block)
                file.flush()
                status = os.fstat(file.fileno())
            self._put_in_place(temporary, path, ref, create=create)
        finally:
            temporary.unlink(missing_ok=True)
        mime_type = mime_type or mimetypes.guess_type(path.name)[0] or DEFAULT_MIME_TYPE
        with self._lock:
            self._mime_types[path] = mime_type
            self._digests[path] = ((status.st_ino, status.st_mtime_ns, status.st_size), digest.hexdigest())
        return FileInfo(ref, status.st_size, digest.hexdigest(), mime_type)

    def _put_in_place(self, temporary: Path, path: Path, ref: str, *, create: bool) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if create:
                os.link(temporary, path)  # fails when it exists, which a rename does not
            else:
                temporary.replace(path)
        except FileExistsError:
            raise RefusedError(HTTPStatus.CONFLICT, f"{ref!r}, or a part of its path, exists") from None
        except (IsADirectoryError, NotADirectoryError):
            raise RefusedError(HTTPStatus.CONFLICT, f"{ref!r}: a file and a directory would have one name") from None

    def clean(self) -> None:
        """Remove what unfinished uploads left."""
        shutil.rmtree(self._uploads, ignore_errors=True)
