"""Calls tenant functions: from a Run message to the values and errors that ActiveRun answers with.

1. claim the run, decode its payload, have its inputs fetched, look up its models, make its context;
2. call the function, in a pool thread inside of the run's gate, or on the event loop;
3. check and encode what it returned, or send each delta as it comes;
4. answer; then act on an error that concerns the whole process: a SystemExit, a poisoned CUDA context.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol

from executor.blobs import Blobs
from executor.cuda_faults import is_poisoned
from executor.events import DELTA
from executor.run import ActiveRun
from executor.sockets import ActiveSession
from gen_worker.assets import assets_in, holds_assets
from gen_worker.context import ActionContext, RunHost
from gen_worker.errors import FatalError, RunCanceled, ValidationError, WorkerError
from gen_worker.payloads import decode_payload, encode_delta, encode_output
from gen_worker.pipe.messages import Failure, Payload, Run, SocketOpen
from gen_worker.realtime import RealtimeSocket
from gen_worker.signature import FunctionSpec
from gen_worker.types import Asset


@dataclass(frozen=True, slots=True)
class Limits:
    """Of Init; 0: no limit."""

    output_bytes: int
    delta_bytes: int
    delta_events: int


TURN_DELTAS: Final = 16
"""An async generator that never waits for anything still lets others have the event loop after so many."""


class Models(Protocol):
    """What the runner asks of the loaded models."""

    def inject(self, model_id: str, type_name: str) -> object:
        """The object for one call. Raises KeyError when it is not loaded."""


class ProcessEnd(Protocol):
    """How a run ends the process. None of them returns."""

    def exit_by_tenant(self, function: str, request: SystemExit) -> None: ...
    def poisoned(self, function: str, failure: Failure) -> None: ...
    def internal(self, error: BaseException) -> None: ...


class PoisonedError(WorkerError):
    """Stands for the error that cost the CUDA context: another executor may well serve the same request."""

    error_type = "retryable"
    retryable = True


class Runner:
    """See the module."""

    def __init__(self, blobs: Blobs, models: Models, limits: Limits, device: str, end: ProcessEnd) -> None:
        self._blobs = blobs
        self._models = models
        self._limits = limits
        self._device = device
        self._end = end

    # -- sync functions and generators, in a pool thread --------------------------------------

    def run_in_thread(self, run: ActiveRun) -> None:
        """Run and answer; raises nothing."""
        try:
            if run.claim():
                self._run_claimed(run)
        except BaseException as defect:  # noqa: BLE001  # errors of the run are answered below
            self._end.internal(defect)

    def _run_claimed(self, run: ActiveRun) -> None:
        try:
            assets = self._decode(run)
            if assets:
                run.wait_unclaimed(assets)
                return
            if run.inputs is not None:
                run.inputs.apply()
            context, arguments = self._prepare(run)
        except (Exception, RunCanceled) as error:  # noqa: BLE001  # every error of a run is its answer
            self._failed(run, error)
            return
        call: Callable[..., Any] = run.spec.func
        if run.spec.incremental:
            call = functools.partial(self._stream, run)
        value, raised = run.gate.call(call, context, **arguments)
        if raised is not None:
            self._failed(run, raised)
        else:
            self._returned(run, value)

    def _stream(self, run: ActiveRun, context: ActionContext, **arguments: Any) -> None:
        deltas = run.spec.func(context, **arguments)
        try:
            for count, delta in enumerate(deltas, 1):
                run.emit(DELTA, self._encode_delta(run, delta, count))
                if context.is_canceled():
                    raise RunCanceled
        finally:
            if inspect.isgenerator(deltas):
                deltas.close()

    # -- async functions and generators, on the event loop ------------------------------------

    async def run_on_loop(self, run: ActiveRun) -> None:
        """Run and answer; raises nothing."""
        try:
            if run.claim():
                await self._run_claimed_on_loop(run)
        except BaseException as defect:  # noqa: BLE001  # as above
            self._end.internal(defect)

    async def _run_claimed_on_loop(self, run: ActiveRun) -> None:
        value = None
        try:
            if assets := self._decode(run):
                await _fetch(run, assets)
            context, arguments = self._prepare(run)
            if run.spec.incremental:
                await self._stream_async(run, context, arguments)
            else:
                value = await run.spec.func(context, **arguments)
        except BaseException as error:  # noqa: BLE001  # as above; SystemExit is told apart there
            self._failed(run, error)
        else:
            self._returned(run, value)

    async def _stream_async(self, run: ActiveRun, context: ActionContext, arguments: dict[str, Any]) -> None:
        deltas = run.spec.func(context, **arguments)
        count = 0
        try:
            async for delta in deltas:
                count += 1
                await run.events.put_async(DELTA, self._encode_delta(run, delta, count))
                if not count % TURN_DELTAS:
                    await asyncio.sleep(0)
                if context.is_canceled():
                    raise RunCanceled
        finally:
            if inspect.isasyncgen(deltas):
                await deltas.aclose()

    # -- handlers of realtime sessions, on the event loop -------------------------------------

    async def run_session(self, session: ActiveSession) -> None:
        """Call the handler and say how it ended; raises nothing."""
        try:
            await self._run_handler(session)
        except BaseException as defect:  # noqa: BLE001  # as above
            self._end.internal(defect)

    async def _run_handler(self, session: ActiveSession) -> None:
        message, spec = session.message, session.spec
        context = self._context(message, message.session_id, session)
        try:
            session.begin(context)
            arguments = self._inject(spec, message.models, f"session {message.session_id}")
            await spec.func(context, **{spec.socket_param: RealtimeSocket(session)}, **arguments)
        except SystemExit as request:
            self._end.exit_by_tenant(spec.qualified_name, request)
        except BaseException as error:  # noqa: BLE001  # as above
            poisoned = is_poisoned(error)
            failure = session.finish(error, poisoned=poisoned)
            if poisoned and failure is not None:
                self._end.poisoned(spec.qualified_name, failure)
        else:
            session.finish()

    # -- around all ---------------------------------------------------------------------------

    def _decode(self, run: ActiveRun) -> list[tuple[str, Asset]]:
        """Decode the payload, the first time; the Assets in it, after their places."""
        message, spec = run.message, run.spec
        if spec.payload_type is None:
            self._blobs.discard(message.payload)
            raise FatalError(f"{spec.name} is a websocket handler: it is opened as a session, not run as a task")
        if run.decoded is not None:
            return []
        if isinstance(message.payload, bytes):
            run.decoded = decode_payload(spec, message.payload)
        else:
            decode = functools.partial(decode_payload, spec)
            run.decoded = self._blobs.decode(message.payload, decode, spec.payload_type)
        return list(assets_in(run.decoded)) if holds_assets(spec.payload_type) else []

    def _prepare(self, run: ActiveRun) -> tuple[ActionContext, dict[str, Any]]:
        message, spec = run.message, run.spec
        arguments: dict[str, Any] = {spec.payload_param: run.decoded}
        if spec.injections:
            arguments |= self._inject(spec, message.models, f"run {message.run_id}")
        run.decoded = None  # the function's alone from here on
        context = self._context(message, message.run_id, run)
        run.attach(context)
        return context, arguments

    def _context(self, message: Run | SocketOpen, run_id: str, host: RunHost) -> ActionContext:
        return ActionContext(
            run_id=run_id,
            host=host,
            tenant_id=message.tenant_id,
            user_id=message.user_id,
            timeout_ms=message.timeout_ms,
            deadline=message.deadline,
            device=self._device,
        )

    def _inject(self, spec: FunctionSpec, models: Mapping[str, str], who: str) -> dict[str, object]:
        """The injected values by parameter, of the models that the message of `who` names."""
        injected: dict[str, object] = {}
        for injection in spec.injections:
            param, type_name = injection.param, injection.type_name
            model_id = models.get(param)
            if model_id is None:
                raise RuntimeError(f"{who} names no model for parameter {param!r} of {spec.name}")
            try:
                injected[param] = self._models.inject(model_id, type_name)
            except KeyError:
                raise RuntimeError(
                    f"model {model_id!r} for parameter {param!r} of {spec.name} is not loaded as {type_name}"
                ) from None
        return injected

    def _encode_delta(self, run: ActiveRun, delta: object, count: int) -> bytes:
        limit = self._limits.delta_events
        if limit and count > limit:
            raise ValidationError(f"more than {limit} deltas: over the limit WORKER_MAX_OUTPUT_DELTA_EVENTS={limit}")
        encoded = encode_delta(run.spec, delta)
        limit = self._limits.delta_bytes
        if limit and len(encoded) > limit:
            raise ValidationError(f"a delta of {len(encoded)} bytes is over WORKER_MAX_OUTPUT_DELTA_BYTES={limit}")
        return encoded

    def _returned(self, run: ActiveRun, value: object) -> None:
        try:
            output = self._output(run, value)
        except OSError as error:
            self._failed(run, MemoryError(f"no shared memory for an output: {error}"))
        except (Exception, RunCanceled) as error:  # noqa: BLE001  # as above
            self._failed(run, error)
        else:
            run.succeed(output)

    def _output(self, run: ActiveRun, value: object) -> Payload:
        if run.is_canceled:
            raise RunCanceled("the function ended after the cancel")
        if run.spec.incremental:
            return b""
        output = encode_output(run.spec, value)
        limit = self._limits.output_bytes
        if limit and len(output) > limit:
            raise ValidationError(f"output of {len(output)} bytes is over WORKER_MAX_OUTPUT_BYTES={limit}")
        return self._blobs.store(output)

    def _failed(self, run: ActiveRun, error: BaseException) -> None:
        if isinstance(error, SystemExit):
            run.events.flush()
            self._end.exit_by_tenant(run.spec.qualified_name, error)
        elif is_poisoned(error):
            poisoned = PoisonedError("the device failed")
            poisoned.__cause__ = error
            self._end.poisoned(run.spec.qualified_name, run.fail(poisoned, poisoned=True))
        else:
            run.fail(error)


async def _fetch(run: ActiveRun, assets: Sequence[tuple[str, Asset]]) -> None:
    """Have the inputs of a run of an async function fetched; a cancel of its task ends the wait."""
    loop = asyncio.get_running_loop()
    replied = loop.create_future()
    inputs = run.files.inputs(assets, lambda: loop.call_soon_threadsafe(_resolve, replied))
    inputs.ask()
    await replied
    inputs.apply()


def _resolve(replied: asyncio.Future[None]) -> None:
    if not replied.done():
        replied.set_result(None)
