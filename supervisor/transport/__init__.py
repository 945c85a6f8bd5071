"""The stream to a scheduler, as the session sees it: batches of encoded messages and a status.

Owns: the seam. A transport opens one bidirectional stream with metadata; messages go in and out as bytes in
batches, since a transport's cost is per hand-over and not per byte; large ones, whose bytes are what costs, are not
joined (`large.py`). `grpcio.py` is the first implementation. Nothing above this package imports grpc.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from supervisor.transport.large import LargeRequest
from supervisor.transport.messages import Message


class StatusCode(IntEnum):
    """gRPC's status codes (grpc/status in the gRPC documentation)."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


@dataclass(frozen=True, slots=True)
class StreamStatus:
    """How a stream ended."""

    code: StatusCode
    details: str
    silent: bool = False
    """The peer had not answered for so long that it was given up: what went out last was not read."""

    def __str__(self) -> str:
        return f"{self.code.name}: {self.details}" if self.details else self.code.name


@dataclass(frozen=True, slots=True)
class Unread:
    """What of the messages that a stream accepted its scheduler may not have read, as far as its transport can tell."""

    since: float
    """Monotonic seconds: one that reads at once has not read what was accepted then or later, and has read the rest."""
    saturated: bool = False
    """There was more for it than it took, so `since` says nothing: all may be unread, or `size` at most."""
    size: int | None = None
    """Bytes at the end of what was accepted, with gRPC's prefixes: the rest was read. None: not known."""
    noticed_at: float = math.inf
    """Monotonic seconds: when it was noticed that the connection is gone, which a process that stands still is late
    for. Infinity: the scheduler said that it ends the stream, or it is not known."""


class StreamClosed(Exception):
    """The stream has ended; `status` says how.

    `accepted` is set by `send`: that many messages of the batch went out before the end, each joined one counted.
    """

    def __init__(self, status: StreamStatus, accepted: int = 0) -> None:
        super().__init__(str(status))
        self.status = status
        self.accepted = accepted


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """Paths for TLS; all None: the system's CAs and no client certificate."""

    ca_file: str | None = None
    client_cert_file: str | None = None
    client_key_file: str | None = None


class Stream(Protocol):
    """One bidirectional stream. `send` and `receive` are each called by one task at a time."""

    async def established(self) -> None:
        """Returns when the scheduler's first byte of an answer (headers or a message) is here.

        Raises StreamClosed when the stream ends before.
        """

    async def send(self, messages: Sequence[Message]) -> None:
        """Hand messages over in order; waits while the scheduler reads too slowly. Other tasks get their turn.

        Raises StreamClosed, with `accepted` set; its status is the scheduler's if that ended the stream, also when a
        message was under way. Canceled, it ends the stream, since nobody knows then what went out.
        """

    async def receive(self) -> Sequence[bytes | LargeRequest]:
        """At least one message, and all that are here.

        Raises StreamClosed once the stream has ended and all that came before was received.
        """

    @property
    def unread_bytes(self) -> int:
        """How much of what was accepted the scheduler may not have read, at most; 0 when this transport can't tell."""
        ...

    def unread(self) -> Unread:
        """What the scheduler may not have read when the stream ended. To be asked after `close`."""
        ...

    async def close(self, grace_s: float = 0.0) -> None:
        """Half-close, wait up to grace_s for the scheduler's status, then cancel. Never raises; may be called again.

        What waits in `send`, `receive` or `established` ends with StreamClosed, and so does every later call, but for
        `receive` while something is left to receive.
        """


class Transport(Protocol):
    """Opens streams; keeps nothing between them."""

    async def open(self, target: str, metadata: Sequence[tuple[str, str]]) -> Stream:
        """Start a stream to `host:port`.

        Returns as soon as messages can be handed over, which does not mean that anyone answered.
        Raises StreamClosed when the address can't be connected to within the connect timeout, with a reason for the
        operator, or when the scheduler has refused already. Canceled, it leaves nothing behind.
        """
