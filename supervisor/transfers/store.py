"""The models of the hub on disk, under `<WORKER_MODEL_CACHE_DIR>/cozy`, which several workers may share.

Owns: the layout and what of it is whole.

    blobs/blake3/<aa>/<bb>/<digest>     each file once; `.part` beside it while it comes
    snapshots/<digest>/<path>           hard links to blobs; appears by one rename, so what is there is whole
    staging/<digest>/<path>             a snapshot in the making
    refs/<ref, URL-quoted>.json         which snapshot a ref stands for, and its files
    locks/<digest>.fetch                held by whoever makes or removes the snapshot
    locks/<digest>.use                  held shared by whoever uses it; its time of modification is the last use
    locks/store                         held shared to give a blob its first link, exclusively to remove blobs

All methods block; the process calls them on threads.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec

from supervisor.transfers.locks import locked_if_free, locked_now, open_lock
from supervisor.transfers.messages import ModelFiles
from supervisor.transfers.part_file import hash_file, is_sealed, remove_part, seal, sync_directory
from supervisor.transfers.snapshots import WEIGHT_SUFFIXES, RemoteFile, Snapshot

RECORD_SUFFIX: Final = ".json"


class Record(msgspec.Struct, frozen=True):
    """What a ref stands for on this disk."""

    ref: str
    snapshot: str
    metadata: dict[str, str]
    files: dict[str, int]
    """Path -> bytes."""

    @property
    def size_bytes(self) -> int:
        return sum(self.files.values())

    @property
    def weight_bytes(self) -> int:
        return sum(size for path, size in self.files.items() if path.endswith(WEIGHT_SUFFIXES))


class Store:
    """See the module."""

    def __init__(self, model_cache_dir: str) -> None:
        self.root = Path(model_cache_dir) / "cozy"
        self.blobs = self.root / "blobs" / "blake3"
        self.snapshots = self.root / "snapshots"
        self.staging = self.root / "staging"
        self.refs = self.root / "refs"
        self.locks = self.root / "locks"

    def prepare(self) -> None:
        """Make the directories. Raises OSError."""
        for directory in (self.blobs, self.snapshots, self.staging, self.refs, self.locks):
            directory.mkdir(parents=True, exist_ok=True)

    # -- places -------------------------------------------------------------------------------

    def blob(self, digest: str) -> Path:
        return self.blobs / digest[:2] / digest[2:4] / digest

    def fetch_lock(self, digest: str) -> Path:
        return self.locks / f"{digest}.fetch"

    def use_lock(self, digest: str) -> Path:
        return self.locks / f"{digest}.use"

    @property
    def store_lock(self) -> Path:
        return self.locks / "store"

    def _record_path(self, ref: str) -> Path:
        return self.refs / f"{quote(ref, safe='')}{RECORD_SUFFIX}"

    # -- what is there ------------------------------------------------------------------------

    def records(self) -> Iterator[Record]:
        """All that were written, whether their snapshots are still there or not."""
        if not self.refs.is_dir():
            return
        for path in sorted(self.refs.iterdir()):
            if path.suffix == RECORD_SUFFIX and (record := _read_record(path)) is not None:
                yield record

    def record(self, ref: str) -> Record | None:
        return _read_record(self._record_path(ref))

    def is_whole(self, record: Record) -> bool:
        """Whether the snapshot is there with all its files, none of them written to since it was verified."""
        directory = self.snapshots / record.snapshot
        return directory.is_dir() and all(_is_intact(directory / path, size) for path, size in record.files.items())

    def model(self, record: Record) -> ModelFiles:
        lock = self.use_lock(record.snapshot)
        return ModelFiles(
            record.ref,
            str(self.snapshots / record.snapshot),
            record.metadata,
            record.size_bytes,
            record.weight_bytes,
            last_use(lock),
            str(lock),
        )

    # -- a snapshot in the making -------------------------------------------------------------

    def adopt_blobs(self, snapshot: Snapshot) -> list[RemoteFile]:
        """Link what is here already into a fresh staging directory; returns what is missing.

        A blob of another size, or one that was written to and no longer has its digest, is removed.
        """
        shutil.rmtree(self.staging / snapshot.digest, ignore_errors=True)
        return [file for file in snapshot.files if not self.stage(snapshot.digest, file)]

    def stage(self, digest: str, file: RemoteFile) -> bool:
        """Link a blob into the staging directory, if it is here and right. Raises OSError."""
        blob, place = self.blob(file.blake3), self.staging / digest / file.path
        if not _verified(blob, file):
            return False
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            place.hardlink_to(blob)
        except FileNotFoundError:
            return False  # removed meanwhile, as nobody used it
        return True

    def publish(self, ref: str, snapshot: Snapshot) -> Record:
        """Everything is staged: make it appear. A broken snapshot in its place goes. Raises OSError."""
        staged, place = self.staging / snapshot.digest, self.snapshots / snapshot.digest
        for directory, _, _ in os.walk(staged):
            sync_directory(Path(directory))
        if place.exists():
            self._retire(place)
        staged.rename(place)
        sync_directory(self.snapshots)
        return self.remember(ref, snapshot)

    def remember(self, ref: str, snapshot: Snapshot) -> Record:
        """Write which snapshot the ref stands for, and that it is used now. Raises OSError."""
        files = {file.path: file.size_bytes for file in snapshot.files}
        record = Record(ref, snapshot.digest, dict(snapshot.metadata), files)
        path = self._record_path(ref)
        fresh = path.with_suffix(f".{os.getpid()}.new")
        fresh.write_bytes(msgspec.json.encode(record))
        fresh.rename(path)
        self.touch(snapshot.digest)
        return record

    def touch(self, digest: str) -> None:
        """It is used now."""
        lock = self.use_lock(digest)
        os.close(open_lock(lock))
        os.utime(lock)

    # -- removal ------------------------------------------------------------------------------

    def remove_snapshot(self, digest: str) -> tuple[str, ...] | None:
        """Take a snapshot that nobody uses or makes, and the refs to it; None when it is in use.

        Its blobs stay until `remove_loose_blobs`. Raises OSError.
        """
        with ExitStack() as stack:
            # One after the other: a supervisor that begins to use it now must not find its lock taken for nothing.
            for lock in (self.fetch_lock(digest), self.use_lock(digest)):
                if not stack.enter_context(locked_if_free(lock)):
                    return None
            refs = tuple(record.ref for record in self.records() if record.snapshot == digest)
            for ref in refs:
                self._record_path(ref).unlink(missing_ok=True)
            if (place := self.snapshots / digest).exists():
                self._retire(place)
            return refs

    @property
    def disk(self) -> Path:
        return self.root

    def removable(self) -> list[tuple[float, str]]:
        """(last use, digest) of each snapshot."""
        return [(last_use(self.use_lock(path.name)), path.name) for path in _entries(self.snapshots)]

    def evict(self, name: str) -> tuple[str, ...] | None:
        """Take a snapshot and the blobs that no other has; None when it is in use."""
        refs = self.remove_snapshot(name)
        if refs is not None:
            self.remove_loose_blobs()
        return refs

    def remove_abandoned(self, wanted: frozenset[str]) -> None:
        """Take what interrupted downloads left, but for the `.part`s of the `wanted` blobs."""
        for staged in _entries(self.staging):
            with locked_if_free(self.fetch_lock(staged.name.partition(".")[0])) as idle:
                if idle:
                    shutil.rmtree(staged, ignore_errors=True)
        for part in self.blobs.glob("??/??/*.part"):
            if part.stem not in wanted:
                remove_part(part.with_suffix(""))
        self.remove_loose_blobs()

    def remove_loose_blobs(self) -> None:
        """Take the blobs to which no snapshot links."""
        with locked_now(self.store_lock):
            for blob in self.blobs.glob("??/??/*"):
                if blob.suffix != ".part" and blob.lstat().st_nlink == 1:
                    blob.unlink(missing_ok=True)

    def used_bytes(self) -> int:
        """Of blobs and `.part`s; a blob counts once, however many snapshots have it."""
        return sum(_size(path) for path in self.blobs.glob("??/??/*"))

    def _retire(self, place: Path) -> None:
        """A snapshot goes as it came: by one rename, so none is ever seen half removed."""
        grave = self.staging / f"{place.name}.{os.getpid()}.{time.monotonic_ns()}"
        place.rename(grave)
        shutil.rmtree(grave, ignore_errors=True)


def last_use(lock: Path) -> float:
    """Epoch seconds; 0.0 when it was never used."""
    try:
        return lock.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _read_record(path: Path) -> Record | None:
    """None when there is none, or one that an older or newer version wrote otherwise."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _is_intact(path: Path, size: int) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_size == size and is_sealed(found)


def _verified(blob: Path, file: RemoteFile) -> bool:
    """Whether the blob is there and right; a wrong one is removed."""
    try:
        found = blob.stat()
    except FileNotFoundError:
        return False
    if found.st_size == file.size_bytes:
        if is_sealed(found):
            return True
        if hash_file(blob) == file.blake3:
            with blob.open("rb") as opened:
                seal(opened.fileno())
            return True
    blob.unlink(missing_ok=True)
    return False


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


def _size(path: Path) -> int:
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0
