"""The log: text for a person or JSON for a collector, redacted, and never in the way of the event loop.

Owns: the root logger's handler, the queue behind it and the thread that writes.

1. The thread that logs renders the message (and the traceback) and puts it into a bounded queue. It never waits:
   when the queue is full the record is dropped and counted.
2. The writer thread formats, redacts and writes to the file descriptor; only this thread feels a stalled reader.
3. When the reader takes lines again, the writer says how many records were dropped.

Run and executor ids travel as `extra={"run_id": ..., "executor": ...}`. The descriptor is written directly, since a
buffered stream's lock, held by a stalled writer, would block the interpreter at exit.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import sys
import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final

import msgspec

from supervisor.redaction import Redactor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

QUEUE_RECORDS: Final = 4096
"""Records that wait for the writer before further ones are dropped."""

_MAX_TEXT: Final = 32 * 1024
_BATCH: Final = 256
_NOISY: Final = ("httpx", "httpcore", "filelock", "urllib3")
"""Libraries that log every request at info; they speak up from warning on, unless the level is debug."""

_CONTROLS: Final = {code: f"\\x{code:02x}" for code in (*range(32), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}
_CONTROLS[ord("\n")] = "\n    "
"""Terminal escapes are shown, not obeyed; further lines are indented, so that none can pose as a record."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One record, rendered as far as the thread that logged it must."""

    created: float
    level: str
    source: str
    message: str
    run_id: str
    executor: str
    trace: str


class JsonLine(msgspec.Struct, omit_defaults=True):
    """The shape of one line of the JSON format."""

    ts: str
    level: str
    logger: str
    message: str
    run_id: str = ""
    executor: str = ""
    exc: str = ""


def format_text(entry: Entry, redact: Callable[[str], str]) -> str:
    """`2026-01-31 12:00:00.123Z INFO     session  [executor 0, run abc] message`, then the traceback."""
    when = datetime.fromtimestamp(entry.created, UTC)
    stamp = f"{when:%Y-%m-%d %H:%M:%S}.{when.microsecond // 1000:03d}Z"
    ids = ", ".join(f"{name} {value}" for name, value in (("executor", entry.executor), ("run", entry.run_id)) if value)
    shown_ids = f"[{ids}] " if ids else ""
    trace = f"\n{entry.trace}" if entry.trace else ""
    body = redact(f"{shown_ids}{entry.message}{trace}").translate(_CONTROLS)
    return f"{stamp} {entry.level:<8} {entry.source.removeprefix('supervisor.'):<16} {body}"


def format_json(entry: Entry, redact: Callable[[str], str]) -> str:
    """One JSON object, see JsonLine; fields that are empty are left out."""
    when = datetime.fromtimestamp(entry.created, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    line = JsonLine(
        ts=when,
        level=entry.level.lower(),
        logger=entry.source,
        message=_encodable(redact(entry.message)),
        run_id=_encodable(entry.run_id),
        executor=_encodable(entry.executor),
        exc=_encodable(redact(entry.trace)),
    )
    return msgspec.json.encode(line).decode()


class QueueingHandler(logging.Handler):
    """The root logger's handler: renders records and hands them to a writer thread."""

    def __init__(
        self, fd: int, formatter: Callable[[Entry, Callable[[str], str]], str], redactor: Redactor, capacity: int
    ) -> None:
        super().__init__()
        self._fd = fd
        self._format_entry = formatter
        self._redactor = redactor
        self._queue: queue.Queue[Entry | None] = queue.Queue(capacity)
        self._traces = logging.Formatter()
        self._dropped = 0  # by the threads that log, under the handler's lock
        self._unwritable = 0  # by the writer alone
        self._reported = 0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._write_all, name="log-writer", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Records lost so far: the queue was full, or the descriptor could not be written."""
        return self._dropped + self._unwritable

    def emit(self, record: logging.LogRecord) -> None:
        """Queue the record, or count it as dropped. Never waits, never raises."""
        try:
            self._queue.put_nowait(self._rendered(record))
        except queue.Full:
            self._dropped += 1

    def close(self, timeout_s: float = 2.0) -> None:
        """Write what is queued and end the writer; a stalled reader is given up after `timeout_s`. Idempotent.

        `logging.shutdown` calls it at exit too, so that the last lines of a failing start are not lost.
        """
        if not self._stopping.is_set():
            self._stopping.set()
            deadline = time.monotonic() + timeout_s
            with contextlib.suppress(queue.Full):  # full for all that time: the reader is stalled, so is the writer
                self._queue.put(None, timeout=timeout_s)
                self._thread.join(max(0.0, deadline - time.monotonic()))
        super().close()

    def _rendered(self, record: logging.LogRecord) -> Entry:
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError) as error:
            message = f"{record.msg!s} (arguments {record.args!r} do not fit: {error})"
        trace = record.exc_text or (self._traces.formatException(record.exc_info) if record.exc_info else "")
        if record.stack_info:
            trace = "\n".join(filter(None, (trace, record.stack_info)))
        return Entry(
            created=record.created,
            level=record.levelname,
            source=record.name,
            message=_bounded(message),
            run_id=_id(record, "run_id"),
            executor=_id(record, "executor"),
            trace=_bounded(trace),
        )

    def _write_all(self) -> None:
        ended = False
        while not ended:
            entries = [self._queue.get()]
            while len(entries) < _BATCH and entries[-1] is not None:
                try:
                    entries.append(self._queue.get_nowait())
                except queue.Empty:
                    break
            ended = entries[-1] is None
            self._write([entry for entry in entries if entry is not None])

    def _write(self, entries: list[Entry]) -> None:
        if (dropped := self._dropped) > self._reported:
            message = f"{dropped - self._reported} log records were dropped: the log was read too slowly"
            entries.append(Entry(time.time(), "WARNING", __name__, message, "", "", ""))
        lines = [self._format_entry(entry, self._redactor.redact) for entry in entries]
        try:
            _write_fully(self._fd, "".join(f"{line}\n" for line in lines).encode(errors="backslashreplace"))
        except OSError:
            # The descriptor is closed or its reader is gone: nobody is left to be told; `dropped` keeps the count.
            self._unwritable += len(entries)
        else:
            self._reported = dropped


class LogHandle:
    """A started log; `stop` flushes it and puts the root logger back."""

    def __init__(self, handler: QueueingHandler, redactor: Redactor, level: int) -> None:
        self._handler = handler
        self._redactor = redactor
        root = logging.getLogger()
        self._previous = (root.level, root.handlers[:])
        self._previous_noisy = {name: logging.getLogger(name).level for name in _NOISY}
        root.handlers[:] = [handler]
        root.setLevel(level)
        for name in _NOISY:
            logging.getLogger(name).setLevel(level if level <= logging.DEBUG else max(level, logging.WARNING))
        logging.captureWarnings(capture=True)

    @property
    def dropped(self) -> int:
        """Records lost so far."""
        return self._handler.dropped

    def add_secrets(self, values: Iterable[str]) -> None:
        """Mask these values from now on, such as a token that was read from a file."""
        self._redactor.add(values)

    def redact(self, text: str) -> str:
        """`text` with the secrets masked, for what is shown elsewhere than in the log."""
        return self._redactor.redact(text)

    def stop(self, timeout_s: float = 2.0) -> None:
        """Write what is queued, waiting at most `timeout_s` for a stalled reader. Idempotent."""
        root = logging.getLogger()
        if self._handler in root.handlers:
            level, root.handlers[:] = self._previous
            root.setLevel(level)
            for name, previous in self._previous_noisy.items():
                logging.getLogger(name).setLevel(previous)
            logging.captureWarnings(capture=False)
        self._handler.close(timeout_s)


def start_logging(
    *,
    level: str = "info",
    log_format: str = "text",
    secrets: Iterable[str] = (),
    fd: int | None = None,
    capacity: int = QUEUE_RECORDS,
) -> LogHandle:
    """Take over the root logger.

    Args:
        level: of WORKER_LOG_LEVEL.
        log_format: of WORKER_LOG_FORMAT, `text` or `json`.
        secrets: values to mask wherever they occur.
        fd: the descriptor to write to; None is stderr.
        capacity: records that may wait for the writer.
    """
    redactor = Redactor(secrets)
    target = sys.stderr.fileno() if fd is None else fd
    handler = QueueingHandler(target, format_json if log_format == "json" else format_text, redactor, capacity)
    return LogHandle(handler, redactor, logging.getLevelNamesMapping()[level.upper()])


def _id(record: logging.LogRecord, name: str) -> str:
    value = getattr(record, name, None)
    return "" if value is None else str(value)


def _bounded(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}... ({len(text) - _MAX_TEXT} more characters)"


def _encodable(text: str) -> str:
    """`text` without lone surrogates, which UTF-8 can't carry."""
    return text.encode(errors="backslashreplace").decode()


def _write_fully(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(fd, view) :]
        except BlockingIOError:
            # Someone else made the terminal or pipe non-blocking; wait for room, as a blocking write would.
            select.select([], [fd], [])
