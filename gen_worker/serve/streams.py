"""Answers that stop when their client goes away: server-sent events, and work that an answer waits for."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any, Final, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

T = TypeVar("T")

KEEPALIVE_S: Final = 15.0
"""A silent stream says something this often, so that nothing between takes it for dead."""


class ClientGone(Exception):
    """There is nobody to answer."""


def sse(event: str, data: object) -> bytes:
    """One event; bytes in its data are base64."""
    return b"event: %s\ndata: %s\n\n" % (event.encode(), msgspec.json.encode(data, enc_hook=repr))


class EventStream:
    """An ASGI answer of server-sent events. `on_end` is called when they end or the client goes away."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: Mapping[str, str] | None = None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._events = events
        self._on_end = on_end
        self._headers = {"content-type": "text/event-stream; charset=utf-8", **(headers or {})}

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(name.encode(), value.encode()) for name, value in self._headers.items()]
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await unless_gone(receive, self._send(send))
        except ClientGone:
            return
        finally:
            self._on_end()

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            following: asyncio.Future[bytes | None] | None = None
            try:
                while True:
                    following = following or asyncio.ensure_future(_next(events))
                    await asyncio.wait((following,), timeout=KEEPALIVE_S)
                    if not following.done():
                        await send({"type": "http.response.body", "body": b":\n\n", "more_body": True})
                        continue
                    event = following.result()
                    following = None
                    if event is None:
                        break
                    await send({"type": "http.response.body", "body": event, "more_body": True})
            finally:
                if following is not None:
                    following.cancel()
                    await asyncio.gather(following, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives; raises ClientGone, with the work canceled, when the client goes away before."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnect(receive))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _next(events: AsyncGenerator[bytes, None]) -> bytes | None:
    return await anext(events, None)
