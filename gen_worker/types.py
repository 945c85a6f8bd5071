"""Types that tenants use in payloads and outputs: Asset, a file of the store.

Owns: nothing. The worker sets `local_path` of every Asset in a payload before the function runs.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import msgspec

from gen_worker.errors import ValidationError


class Asset(msgspec.Struct):
    """A file, named by its ref in the file store or by an http(s) URL; usable wherever a path is."""

    ref: str
    tenant_id: str | None = None
    local_path: str | None = None
    mime_type: str | None = None
    size_bytes: int | None = None
    sha256: str | None = None

    def __fspath__(self) -> str:
        """The local file. Raises FileNotFoundError when the asset was not downloaded."""
        if self.local_path is None:
            raise FileNotFoundError(f"asset {self.ref!r} has no local file: only assets of a payload are downloaded")
        return self.local_path

    def open(self, mode: str = "rb") -> IO[Any]:
        """Open the local file for reading: it is shared with other runs, so writing raises ValueError."""
        if set(mode) - set("rbt"):
            raise ValueError(f"an asset is opened for reading only, not with mode {mode!r}")
        return Path(self).open(mode)

    def exists(self) -> bool:
        """Whether the asset has a local file."""
        return self.local_path is not None and Path(self.local_path).is_file()

    def read_bytes(self, max_bytes: int | None = None) -> bytes:
        """The whole file. Raises ValidationError when it is larger than `max_bytes`."""
        with Path(self).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if max_bytes is not None and size > max_bytes:
                raise ValidationError(f"asset {self.ref!r} has {size} bytes, at most {max_bytes} are allowed")
            return file.read()
