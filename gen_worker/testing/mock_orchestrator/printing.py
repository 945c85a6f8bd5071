"""Wire messages as lines of JSON for people and scripts.

Owns: the output format of the command line tool. One thing is one line, `[kind] json`, written at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import msgspec
from google.protobuf.message import Message

from gen_worker.wire import worker_scheduler_pb2 as pb

from .connection import WorkerConnection
from .runs import DELTA_EVENT


def to_json(value: object) -> str:
    """Compact JSON of plain objects; bytes become base64, what JSON has no form for its repr."""
    return msgspec.json.encode(value, enc_hook=repr).decode()


def json_line(payload: bytes) -> str:
    """A payload_json as one line; one that is no JSON comes as a JSON string of what it is."""
    try:
        return to_json(msgspec.json.decode(payload))
    except (msgspec.DecodeError, UnicodeDecodeError):
        return to_json(repr(payload))


def to_plain(message: Message) -> dict[str, Any]:
    """The fields that are set, with their wire names; encoded payloads and schemas are decoded."""
    plain: dict[str, Any] = {}
    for descriptor, value in message.ListFields():
        if isinstance(value, Message):
            plain[descriptor.name] = to_plain(value)
        elif isinstance(value, (str, int, float, bool)):
            plain[descriptor.name] = value
        elif isinstance(value, bytes):
            plain[descriptor.name] = _decoded(descriptor.name, value)
        elif hasattr(value, "items"):
            plain[descriptor.name] = dict(value)
        else:
            plain[descriptor.name] = [to_plain(item) if isinstance(item, Message) else item for item in value]
    return plain


def _decoded(name: str, value: bytes) -> Any:
    try:
        if name.endswith("_json"):
            return msgspec.json.decode(value)
        if name.endswith("_payload"):
            return msgspec.msgpack.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return repr(value)
    return value


class Printer:
    """Prints what arrives, as far as it is asked for; `on_broken_pipe` is called once when nobody reads any more."""

    def __init__(
        self, *, registrations: bool, events: bool, everything: bool, on_broken_pipe: Callable[[], None]
    ) -> None:
        self._registrations = registrations or everything
        self._events = events or everything
        self._everything = everything
        self._on_broken_pipe = on_broken_pipe

    def line(self, text: str) -> None:
        try:
            print(text, flush=True)
        except BrokenPipeError:
            # Python flushes stdout at exit once more, which must not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self._on_broken_pipe()

    def message(self, _connection: WorkerConnection, kind: str, message: pb.WorkerSchedulerMessage) -> None:
        """An `on_message` of the orchestrator."""
        if kind == "worker_event":
            self._event(message.worker_event)
        elif kind == "worker_registration":
            if self._registrations:
                self.line(f"[registration] {to_json(to_plain(message.worker_registration))}")
        elif self._everything:
            body = to_plain(getattr(message, kind)) if kind else {}
            self.line(f"[{kind.removeprefix('run_') or 'empty'}] {to_json(body)}")

    def _event(self, event: pb.WorkerEvent) -> None:
        if self._events:
            run = f" {event.run_id}" if self._everything else ""
            self.line(f"[event]{run} {event.event_type} {json_line(event.payload_json)}")
        if event.event_type == DELTA_EVENT and not self._everything:
            self.line(f"[delta] {json_line(event.payload_json)}")
