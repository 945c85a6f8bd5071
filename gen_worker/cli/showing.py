"""How one run is shown: live on a terminal, as plain lines elsewhere, as JSON for machines.

Owns: what goes where. The output and the deltas are stdout's, all else is stderr's, so that a pipe gets the output
alone; with --json everything is stdout's.
"""

from __future__ import annotations

import sys
import time
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

import msgspec

if TYPE_CHECKING:
    from gen_worker.serve.worker_log import LogLine
    from gen_worker.testing.mock_orchestrator import RunFailedError

DELTA = "output.delta"
PROGRESS = "job.progress"
LOG = "job.log"
_LONG = 400
"""Characters of one text that a terminal is shown."""


class Show(AbstractContextManager["Show"], Protocol):
    """Told of everything that happens to the run."""

    def log(self, line: LogLine) -> None:
        """The worker wrote a line."""

    def status(self, text: str) -> None:
        """What is being done now."""

    def event(self, event_type: str, payload: Any) -> None:
        """An event of the run."""

    def result(self, output: Any, run_id: str) -> None:
        """It succeeded; the output of a streaming function is {}."""

    def failure(self, error: RunFailedError) -> None:
        """It failed."""

    def problem(self, line: str) -> None:
        """There will be no result, in one line."""


def show_for(*, as_json: bool, verbose: bool) -> Show:
    """What fits where the command's output goes."""
    if as_json:
        return JsonShow(verbose=verbose)
    if sys.stdout.isatty() and sys.stderr.isatty():
        return TerminalShow(verbose=verbose)
    return PlainShow(verbose=verbose)


def to_json(value: object) -> str:
    """Compact JSON; bytes are base64."""
    return msgspec.json.encode(value, enc_hook=repr).decode()


class PlainShow:
    """Lines."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return

    def log(self, line: LogLine) -> None:
        if self._verbose or line.is_output:
            self._note(line.message if line.is_output else str(line))

    def status(self, text: str) -> None:
        if self._verbose:
            self._note(text)

    def event(self, event_type: str, payload: Any) -> None:
        if event_type == DELTA:
            self._out(to_json(payload))
        elif (line := event_line(event_type, payload)) is not None:
            self._note(line)

    def result(self, output: Any, run_id: str) -> None:  # noqa: ARG002  (JSON has it)
        if output != {}:
            self._out(to_json(output))

    def failure(self, error: RunFailedError) -> None:
        self.problem(failure_line(error))
        if self._verbose and error.error_message:
            self._note(error.error_message)

    def problem(self, line: str) -> None:
        self._note(f"error: {one_line(line)}")

    def _out(self, line: str) -> None:
        print(line, flush=True)

    def _note(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class JsonShow(PlainShow):
    """One object a line, the last one of "event" `result` or `error`."""

    def __init__(self, *, verbose: bool) -> None:
        super().__init__(verbose=verbose)
        self._started = time.monotonic()

    def log(self, line: LogLine) -> None:
        if self._verbose:
            self._note(str(line))

    def event(self, event_type: str, payload: Any) -> None:
        self._out(to_json({"event": event_type, "payload": payload}))

    def result(self, output: Any, run_id: str) -> None:
        seconds = round(time.monotonic() - self._started, 3)
        self._out(to_json({"event": "result", "run_id": run_id, "output": output, "seconds": seconds}))

    def failure(self, error: RunFailedError) -> None:
        fields = {
            "error_type": error.error_type,
            "message": error.safe_message,
            "retryable": error.retryable,
            "detail": error.error_message,
        }
        self._out(to_json({"event": "error", "run_id": error.run_id, **fields}))

    def problem(self, line: str) -> None:
        self._out(to_json({"event": "error", "error_type": "", "message": one_line(line)}))


class TerminalShow(PlainShow):
    """Live: a line that says what is being done with its progress, and above it what came."""

    def __init__(self, *, verbose: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

        super().__init__(verbose=verbose)
        self._stdout = Console(highlight=False)
        self._stderr = Console(stderr=True, highlight=False)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TaskProgressColumn())
        self._live = Progress(*columns, TimeElapsedColumn(), console=self._stderr, transient=True)
        self._task = self._live.add_task("", total=None)
        self._is_text = False
        """Whether a stream of text is being written, whose line has no end yet."""

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        self._end_text()

    def status(self, text: str) -> None:
        self._live.update(self._task, description=text)

    def event(self, event_type: str, payload: Any) -> None:
        if event_type == DELTA and (text := text_of(payload)) is not None:
            self._live.stop()  # it redraws its line, which the text's last line is now
            self._is_text = True
            self._stdout.print(text, end="", markup=False, soft_wrap=True)
        elif event_type == PROGRESS and isinstance(payload, dict):
            fraction = float(payload.get("progress", 0))
            self._live.update(self._task, total=1.0, completed=fraction, description=payload.get("stage") or "running")
        else:
            super().event(event_type, payload)

    def result(self, output: Any, run_id: str) -> None:  # noqa: ARG002  (JSON has it)
        self._live.stop()
        self._end_text()
        if output != {}:
            self._stdout.print_json(to_json(shortened(output)))

    def problem(self, line: str) -> None:
        self._live.stop()
        self._end_text()
        self._stderr.print(f"error: {one_line(line)}", style="red", markup=False, soft_wrap=True)

    def _out(self, line: str) -> None:
        self._print(line)

    def _note(self, line: str) -> None:
        self._print(line, style="dim")

    def _print(self, line: str, style: str | None = None) -> None:
        self._end_text()
        # Through the live display's own console: it writes above its line.
        self._stderr.print(line, style=style, markup=False, soft_wrap=True)

    def _end_text(self) -> None:
        if self._is_text:
            self._is_text = False
            self._stdout.print()


def event_line(event_type: str, payload: Any) -> str | None:
    """An event in words; None for one that says nothing to a person."""
    if event_type == PROGRESS and isinstance(payload, dict):
        stage = f" {payload['stage']}" if payload.get("stage") else ""
        return f"progress {float(payload.get('progress', 0)):.0%}{stage}"
    if event_type == LOG and isinstance(payload, dict):
        return f"{payload.get('level', 'info')}: {payload.get('message', '')}"
    if event_type in ("output.completed", "output.error"):
        return None  # the result follows and says it
    return f"{event_type} {to_json(payload)}"


def failure_line(error: RunFailedError) -> str:
    """A failed run in one line: what a caller is told, and the first line of what an operator is told."""
    detail = error.error_message.strip().partition("\n")[0]
    more = f" ({detail})" if detail and error.safe_message not in detail else ""
    return f"{error.error_type}: {error.safe_message}{more}"


def one_line(text: str) -> str:
    return " ".join(text.split())


def text_of(delta: Any) -> str | None:
    """The text of a delta that has one text and nothing else, as a language model's tokens have; else None."""
    if isinstance(delta, dict) and len(delta) == 1:
        value = next(iter(delta.values()))
        return value if isinstance(value, str) else None
    return None


def shortened(value: Any) -> Any:
    """The same with its long texts cut."""
    match value:
        case dict():
            return {key: shortened(item) for key, item in value.items()}
        case list():
            return [shortened(item) for item in value]
        case bytes():
            return f"<{len(value):,} bytes>" if len(value) > _LONG else value
        case str() if len(value) > _LONG:
            return f"{value[:_LONG]}... <{len(value):,} characters>"
    return value
