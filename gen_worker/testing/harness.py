"""Runs one tenant function in this process, as an executor would.

Owns: a RunHost and a SocketHost in memory. The signature checks, the payload decoding, the context and the mapping of
failures are those of the executor; what is not here is what needs processes: a deadline shows in the context but
kills nothing, and models and the files of the payload's Assets are what the caller passes.

1. inspect the function, decode the payload and lay its files down in a directory; 2. call it, or drive its generator,
checking each delta; 3. keep what it emitted and saved; 4. map what it raised to a Failure. SignatureError and wrong
`models` are raised: they are the test's or the function's mistake, and no request can cause them.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import force_setattr

from gen_worker.assets import assets_in
from gen_worker.context import ActionContext
from gen_worker.errors import RunCanceled, ValidationError, WorkerError
from gen_worker.failures import failure_of
from gen_worker.mime_types import HEAD_BYTES, mime_type_of
from gen_worker.payloads import convert_payload, decode_payload, encode_delta, encode_output
from gen_worker.pipe.messages import Failure
from gen_worker.realtime import Frame, RealtimeSocket
from gen_worker.signature import FunctionSpec, inspect_function
from gen_worker.types import Asset


@dataclass(frozen=True, slots=True)
class RecordedEvent:
    """One event, its payload decoded from the JSON that the scheduler would get."""

    type: str
    payload: Any


class RunFailedError(WorkerError):
    """Raised by `Outcome.check` for a run that failed; `failure` says how."""

    def __init__(self, failure: Failure) -> None:
        super().__init__(f"{failure.error_type}: {failure.safe_message}\n{failure.detail}")
        self.failure = failure


@dataclass(slots=True)
class Outcome:
    """What a run left. `failure` is what the scheduler would be told; `exception` is what it was made from."""

    output: Any = None
    """The output struct; None for an incremental function and for a failed run."""
    deltas: list[Any] = field(default_factory=list)
    events: list[RecordedEvent] = field(default_factory=list)
    """What the function emitted itself: progress, log and its own."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Whole ref -> what was saved under it."""
    failure: Failure | None = None
    exception: BaseException | None = None

    def check(self) -> Outcome:
        """Itself, when the run did not fail. Raises RunFailedError, from what the function raised."""
        if self.failure is not None:
            raise RunFailedError(self.failure) from self.exception
        return self


@dataclass(slots=True)
class SocketOutcome(Outcome):
    """What a websocket handler left."""

    sent: list[bytes | str] = field(default_factory=list)
    """The frames that it sent, text frames as str."""
    closed: bool = False
    """Whether the handler closed the socket."""


InputFiles = Mapping[str, bytes | str | os.PathLike[str]]
"""By ref: the bytes of an input file, or its path."""
OnEvent = Callable[[ActionContext, RecordedEvent], None]
"""Called for each event and each delta (as `output.delta`), so that a test can cancel in the middle."""


@dataclass(slots=True)
class MemoryHost:
    """RunHost over an Outcome."""

    outcome: Outcome
    on_event: Callable[[RecordedEvent], None] = lambda _event: None

    def emit(self, event_type: str, payload_json: bytes) -> None:
        event = RecordedEvent(event_type, msgspec.json.decode(payload_json))
        self.outcome.events.append(event)
        self.on_event(event)

    def store(self, ref: str, source: bytes | Path, *, create: bool) -> Asset:
        if create and ref in self.outcome.files:
            name = ref.partition("/outputs/")[2]
            raise ValidationError(f"output {name!r}: it exists already")
        data = source.read_bytes() if isinstance(source, Path) else source
        self.outcome.files[ref] = data
        mime_type = mime_type_of(data[:HEAD_BYTES], ref)
        return Asset(ref, mime_type=mime_type, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


@dataclass(slots=True)
class _MemorySocket:
    """SocketHost over a SocketOutcome."""

    outcome: SocketOutcome
    frames: deque[Frame]

    async def send(self, data: bytes, *, is_text: bool) -> None:
        self.outcome.sent.append(data.decode() if is_text else data)

    async def receive(self) -> Frame | None:
        return self.frames.popleft() if self.frames else None

    async def close(self) -> None:
        self.outcome.closed = True


@dataclass(frozen=True, slots=True)
class _Call:
    """One run: the function, its context and what it is given."""

    spec: FunctionSpec
    context: ActionContext
    outcome: Outcome
    arguments: dict[str, Any]
    on_event: OnEvent | None
    files: InputFiles = field(default_factory=dict)

    def start(self) -> Any:
        return self.spec.func(self.context, **self.arguments)

    def returned(self, value: Any) -> None:
        encode_output(self.spec, value)
        self.outcome.output = value

    def yielded(self, delta: Any) -> None:
        encoded = encode_delta(self.spec, delta)
        self.outcome.deltas.append(delta)
        if self.on_event is not None:
            self.on_event(self.context, RecordedEvent("output.delta", msgspec.json.decode(encoded)))
        if self.context.is_canceled():
            raise RunCanceled

    def failed(self, error: BaseException) -> None:
        self.outcome.output = None
        self.outcome.exception = error
        self.outcome.failure = failure_of(error, cancel_cause=self.context.cancel_cause)


def run_function(  # noqa: PLR0913  # keyword-only, each with a default
    func: Callable[..., Any],
    payload: msgspec.Struct | Mapping[str, Any],
    *,
    models: Mapping[str, object] | None = None,
    files: InputFiles | None = None,
    run_id: str = "test-run",
    tenant_id: str = "",
    user_id: str = "",
    timeout_ms: int | None = None,
    device: str = "cpu",
    on_event: OnEvent | None = None,
) -> Outcome:
    """Run a worker function of any kind to its end.

    `payload` is the struct or a plain mapping, `models` the injected values by parameter, `files` what the payload's
    Assets are, by ref. Raises SignatureError for a function that breaks the rules, TypeError for `models` that do not
    fit it, and RuntimeError for an async function inside a running event loop: use run_function_async there.
    """
    spec = inspect_as(func, is_websocket=False)
    who = {"run_id": run_id, "tenant_id": tenant_id, "user_id": user_id}
    call = _prepare(spec, models, files, on_event, timeout_ms=timeout_ms, device=device, **who)
    if spec.mode in {"async", "async_generator"}:
        _check_no_loop(spec)
        return asyncio.run(_run_async(call, payload))
    return _run_sync(call, payload)


async def run_function_async(  # noqa: PLR0913  # as above
    func: Callable[..., Any],
    payload: msgspec.Struct | Mapping[str, Any],
    *,
    models: Mapping[str, object] | None = None,
    files: InputFiles | None = None,
    run_id: str = "test-run",
    tenant_id: str = "",
    user_id: str = "",
    timeout_ms: int | None = None,
    device: str = "cpu",
    on_event: OnEvent | None = None,
) -> Outcome:
    """As run_function, on the running event loop; sync functions run in a thread, as in an executor."""
    spec = inspect_as(func, is_websocket=False)
    who = {"run_id": run_id, "tenant_id": tenant_id, "user_id": user_id}
    call = _prepare(spec, models, files, on_event, timeout_ms=timeout_ms, device=device, **who)
    if spec.mode in {"async", "async_generator"}:
        return await _run_async(call, payload)
    return await asyncio.to_thread(_run_sync, call, payload)


async def run_websocket(
    func: Callable[..., Any],
    frames: Iterable[bytes | str],
    *,
    models: Mapping[str, object] | None = None,
    session_id: str = "test-session",
    tenant_id: str = "",
    user_id: str = "",
    device: str = "cpu",
) -> SocketOutcome:
    """Run a websocket handler over `frames`; after the last one the other end has closed. Raises as run_function.

    To talk with one, see `open_socket`.
    """
    spec = inspect_as(func, is_websocket=True)
    outcome = SocketOutcome()
    incoming = deque(Frame(frame.encode(), True) if isinstance(frame, str) else Frame(frame) for frame in frames)
    host = MemoryHost(outcome)
    context = ActionContext(run_id=session_id, host=host, tenant_id=tenant_id, user_id=user_id, device=device)
    arguments = {**check_models(spec, models), spec.socket_param: RealtimeSocket(_MemorySocket(outcome, incoming))}
    call = _Call(spec, context, outcome, arguments, None)
    try:
        await call.start()
    except (Exception, RunCanceled, asyncio.CancelledError) as error:  # noqa: BLE001  # kept in the outcome
        _reraise_outer_cancel(error)
        call.failed(error)
    return outcome


def inspect_as(func: Callable[..., Any], *, is_websocket: bool) -> FunctionSpec:
    """The spec of a function, or of a handler. Raises SignatureError, and TypeError when it is the other."""
    spec = inspect_function(func)
    if (spec.mode == "websocket") != is_websocket:
        raise TypeError(f"{spec.qualified_name}: use {'run_function' if is_websocket else 'run_websocket'} for it")
    return spec


def _check_no_loop(spec: FunctionSpec) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return
    raise RuntimeError(f"{spec.qualified_name} is async and an event loop is running: use run_function_async")


def _prepare(
    spec: FunctionSpec, models: Mapping[str, object] | None, files: InputFiles | None, on_event: OnEvent | None,
    **context_arguments: Any,
) -> _Call:  # fmt: skip
    outcome = Outcome()
    host = MemoryHost(outcome)
    context = ActionContext(host=host, **context_arguments)
    if on_event is not None:
        host.on_event = lambda event: on_event(context, event)
    return _Call(spec, context, outcome, check_models(spec, models), on_event, files or {})


def check_models(spec: FunctionSpec, models: Mapping[str, object] | None) -> dict[str, object]:
    """The injected values by parameter. Raises TypeError when some are missing or unknown."""
    given, wanted = dict(models or {}), {injection.param for injection in spec.injections}
    if missing := sorted(wanted - set(given)):
        raise TypeError(f"{spec.qualified_name} needs models={{{missing[0]!r}: ...}}")
    if unknown := sorted(set(given) - wanted):
        raise TypeError(f"{spec.qualified_name} has no injected parameter {unknown[0]!r}")
    return given


def _decode(spec: FunctionSpec, payload: msgspec.Struct | Mapping[str, Any]) -> msgspec.Struct:
    """Through the wire's encoding when it is a struct, so that constraints are checked as for a request."""
    if isinstance(payload, msgspec.Struct):
        return decode_payload(spec, msgspec.msgpack.encode(payload))
    return convert_payload(spec, payload)


@contextmanager
def _inputs(call: _Call, payload: msgspec.Struct | Mapping[str, Any]) -> Iterator[None]:
    """Make the payload the call's argument, its Assets with files in a directory that is gone after the run."""
    decoded = _decode(call.spec, payload)
    call.arguments[call.spec.payload_param] = decoded
    with tempfile.TemporaryDirectory(prefix="gen-worker-inputs-") as directory:
        for number, (place, asset) in enumerate(assets_in(decoded)):
            given = call.files.get(asset.ref, asset.local_path)
            if given is None:
                hint = f"the test gives no such file: pass files={{{asset.ref!r}: ...}}"
                raise ValidationError(f"input {place} ({asset.ref!r}): {hint}")
            data = given if isinstance(given, bytes) else Path(given).read_bytes()
            path = Path(directory, f"{number}-{Path(asset.ref).name}")
            path.write_bytes(data)
            for name, value in (
                ("local_path", str(path)), ("size_bytes", len(data)), ("sha256", hashlib.sha256(data).hexdigest()),
                ("mime_type", mime_type_of(data[:HEAD_BYTES], asset.ref)),
            ):  # fmt: skip
                force_setattr(asset, name, value)
        yield


def _run_sync(call: _Call, payload: msgspec.Struct | Mapping[str, Any]) -> Outcome:
    try:
        with _inputs(call, payload):
            result = call.start()
            if not call.spec.incremental:
                call.returned(result)
                return call.outcome
            try:
                for delta in result:
                    call.yielded(delta)
            finally:
                if inspect.isgenerator(result):
                    result.close()
    except (Exception, RunCanceled) as error:  # noqa: BLE001  # kept in the outcome
        call.failed(error)
    return call.outcome


async def _run_async(call: _Call, payload: msgspec.Struct | Mapping[str, Any]) -> Outcome:
    try:
        with _inputs(call, payload):
            if not call.spec.incremental:
                call.returned(await call.start())
                return call.outcome
            result = call.start()
            try:
                async for delta in result:
                    call.yielded(delta)
            finally:
                if inspect.isasyncgen(result):
                    await result.aclose()
    except (Exception, RunCanceled, asyncio.CancelledError) as error:  # noqa: BLE001  # kept in the outcome
        _reraise_outer_cancel(error)
        call.failed(error)
    return call.outcome


def _reraise_outer_cancel(error: BaseException) -> None:
    """The test's own task being canceled is not the function's failure."""
    task = asyncio.current_task()
    if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
        raise error
