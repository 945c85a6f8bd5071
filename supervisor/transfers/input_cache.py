"""Fetched files on disk: the cache of each tenant, and the directories of running runs.

Owns: `<WORKER_CACHE_DIR>/inputs/<tenant>/<aa>/<sha256>` and `<WORKER_RUN_DIR>/<run>/inputs`, hard-linked to it.

A tenant's directory is named by a digest of its id, so no id leads out of it or into another's. A file gets its name
there when it is whole, and is read again and compared before it is used again: one that somebody has changed is thrown
away. When the disk is nearly full the files that were not used for longest go; a run that has one linked keeps it.

The directory of a run is locked (flock) while its process lives, so what a killed worker left can be told, and is swept
away by the next one.

Everything here blocks, and is called in threads; but `RunDirectories.prepare` and `remove`, which are quick and keep
the order of the requests.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import re
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Final

log = logging.getLogger(__name__)

FULL: Final = 0.95
"""Of the disk: as for models, the rest is for others."""
_READABLE: Final = 0o444
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME_CHARS: Final = 100
_UNSAFE: Final = re.compile(r"[^\w.-]+")


class InputCache:
    """See the module."""

    def __init__(self, directory: Path) -> None:
        self._root = directory / "inputs"

    def sweep(self, before: float) -> None:
        """Remove what interrupted fetches left, if it is older than `before` (epoch seconds)."""
        for path in self._root.glob("*/*.part"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    path.unlink()

    def find(self, tenant: str, sha256: str) -> Path | None:
        """A whole copy of the file that this tenant has fetched before."""
        path = self._path(tenant, sha256)
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                log.warning("a cached input was changed on disk: it is fetched again")
                path.unlink(missing_ok=True)
                return None
            os.utime(path)
        except FileNotFoundError:
            return None
        return path

    def new_file(self, tenant: str) -> Path:
        """A name for a file that is being fetched; the directory is there. Raises OSError."""
        directory = self._tenant(tenant)
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        return directory / f"{secrets.token_hex(8)}.part"

    def keep(self, part: Path, tenant: str, sha256: str) -> Path:
        """Give a fetched file its place. Raises OSError."""
        path = self._path(tenant, sha256)
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        part.chmod(_READABLE)
        part.replace(path)
        return path

    def make_room(self, size: int) -> None:
        """Remove what was not used for longest until `size` more bytes leave the disk below FULL, if that can be."""
        if self._has_room(size):
            return
        used: list[tuple[float, Path]] = []
        for path in self._root.glob("*/*/*"):
            with suppress(OSError):  # removed by another thread meanwhile
                used.append((path.stat().st_mtime, path))
        for _, path in sorted(used):
            path.unlink(missing_ok=True)
            if self._has_room(size):
                return

    def _has_room(self, size: int) -> bool:
        self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
        disk = shutil.disk_usage(self._root)
        return disk.total - disk.free + size <= disk.total * FULL

    def _tenant(self, tenant: str) -> Path:
        return self._root / hashlib.sha256(tenant.encode()).hexdigest()[:32]

    def _path(self, tenant: str, sha256: str) -> Path:
        return self._tenant(tenant) / sha256[:2] / sha256


class RunDirectories:
    """See the module. A run's directory is known by the name that the supervisor gave it."""

    def __init__(self, directory: Path) -> None:
        self._root = directory
        self._own: dict[str, int] = {}
        """Name -> descriptor of the locked directory."""

    def prepare(self, name: str) -> Path:
        """The directory for a run's inputs, empty at its first use. Raises OSError."""
        path = self._root / name / "inputs"
        if name not in self._own:
            self.delete(self._set_aside(name))  # a worker that was killed may have left it
            path.mkdir(parents=True)
            for each in (path.parent, path):
                each.chmod(0o755)  # whatever the umask: executors may be another user
            self._own[name] = os.open(path.parent, _DIRECTORY)
            fcntl.flock(self._own[name], fcntl.LOCK_EX | fcntl.LOCK_NB)
        return path

    def link(self, cached: Path, path: Path) -> None:
        """Let a cached file appear in a run's directory. Raises OSError."""
        path.unlink(missing_ok=True)  # of a request that is done again
        try:
            path.hardlink_to(cached)
        except OSError:
            if not path.parent.is_dir():
                raise
            # Another file system, or one without links.
            shutil.copyfile(cached, path)
            path.chmod(_READABLE)

    def remove(self, name: str) -> Path | None:
        """The run has ended: its directory is gone from its place at once. What it gives is to be `delete`d."""
        own = self._own.pop(name, None)
        if own is not None:
            os.close(own)
        return self._set_aside(name)

    def sweep(self, before: float) -> int:
        """Remove what killed workers left, if it is older than `before` (epoch seconds); how many there were.

        What is younger may be of a run that is active: this process may not be its worker's first.
        """
        found = 0
        for path in self._root.glob("*/inputs"):
            try:
                if (
                    path.lstat().st_uid == os.geteuid()
                    and path.parent.stat().st_mtime < before
                    and _is_free(path.parent)
                ):
                    self.delete(self._set_aside(path.parent.name))
                    found += 1
            except OSError as error:
                log.warning("what a killed worker left can't be removed: %s", error)
        for path in self._root.glob(".ended-*"):
            self.delete(path)
        return found

    def _set_aside(self, name: str) -> Path | None:
        aside = self._root / f".ended-{secrets.token_hex(8)}"
        try:
            (self._root / name).rename(aside)
        except FileNotFoundError:
            return None
        return aside

    @staticmethod
    def delete(aside: Path | None) -> None:
        """Delete what was set aside; what can't be deleted now is when a worker starts."""
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def _is_free(directory: Path) -> bool:
    """Whether no process has it locked."""
    fd = os.open(directory, _DIRECTORY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def local_name(number: int, index: int, ref: str, suffix: str) -> str:
    """A file name for an input: the ref's own with its suffix, made harmless, after numbers that make it the only one.

    `suffix` is for a name that has none.
    """
    name = _UNSAFE.sub("_", ref.rpartition("/")[2]).lstrip(".")
    stem, dot, ending = name.rpartition(".")
    if not dot or not stem or len(ending) >= _NAME_CHARS:
        stem, ending = name, suffix.removeprefix(".")
    name = f"{stem[: _NAME_CHARS - len(ending)]}.{ending}" if ending else stem[:_NAME_CHARS]
    return f"{number}-{index}-{name}" if name else f"{number}-{index}"
