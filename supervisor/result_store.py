"""WORKER_OUTBOX_DIR: results that are not known to have arrived, on disk for the supervisor after this one.

Owns: this supervisor's journal, the journals of dead supervisors that it found in the same directory, and the one
thread that touches them: a disk may be slow, or stuck, and the event loop must not be.

1. `open` adopts what dead supervisors left, whatever their worker ids were; a journal whose supervisor lives is locked.
2. `keep` and `forget` are handed to the thread in order. `keep` returns a ticket, by which the outbox says later that
   the result has arrived. A result that arrived before it was written is never written. A large output is read by the
   thread where it lies.
3. `hand_over` gives the outbox what was adopted, as far as the outbox has room.
4. A disk that is full or can't be written to is said once, and once more when it can. The worker goes on without.

What a SIGKILL loses is what the thread has not written yet: a few milliseconds' worth, and the runs without a result,
which the scheduler sees break with the stream.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import re
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from gen_worker.pipe.arena import ArenaError
from supervisor.held_output import LargeResult
from supervisor.journal import Journal

log = logging.getLogger(__name__)

T = TypeVar("T")

QUEUED_BYTES: Final = 64 * 1024 * 1024
"""What may wait for a slow disk; results beyond it are not kept on it."""
CLOSE_S: Final = 2.0
BATCH: Final = 256
_NAME_CHARS: Final = 64


class _Keep(NamedTuple):
    ticket: int
    message: bytes | LargeResult


class _Forget(NamedTuple):
    ticket: int


class _Read(NamedTuple):
    ticket: int
    reply: Future[bytes | None]


class _Stop(NamedTuple):
    reply: Future[None]


class ResultStore:
    """See the module. Implements the outbox's Keeper; no method raises OSError."""

    def __init__(self, parent: Path, worker_id: str) -> None:
        self._parent = parent
        self._name = re.sub(r"[^\w.-]", "_", worker_id, flags=re.ASCII)[:_NAME_CHARS].lstrip(".") or "worker"
        self._tickets = itertools.count(1)
        self._leftovers: list[int] = []
        self._queue: queue.SimpleQueue[_Keep | _Forget | _Read | _Stop] = queue.SimpleQueue()
        self._queued_bytes = 0  # counted up by the event loop
        self._done_bytes = 0  # by the thread
        self._overrun = False
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        # The thread's alone, once it runs.
        self._own: Journal | None = None
        self._places: dict[int, tuple[Journal, int]] = {}
        self._failing = False

    # -- the event loop's side ----------------------------------------------------------------

    async def open(self) -> None:
        """Adopt what is there, begin a journal, start the thread."""
        self._loop = asyncio.get_running_loop()
        await asyncio.to_thread(self._open)
        self._thread = threading.Thread(target=self._work, name="result-store", daemon=True)
        self._thread.start()

    def keep(self, message: bytes | LargeResult) -> int:
        """Have a result written; returns its ticket."""
        ticket = next(self._tickets)
        if self._queued_bytes - self._done_bytes + len(message) > QUEUED_BYTES:
            if not self._overrun:
                log.error("%s is too slow: some results are not kept on disk", self._parent)
            self._overrun = True
            return ticket
        self._overrun = False
        self._queued_bytes += len(message)
        if not isinstance(message, bytes):
            message.hold()
        self._queue.put(_Keep(ticket, message))
        return ticket

    def forget(self, ticket: int) -> None:
        """The result with this ticket has arrived."""
        self._queue.put(_Forget(ticket))

    async def hand_over(self, put: Callable[[bytes, int], None], room: Callable[[], Awaitable[None]]) -> None:
        """Put each adopted result and its ticket, and wait for room before the next."""
        tickets, self._leftovers = self._leftovers, []
        for ticket in tickets:
            await room()
            reply: Future[bytes | None] = Future()
            self._queue.put(_Read(ticket, reply))
            message = await asyncio.wrap_future(reply)
            if message is not None:
                put(message, ticket)

    async def close(self) -> None:
        """Write what is queued, within CLOSE_S, and remove the journals that nothing is left in."""
        if self._thread is None:
            return
        reply: Future[None] = Future()
        self._queue.put(_Stop(reply))
        try:
            async with asyncio.timeout(CLOSE_S):
                await asyncio.wrap_future(reply)
        except TimeoutError:
            log.error("%s is too slow: the last results may not be on disk", self._parent)

    # -- the thread's side --------------------------------------------------------------------

    def _open(self) -> None:
        try:
            if self._parent.is_dir():
                self._adopt_all()
            self._own = Journal.create(self._parent, self._name)
        except OSError as error:
            log.error("WORKER_OUTBOX_DIR can't be used, results are not kept on disk: %s", error)

    def _adopt_all(self) -> None:
        for directory in sorted(self._parent.iterdir()):
            if not directory.is_dir():
                continue
            try:
                journal = Journal.adopt(directory)
            except OSError as error:
                log.error("the results in %s can't be taken over: %s", directory, error)
                continue
            if journal is None:
                continue
            for result_id in journal.ids:
                ticket = next(self._tickets)
                self._places[ticket] = (journal, result_id)
                self._leftovers.append(ticket)
            if journal.ids:
                log.info("%d results in %s are taken over", len(journal.ids), directory)
            else:
                journal.close()

    def _work(self) -> None:
        stop: _Stop | None = None
        while stop is None:
            batch = [self._queue.get()]
            while len(batch) < BATCH and not self._queue.empty():
                batch.append(self._queue.get())
            arrived = {message.ticket for message in batch if isinstance(message, _Forget)}
            for message in batch:
                if isinstance(message, _Keep):
                    if message.ticket not in arrived:
                        self._write(message)
                    self._done_bytes += len(message.message)
                    self._release(message.message)
                elif isinstance(message, _Read):
                    _answer(message.reply, self._read(message.ticket))
                elif isinstance(message, _Stop):
                    stop = message
            self._note_arrivals(arrived)
        for journal in {*([self._own] if self._own else []), *(journal for journal, _ in self._places.values())}:
            journal.close()
        _answer(stop.reply, None)

    def _write(self, kept: _Keep) -> None:
        if self._own is None:
            return
        try:
            self._own.keep(kept.ticket, kept.message)
        except (OSError, ArenaError) as error:
            self._failed(error)
        else:
            self._places[kept.ticket] = (self._own, kept.ticket)
            self._worked()

    def _release(self, message: bytes | LargeResult) -> None:
        if not isinstance(message, bytes) and self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed: nobody is left who could use the memory
                self._loop.call_soon_threadsafe(message.release)

    def _note_arrivals(self, tickets: set[int]) -> None:
        by_journal: dict[Journal, list[int]] = {}
        for ticket in tickets:
            if (place := self._places.pop(ticket, None)) is not None:
                by_journal.setdefault(place[0], []).append(place[1])
        for journal, result_ids in by_journal.items():
            try:
                journal.forget(result_ids)
            except OSError as error:
                self._failed(error)
            else:
                self._worked()
            if journal is not self._own and not journal.ids:
                journal.close()

    def _read(self, ticket: int) -> bytes | None:
        if (place := self._places.get(ticket)) is None:
            return None
        journal, result_id = place
        try:
            return journal.read(result_id)
        except OSError as error:
            log.error("a result that was kept can't be read: %s", error)
            return None

    def _failed(self, error: OSError | ArenaError) -> None:
        if not self._failing:
            log.error("results are not kept on disk for now: %s", error)
        self._failing = True

    def _worked(self) -> None:
        if self._failing:
            log.info("results are kept on disk again")
        self._failing = False


def _answer(reply: Future[T], value: T) -> None:
    """To who waits for it, if that one still does."""
    if reply.set_running_or_notify_cancel():
        reply.set_result(value)
