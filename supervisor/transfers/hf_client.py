"""What is asked of huggingface_hub: a repo's listing, and the download of exactly the selected files.

Owns: the translation of its errors and of its progress bars, which are also the place where a download that nobody
waits for any more is stopped. It is imported at the first call. Which HTTP library its errors come from differs by
version, so those are told by their module. All of it blocks.
"""

from __future__ import annotations

import glob
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

from gen_worker.errors import AuthError, FatalError, ValidationError
from gen_worker.model_refs import ParsedModelRef
from supervisor.transfers.http import is_transient, retry_after
from supervisor.transfers.part_file import disk_full_errors
from supervisor.transfers.retries import Transient

FILES_AT_ONCE: Final = 8
_HTTP_LIBRARIES: Final = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"})


@dataclass(frozen=True, slots=True)
class Repo:
    """A repo at one commit."""

    ref: ParsedModelRef
    commit: str
    files: Mapping[str, int]
    """Path -> bytes."""
    headers: Mapping[str, str] = field(repr=False)

    def url(self, path: str) -> str:
        from huggingface_hub import hf_hub_url  # noqa: PLC0415

        return hf_hub_url(self.ref.repo_id, path, revision=self.commit)


def look_up(ref: ParsedModelRef, token: str) -> Repo:
    """Raises Transient, WorkerError."""
    from huggingface_hub import HfApi  # noqa: PLC0415

    with _translated(ref):
        info = HfApi(token=token or False).model_info(ref.repo_id, revision=ref.revision, files_metadata=True)
    files = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    if not info.sha or not files:
        raise FatalError(f"{ref.canonical} is an empty repo")
    return Repo(ref, info.sha, files, {"Authorization": f"Bearer {token}"} if token else {})


class Stopped(Exception):
    """The download was stopped: nobody waits for it."""


def fetch_files(
    repo: Repo, paths: Iterable[str], token: str, cache: Path, on_bytes: Callable[[int], None], stop: threading.Event
) -> str:
    """Have these files in the cache; returns the snapshot's directory.

    `on_bytes` gets how many came in all, on other threads. Raises Stopped, Transient, DiskFull, WorkerError.
    """
    from huggingface_hub import snapshot_download  # noqa: PLC0415

    bars = _bars(on_bytes, stop)
    with _translated(repo.ref), disk_full_errors(cache):
        return snapshot_download(
            repo.ref.repo_id,
            revision=repo.commit,
            allow_patterns=[glob.escape(path) for path in paths],
            cache_dir=cache,
            token=token or False,
            max_workers=FILES_AT_ONCE,
            tqdm_class=bars,
        )


def default_cache() -> Path:
    """Where huggingface_hub keeps its cache when HF_HOME is not set."""
    from huggingface_hub import constants  # noqa: PLC0415

    return Path(constants.HF_HUB_CACHE)


def _bars(on_bytes: Callable[[int], None], stop: threading.Event) -> type[Any]:
    """A class of invisible progress bars that report bytes."""
    from tqdm.auto import tqdm  # noqa: PLC0415

    counts: dict[int, int] = {}
    """Bar -> bytes; several bars may count the same bytes at different stages."""
    lock = threading.Lock()

    class Bar(tqdm):  # type: ignore[misc]  # it ships no types
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)  # of huggingface_hub's own bars
            self._counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **{**kwargs, "disable": True})

        def update(self, n: float | None = 1) -> object:
            if stop.is_set():
                raise Stopped
            if self._counts_bytes:
                with lock:
                    counts[id(self)] = counts.get(id(self), 0) + int(n or 0)
                    most = max(counts.values())
                on_bytes(most)
            return super().update(n)

    return Bar


@contextmanager
def _translated(ref: ParsedModelRef) -> Iterator[None]:
    """huggingface_hub's errors as Transient or WorkerErrors that name the ref."""
    from huggingface_hub.errors import (  # noqa: PLC0415
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except LocalEntryNotFoundError as error:  # how it says that it could not get at the network
        raise Transient(f"{ref.canonical}: {_one_line(error)}") from error
    except GatedRepoError as error:
        raise AuthError(f"{ref.canonical} is gated: its terms must be accepted by the owner of HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise ValidationError(f"{ref.canonical}: Hugging Face has no such revision") from error
    except HfHubHTTPError as error:
        status, headers = error.response.status_code, error.response.headers
        if isinstance(error, RepositoryNotFoundError) and status == HTTPStatus.NOT_FOUND:
            words = "Hugging Face has no such repo, or not for this HF_TOKEN"
            raise ValidationError(f"{ref.canonical}: {words}") from error
        if is_transient(status):
            raise Transient(f"{ref.canonical}: Hugging Face answers {status}", retry_after(headers)) from error
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise AuthError(f"Hugging Face refuses {ref.canonical} ({status}): check HF_TOKEN") from error
        raise FatalError(f"{ref.canonical}: Hugging Face answers {status}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _HTTP_LIBRARIES:
            raise
        raise Transient(f"{ref.canonical}: the connection to Hugging Face failed: {_one_line(error)}") from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
