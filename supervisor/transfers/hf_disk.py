"""What of Hugging Face is on this disk: snapshots in huggingface_hub's own cache, and for which refs they came.

Owns: the records, `<WORKER_MODEL_CACHE_DIR>/hf/refs/<ref, URL-quoted>.json`, and the locks beside them. A snapshot that
came by other means is taken too, when it holds all that the rules ask for. All of it blocks.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final
from urllib.parse import quote

import msgspec

from gen_worker.errors import ValidationError, WorkerError
from gen_worker.model_refs import ParsedModelRef
from supervisor.transfers.hf_client import default_cache
from supervisor.transfers.hf_probe import file_dtype
from supervisor.transfers.hf_selection import MODEL_INDEX, Selection, Survey, reads, select, survey
from supervisor.transfers.locks import locked_if_free, open_lock
from supervisor.transfers.messages import ModelFiles, TransferSettings
from supervisor.transfers.snapshots import WEIGHT_SUFFIXES
from supervisor.transfers.store import last_use

WITHOUT_WEIGHTS: Final = ("tokenizer", "scheduler", "processor", "feature_extractor")
"""In the names of components that have none; any other without weights was not downloaded whole."""


class HfRecord(msgspec.Struct, frozen=True):
    """What was taken for a ref, and by which settings it was selected."""

    ref: str
    root_dir: str
    options: str
    metadata: dict[str, str]
    files: dict[str, int]
    ours: bool = False
    """Whether it was downloaded for this ref, and so may be removed to make room."""

    @property
    def weight_bytes(self) -> int:
        return sum(size for path, size in self.files.items() if path.endswith(WEIGHT_SUFFIXES))


class HfDisk:
    """See the module."""

    def __init__(self, settings: TransferSettings) -> None:
        self._hf = settings.hf
        self._home = settings.hf_home
        self._options = msgspec.json.encode(settings.hf).decode()
        self._root = Path(settings.model_cache_dir) / "hf"

    @property
    def cache(self) -> Path:
        """huggingface_hub's."""
        return Path(self._home) / "hub" if self._home else default_cache()

    def fetch_lock(self, ref: str) -> Path:
        return self._root / "locks" / f"{quote(ref, safe='')}.fetch"

    def use_lock(self, ref: str) -> Path:
        return self._root / "locks" / f"{quote(ref, safe='')}.use"

    def models(self) -> list[ModelFiles]:
        """All that is whole."""
        return [self.model(record) for record in self._records() if self._is_whole(record)]

    def model(self, record: HfRecord) -> ModelFiles:
        lock, size = self.use_lock(record.ref), sum(record.files.values())
        return ModelFiles(
            record.ref, record.root_dir, record.metadata, size, record.weight_bytes, last_use(lock), str(lock)
        )

    def find(self, ref: ParsedModelRef) -> HfRecord | None:
        """What is whole for this ref."""
        record = _read(self._path(ref.canonical))
        if record is not None and self._is_whole(record):
            return record
        snapshot = self._cached_snapshot(ref)
        selection = None if snapshot is None else self._selected(ref, snapshot)
        if snapshot is None or selection is None:
            return None
        ours = record is not None and record.ours and record.root_dir == str(snapshot)
        return self.remember(ref, str(snapshot), selection, ours=ours)

    def remember(self, ref: ParsedModelRef, root_dir: str, selection: Selection, *, ours: bool = False) -> HfRecord:
        """Write what was taken for the ref; `ours`: it was downloaded for it. Raises OSError."""
        files = {path: _size(Path(root_dir) / path) for path in selection.files}
        precisions = {precision for precision in selection.precisions.values() if precision}
        metadata = {"quantization": precisions.pop()} if len(precisions) == 1 else {}
        record = HfRecord(ref.canonical, root_dir, self._options, metadata, files, ours)
        path = self._path(ref.canonical)
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{os.getpid()}.new")
        fresh.write_bytes(msgspec.json.encode(record))
        fresh.rename(path)
        return record

    def touch(self, ref: str) -> None:
        """It is used now."""
        lock = self.use_lock(ref)
        os.close(open_lock(lock))
        os.utime(lock)

    def remove(self, ref: str) -> int | None:
        """Take it from the cache unless another ref stands for the same snapshot; freed bytes, None: it is in use.

        Raises ValidationError when it is not here.
        """
        record = _read(self._path(ref))
        if record is None:
            raise ValidationError(f"{ref} is not on this disk; `gen-worker models` lists what is")
        with locked_if_free(self.use_lock(ref)) as unused:
            if not unused:
                return None
            self._path(ref).unlink(missing_ok=True)
            if record.root_dir in {each.root_dir for each in self._records()}:
                return 0
            return _remove_revision(Path(record.root_dir))

    def discard(self, ref: ParsedModelRef, commit: str) -> None:
        """Take what a download that failed has written, unless it is part of what was there before."""
        repo = self._repo(ref)
        for part in repo.glob("blobs/*.incomplete"):
            part.unlink(missing_ok=True)
        snapshot = repo / "snapshots" / commit
        if snapshot.is_dir() and str(snapshot) not in {record.root_dir for record in self._records()}:
            _remove_revision(snapshot)

    # -- Evictable ----------------------------------------------------------------------------

    @property
    def disk(self) -> Path:
        return self.cache

    def used_bytes(self) -> int:
        """Of what was downloaded by this and other workers; a snapshot counts once."""
        sizes = {record.root_dir: sum(record.files.values()) for record in self._records() if record.ours}
        return sum(size for root_dir, size in sizes.items() if Path(root_dir).is_dir())

    def removable(self) -> list[tuple[float, str]]:
        """(last use, ref) of what was downloaded; other programs' snapshots stay."""
        return [(last_use(self.use_lock(record.ref)), record.ref) for record in self._records() if record.ours]

    def evict(self, name: str) -> tuple[str, ...] | None:
        """Remove what was downloaded for a ref; None when it is in use or being made."""
        with locked_if_free(self.fetch_lock(name)) as idle:
            if not idle:
                return None
            try:
                return None if self.remove(name) is None else (name,)
            except ValidationError:
                return (name,)  # another worker has made room of it meanwhile

    # -- snapshots that came by other means ---------------------------------------------------

    def _cached_snapshot(self, ref: ParsedModelRef) -> Path | None:
        repo = self._repo(ref)
        revision = ref.revision or "main"
        try:
            commit = (repo / "refs" / revision).read_text("ascii").strip()
        except (OSError, UnicodeDecodeError):
            commit = revision  # it may be a commit itself
        snapshot = repo / "snapshots" / commit
        return snapshot if commit and snapshot.is_dir() else None

    def _selected(self, ref: ParsedModelRef, snapshot: Path) -> Selection | None:
        """What the rules choose of a cached snapshot; None when that is less than they ask for."""
        files = {str(path.relative_to(snapshot)): _size(path) for path in snapshot.rglob("*") if not path.is_dir()}
        if self._hf.full_repo or -1 in files.values():
            return None  # without its listing nobody knows whether it is the full repo
        try:
            contents = {path: (snapshot / path).read_bytes() for path in reads(files)}
            found = survey(ref.canonical, files, contents, self._hf)
            if not _is_complete(found, contents):
                return None
            dtypes = {path: file_dtype(snapshot / path) for path in found.probes}
            return select(ref.canonical, files, found, dtypes, self._hf)
        except (WorkerError, OSError):
            return None  # it is asked for anew, and whatever is wrong with the repo is said then

    # -- records ------------------------------------------------------------------------------

    def _repo(self, ref: ParsedModelRef) -> Path:
        return self.cache / f"models--{ref.org}--{ref.repo}"

    def _path(self, ref: str) -> Path:
        return self._root / "refs" / f"{quote(ref, safe='')}.json"

    def _records(self) -> Iterator[HfRecord]:
        for path in sorted((self._root / "refs").glob("*.json")):
            if (record := _read(path)) is not None:
                yield record

    def _is_whole(self, record: HfRecord) -> bool:
        root = Path(record.root_dir)
        return record.options == self._options and all(_size(root / path) == n for path, n in record.files.items())


def _is_complete(found: Survey, contents: dict[str, bytes]) -> bool:
    """Whether each component that the index names is there, with weights where it should have some."""
    if MODEL_INDEX in contents:
        index = msgspec.json.decode(contents[MODEL_INDEX], type=dict[str, object])
        named = {name for name, what in index.items() if isinstance(what, list) and any(what)}
        if not named - {component.name for component in found.components} <= {"safety_checker", "feature_extractor"}:
            return False
    return all(
        component.sets or any(word in component.name for word in WITHOUT_WEIGHTS) for component in found.components
    )


def _remove_revision(snapshot: Path) -> int:
    from huggingface_hub import scan_cache_dir  # noqa: PLC0415

    found = scan_cache_dir(snapshot.parent.parent.parent)
    # A revision is named by its commit, which a copy of the repo shares: it must not lose its own.
    repo = frozenset(each for each in found.repos if each.repo_path == snapshot.parent.parent)
    strategy = dataclasses.replace(found, repos=repo).delete_revisions(snapshot.name)
    freed = int(strategy.expected_freed_size)
    strategy.execute()
    return freed


def _read(path: Path) -> HfRecord | None:
    """None when there is none, or one that another version wrote otherwise."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=HfRecord)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def _size(path: Path) -> int:
    """-1 when there is none, as for a link to nowhere."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
