"""One gRPC call on a connection of its own, as the session's stream.

Owns: the connection, the call on it, and what is known of its end.

1. `connection_made` sends the preface, the settings and the call's headers in one write. The connection stands when
   the peer's SETTINGS are here (`ready`), so a peer that accepts and speaks no HTTP/2 is found out.
2. All that one wake-up brings is handled before anyone is woken: messages go to the inbox, answers to pings and
   settings go out in one write. Received data is acknowledged when the session took it, so a session that does not
   receive makes the scheduler wait, with WINDOW_BYTES on the way at most.
3. `send` packs a batch into as few DATA frames as the windows and the peer's frame size let it, and waits where they
   or the socket are full. A message counts as accepted when flow control let its last byte go to the socket.
4. The first thing that ends the call decides its status: trailers, a reset, a lost connection, our own `close`.

One module, since sending, receiving and ending share one state that nobody else may touch.
"""

from __future__ import annotations

import asyncio
import logging
import math
import ssl
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, Final, cast

from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    DataReceived,
    Event,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import H2Error
from h2.settings import SettingCodes, Settings

from gen_worker.wire import MESSAGE_LIMIT_BYTES
from supervisor.input_arena import InputArena
from supervisor.transport import StatusCode, StreamClosed, StreamStatus, Unread
from supervisor.transport.h2.busy_poll import BusyPoll
from supervisor.transport.h2.connection import CallConnection
from supervisor.transport.h2.frames import GOAWAY, BadFrame, FrameCutter, Goaway, type_of
from supervisor.transport.h2.inbox import Inbox
from supervisor.transport.h2.keepalive import KEEPALIVE_S, KEEPALIVE_TIMEOUT_S, Keepalive
from supervisor.transport.h2.statuses import (
    headers_of,
    name_of,
    status_of_answer,
    status_of_reset,
    status_of_trailers,
)
from supervisor.transport.h2.window import Window
from supervisor.transport.large import PIECE_BYTES, LargeRequest
from supervisor.transport.messages import Joined, Message, count_of, prefix, wire_size
from supervisor.transport.tcp_info import round_trip, since_end

log = logging.getLogger(__name__)
# At debug it logs every header as it encodes it, the token's among them, in plain and in Huffman's code.
logging.getLogger("hpack").setLevel(logging.WARNING)

WINDOW_BYTES: Final = 4 * 1024 * 1024
"""What the scheduler may send ahead of what the session took: fills 80 MB/s over 50 ms."""
FRAME_BYTES: Final = 256 * 1024
"""The largest frame that is taken: large payloads come in few frames, and none holds up the loop for long."""

IDLE_PINGS: Final = 2
"""Pings without a message in between: as grpcio's grpc.http2.max_pings_without_data has it."""
TURN_BYTES: Final = 16 * 1024
"""After so much `send` lets others have the loop, though nothing makes it wait."""

_STREAM: Final = 1
_DEFAULT_WINDOW: Final = 65_535
_WRITE_BYTES: Final = 512 * 1024
"""So much may wait for the socket before `send` waits."""
_READ_BYTES: Final = 1024 * 1024
"""After so much is read others get a turn of the loop: it reads 8 MiB in one, which takes 20 ms and more."""
_UNREAD_BYTES: Final = 4 * 1024 * 1024
"""So many answers to pings and settings, unread by the peer that asks for them, end the connection."""
_ACKNOWLEDGED_BYTES: Final = 64 * 1024
"""What was taken is told to `h2` in such steps; it gives windows back by halves, and these are megabytes."""
_JOIN_BYTES: Final = 64 * 1024
"""Messages up to this size are copied together; a larger one is sent from where it is."""
_TRAILERS_S: Final = 0.05
"""Within this time after the answer's headers a message or the end comes, or those were headers only."""
_LINGER_S: Final = 0.25
"""What the peer's end of a connection may take to close."""
_CLOSED: Final = StreamStatus(StatusCode.CANCELLED, "closed by this worker")


class H2Stream(asyncio.Protocol):
    """See the module. Made by H2Transport, which connects it. `headers` are the call's, pseudo-headers first."""

    def __init__(
        self,
        target: str,
        headers: Sequence[tuple[str, str]],
        *,
        keepalive_s: float = KEEPALIVE_S,
        keepalive_timeout_s: float = KEEPALIVE_TIMEOUT_S,
        arena: InputArena | None = None,
        busy_poll_s: float = 0.0,
    ) -> None:
        self._target = target
        self._headers = headers
        self._keepalive_settings = (keepalive_s, keepalive_timeout_s)
        self._loop = asyncio.get_running_loop()
        self._poll = BusyPoll(self._loop.call_soon, time.monotonic, busy_poll_s) if busy_poll_s else None
        self._http = _connection()
        self._frames = FrameCutter(FRAME_BYTES)
        self._inbox = Inbox(MESSAGE_LIMIT_BYTES, arena)
        self._transport: asyncio.Transport | None = None
        self._keepalive: Keepalive | None = None
        self._unacknowledged = 0
        """Received bytes that the scheduler's windows don't have back."""
        self._sent = 0
        """Bytes of messages, with prefixes, that went out."""
        self._window = Window()
        self._round_trip_s = 0.0
        """As it was when the call ended."""
        self._ended_at = math.inf
        """When the end came, or was noticed."""
        self._gone_at = math.inf
        """The same, if the connection was found to be gone: a peer that says that it ends the call was there."""
        self._sent_at_ping = 0
        self._idle_pings = 0
        self._sent_in_turn = 0
        """The same when others last had a turn of the loop by us."""
        self._read_in_turn = 0
        """Bytes that were read since."""
        self._sending = False
        self._writable = True
        self._spoke = False
        """The peer's SETTINGS are here, so it speaks HTTP/2."""
        self._answered = False
        """Headers of the scheduler are here."""
        self._got_message = False
        self._closing = False
        self._broken = False
        """Nothing more is read from the connection."""
        self._farewell = ""
        """What the peer said when it announced that it leaves."""
        self._status: StreamStatus | None = None
        self._news = asyncio.Event()
        """Set when something of the above has changed that a task may wait for."""
        self._room = asyncio.Event()
        """Set when `send` may go on, or has to end."""
        self._gone = asyncio.Event()
        """The connection is closed."""
        self._on_event: dict[type[Event], Callable[[Any], None]] = {
            DataReceived: self._on_data,
            ResponseReceived: self._on_answer,
            TrailersReceived: self._on_trailers,
            StreamEnded: self._on_stream_ended,
            StreamReset: self._on_reset,
            RemoteSettingsChanged: self._on_settings,
            WindowUpdated: self._on_window,
        }

    # -- the session (Stream) -----------------------------------------------------------------

    async def ready(self) -> None:
        """Wait until the peer has spoken HTTP/2. Raises StreamClosed when the call has ended by then."""
        await self._until(lambda: self._spoke)
        if self._status is not None and not self._got_message:
            raise StreamClosed(self._status)

    async def established(self) -> None:
        await self._until(lambda: self._answered)
        # A refusal may have headers of its own, just before the status.
        try:
            async with asyncio.timeout(_TRAILERS_S):
                await self._until(lambda: self._got_message)
        except TimeoutError:
            log.debug("headers came, and nothing else yet")
        if self._status is not None and not self._got_message:
            raise StreamClosed(self._status)

    async def send(self, messages: Sequence[Message]) -> None:
        before = self._sent
        if self._closing:
            await self._until(lambda: False)
        if self._status is not None:
            raise StreamClosed(self._status)
        self._sending = True
        try:
            for piece in _packed(messages):
                await self._write(piece)
                if self._sent - self._sent_in_turn > _WRITE_BYTES:
                    await asyncio.sleep(0)
                    self._sent_in_turn = self._sent
            if self._sent - self._sent_in_turn > TURN_BYTES:
                await asyncio.sleep(0)
                self._sent_in_turn = self._sent
        except StreamClosed as closed:
            raise StreamClosed(closed.status, _whole_within(messages, self._sent - before)) from None
        except asyncio.CancelledError:
            self._cancel(_CLOSED)  # whether the message at hand is out is not known: nothing may follow it
            raise
        finally:
            self._sending = False
            if self._closing:
                self._news.set()

    async def receive(self) -> Sequence[bytes | LargeRequest]:
        await self._until(lambda: self._inbox.messages)
        messages = self._inbox.take()
        self._look_at_inbox()
        if not messages:
            raise StreamClosed(self._last_status())
        self._acknowledge()
        self._flush()
        return messages

    @property
    def unread_bytes(self) -> int:
        """The largest window that the scheduler was seen to give, and what waits for the socket."""
        return self._window.peak + 2 * _WRITE_BYTES

    def unread(self) -> Unread:
        ended_at = min(self._ended_at, time.monotonic())
        late_s = max(self._round_trip_s, self._window.behind_s)
        short, size = self._window.was_short(ended_at), self._window.unread
        return Unread(ended_at - late_s, short, size, self._gone_at)

    async def close(self, grace_s: float = 0.0) -> None:
        try:
            if grace_s > 0 and not self._closing and self._status is None:
                self._closing = True
                await self._half_close(grace_s)
        finally:
            self._closing = True
            self._cancel(_CLOSED)
            await self._disconnect()

    async def _until(self, holds: Callable[[], object]) -> None:
        """Wait until `holds`, or the call has ended."""
        while not holds() and self._status is None:
            self._news.clear()
            await self._news.wait()

    # -- sending ------------------------------------------------------------------------------

    async def _write(self, piece: memoryview) -> None:
        """Send all of it, in frames as large as they may be. Raises StreamClosed."""
        position, size = 0, len(piece)
        while position < size:
            if self._status is not None:
                raise StreamClosed(self._status)
            if not self._writable or self._http.local_flow_control_window(_STREAM) <= 0:
                self._room.clear()
                await self._room.wait()
                self._window.waited(time.monotonic())
                continue
            position += self._fill(piece[position : position + _WRITE_BYTES])
            self._flush()

    def _fill(self, piece: memoryview) -> int:
        """Frame what the windows let go of it. Returns how many bytes that is."""
        http, position = self._http, 0
        while position < len(piece):
            room = min(http.local_flow_control_window(_STREAM), http.max_outbound_frame_size)
            if room <= 0:
                break
            part = piece[position : position + room]
            http.put_data(part)
            position += len(part)
        self._sent += position
        self._window.sent(position, time.monotonic())
        if self._poll is not None:
            self._poll.sent()
        return position

    def _flush(self) -> None:
        """Give the socket what is framed."""
        if not self._http.has_data_to_send:
            return
        data = self._http.data_to_send()
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    # -- the connection (asyncio.Protocol) ----------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_WRITE_BYTES)
        tls: ssl.SSLObject | None = transport.get_extra_info("ssl_object")
        if tls is not None and tls.selected_alpn_protocol() != "h2":
            self._break(f"{self._target} speaks TLS, but no HTTP/2 over it (ALPN {tls.selected_alpn_protocol()!r})")
            return
        self._keepalive = Keepalive(self._ping, self._on_dead, *self._keepalive_settings)
        self._http.initiate_connection()
        self._http.increment_flow_control_window(WINDOW_BYTES - _DEFAULT_WINDOW)
        self._http.send_headers(_STREAM, self._headers)
        self._flush()

    def data_received(self, data: bytes) -> None:
        if self._broken:
            return
        if self._keepalive is not None:
            self._keepalive.heard()
        if self._poll is not None:
            self._poll.received()
        try:
            self._take(data)
        except (H2Error, BadFrame) as error:
            if self._spoke:
                self._break(f"{self._target} broke HTTP/2: {error}", StatusCode.INTERNAL)
            else:
                self._break(f"{self._target} speaks no HTTP/2: {error}")
            return
        self._look_at_inbox()
        self._acknowledge()
        self._flush()
        self._read_in_turn += len(data)
        if self._read_in_turn > _READ_BYTES and self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()
            self._loop.call_soon(self._read_on)
        if not self._writable and self._transport is not None:
            unread = self._transport.get_write_buffer_size()
            if unread > _UNREAD_BYTES:
                self._break(f"{self._target} reads nothing, and {unread} bytes of answers to it wait")

    def _read_on(self) -> None:
        self._read_in_turn = 0
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def _take(self, data: bytes) -> None:
        only_data = True
        for frame in self._frames.cut(data):
            payload = self._http.take_data(frame)
            if payload is not None:
                self._on_payload(payload, len(payload))
                continue
            only_data = False
            if type_of(frame) == GOAWAY:
                self._on_goaway(Goaway.parse(frame))
                continue
            for event in self._http.receive_data(frame):
                handler = self._on_event.get(type(event))
                if handler is not None:
                    handler(event)
        if only_data:
            return
        self._room.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self._broken = True
        if self._keepalive is not None:
            self._keepalive.stop()
        if self._farewell:
            reason = f"{self._target} left: {self._farewell}"
        elif exc is not None:
            reason = f"the connection to {self._target} broke: {exc}"
        else:
            reason = f"{self._target} closed the connection"
        silent = isinstance(exc, TimeoutError)  # the kernel's, for what was never acknowledged
        self._end(StreamStatus(StatusCode.UNAVAILABLE, reason, silent))
        self._gone.set()

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._room.set()

    # -- what the scheduler says --------------------------------------------------------------

    def _on_settings(self, event: RemoteSettingsChanged) -> None:
        window = event.changed_settings.get(SettingCodes.INITIAL_WINDOW_SIZE)
        if window is not None:
            self._window.resized(window.new_value)
        self._spoke = True
        self._news.set()

    def _on_window(self, event: WindowUpdated) -> None:
        if event.stream_id == _STREAM:
            self._window.opened(event.delta or 0, time.monotonic())

    def _on_data(self, event: DataReceived) -> None:
        self._on_payload(bytes(event.data or b""), event.flow_controlled_length or 0)

    def _on_payload(self, payload: bytes, flow_controlled_bytes: int) -> None:
        self._unacknowledged += flow_controlled_bytes
        if self._status is None and payload:
            self._inbox.feed(payload)

    def _on_answer(self, event: ResponseReceived) -> None:
        headers = headers_of(event.headers)
        status = status_of_trailers(headers) or status_of_answer(headers, self._target)
        if status is not None:
            self._cancel(status)
        else:
            self._answered = True
            self._news.set()

    def _on_trailers(self, event: TrailersReceived) -> None:
        status = status_of_trailers(headers_of(event.headers))
        if status is not None:
            self._end(status)

    def _on_stream_ended(self, _event: StreamEnded) -> None:
        self._end(StreamStatus(StatusCode.UNKNOWN, f"{self._target} ended the stream without a status"))

    def _on_reset(self, event: StreamReset) -> None:
        if event.remote_reset:
            self._end(status_of_reset(event.error_code or 0, self._target))
        else:
            self._end(StreamStatus(StatusCode.INTERNAL, f"{self._target} broke HTTP/2, and the stream was reset"))

    def _on_goaway(self, goaway: Goaway) -> None:
        """It leaves: the call goes on until it ends or the connection is closed, unless the peer did not take it."""
        said = f" ({goaway.words})" if goaway.words else ""
        self._farewell = f"GOAWAY {name_of(goaway.code)}{said}"
        log.info("%s announces that it leaves: %s", self._target, self._farewell)
        if goaway.last_stream < _STREAM:
            self._end(StreamStatus(StatusCode.UNAVAILABLE, f"{self._target} left: {self._farewell}"))

    def _look_at_inbox(self) -> None:
        """After it was fed or emptied: wake who receives; end the call when what came is no message."""
        if self._inbox.messages:
            self._got_message = True
            self._news.set()
        if self._inbox.error is not None:
            self._cancel(self._inbox.error)

    def _acknowledge(self) -> None:
        """Give back to the windows what does not wait for the session."""
        done = self._unacknowledged - self._inbox.held
        if done >= _ACKNOWLEDGED_BYTES and not self._broken:
            self._unacknowledged -= done
            self._http.acknowledge_received_data(done, _STREAM)

    # -- keepalive ----------------------------------------------------------------------------

    def _ping(self) -> bool:
        """False when a server with gRPC's defaults would take one more, without a message in between, for abuse."""
        if self._sent != self._sent_at_ping:
            self._sent_at_ping, self._idle_pings = self._sent, 0
        self._idle_pings += 1
        if self._broken or self._idle_pings > IDLE_PINGS:
            return False
        self._http.ping(b"alive?\0\0")
        self._flush()
        return True

    def _on_dead(self) -> None:
        self._break(f"{self._target} did not answer a ping within {self._keepalive_settings[1]:g} s", silent=True)

    # -- the end ------------------------------------------------------------------------------

    def _end(self, status: StreamStatus, *, by_us: bool = False) -> None:
        """The call has ended. The first status counts."""
        if self._status is None:
            self._status = status
            self._ended_at = now = time.monotonic()
            if self._broken and not self._farewell:
                self._gone_at = now
            connection = self._transport.get_extra_info("socket") if self._transport is not None else None
            if connection is not None:
                self._round_trip_s = round_trip(connection)
                self._ended_at = now - (0.0 if by_us else since_end(connection))
            self._inbox.abandon()
        self._news.set()
        self._room.set()

    def _cancel(self, status: StreamStatus) -> None:
        """End the call from this side, and tell the peer."""
        if self._status is None and not self._broken and self._transport is not None:
            try:
                self._http.reset_stream(_STREAM, ErrorCodes.CANCEL)
            except H2Error as error:
                log.debug("the stream could not be reset, it has ended: %s", error)
            self._flush()
        self._end(status, by_us=True)

    def _break(self, reason: str, code: StatusCode = StatusCode.UNAVAILABLE, *, silent: bool = False) -> None:
        """The connection is of no more use."""
        self._broken = True
        self._end(StreamStatus(code, reason, silent), by_us=True)
        self._flush()  # after an error h2 has a GOAWAY ready that names it
        if self._transport is not None:
            self._transport.close()

    def _last_status(self) -> StreamStatus:
        """The status to end with when all that came is received."""
        status = self._inbox.error or self._status or _CLOSED
        if status.code is StatusCode.OK and self._inbox.is_amid_message:
            return StreamStatus(StatusCode.INTERNAL, f"{self._target} ended the stream amid a message")
        return status

    async def _half_close(self, grace_s: float) -> None:
        """Say that nothing follows, and give the scheduler the time to end the stream its way."""
        try:
            async with asyncio.timeout(grace_s):
                await self._until(lambda: not self._sending)
                if self._status is None:
                    self._http.end_stream(_STREAM)
                    self._flush()
                await self._until(lambda: False)
        except TimeoutError:
            log.debug("no status from the scheduler within %g s after the half-close", grace_s)

    async def _disconnect(self) -> None:
        """Close the connection, and wait until it is closed."""
        transport = self._transport
        if transport is None:
            return
        if not self._broken:
            self._broken = True
            self._http.close_connection()
            self._flush()
        if self._writable:
            transport.close()  # what was written goes out first
        else:
            transport.abort()
        try:
            async with asyncio.timeout(_LINGER_S):
                await self._gone.wait()
        except TimeoutError:
            log.debug("%s does not let the connection close; it is cut", self._target)
            transport.abort()
            await self._gone.wait()


def _connection() -> CallConnection:
    """The state of HTTP/2, with this side's settings."""
    http = CallConnection(H2Configuration(client_side=True, header_encoding=None))
    http.local_settings = Settings(
        client=True,
        initial_values={
            SettingCodes.ENABLE_PUSH: 0,
            SettingCodes.INITIAL_WINDOW_SIZE: WINDOW_BYTES,
            SettingCodes.MAX_FRAME_SIZE: FRAME_BYTES,
            SettingCodes.MAX_HEADER_LIST_SIZE: H2Connection.DEFAULT_MAX_HEADER_LIST_SIZE,
        },
    )
    http.max_inbound_frame_size = FRAME_BYTES
    return http


def _whole_within(messages: Sequence[Message], size: int) -> int:
    """How many messages the first `size` bytes of these hold to their end."""
    whole = bisect_right(list(accumulate(map(wire_size, messages))), size)
    count = count_of(messages[:whole])
    if whole < len(messages) and isinstance(cut := messages[whole], Joined):
        count += cut.whole_within(size - sum(map(wire_size, messages[:whole])))
    return count


def _packed(messages: Sequence[Message]) -> Iterator[memoryview]:
    """The messages with their prefixes, small ones joined. Raises StreamClosed before one that is too large."""
    small: list[bytes] = []
    for message in messages:
        if isinstance(message, Joined):
            small.append(message.data)
            continue
        if len(message) > MESSAGE_LIMIT_BYTES:
            yield memoryview(b"".join(small))
            reason = f"a message of {len(message)} bytes can't be sent; {MESSAGE_LIMIT_BYTES} are the most"
            raise StreamClosed(StreamStatus(StatusCode.RESOURCE_EXHAUSTED, reason))
        small.append(prefix(message))
        if isinstance(message, bytes) and len(message) <= _JOIN_BYTES:
            small.append(message)
            continue
        yield memoryview(b"".join(small))
        small.clear()
        if isinstance(message, bytes):
            view = memoryview(message)
            yield from (view[start : start + PIECE_BYTES] for start in range(0, len(view), PIECE_BYTES))
        else:
            yield from (memoryview(piece) for piece in message.pieces())
    yield memoryview(b"".join(small))
