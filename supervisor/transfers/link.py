"""The transfer process's end of the pipe.

Owns: the socket. Frames come in many per wake-up and go out in the order in which they were sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

from gen_worker.pipe.frames import FrameDecoder, encode_frame
from supervisor.transfers.messages import Downward, Upward, decode_downward, encode


class Link(asyncio.Protocol):
    """See the module. `closed` gets None at the end of the pipe, or the error that ended it."""

    def __init__(self, on_message: Callable[[Downward], None]) -> None:
        self._on_message = on_message
        self._decoder = FrameDecoder()
        self._transport: asyncio.WriteTransport | None = None
        self.closed: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()

    def send(self, message: Upward) -> None:
        """Queue one message. Nothing is sent that could pile up: progress is told a few times a second."""
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encode_frame(encode(message)))

    # -- asyncio.Protocol ---------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            for body in self._decoder.feed(data):
                self._on_message(decode_downward(body))
        except Exception as error:  # noqa: BLE001  (whatever it is, it ends the process: main raises it)
            self._end(error)

    def connection_lost(self, exc: Exception | None) -> None:
        self._end(exc)

    def _end(self, error: Exception | None) -> None:
        if not self.closed.done():
            self.closed.set_result(error)
