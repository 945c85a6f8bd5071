"""ActionContext: what a running function knows of its run, and how it talks back.

Owns: the cancel flag of one run, and the rules for what a function may emit and under which refs it may store files.
Everything that leaves the process goes through a RunHost: the executor's writes to the pipe, the test harness's
keeps it in memory.
"""

from __future__ import annotations

import importlib
import math
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import msgspec

from gen_worker.errors import ValidationError
from gen_worker.pipe.messages import CancelCause
from gen_worker.types import Asset

_OWN_EVENTS = frozenset(("output.delta", "output.completed", "output.error"))
"""What the worker itself sends of an incremental run."""
_MAKING = threading.Lock()
"""Held while a context's event is made, so that all threads of a run get the same one."""


class RunHost(Protocol):
    """The process around one run. Called from the thread (or event loop) that runs the function."""

    def emit(self, event_type: str, payload_json: bytes) -> None:
        """Send one event; may block while the scheduler reads too slowly."""

    def store(self, ref: str, source: bytes | Path, *, create: bool) -> Asset:
        """Store bytes, or a file streamed from disk, under a whole ref.

        Raises ValidationError when `create` is set and the ref exists, and another WorkerError when it can't be stored
        or this host has no file store.
        """


@dataclass(frozen=True, slots=True)
class PlainDevice:
    """What stands for a torch.device where torch is not installed: the same `type`, `index` and `str()`."""

    type: str
    index: int | None = None

    @classmethod
    def parse(cls, name: str) -> PlainDevice:
        """`cuda:0`, `cpu`."""
        kind, _, index = name.partition(":")
        return cls(kind, int(index) if index else None)

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"


class ActionContext:
    """One run, as its function sees it. Safe to use from any thread of the run."""

    def __init__(  # noqa: PLR0913  # keyword-only, all but two with a default
        self,
        *,
        run_id: str,
        host: RunHost,
        tenant_id: str = "",
        user_id: str = "",
        timeout_ms: int | None = None,
        deadline: float | None = None,
        device: str = "cpu",
        clock: Callable[[], float] = time.time,
    ) -> None:
        """For the executor and the harness; a timeout without a deadline starts now. 0 means none for both."""
        self._run_id = run_id
        self._host = host
        self._tenant_id = tenant_id
        self._user_id = user_id
        self._timeout_ms = timeout_ms or None
        self._deadline = deadline or (clock() + timeout_ms / 1000 if timeout_ms else None)
        self._device_name = device
        self._clock = clock
        self._done: threading.Event | None = None
        """Made when asked for: that costs more than the rest of a context, and few functions ask."""
        self._cancel_cause: CancelCause | None = None

    @property
    def run_id(self) -> str:
        """The scheduler's id of this run."""
        return self._run_id

    @property
    def tenant_id(self) -> str:
        """Empty when the scheduler gave none."""
        return self._tenant_id

    @property
    def user_id(self) -> str:
        """Empty when the scheduler gave none."""
        return self._user_id

    @property
    def timeout_ms(self) -> int | None:
        """Counted from the arrival of the request; None: no limit."""
        return self._timeout_ms

    @property
    def deadline(self) -> float | None:
        """Epoch seconds; None: no limit."""
        return self._deadline

    def time_remaining_s(self) -> float | None:
        """Seconds until the deadline, never below 0; None: no limit."""
        return None if self._deadline is None else max(0.0, self._deadline - self._clock())

    @property
    def device(self) -> Any:
        """The torch.device of this executor; a PlainDevice where torch is not installed.

        torch is imported by the first use, never by importing this package: it is an optional dependency, which is
        why the type can't be named here.
        """
        try:
            torch = importlib.import_module("torch")
        except ModuleNotFoundError:
            return PlainDevice.parse(self._device_name)
        return torch.device(self._device_name)

    def is_canceled(self) -> bool:
        """Whether the run was canceled or is past its deadline: a long function looks at this and stops."""
        return self._cancel_cause is not None

    def cancel(self, cause: CancelCause = "canceled") -> None:
        """Ask the function to stop. The first call's cause is kept."""
        if self._cancel_cause is None:
            self._cancel_cause = cause
        if self._done is not None:
            self._done.set()

    @property
    def cancel_cause(self) -> CancelCause | None:
        """Why `cancel` was called; None while it was not."""
        return self._cancel_cause

    def done(self) -> threading.Event:
        """Set on cancel: wait on it instead of sleeping."""
        with _MAKING:
            if self._done is None:
                self._done = threading.Event()
        # `cancel` stores the cause and then looks for an event, this the other way round: one of them sees both.
        if self._cancel_cause is not None:
            self._done.set()
        return self._done

    def emit(self, event_type: str, payload: Any) -> None:
        """Send an event of the function's own. Raises ValidationError for a bad type or a payload that is not JSON."""
        if not event_type or event_type in _OWN_EVENTS:
            message = f"event type {event_type!r} can't be emitted: it must not be empty nor one that the worker sends"
            raise ValidationError(message)
        self._send(event_type, payload)

    def progress(self, fraction: float, stage: str | None = None) -> None:
        """Report how much is done, from 0 to 1. Raises ValidationError outside of that."""
        if not math.isfinite(fraction) or not 0 <= fraction <= 1:
            raise ValidationError(f"progress must be from 0 to 1, got {fraction!r}")
        payload: dict[str, Any] = {"progress": float(fraction), "timestamp": self._clock()}
        if stage is not None:
            payload["stage"] = stage
        self._send("job.progress", payload)

    def log(self, message: str, level: str = "info") -> None:
        """Send a line to the run's log."""
        self._send("job.log", {"message": str(message), "level": level.lower(), "timestamp": self._clock()})

    def save_bytes(self, ref: str, data: bytes | bytearray | memoryview) -> Asset:
        """Store `data` under `ref`, replacing what is there. Raises ValidationError for a ref outside of this run."""
        return self._store_bytes(ref, data, create=False)

    def save_file(self, ref: str, path: str | os.PathLike[str]) -> Asset:
        """Store a file under `ref`, replacing what is there; it is streamed, so memory does not grow with it.

        Raises ValidationError for a ref outside of this run, FileNotFoundError when there is no such file.
        """
        return self._store_file(ref, path, create=False)

    def save_bytes_create(self, ref: str, data: bytes | bytearray | memoryview) -> Asset:
        """As save_bytes; raises ValidationError when the ref exists."""
        return self._store_bytes(ref, data, create=True)

    def save_file_create(self, ref: str, path: str | os.PathLike[str]) -> Asset:
        """As save_file; raises ValidationError when the ref exists."""
        return self._store_file(ref, path, create=True)

    save_bytes_overwrite = save_bytes
    save_file_overwrite = save_file

    def _send(self, event_type: str, payload: Any) -> None:
        try:
            encoded = msgspec.json.encode(payload)
        except (TypeError, ValueError) as error:
            raise ValidationError(f"the payload of event {event_type!r} can't be JSON: {error}") from error
        self._host.emit(event_type, encoded)

    def _store_bytes(self, ref: str, data: bytes | bytearray | memoryview, *, create: bool) -> Asset:
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise ValidationError(f"saving {ref!r} needs bytes, got {type(data).__name__}")
        return self._host.store(output_ref(self._run_id, ref), bytes(data), create=create)

    def _store_file(self, ref: str, path: str | os.PathLike[str], *, create: bool) -> Asset:
        source = Path(path)
        if not source.is_file():
            raise FileNotFoundError(f"can't save {ref!r}: there is no file {source}")
        return self._host.store(output_ref(self._run_id, ref), source, create=create)


def output_ref(run_id: str, ref: str) -> str:
    """The whole ref of an output of this run: `runs/<run_id>/outputs/<name>`.

    A name is put under that prefix and a ref that has it is taken as it is. Raises ValidationError for any other
    ref under `runs/`, an absolute one, and empty, `.` or `..` segments.
    """
    prefix = f"runs/{run_id}/outputs/"
    name = ref.removeprefix(prefix)
    rule = f"use a plain name such as 'output.png', or a ref under {prefix!r}"
    if any(segment in {"", ".", ".."} for segment in name.split("/")):
        raise ValidationError(f"ref {ref!r} is empty, absolute or has an empty, '.' or '..' segment; {rule}")
    if "\\" in name or not name.isprintable():
        raise ValidationError(f"ref {ref!r} has a backslash or an unprintable character; {rule}")
    if name == ref and ref.startswith("runs/"):
        raise ValidationError(f"ref {ref!r} belongs to another run or is not an output; {rule}")
    return prefix + name
