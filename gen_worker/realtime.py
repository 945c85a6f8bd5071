"""The socket that a websocket handler talks through.

Owns: how objects become frames, and that nothing is sent after the end. The frames themselves are moved by a
SocketHost: the executor's goes over the pipe, the test harness's lives in memory.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, NamedTuple, Protocol

import msgspec

from gen_worker.errors import CanceledError


class Frame(NamedTuple):
    """One frame as it arrived."""

    data: bytes
    """Of a text frame its UTF-8, which nobody has checked."""
    is_text: bool = False


class SocketHost(Protocol):
    """Moves the frames of one session."""

    async def send(self, data: bytes, *, is_text: bool) -> None:
        """Hand one frame over; waits while the other end reads too slowly.

        Raises CanceledError when the session is over, ValidationError for a frame over the limit, which ends it.
        """

    async def receive(self) -> Frame | None:
        """The next frame; None when the other end closed."""

    async def close(self) -> None:
        """End the session from this side; whoever waits in `receive` gets None."""


class RealtimeSocket:
    """One open session. Used by one handler, in its event loop; several of its tasks may send.

    `send_bytes`, `send_text` and `send_json` wait while the other end reads too slowly. They raise CanceledError when
    the session is over, whoever ended it, and ValidationError for a frame over WORKER_MAX_WS_FRAME_BYTES, which ends
    it.
    """

    def __init__(self, host: SocketHost) -> None:
        self._host = host
        self._closed = False

    async def send_bytes(self, data: bytes) -> None:
        """Send a binary frame."""
        self._check_open()
        await self._host.send(bytes(data), is_text=False)

    async def send_text(self, text: str) -> None:
        """Send a text frame."""
        self._check_open()
        await self._host.send(text.encode(), is_text=True)

    async def send_json(self, obj: Any) -> None:
        """Send `obj` (anything that msgspec encodes) as a text frame of JSON."""
        self._check_open()
        await self._host.send(msgspec.json.encode(obj), is_text=True)

    async def iter_bytes(self) -> AsyncIterator[bytes]:
        """The frames as they come, text frames as UTF-8; ends when either side closes."""
        async for frame in self.iter_frames():
            yield frame.data

    async def iter_frames(self) -> AsyncIterator[Frame]:
        """As `iter_bytes`, for handlers that tell text from binary."""
        while not self._closed:
            frame = await self._host.receive()
            if frame is None:
                return
            yield frame

    async def close(self) -> None:
        """End the session; a second call does nothing."""
        if not self._closed:
            self._closed = True
            await self._host.close()

    def _check_open(self) -> None:
        if self._closed:
            raise CanceledError("the realtime socket was closed by this handler")
