"""The socket that a websocket handler talks through.

Owns: how objects become frames, and that nothing is sent after `close`. The frames themselves are moved by a
SocketHost: the executor's goes over the pipe, the test harness's lives in memory.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Protocol

import msgspec

from gen_worker.errors import CanceledError


class SocketHost(Protocol):
    """Moves the frames of one session."""

    async def send(self, data: bytes, *, is_text: bool) -> None:
        """Hand one frame over; waits while the other end reads too slowly."""

    async def receive(self) -> bytes | None:
        """The next frame; None when the other end closed."""

    async def close(self) -> None:
        """End the session from this side."""


class RealtimeSocket:
    """One open session. Used by one handler; not safe for use from several threads."""

    def __init__(self, host: SocketHost) -> None:
        self._host = host
        self._closed = False

    async def send_bytes(self, data: bytes) -> None:
        """Send a binary frame. Raises CanceledError after `close`."""
        self._check_open()
        await self._host.send(bytes(data), is_text=False)

    async def send_json(self, obj: Any) -> None:
        """Send `obj` (anything that msgspec encodes) as a text frame of JSON. Raises CanceledError after `close`."""
        self._check_open()
        await self._host.send(msgspec.json.encode(obj), is_text=True)

    async def iter_bytes(self) -> AsyncIterator[bytes]:
        """The frames as they come, text frames as UTF-8; ends when either side closes."""
        while not self._closed:
            data = await self._host.receive()
            if data is None:
                return
            yield data

    async def close(self) -> None:
        """End the session; a second call does nothing."""
        if not self._closed:
            self._closed = True
            await self._host.close()

    def _check_open(self) -> None:
        if self._closed:
            raise CanceledError("the realtime socket was closed by this handler")
