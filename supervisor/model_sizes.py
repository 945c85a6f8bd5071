"""What models took on a device when they were loaded last, as the first guess for the next time.

Owns: the figures, and their file in WORKER_MODEL_CACHE_DIR, so that a restarted worker need not guess again. The file
is a help, never a condition: one that can't be read or written costs a line in the log.
"""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path
from typing import Final

import msgspec

log = logging.getLogger(__name__)

FILE_NAME: Final = "measured-sizes.json"
CAP: Final = 10_000
"""Models kept; the oldest figures go first."""


class _Size(msgspec.Struct, frozen=True):
    weights: int
    """Bytes of the weight files that this was measured with: other files are another model."""
    device: int


class _File(msgspec.Struct, frozen=True):
    version: int
    sizes: dict[str, _Size]


class ModelSizes:
    """See the module. `folder` None: nothing outlives the process."""

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / FILE_NAME
        self._sizes = {} if self._path is None else _read(self._path)
        self._writing: asyncio.Future[None] | None = None
        self._dirty = False

    def measured(self, model_id: str, type_name: str, weights: int) -> int | None:
        """Bytes on the device, when a model with as many bytes of weights was measured."""
        size = self._sizes.get(_key(model_id, type_name))
        return size.device if size is not None and size.weights == weights else None

    def remember(self, model_id: str, type_name: str, weights: int, device: int) -> None:
        """Keep a figure, and have it written by a thread: the folder may be on a slow or hanging network disk."""
        key, size = _key(model_id, type_name), _Size(weights, device)
        if self._sizes.get(key) == size:
            return
        self._sizes.pop(key, None)
        self._sizes[key] = size
        while len(self._sizes) > CAP:
            del self._sizes[next(iter(self._sizes))]
        self._dirty = True
        self._write()

    def _write(self) -> None:
        if self._path is None or self._writing is not None or not self._dirty:
            return
        self._dirty = False
        loop = asyncio.get_running_loop()
        self._writing = loop.run_in_executor(None, _write, self._path, dict(self._sizes))
        self._writing.add_done_callback(self._written)

    def _written(self, writing: asyncio.Future[None]) -> None:
        self._writing = None
        if not writing.cancelled() and (error := writing.exception()) is not None:
            log.warning("measured model sizes can't be kept in %s: %s", self._path, error)
        self._write()


def _key(model_id: str, type_name: str) -> str:
    return f"{model_id} as {type_name}"


def _read(path: Path) -> dict[str, _Size]:
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_File)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:  # ValueError: msgspec's and UnicodeDecodeError
        log.warning(
            "measured model sizes in %s can't be read, so first guesses are the weights' sizes: %s", path, error
        )
        return {}
    return found.sizes


def _write(path: Path, sizes: dict[str, _Size]) -> None:
    """Replace the file at once: a reader never sees half of it, and two workers never mix theirs. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_bytes(msgspec.json.format(msgspec.json.encode(_File(1, sizes)), indent=1))
    part.replace(path)
