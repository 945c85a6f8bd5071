"""Serves the pipe: every message of the supervisor goes to what it concerns.

Owns: the runs that the executor has. It takes all frames that are there, hands sync functions to the pool and async
ones to the event loop in one go each, and acts on the rest itself, without waiting for anything. A single run of a
function that has proved brief it hands back to the thread that read it (reader.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextvars import Context
from functools import partial
from typing import Any, Final

import msgspec

from executor.blobs import Blobs
from executor.files import StoreSettings
from executor.models import ModelStore
from executor.pace import BRIEF_S, TINY_S, Pace
from executor.pool import ThreadPool
from executor.run import ActiveRun
from executor.runner import Runner
from executor.sockets import ActiveSession, Sockets
from executor.striker import Striker
from gen_worker.errors import FatalError, RunCanceled
from gen_worker.failures import failure_of
from gen_worker.pipe.messages import (
    Cancel,
    Credit,
    Downward,
    FileReply,
    Free,
    LoadModel,
    Result,
    Run,
    Shutdown,
    SocketClose,
    SocketCredit,
    SocketFrame,
    SocketOpen,
    UnloadModel,
    Upward,
    decode_downward,
)
from gen_worker.signature import FunctionSpec

STRIKE_AFTER: Final = 0.5
"""Of the cancel's grace period: the first half is the function's to end by itself."""


class Service:
    """See the module. Made by the event loop's thread, then fed by the reader."""

    def __init__(  # noqa: PLR0913  # keyword-only, the parts that it connects
        self,
        specs: Mapping[str, FunctionSpec],
        *,
        send: Callable[[Upward], None],
        blobs: Blobs,
        models: ModelStore,
        runner: Runner,
        threads: int,
        cancel_grace_s: float,
        loop: asyncio.AbstractEventLoop,
        loop_thread: int,
        store: StoreSettings,
        on_shutdown: Callable[[], None],
    ) -> None:
        self._specs = specs
        self._send = send
        self._blobs = blobs
        self._models = models
        self._runner = runner
        self._brief, self._tiny = Pace(BRIEF_S), Pace(TINY_S)
        self._pool = ThreadPool(threads, self._run_timed)
        self._loop = loop
        self._loop_thread = loop_thread
        self._store = store
        self._strike_after_s = cancel_grace_s * STRIKE_AFTER
        self._striker = Striker()
        self._sockets = Sockets(
            specs,
            send=send,
            blobs=blobs,
            start=self._start_session,
            strike_after_s=self._strike_after_s,
            loop=loop,
            loop_thread=loop_thread,
            store=store,
        )
        self._runs: dict[int, ActiveRun] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._for_threads: list[ActiveRun] = []
        self._for_loop: list[ActiveRun] = []
        self._handlers: dict[type, Callable[[Any], None]] = {
            Run: self._run,
            Cancel: self._cancel,
            Credit: self._credit,
            SocketOpen: self._sockets.open,
            SocketFrame: self._sockets.frame,
            SocketClose: self._sockets.close,
            SocketCredit: self._sockets.credit,
            FileReply: self._file_reply,
            LoadModel: models.load,
            UnloadModel: models.unload,
            Free: lambda message: blobs.freed(message.offset),
            Shutdown: lambda _: on_shutdown(),
        }

    def handle(self, frames: Sequence[bytes]) -> Callable[[], None] | None:
        """Act on frames that arrived together. Returns what the calling thread may as well do by itself.

        Raises DecodeError and ArenaError for what they can't be.
        """
        for body in frames:
            message: Downward = decode_downward(body)
            handler = self._handlers.get(type(message))
            if handler is None:
                raise msgspec.DecodeError(f"{type(message).__name__} is not expected now")
            handler(message)
        work = None
        if self._for_threads:
            runs, self._for_threads = self._for_threads, []
            if len(runs) == 1 and self._may_stay(runs[0]):
                work = partial(Context().run, self._run_timed, runs[0])
            else:
                self._pool.submit(runs)
        if self._for_loop:
            self._loop.call_soon_threadsafe(self._start_tasks, self._for_loop)
            self._for_loop = []
        self._sockets.flush()
        return work

    def _may_stay(self, run: ActiveRun) -> bool:
        """Whether the reader may run it: it is brief, and none waits before it."""
        if self._pool.waits or not self._brief.is_short(run.spec.name):
            return False
        return run.spec.mode == "sync" and isinstance(run.message.payload, bytes)

    def _run_timed(self, run: ActiveRun) -> None:
        name, begin = run.spec.name, time.perf_counter()
        run.tiny = self._tiny.is_short(name)
        self._runner.run_in_thread(run)
        seconds = time.perf_counter() - begin
        if run.context is not None:  # else its function was not called: paused, refused, canceled
            self._brief.note(name, seconds)
            self._tiny.note(name, seconds)

    # -- runs ---------------------------------------------------------------------------------

    def _run(self, message: Run) -> None:
        spec = self._specs.get(message.function)
        if spec is None:
            self._blobs.discard(message.payload)
            error = FatalError(f"this executor has no function {message.function!r}")
            self._send(Result(message.key, b"", failure_of(error)))
            return
        run = ActiveRun(
            message,
            spec,
            send=self._send,
            forget=self._runs.pop,
            loop_thread=self._loop_thread,
            store=self._store,
            resume=lambda run: self._pool.submit([run]),
        )
        self._runs[message.key] = run
        (self._for_loop if spec.mode.startswith("async") else self._for_threads).append(run)

    def _start_tasks(self, runs: Sequence[ActiveRun]) -> None:
        for run in runs:
            run.task = self._start_task(self._runner.run_on_loop(run))

    def _start_session(self, session: ActiveSession) -> asyncio.Task[None]:
        return self._start_task(self._runner.run_session(session))

    def _start_task(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _cancel(self, message: Cancel) -> None:
        run = self._runs.get(message.key)
        if run is None:
            self._sockets.cancel(message)
            return
        run.cancel(message.cause)
        if run.claim():
            if run.inputs is None:  # else the payload was decoded
                self._blobs.discard(run.message.payload)
            run.fail(RunCanceled("it had not started"))
        elif run.spec.mode.startswith("async"):
            self._cancel_task(run)
            self._striker.watch(partial(self._cancel_task, run), self._strike_after_s)
        else:
            self._striker.watch(partial(self._strike, run), self._strike_after_s)

    def _cancel_task(self, run: ActiveRun) -> bool:
        """Cancel a task from another thread; False when the run has ended."""
        if run.message.key not in self._runs:
            return False
        self._loop.call_soon_threadsafe(_cancel_if_there, run)
        return True

    def _strike(self, run: ActiveRun) -> bool:
        """Interrupt a sync function; False when the run has ended, maybe before its function was called."""
        return run.message.key in self._runs and run.gate.strike()

    def _file_reply(self, message: FileReply) -> None:
        run = self._runs.get(message.key)
        if run is not None:
            run.files.replied(message)
        else:
            self._sockets.file_reply(message)

    def _credit(self, message: Credit) -> None:
        run = self._runs.get(message.key)
        if run is not None:
            run.events.credit(message.size)


def _cancel_if_there(run: ActiveRun) -> None:
    if run.task is not None:
        run.task.cancel()
