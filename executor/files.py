"""The files of one run, as the executor asks for them.

Owns: the requests of a run that have no reply yet. A request is made by the run's thread or its coroutine; the reader
thread brings the reply. A cancel ends every wait.

A file that is stored is opened here, with the rights of this process, and handed to the transfer process as an open
file: that one opens nothing that tenant code names. Bytes are first put into an anonymous file in memory.
"""

from __future__ import annotations

import os
import secrets
import socket
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from msgspec.structs import force_setattr

from gen_worker.errors import (
    AuthError,
    FatalError,
    ResourceError,
    RetryableError,
    RunCanceled,
    ValidationError,
    WorkerError,
)
from gen_worker.pipe.frames import FrameError
from gen_worker.pipe.messages import Failure, FetchFile, FileReply, StoreFile, Upward
from gen_worker.types import Asset

TICKET_BYTES: Final = 16
"""As the transfer process expects them (supervisor/transfers/descriptors.py)."""
MAX_INPUTS: Final = 1000
"""Assets with different refs in one payload."""
MAX_REFS_BYTES: Final = 4 * 1024 * 1024
"""All refs of a payload: they are one frame on the pipe."""
_AGAIN_S: Final = 0.02
"""Between attempts to reach the transfer process, which is started by the first file, and anew after a crash."""

_ERRORS: Final[dict[str, type[WorkerError]]] = {
    error.error_type: error for error in (ValidationError, AuthError, RetryableError, ResourceError, FatalError)
}


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """Of Init; see there."""

    socket: str = ""
    max_upload_bytes: int = 0


@dataclass(slots=True)
class _Request:
    on_reply: Callable[[], object] | None = None
    """Called by the reader when the reply is there; without it somebody waits for `done`."""
    done: threading.Event = field(default_factory=threading.Event)
    reply: FileReply | None = None


class Inputs:
    """The inputs of one run, on their way."""

    def __init__(
        self, assets: Sequence[tuple[str, Asset]], refs: tuple[str, ...], request: _Request, ask: Callable[[], None]
    ) -> None:
        self._assets = assets
        self._refs = refs
        self._request = request
        self.ask = ask
        """Called once, when whoever is told of the reply is ready for it."""

    def apply(self) -> None:
        """Set the assets, after the reply. Raises a WorkerError that names the file when one could not be fetched."""
        reply = self._request.reply
        if reply is None:
            raise RunCanceled
        if reply.failure is not None:
            failed = self._refs[reply.failed]
            place, asset = next(item for item in self._assets if item[1].ref == failed)
            raise _error_of(reply.failure, f"input {place} ({_shown(asset.ref)})")
        files = dict(zip(self._refs, reply.files, strict=True))
        for _, asset in self._assets:
            file = files[asset.ref]
            for name, value in (
                ("local_path", file.path), ("size_bytes", file.size_bytes),
                ("sha256", file.sha256), ("mime_type", file.mime_type),
            ):  # fmt: skip
                force_setattr(asset, name, value)  # a tenant's own kind of Asset may be frozen


class RunFiles:
    """See the module. `settings` are the executor's."""

    def __init__(self, key: int, settings: StoreSettings, send: Callable[[Upward], None]) -> None:
        self._key = key
        self._settings = settings
        self._send = send
        self._lock = threading.Lock()
        self._requests: dict[int, _Request] = {}
        self._count = 0
        self._canceled = False

    def replied(self, reply: FileReply) -> None:
        """From the reader."""
        with self._lock:
            request = self._requests.pop(reply.number, None)
        if request is not None:  # else nobody waits for it any more
            request.reply = reply
            request.done.set()
            if request.on_reply is not None:
                request.on_reply()

    def cancel(self) -> None:
        """Whoever waits, now or later, gives up. What goes on by `on_reply` is ended by others."""
        with self._lock:
            self._canceled = True
            for request in self._requests.values():
                request.done.set()

    # -- inputs -------------------------------------------------------------------------------

    def inputs(self, assets: Sequence[tuple[str, Asset]], on_reply: Callable[[], object]) -> Inputs:
        """What fetches the files of these assets (after their places); `on_reply` is called once that has ended.

        Raises ValidationError when they are too many, and RunCanceled after a cancel.
        """
        refs = tuple(dict.fromkeys(asset.ref for _, asset in assets))
        if len(refs) > MAX_INPUTS:
            raise ValidationError(f"the payload has {len(refs)} files, at most {MAX_INPUTS} are fetched")
        if sum(len(ref.encode()) for ref in refs) > MAX_REFS_BYTES:
            raise ValidationError(f"the refs of the payload's files have more than {MAX_REFS_BYTES} bytes")
        number, request = self._new_request(on_reply)
        return Inputs(assets, refs, request, lambda: self._send(FetchFile(self._key, number, refs)))

    # -- outputs ------------------------------------------------------------------------------

    def store(self, ref: str, source: bytes | Path, *, create: bool) -> Asset:
        """Store a file and wait for it. Raises a WorkerError that names it, OSError, RunCanceled."""
        if not self._settings.socket:
            raise WorkerError(f"output {_name(ref)!r} can't be stored: this worker has no file store")
        with self._opened(ref, source) as fd:
            ticket = secrets.token_bytes(TICKET_BYTES)
            number, request = self._new_request(None)
            try:
                self._send(StoreFile(self._key, number, ref, create, ticket))
            except FrameError as error:
                raise ValidationError(f"the ref of an output is too long: {error}") from None
            with self._handed_over(ticket, fd, request):
                request.done.wait()
        if request.reply is None:
            raise RunCanceled
        if request.reply.failure is not None:
            raise _error_of(request.reply.failure, f"output {_name(ref)!r}")
        (file,) = request.reply.files
        return Asset(ref, mime_type=file.mime_type, size_bytes=file.size_bytes, sha256=file.sha256)

    @contextmanager
    def _opened(self, ref: str, source: bytes | Path) -> Iterator[int]:
        """An open file with what is to be stored."""
        if isinstance(source, bytes):
            self._check_size(ref, len(source))
            fd = os.memfd_create("output", os.MFD_CLOEXEC)
        else:
            # A FIFO opens at once with O_NONBLOCK, and is told by what it is.
            fd = os.open(source, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            if isinstance(source, bytes):
                rest = memoryview(source)
                while rest:
                    rest = rest[os.write(fd, rest) :]
            else:
                found = os.fstat(fd)
                if not stat.S_ISREG(found.st_mode):
                    raise ValidationError(f"output {_name(ref)!r} can't be stored: {source} is not a regular file")
                self._check_size(ref, found.st_size)
            yield fd
        finally:
            os.close(fd)

    def _check_size(self, ref: str, size: int) -> None:
        limit = self._settings.max_upload_bytes
        if limit and size > limit:
            raise ValidationError(
                f"output {_name(ref)!r} has {size} bytes, over the limit WORKER_MAX_UPLOAD_BYTES={limit}"
            )

    @contextmanager
    def _handed_over(self, ticket: bytes, fd: int, request: _Request) -> Iterator[None]:
        """Hand the open file to the transfer process; closing the connection takes it back if it was not asked for."""
        while not request.done.is_set():
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as connection:
                try:
                    connection.connect(f"\0{self._settings.socket}")
                    socket.send_fds(connection, [ticket], [fd])
                except (ConnectionError, BlockingIOError):
                    request.done.wait(_AGAIN_S)
                    continue
                yield
                return
        yield

    # -- both ---------------------------------------------------------------------------------

    def _new_request(self, on_reply: Callable[[], object] | None) -> tuple[int, _Request]:
        with self._lock:
            if self._canceled:
                raise RunCanceled
            self._count += 1
            request = _Request(on_reply)
            self._requests[self._count] = request
            return self._count, request


def _error_of(failure: Failure, file: str) -> WorkerError:
    """The error for the function, which says which file and why; where the worker met it goes to operators."""
    error = _ERRORS.get(failure.error_type, WorkerError)(f"{file}: {failure.safe_message}")
    if failure.detail and failure.detail != failure.safe_message:
        error.add_note(failure.detail)
    return error


def _name(ref: str) -> str:
    """An output's name, as the function gave it."""
    return ref.partition("/outputs/")[2]


def _shown(ref: str) -> str:
    """A ref of the store as it is; of a URL only that it is one, since it may hold a credential."""
    return "a URL" if "://" in ref else repr(ref)
