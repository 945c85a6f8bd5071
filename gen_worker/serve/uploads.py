"""Files of a developer's machine, put into the development file store for a run to read."""

from __future__ import annotations

import mimetypes
import re
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Final

from gen_worker.errors import ValidationError
from gen_worker.testing.mock_orchestrator import FileStoreServer

PREFIX: Final = "inputs"
_UNUSUAL: Final = re.compile(r"[^\w.-]+")
_NAME_CHARS: Final = 60
"""Of a name, its end: file systems take 255 bytes, and the suffix says what it is."""
_BLOCK_BYTES: Final = 1024 * 1024


def upload(files: FileStoreServer, path: Path) -> str:
    """Store a file; its ref. Raises ValidationError when it can't be read."""
    try:
        with path.open("rb") as file:
            return store(files, file, path.name)
    except OSError as error:
        raise ValidationError(f"@{path} can't be read: {error.strerror}") from error


def store(files: FileStoreServer, file: BinaryIO, name: str, mime_type: str = "") -> str:
    """Store an open file under a ref of its own that ends with its name; the ref. Raises OSError."""
    plain = _UNUSUAL.sub("_", name.replace("\\", "/").rpartition("/")[2])[-_NAME_CHARS:].strip(".") or "file"
    ref = f"{PREFIX}/{secrets.token_hex(8)}/{plain}"
    mime_type = mime_type or mimetypes.guess_type(plain)[0] or ""
    return files.directory.store(ref, _blocks(file), mime_type, create=True).ref


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(_BLOCK_BYTES):
        yield block
