"""The files of runs: what executors ask for is done by the transfer process, with each run's own token.

Owns: which transfers each run has under way, and which runs have a directory of inputs.

1. FetchFile: the run is paused, so that it takes no place from others; its inputs are fetched; it goes on when its
   executor has a place again, which is when the reply is sent.
2. StoreFile: the file is stored while the function waits.
3. A cancel or the end of a run stops its transfers at once; the end removes its inputs.

A token goes to its own store only: the run's to the run's, or to this worker's when the run names none; a fallback's
never to a store that a run names, unless that is the very same.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, Protocol

from gen_worker.pipe.messages import Failure, FetchFile, FileReply, LocalFile, StoreFile
from supervisor.executor_handle import ExecutorHandle
from supervisor.runs import Run
from supervisor.transfer_process import TransferError
from supervisor.transfers.messages import (
    FetchInputs,
    FileAccess,
    InputsFetched,
    InputsRemoved,
    OutputStored,
    RemoveInputs,
    ReplyT,
    RequestBody,
    StoreOutput,
)

log = logging.getLogger(__name__)

MAX_REQUESTS: Final = 256
"""Of one run at once; each is a task here. Functions that save in as many threads are none that we know."""
_PLAIN_NAME: Final = re.compile(r"(?!uid-)[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Transfers(Protocol):
    """What is asked of the transfer process."""

    async def call(self, request: RequestBody, reply: type[ReplyT]) -> ReplyT:
        """Raises TransferError."""


@dataclass(frozen=True, slots=True)
class Store:
    """A file store and the token for it."""

    base_url: str
    token: str


class RunFiles:
    """See the module. `stores` are this worker's own, the first that has a URL counts.

    `go_on(run, start)` calls `start` when the run has a place again. `reserved` are names in WORKER_RUN_DIR that are
    no run's.
    """

    def __init__(
        self,
        transfers: Transfers,
        stores: tuple[Store, ...],
        go_on: Callable[[Run, Callable[[], None]], None],
        reserved: frozenset[str] = frozenset(),
    ) -> None:
        self._transfers = transfers
        self._stores = tuple(store for store in stores if store.base_url)
        self._go_on = go_on
        self._reserved = reserved
        self._tasks: dict[int, set[asyncio.Task[None]]] = {}
        """By the key of the run."""
        self._directories: dict[int, str] = {}
        self._removals: set[asyncio.Task[None]] = set()

    def fetch(self, run: Run, handle: ExecutorHandle, request: FetchFile) -> None:
        """An executor asks for the inputs of one of its runs."""
        handle.pause(run)
        self._begin(run, handle, request, self._fetch(run, handle, request))

    def store(self, run: Run, handle: ExecutorHandle, request: StoreFile) -> None:
        """An executor asks to store an output."""
        self._begin(run, handle, request, self._store(run, handle, request))

    def cancel(self, run: Run) -> None:
        """Stop what is under way for it; its executor is told of the cancel by other means."""
        for task in self._tasks.pop(run.key, ()):
            task.cancel()

    def end(self, run: Run) -> None:
        """It has ended: stop what is under way, remove its inputs."""
        self.cancel(run)
        directory = self._directories.pop(run.key, None)
        if directory is not None:
            task = asyncio.get_running_loop().create_task(self._remove(directory))
            self._removals.add(task)
            task.add_done_callback(self._removals.discard)

    async def wait_removed(self, timeout_s: float) -> None:
        """Wait until the inputs of the runs that have ended are gone."""
        if self._removals:
            await asyncio.wait(self._removals, timeout=timeout_s)

    def access(self, run: Run) -> FileAccess:
        """Where its files are."""
        base_url, token = run.file_base_url, run.file_token
        if not base_url and self._stores:
            own = self._stores[0]
            base_url, token = own.base_url, token or own.token
        elif not token:
            token = next((store.token for store in self._stores if _same(store.base_url, base_url)), "")
        return FileAccess(base_url, token, run.tenant_id)

    # -- inside -------------------------------------------------------------------------------

    def _begin(
        self, run: Run, handle: ExecutorHandle, request: FetchFile | StoreFile, work: Coroutine[Any, Any, None]
    ) -> None:
        tasks = self._tasks.setdefault(run.key, set())
        if len(tasks) >= MAX_REQUESTS:
            work.close()
            failure = Failure("validation", f"more than {MAX_REQUESTS} files at once")
            handle.send_files(FileReply(request.key, request.number, failure=failure))
            return
        task = asyncio.get_running_loop().create_task(work)
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _fetch(self, run: Run, handle: ExecutorHandle, request: FetchFile) -> None:
        directory = self._directories.setdefault(run.key, self._directory_of(run.run_id))
        wanted = FetchInputs(directory, request.number, request.refs, self.access(run))
        try:
            got = await self._transfers.call(wanted, InputsFetched)
        except TransferError as error:
            got = InputsFetched((), error.failure)
        reply = FileReply(request.key, request.number, got.files, got.failure, got.failed)
        self._go_on(run, lambda: handle.send_files(reply))

    async def _store(self, run: Run, handle: ExecutorHandle, request: StoreFile) -> None:
        wanted = StoreOutput(request.ref, request.ticket, request.create, self.access(run))
        files: tuple[LocalFile, ...] = ()
        failure = None
        try:
            files = ((await self._transfers.call(wanted, OutputStored)).file,)
        except TransferError as error:
            failure = error.failure
        handle.send_files(FileReply(request.key, request.number, files, failure))

    async def _remove(self, directory: str) -> None:
        try:
            await self._transfers.call(RemoveInputs(directory), InputsRemoved)
        except TransferError as error:
            log.warning("the inputs of a run stay in %s: %s", directory, error)

    def _directory_of(self, run_id: str) -> str:
        """The name of the run's directory: its id, unless that is no plain name or another's."""
        taken = run_id in self._reserved or run_id in self._directories.values()
        if not taken and _PLAIN_NAME.fullmatch(run_id):
            return run_id
        return f"run-{hashlib.sha256(run_id.encode()).hexdigest()[:32]}"


def _same(one: str, other: str) -> bool:
    return one.rstrip("/") == other.rstrip("/")
