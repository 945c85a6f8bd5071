"""The command line tool: a scheduler that runs one function, or shows what workers say.

Owns: options, exit codes and the order of things. argparse and not typer, since a usage error must not leave with 2
(which says that no worker came), and since the tool starts for every run of a developer.

    1. Check the options; start the file store, if asked for, and the scheduler.
    2. Without --run: print until interrupted. With it: wait for a worker, send the run, wait for its result.
    3. Print the output or the error; leave with the exit code.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import logging
import math
import signal
import sys
import time
import uuid
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NoReturn, TypeVar

import msgspec

from .bridge import RealtimeBridge
from .connection import WorkerConnection
from .errors import MockOrchestratorError, NoResultError, NoWorkerError, StreamEndedError, UsageError, WaitTimeoutError
from .files import FileStoreServer
from .printing import Printer, to_json
from .runs import RunHandle, decode_output
from .server import MockOrchestrator

T = TypeVar("T")

_DEFAULT_WAIT_S = 60.0
_FUNCTIONS_WAIT_S = 5.0
"""How long a worker may be registered without any function (its executors are starting) before it gets the run."""
_DEFAULT_RESULT_S = 600.0
_GOODBYE_S = 1.0
"""At most, for a worker that does not read."""
_RESULT_SLACK_S = 15.0
"""Past --timeout-ms: a worker's result is out within the timeout and the grace that it gives a cancel (5 s)."""

_EPILOG = """\
output (stdout, one line each; all else goes to stderr):
  [output] <json>            the run's output; {} for a function with incremental output
  [delta] <json>             each delta of a function with incremental output, as it comes
  [event] <type> <json>      every event, deltas included, with --print-events
  [registration] <json>      every registration and heartbeat, with --print-registrations
  Bytes are printed as base64. Without --run every message is printed, events with their run_id before the type.

--realtime-listen 127.0.0.1:8081:
  A browser or any WebSocket client that connects to ws://127.0.0.1:8081/<function> talks to that handler, in a
  session of its own: text and binary frames pass as they are. The worker's reason for the end is the reason of the
  close frame. Its code: 1000 completed, closed; 1008 unknown_function; 1009 frame_too_large; 1011 worker_crashed,
  timeout, error:<ExceptionName>; 1012 the worker's stream ended; 1013 slow_consumer, or no worker is connected.
  --tenant-id, --user-id, --timeout-ms and --required-model go for sessions too.

exit codes:
  0   the run succeeded; or, without --run, the tool was interrupted
  1   the run failed; the error is on stderr
  2   no worker came in --wait-s
  3   no result came: not in --result-timeout-s, or the worker left and none came back in --wait-s, or interrupted
  64  an option can't be used, or an address can't be listened on
"""


class _InterruptedError(Exception):
    """SIGINT or SIGTERM came, or nobody reads stdout any more."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m gen_worker.testing.mock_orchestrator",
        description="A scheduler for development: workers dial it; it runs one function, or shows what they say.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--listen", default="127.0.0.1:8080", metavar="H:P", help="where workers dial (%(default)s); port 0: a free one"
    )
    add("--run", metavar="FN", help="function to run once; without it, print what arrives until interrupted")
    add("--payload-json", default="{}", metavar="J", help="the payload (%(default)s)")
    add("--wait-s", type=_seconds, default=_DEFAULT_WAIT_S, metavar="S", help="for a worker to come (%(default)s)")
    add(
        "--result-timeout-s",
        type=_seconds,
        metavar="S",
        help=f"for the result (--timeout-ms + {_RESULT_SLACK_S:g} s, or {_DEFAULT_RESULT_S:g} s without one)",
    )
    add("--timeout-ms", type=_milliseconds, default=0, metavar="MS", help="the run's deadline; 0: none")
    add("--tenant-id", default="", metavar="ID")
    add("--user-id", default="", metavar="ID")
    add("--required-model", action="append", default=[], metavar="REF", help="repeatable; the i-th injected model")
    add("--file-base-url", default="", metavar="URL", help="file store given to the run (that of --serve-files-dir)")
    add("--file-token", default="", metavar="T", help="its token; also what --serve-files-dir then asks for")
    add("--serve-files-dir", metavar="DIR", help="serve this directory as a development file store")
    add("--serve-files-listen", default="127.0.0.1:0", metavar="H:P", help="where (%(default)s)")
    add(
        "--realtime-listen",
        metavar="H:P",
        help="serve websocket handlers to WebSocket clients there; port 0: a free one; needs the package websockets",
    )
    add("--require-token", metavar="T", help="refuse workers with another bearer token")
    add("--print-events", action="store_true")
    add("--print-registrations", action="store_true")
    return parser


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return value


def _milliseconds(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of milliseconds")
    return int(text)


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


class _Session:
    """One use of the tool."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        try:
            self._payload: object = msgspec.json.decode(options.payload_json)
        except (msgspec.DecodeError, UnicodeError) as error:
            raise UsageError(f"--payload-json is not JSON: {error}") from error
        if not options.run and options.payload_json != "{}":
            raise UsageError("--payload-json needs --run")
        self._interrupted = asyncio.Event()
        self._printer = Printer(
            registrations=options.print_registrations,
            events=options.print_events,
            everything=not options.run,
            on_broken_pipe=self._interrupted.set,
        )
        self._orchestrator = MockOrchestrator(
            options.listen,
            required_token=options.require_token,
            on_connect=None if options.run else self._show_start,
            on_message=self._printer.message,
            on_end=None if options.run else self._show_end,
        )

    async def main(self) -> int:
        """Returns the exit code; raises MockOrchestratorError."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._interrupted.set)
        options = self._options
        async with contextlib.AsyncExitStack() as stack:
            if options.serve_files_dir is not None:
                store = stack.enter_context(self._file_store())
                options.file_base_url = options.file_base_url or store.url
                _note(f"serving {options.serve_files_dir} on {store.url}")
            await stack.enter_async_context(self._orchestrator)
            _note(f"listening on {self._orchestrator.address}")
            if options.realtime_listen is not None:
                bridge = await stack.enter_async_context(self._bridge())
                _note(f"websocket handlers on {bridge.url}/<function>")
            if not options.run:
                await self._interrupted.wait()
                return 0
            try:
                return await self._run()
            finally:
                await self._say_goodbye()

    async def _say_goodbye(self) -> None:
        """End the streams with a status, behind what was sent last; a stop alone would overtake it."""
        for connection in self._orchestrator.connections:
            connection.half_close()
        await self._orchestrator.stop(_GOODBYE_S)

    def _file_store(self) -> FileStoreServer:
        options = self._options
        try:
            return FileStoreServer(options.serve_files_dir, listen=options.serve_files_listen, token=options.file_token)
        except OSError as error:
            raise UsageError(f"--serve-files-dir {options.serve_files_dir}: {error.strerror}") from error

    def _bridge(self) -> RealtimeBridge:
        options = self._options
        return RealtimeBridge(
            self._orchestrator,
            options.realtime_listen,
            tenant_id=options.tenant_id,
            user_id=options.user_id,
            timeout_ms=options.timeout_ms,
            required_models=options.required_model,
        )

    async def _run(self) -> int:
        try:
            handle = await self._unless_interrupted(self._send_run())
            await self._unless_interrupted(self._wait_for_result(handle))
        except _InterruptedError:
            await self._cancel_runs()
            raise
        try:
            output = decode_output(handle.results[0].message)
        except msgspec.DecodeError as error:
            _note(f"the output is not MessagePack: {error}")
            return 1
        self._printer.line(f"[output] {to_json(output)}")
        return 0

    async def _cancel_runs(self) -> None:
        # The worker may be gone or not read; we leave anyway.
        with contextlib.suppress(MockOrchestratorError, TimeoutError):
            async with asyncio.timeout(_GOODBYE_S):
                for handle in self._orchestrator.runs.values():
                    await handle.cancel()

    async def _send_run(self) -> RunHandle:
        """Hand the run to a worker. Raises NoWorkerError when none takes it in --wait-s."""
        options = self._options
        deadline = time.monotonic() + options.wait_s
        run_id = uuid.uuid4().hex  # the same at every attempt: a worker that got it already ignores it
        while True:
            worker = await self._find_worker(deadline)
            try:
                return await self._orchestrator.run(
                    options.run,
                    msgspec.msgpack.encode(self._payload),
                    run_id=run_id,
                    timeout_ms=options.timeout_ms,
                    required_models=options.required_model,
                    tenant_id=options.tenant_id,
                    user_id=options.user_id,
                    file_base_url=options.file_base_url,
                    file_token=options.file_token,
                    worker=worker,
                    keep_events=False,
                )
            except StreamEndedError as error:
                _note(f"the worker left before it got the run: {error}")

    async def _find_worker(self, deadline: float) -> WorkerConnection:
        """A worker, if possible one that has the function: one that has others only will say so itself."""
        orchestrator = self._orchestrator
        worker = await orchestrator.wait_for_worker(timeout=max(0.0, deadline - time.monotonic()))
        with contextlib.suppress(WaitTimeoutError):
            registration = await orchestrator.wait_for_registration(
                lambda registration: bool(registration.resources.available_functions),
                min(_FUNCTIONS_WAIT_S, max(0.0, deadline - time.monotonic())),
            )
            worker = registration.connection
        with contextlib.suppress(NoWorkerError):
            worker = orchestrator.find(None, self._options.run)
        return worker

    async def _wait_for_result(self, handle: RunHandle) -> None:
        """Until a result is here. Raises NoResultError: in time none came, or the workers left for good."""
        options = self._options
        limit = options.result_timeout_s
        if limit is None:
            limit = options.timeout_ms / 1000 + _RESULT_SLACK_S if options.timeout_ms else _DEFAULT_RESULT_S
        deadline = time.monotonic() + limit
        while True:
            await self._until(handle, deadline, lambda: handle.done or not self._orchestrator.workers)
            if handle.done:
                return
            _note(f"the worker left; waiting {options.wait_s:g} s for one to bring the result")
            back_by = min(deadline, time.monotonic() + options.wait_s)
            await self._until(handle, back_by, lambda: handle.done or bool(self._orchestrator.workers))

    async def _until(self, handle: RunHandle, deadline: float, check: Callable[[], bool]) -> None:
        remaining = max(0.0, deadline - time.monotonic())
        try:
            await self._orchestrator.wait_until(check, remaining)
        except TimeoutError:
            here = "a worker is connected" if self._orchestrator.workers else "the worker left"
            text = f"no result of {handle.function_name} (run {handle.run_id}) came; {here}"
            raise NoResultError(text) from None

    async def _unless_interrupted(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.create_task(work)
        interrupted = asyncio.create_task(self._interrupted.wait())
        try:
            await asyncio.wait((task, interrupted), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise _InterruptedError
        finally:
            interrupted.cancel()
            task.cancel()

    def _show_start(self, connection: WorkerConnection) -> None:
        self._printer.line(f"[connected] {to_json({'stream': connection.index, 'peer': connection.peer})}")

    def _show_end(self, connection: WorkerConnection) -> None:
        by = connection.ended.by.value if connection.ended else ""
        about = {"stream": connection.index, "worker_id": connection.worker_id, "by": by}
        self._printer.line(f"[disconnected] {to_json(about)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The tool. Returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        options = _parser().parse_args(arguments)
        loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
        if importlib.util.find_spec("uvloop") is not None:
            import uvloop  # noqa: PLC0415  (optional)

            loop_factory = uvloop.new_event_loop
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(_main(options))
    except _InterruptedError:
        _note("interrupted before a result came")
        return NoResultError.exit_code
    except MockOrchestratorError as error:
        _note(str(error))
        return error.exit_code


async def _main(options: argparse.Namespace) -> int:
    return await _Session(options).main()
