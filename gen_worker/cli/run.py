"""`gen-worker run`: one call of one function, through a real supervisor and executor.

Owns: the exit codes, and what a Ctrl-C means: the first cancels the run, the second ends everything at once.

1. Start a local worker in the project's folder and wait until it serves the function.
2. Make the payload by the function's schema, send the run, show what comes.
3. Print the output or the error, and leave with the code that says how it went.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from gen_worker.errors import ProjectError, ValidationError

if TYPE_CHECKING:
    from gen_worker.cli.showing import Show
    from gen_worker.serve.functions import Function
    from gen_worker.serve.local_worker import LocalWorker
    from gen_worker.testing.mock_orchestrator import RunHandle


class ExitCode(IntEnum):
    """How `gen-worker run` ended."""

    OK = 0
    RUN_FAILED = 1
    USAGE = 2
    NO_WORKER = 3
    CANCELED = 130
    BROKEN_PIPE = 141


EPILOG: Final = (
    "Exit codes: 0 the run succeeded; 1 it failed; 2 the command line, the project or the payload can't be used; "
    "3 the worker did not start, or ended before the run had a result; 130 canceled by Ctrl-C; "
    "141 nobody reads the output any more."
)
START_S: Final = 300.0
"""A first start may import torch from a cold disk."""
CANCEL_S: Final = 15.0
"""For a canceled run to end; the worker kills what does not."""


def run(
    function: Annotated[str, typer.Argument(metavar="FUNCTION", help="The function's name.", show_default=False)],
    fields: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="FIELD=VALUE",
            help="The payload: prompt=hello steps=4 size.width=512 tags=a tags=b image=@photo.png",
            show_default=False,
        ),
    ] = None,
    payload_json: Annotated[
        str | None, typer.Option(metavar="JSON", help="The payload as JSON; - reads it from stdin.")
    ] = None,
    project: Annotated[
        Path, typer.Option(exists=True, file_okay=False, help="The project's folder.", show_default="here")
    ] = Path(),
    timeout_s: Annotated[float, typer.Option(min=0, help="The run's deadline in seconds; 0: none.")] = 0,
    start_timeout_s: Annotated[float, typer.Option(min=1, help="For the worker to start.")] = START_S,
    files_dir: Annotated[
        Path | None, typer.Option(file_okay=False, help="Keep what the function saves here.", show_default="nowhere")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line, for machines.")] = False,  # noqa: FBT002
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show the worker's log on stderr.")] = False,  # noqa: FBT002
) -> None:
    """Call a function once.

    It runs as the platform would run it, through a supervisor and an executor on this machine. Values follow the
    function's schema: steps=4 is a number where the field is one. A streaming function's deltas are shown as they
    come. With --json each line is an object with an "event": "output.delta", "job.progress", ... and last "result"
    or "error".
    """
    from gen_worker.cli.local import child_environment, refuse_clash
    from gen_worker.cli.showing import show_for
    from gen_worker.serve.local_worker import LocalOptions, LocalWorker, check_project

    show = show_for(as_json=as_json, verbose=verbose)
    request = _Request(function, tuple(fields or ()), payload_json, round(timeout_s * 1000), start_timeout_s)
    try:
        refuse_clash()
        check_project(project)
        given = request.from_json()
        worker = LocalWorker(LocalOptions(project.resolve(), child_environment(), 1, files_dir))
        worker.listeners.append(show.log)
        code = asyncio.run(_Call(worker, request, given, show).run())
    except (ProjectError, ValidationError) as error:
        show.problem(str(error))
        code = ExitCode.USAGE
    raise typer.Exit(code)


@dataclass(frozen=True, slots=True)
class _Request:
    function: str
    words: tuple[str, ...]
    payload_json: str | None
    timeout_ms: int
    start_timeout_s: float

    def from_json(self) -> Mapping[str, Any] | None:
        """The payload of --payload-json. Raises ValidationError."""
        import msgspec

        if self.payload_json is None:
            return None
        if self.words:
            raise ValidationError("give FIELD=VALUE or --payload-json, not both")
        text = sys.stdin.read() if self.payload_json == "-" else self.payload_json
        try:
            return msgspec.json.decode(text, type=dict[str, Any])
        except (msgspec.DecodeError, UnicodeError) as error:
            raise ValidationError(f"--payload-json: {error}") from error

    def payload(self, function: Function, given: Mapping[str, Any] | None, worker: LocalWorker) -> Any:
        """As the wire takes it. Raises ValidationError."""
        from gen_worker.serve.uploads import upload

        plain = function.input.parse(self.words) if given is None else dict(given)
        return function.input.fit(plain, lambda path: upload(worker.files, path))


class _Interrupted(Exception):
    """Ctrl-C or SIGTERM came."""


class _Call:
    """One use of the command."""

    def __init__(self, worker: LocalWorker, request: _Request, given: Mapping[str, Any] | None, show: Show) -> None:
        self._worker = worker
        self._request = request
        self._given = given
        self._show = show
        self._interrupts = 0
        self._interrupted = asyncio.Event()
        self._hurried = asyncio.Event()

    async def run(self) -> ExitCode:
        """Raises ValidationError and ProjectError."""
        from gen_worker.serve.local_worker import WorkerStartError
        from gen_worker.testing.mock_orchestrator import MockOrchestratorError

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        with self._show:
            try:
                async with self._worker:
                    return await self._call()
            except WorkerStartError as error:
                self._show.problem(f"the worker did not start: {error}")
            except BrokenPipeError:
                # Python flushes stdout at exit once more, which must not fail again.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return ExitCode.BROKEN_PIPE
            except (MockOrchestratorError, OSError) as error:
                self._show.problem(str(error))
            except _Interrupted:
                self._show.problem("canceled before it ran")
                return ExitCode.CANCELED
        return ExitCode.NO_WORKER

    def _on_signal(self) -> None:
        self._interrupts += 1
        self._interrupted.set()
        if self._interrupts > 1:
            self._hurried.set()
            self._worker.terminate()

    async def _call(self) -> ExitCode:
        worker, request = self._worker, self._request
        self._show.status("starting the worker")
        await worker.start()
        await self._unless_interrupted(worker.wait_ready(request.start_timeout_s))
        function = worker.functions().get(request.function)
        if function is None:
            known = ", ".join(worker.functions())
            raise ValidationError(f"there is no function {request.function!r}; this project has: {known}")
        if function.is_realtime:
            raise ValidationError(f"{function.name} is a websocket handler: use gen-worker serve")
        payload = request.payload(function, self._given, worker)
        self._show.status(f"running {function.name}")
        handle = await worker.call(function.name, payload, timeout_ms=request.timeout_ms)
        try:
            return await self._follow(handle)
        except BrokenPipeError:
            await handle.cancel()
            raise

    async def _follow(self, handle: RunHandle) -> ExitCode:
        """Show the run to its end."""
        showing = asyncio.ensure_future(self._show_events(handle))
        ended = asyncio.ensure_future(self._worker.wait_ended())
        interrupted = asyncio.ensure_future(self._interrupted.wait())
        try:
            await asyncio.wait((showing, ended, interrupted), return_when=asyncio.FIRST_COMPLETED)
            if interrupted.done() and not showing.done():
                self._show.status("canceling")
                await handle.cancel()
                hurried = asyncio.ensure_future(self._hurried.wait())
                await asyncio.wait((showing, ended, hurried), timeout=CANCEL_S, return_when=asyncio.FIRST_COMPLETED)
                hurried.cancel()
            if showing.done():
                showing.result()  # raises when what came can't be shown
        finally:
            for task in (showing, ended, interrupted):
                task.cancel()
        return self._judge(handle)

    async def _show_events(self, handle: RunHandle) -> None:
        async for event in handle.stream():
            self._show.event(event.type, event.payload)

    def _judge(self, handle: RunHandle) -> ExitCode:
        from gen_worker.testing.mock_orchestrator import RunFailedError, decode_output

        if not handle.done:
            if self._interrupts:
                self._show.problem("canceled")
                return ExitCode.CANCELED
            why = self._worker.last_error()
            self._show.problem(f"the worker ended before the run had a result: {why}")
            return ExitCode.NO_WORKER
        try:
            output = decode_output(handle.results[0].message)
        except RunFailedError as error:
            self._show.failure(error)
            return ExitCode.CANCELED if self._interrupts and error.error_type == "canceled" else ExitCode.RUN_FAILED
        self._show.result(output, handle.run_id)
        return ExitCode.OK

    async def _unless_interrupted(self, step: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(step)
        interrupted = asyncio.ensure_future(self._interrupted.wait())
        try:
            await asyncio.wait((task, interrupted), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise _Interrupted
            await task
        finally:
            task.cancel()
            interrupted.cancel()
