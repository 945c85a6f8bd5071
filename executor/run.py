"""One run inside of an executor, from its message to its one Result.

Owns: the run's cancel, its events, and that it is answered once.

    QUEUED --claim--> STARTED --succeed | fail--> answered
      |  ^---unclaim----'                             ^
      `---claim, by a cancel--------------------------'

A run of a sync function that has to wait for its inputs is unclaimed, so that it uses no thread, and queued again
when they are there. Who claims a run answers it: the thread (or coroutine) that starts it, or the cancel that was
faster. A cancel that finds it started sets the flag, ends its waits and leaves the answer to whoever runs it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Final

import msgspec

from executor.events import LOOP_WINDOWS, EventStream
from executor.files import Inputs, RunFiles, StoreSettings
from executor.gate import Gate
from executor.tracebacks import drop_frames
from gen_worker.context import ActionContext
from gen_worker.errors import RunCanceled
from gen_worker.failures import failure_of
from gen_worker.pipe.messages import CancelCause, Failure, Payload, Result, Run, Upward
from gen_worker.signature import FunctionSpec
from gen_worker.types import Asset

_MAKING: Final = threading.RLock()
"""Held while a run's events or files are made, so that all of its threads get the same ones."""


class ActiveRun:
    """See the module. It is the RunHost of its ActionContext."""

    __slots__ = (
        "_claimed", "_events", "_files", "_forget", "_loop_thread", "_over", "_resume", "_send", "_store", "cause",
        "context", "decoded", "gate", "inputs", "message", "spec", "task", "tiny",
    )  # fmt: skip

    def __init__(
        self,
        message: Run,
        spec: FunctionSpec,
        *,
        send: Callable[[Upward], None],
        forget: Callable[[int, None], object],
        loop_thread: int,
        store: StoreSettings,
        resume: Callable[[ActiveRun], None],
    ) -> None:
        """`forget(key, None)` is called when the run is answered; `loop_thread` is the event loop's thread.

        `resume` queues it again, after it was unclaimed.
        """
        self.message = message
        self.spec = spec
        self.cause: CancelCause | None = None
        self.context: ActionContext | None = None
        self._events: EventStream | None = None
        self._files: RunFiles | None = None
        self.decoded: msgspec.Struct | None = None
        """The payload, once it is decoded; what the message says of it is void then."""
        self.inputs: Inputs | None = None
        """Of a run that was unclaimed."""
        self.gate = Gate()
        self.task: asyncio.Task[None] | None = None
        """Of an async function, once the event loop has it."""
        self.tiny = False
        """What its Result says of its function."""
        self._over = False
        """It is being answered."""
        self._send = send
        self._store = store
        self._forget = forget
        self._loop_thread = loop_thread
        self._resume = resume
        self._claimed = threading.Lock()

    # -- made when asked for, since most runs have neither -------------------------------------

    @property
    def events(self) -> EventStream:
        """What it emits."""
        if self._events is None:
            made = EventStream(self.message.key, self.message.window, self._send)
            with _MAKING:
                if self._events is None:
                    self._events = made
            # Who cancels or answers stores that and then looks for events, this the other way round: one sees both.
            if self.cause is not None:
                self._events.cancel()
            if self._over:
                self._events.close()
        return self._events

    @property
    def files(self) -> RunFiles:
        """What it has fetched and stored."""
        if self._files is None:
            made = RunFiles(self.message.key, self._store, self._send)
            with _MAKING:
                if self._files is None:
                    self._files = made
            if self.cause is not None:
                self._files.cancel()
        return self._files

    # -- its life -----------------------------------------------------------------------------

    def claim(self) -> bool:
        """True for the first who asks: that one answers the run."""
        return self._claimed.acquire(blocking=False)

    def wait_unclaimed(self, assets: Sequence[tuple[str, Asset]]) -> None:
        """Ask for the inputs and give the claim back; the run is queued again when they are there.

        Raises ValidationError and RunCanceled, with the claim still held.
        """
        self.inputs = self.files.inputs(assets, lambda: self._resume(self))
        self._claimed.release()
        self.inputs.ask()
        # A cancel sets the flag and then tries to claim, this the other way round: one of them answers.
        if self.is_canceled and self.claim():
            self.fail(RunCanceled("it waited for its inputs"))

    def attach(self, context: ActionContext) -> None:
        """The context that the function gets; a cancel that came before is passed on to it."""
        self.context = context
        if self.cause is not None:
            context.cancel(self.cause)

    def cancel(self, cause: CancelCause) -> None:
        """Set the flag and end the run's waits. The first cause stays."""
        if self.cause is None:
            self.cause = cause
        # `attach` stores the context and then looks at the cause, this the other way round: one of them sees both.
        if self.context is not None:
            self.context.cancel(self.cause)
        if self._events is not None:
            self._events.cancel()
        if self._files is not None:
            self._files.cancel()

    @property
    def is_canceled(self) -> bool:
        """By the scheduler, the deadline or the function itself."""
        return self.cause is not None or (self.context is not None and self.context.is_canceled())

    def succeed(self, output: Payload) -> None:
        """Answer with the output; an incremental run's is empty, after `output.completed`."""
        if self.spec.incremental:
            self.events.close(("output.completed", b"{}"))
        self._answer(Result(self.message.key, output, tiny=self.tiny))

    def fail(self, error: BaseException, *, poisoned: bool = False) -> Failure:
        """Answer with what went wrong, and say so in the stream of an incremental run."""
        failure = self._failure_of(error)
        drop_frames(error)
        if self.spec.incremental:
            said = {"error_type": failure.error_type, "message": failure.safe_message}
            self.events.close(("output.error", msgspec.json.encode(said)))
        self._answer(Result(self.message.key, b"", failure, poisoned))
        return failure

    def _failure_of(self, error: BaseException) -> Failure:
        cause = self.cause or (self.context.cancel_cause if self.context is not None else None)
        failure = failure_of(error, cancel_cause=cause)
        if cause is None or failure.error_type == cause:
            return failure
        # Whatever a function raises because it was stopped, that it was stopped is the answer.
        stopped = failure_of(RunCanceled(), cancel_cause=cause)
        return msgspec.structs.replace(stopped, detail=failure.detail)

    def _answer(self, result: Result) -> None:
        self._over = True
        if self._events is not None:
            self._events.close()
        self._forget(self.message.key, None)
        self._send(result)

    # -- RunHost ------------------------------------------------------------------------------

    def emit(self, event_type: str, payload_json: bytes) -> None:
        thread = threading.get_ident()
        if self.gate.is_inside(thread):
            with self.gate.shielded():
                self.events.put(event_type, payload_json)
        elif thread == self._loop_thread:
            self.events.put(event_type, payload_json, windows=LOOP_WINDOWS)
        else:
            self.events.put(event_type, payload_json)

    def store(self, ref: str, source: bytes | Path, *, create: bool) -> Asset:
        shield = self.gate.shielded() if self.gate.is_inside(threading.get_ident()) else nullcontext()
        with shield:
            asset = self.files.store(ref, source, create=create)
        asset.tenant_id = self.message.tenant_id or None
        return asset
