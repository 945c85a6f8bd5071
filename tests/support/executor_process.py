"""A real `python -P -m executor` process, and the supervisor's end of its pipe in this test's hands."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self, TypeVar

import msgspec

from gen_worker.pipe.arena import BLOB_THRESHOLD_BYTES, ArenaReader, ArenaWriter, create_arena
from gen_worker.pipe.frames import FrameDecoder, encode_frame
from gen_worker.pipe.messages import (
    PIPE_PROTOCOL,
    Cancel,
    CancelCause,
    Deltas,
    Downward,
    Event,
    Fatal,
    Free,
    Init,
    Payload,
    Ready,
    Result,
    Run,
    Upward,
    decode_upward,
    encode,
)

TENANT = Path(__file__).parent.parent / "tenants" / "executor"
WAIT_S = 20.0
"""For anything that must happen; far above what it takes, so that a loaded machine fails no test."""

M = TypeVar("M")


class ExecutorProcess:
    """Started by `with`, which also kills what is left. Messages are kept until a test asks for them."""

    def __init__(
        self, root: Path = TENANT, modules: tuple[str, ...] = ("exec_functions",), *, parent_pid: int = 0, **init: Any
    ) -> None:
        fields: dict[str, Any] = {
            "protocol": PIPE_PROTOCOL, "slot": 0, "device": "cpu", "modules": modules, "project_root": str(root),
            "run_dir": str(root), "threads": 8, "cancel_grace_s": 0.4, "max_output_bytes": 0, "max_delta_bytes": 0,
            "max_delta_events": 0, "runtime_loaders": {},
        }  # fmt: skip
        self.init = Init(**{**fields, **init})
        self._parent_pid = parent_pid or os.getpid()
        self._cwd = root
        self._decoder = FrameDecoder()
        self.inbox: list[Upward] = []
        """What arrived and was not taken by a `wait`."""
        self.events: dict[int, list[Event]] = {}
        self._next_key = 0

    def __enter__(self) -> Self:
        self.spawn()
        return self

    def __exit__(self, *exc: object) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream is not None
        self._drain.join(WAIT_S)
        self._stdout_drain.join(WAIT_S)
        self.process.stdout.close()  # type: ignore[union-attr]
        self.process.stderr.close()  # type: ignore[union-attr]
        self.socket.close()
        self._down.close()
        self._up.close()
        if exc[0] is not None:
            print("\n".join(self.stderr))

    def spawn(self) -> None:
        ours, theirs = multiprocessing.Pipe()
        down, up = create_arena("down"), create_arena("up")
        command = [sys.executable, "-P", "-m", "executor", "--pipe-fd", str(theirs.fileno()), "--down-fd", str(down)]
        command += ["--up-fd", str(up), "--parent-pid", str(self._parent_pid)]
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(theirs.fileno(), down, up),
            cwd=self._cwd,
            text=True,
        )
        theirs.close()
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self._stdout_drain = _drain(self.process.stdout, self.stdout)
        self._drain = _drain(self.process.stderr, self.stderr)
        self.socket = socket.socket(fileno=os.dup(ours.fileno()))
        ours.close()
        self.socket.settimeout(WAIT_S)
        self._down, self._up = ArenaWriter(down), ArenaReader(up)
        self.freed: list[int] = []

    # -- messages -----------------------------------------------------------------------------

    def send(self, *messages: Downward) -> None:
        self.socket.sendall(b"".join(encode_frame(encode(message)) for message in messages))

    def start(self) -> Ready:
        self.send(self.init)
        return self.wait(Ready)

    def wait(self, kind: type[M], accept: Callable[[M], bool] = lambda _: True) -> M:
        """The first message of a kind that `accept` likes; the rest stays in the inbox. Fails after WAIT_S."""
        while True:
            for position, message in enumerate(self.inbox):
                if isinstance(message, kind) and accept(message):
                    del self.inbox[position]
                    return message
            self._receive()

    def _receive(self) -> None:
        data = self.socket.recv(65536)
        if not data:
            raise EOFError(f"the executor left with {self.process.wait(WAIT_S)}: {self.stderr}; {self.inbox}")
        for body in self._decoder.feed(data):
            message = decode_upward(body)
            if isinstance(message, Event):
                self.events.setdefault(message.key, []).append(message)
            if isinstance(message, Deltas):
                joined = [Event(message.key, "output.delta", payload) for payload in message.payloads]
                self.events.setdefault(message.key, []).extend(joined)
            if isinstance(message, Free):
                self._down.free(message.offset)
                self.freed.append(message.offset)
            self.inbox.append(message)

    def run(self, function: str, payload: Mapping[str, Any] | bytes = b"\x80", **fields: Any) -> int:
        """Start a run; its key."""
        self._next_key += 1
        data = payload if isinstance(payload, bytes) else msgspec.msgpack.encode(payload)
        where: Payload = data if len(data) < BLOB_THRESHOLD_BYTES else self._down.put(data)
        defaults: dict[str, Any] = {
            "run_id": f"run-{self._next_key}", "models": {}, "timeout_ms": 0, "deadline": 0.0, "tenant_id": "tenant",
            "user_id": "user", "window": 65536,
        }  # fmt: skip
        self.send(Run(key=self._next_key, function=function, payload=where, **{**defaults, **fields}))
        return self._next_key

    def cancel(self, key: int, cause: CancelCause = "canceled") -> None:
        self.send(Cancel(key, cause))

    def result(self, key: int) -> Result:
        return self.wait(Result, lambda result: result.key == key)

    def output(self, result: Result) -> Any:
        """The decoded output of a result that must not be a failure; a blob is freed."""
        assert result.failure is None, result.failure
        if isinstance(result.output, bytes):
            return msgspec.msgpack.decode(result.output)
        data = self._up.read(result.output)
        self.send(Free(result.output.offset))
        return msgspec.msgpack.decode(data)

    def call(self, function: str, payload: Mapping[str, Any] | bytes = b"\x80", **fields: Any) -> Any:
        """Run and return the decoded output."""
        return self.output(self.result(self.run(function, payload, **fields)))

    def event(self, key: int, event_type: str) -> Event:
        """Wait for an event."""
        return self.wait(Event, lambda event: event.key == key and event.type == event_type)

    # -- its end ------------------------------------------------------------------------------

    def exit_code(self) -> int:
        """Wait for the end; what it still wrote is in the inbox."""
        try:
            while True:
                self._receive()
        except (EOFError, ConnectionError):
            return self.process.wait(WAIT_S)

    def fatal(self) -> Fatal:
        """Send Init and wait for the end that a broken project leads to."""
        self.send(self.init)
        return self.wait(Fatal)


def wait_until(condition: Callable[[], bool]) -> None:
    """Fails after WAIT_S."""
    end = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def _drain(stream: Any, lines: list[str]) -> threading.Thread:
    def drain() -> None:
        while line := stream.readline():
            lines.append(line.rstrip("\n"))

    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    return thread
