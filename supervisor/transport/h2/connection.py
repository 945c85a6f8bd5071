"""The state of HTTP/2, by `h2`, with a short way for what is nearly all of the traffic.

Owns: nothing beyond h2's state. A plain DATA frame of the one call, in a state in which it may come or go, changes two
windows and nothing else; `h2` makes half a dozen objects of it, which is a tenth of what a small run takes. Such frames
are counted and framed here. Every other frame, and one that may not come now, is for `h2`, errors included.
"""

from __future__ import annotations

import struct
from typing import Final

from h2.connection import ConnectionState, H2Connection
from h2.stream import StreamState

from supervisor.transport.h2.frames import HEADER_BYTES

STREAM: Final = 1
"""A connection has one call."""

_HEADER: Final = struct.Struct(">BHBBL")
"""Of a frame (RFC 9113, 4.1): length in three bytes, type, flags, stream."""
_PLAIN: Final = _HEADER.pack(0, 0, 0, 0, STREAM)[3:]
_RECEIVES: Final = (StreamState.OPEN, StreamState.HALF_CLOSED_LOCAL)
_SENDS: Final = (StreamState.OPEN, StreamState.HALF_CLOSED_REMOTE)


class CallConnection(H2Connection):
    """See the module. The private attributes that it moves are h2's of 4.2 and later; each is tested over the wire."""

    def take_data(self, frame: bytes) -> bytes | None:
        """The payload of a whole frame that is a plain DATA frame and may come now; None: give it to `h2`."""
        stream = self.streams.get(STREAM)
        if frame[3:HEADER_BYTES] != _PLAIN or stream is None:
            return None
        call = stream.state_machine
        expected = self.state_machine.state is ConnectionState.CLIENT_OPEN and call.state in _RECEIVES
        if not expected or not call.headers_received or stream._expected_content_length is not None:  # noqa: SLF001
            return None
        size = len(frame) - HEADER_BYTES
        all_, own = self._inbound_flow_control_window_manager, stream._inbound_window_manager  # noqa: SLF001
        if size > all_.current_window_size or size > own.current_window_size:
            return None
        all_.window_consumed(size)
        own.window_consumed(size)
        return frame[HEADER_BYTES:]

    def put_data(self, part: memoryview) -> None:
        """Frame so much of the call's data; it has room in the windows and in one frame. Raises H2Error."""
        stream = self.streams[STREAM]
        if stream.state_machine.state not in _SENDS or self.state_machine.state is not ConnectionState.CLIENT_OPEN:
            self.send_data(STREAM, part)  # which says why not
            return
        size = len(part)
        stream.outbound_flow_control_window -= size
        self.outbound_flow_control_window -= size
        self._data_to_send += _HEADER.pack(size >> 16, size & 0xFFFF, 0, 0, STREAM)
        self._data_to_send += part

    @property
    def has_data_to_send(self) -> bool:
        """Whether anything is framed and not taken."""
        return bool(self._data_to_send)
