"""What to do with a new stream, before a byte of it is answered: canned policies for `on_connect`.

A policy is called with the new WorkerConnection, as a plain or an async function. Reading from the stream goes on
meanwhile. Headers are sent when the policy has returned, unless it ended the stream (the worker then gets the status
alone, as from a real scheduler that refuses) or set `headers_held`; one that talks to the worker sends them implicitly.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable

import grpc

from gen_worker.wire import NOT_LEADER_PREFIX

from .connection import WorkerConnection

OnConnect = Callable[[WorkerConnection], Awaitable[None] | None]

GARBAGE = b"\xff" * 16
"""No protobuf message: its first tag never ends."""


async def accept(connection: WorkerConnection) -> None:
    """Do what is done without a policy: send headers and listen."""
    await connection.send_headers()


def refuse_auth(details: str = "invalid token") -> OnConnect:
    """End every stream with UNAUTHENTICATED."""
    return end_at_once(grpc.StatusCode.UNAUTHENTICATED, details)


def redirect(address: str) -> OnConnect:
    """Send every worker to the scheduler at `host:port`."""
    return end_at_once(grpc.StatusCode.FAILED_PRECONDITION, f"{NOT_LEADER_PREFIX}{address}")


def end_at_once(code: grpc.StatusCode = grpc.StatusCode.OK, details: str = "") -> OnConnect:
    """End every stream with this status and no headers before it."""

    def policy(connection: WorkerConnection) -> None:
        connection.close(code, details)

    return policy


def stay_silent(connection: WorkerConnection) -> None:
    """Take the stream and answer nothing, not even headers."""
    connection.headers_held = True


def send_garbage(data: bytes = GARBAGE) -> OnConnect:
    """Send bytes that are no message; the stream stays open."""

    async def policy(connection: WorkerConnection) -> None:
        await connection.send_raw(data)

    return policy


def drop_at_once(connection: WorkerConnection) -> None:
    """Cut the TCP connection."""
    connection.drop()


def in_turn(*policies: OnConnect) -> OnConnect:
    """The first policy for the first stream from now on, the next for the next; the last one for all that follow."""
    remaining = list(policies)

    async def policy(connection: WorkerConnection) -> None:
        current = remaining.pop(0) if len(remaining) > 1 else remaining[0]
        answer = current(connection)
        if inspect.isawaitable(answer):
            await answer

    return policy
