"""The stream over grpcio's asyncio API.

Owns: one channel and one call per stream, and the task that reads from it. Messages pass as bytes: grpc neither
encodes nor decodes them.

1. `open` makes a channel and a call. The call's metadata goes out once HTTP/2 is spoken (the peer sent its SETTINGS),
   so waiting for that finds refused connections, wrong names, TLS trouble, and peers that accept and say nothing.
2. A reader task moves messages into an inbox that is bounded in bytes and number. While the inbox is full nothing is
   read, so HTTP/2's flow control makes the scheduler wait.
3. `receive` empties the inbox: one wake-up of the session for all that came meanwhile. Where messages come faster
   than they are handled some gather first (gather.py).
4. `send` writes one message after the other. A write returns when HTTP/2 took the message, so it is known how many
   were accepted; request iterators cost the same and don't tell.
   grpc's threads find the end of a stream, and on a busy host that takes them time in which messages are accepted that
   nobody will read. So the kernel is asked when the end came.
5. grpc gives and takes a message in one piece of memory. Large ones are copied piece by piece: out of it into shared
   memory when they come, and, in a thread, together from there when they go. What grpc itself does with one holds up
   the loop, about 1 ms for each MiB. When none has followed for a moment malloc is asked for the memory, which it
   would keep.
"""

from __future__ import annotations

import asyncio
import ctypes
import io
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

import grpc
from grpc import aio

from gen_worker.wire import MESSAGE_LIMIT_BYTES, METHOD
from supervisor.input_arena import InputArena
from supervisor.transport import StatusCode, StreamClosed, StreamStatus, TlsFiles, Unread
from supervisor.transport.gather import GATHER_S, Gather
from supervisor.transport.large import LARGE_BYTES, PIECE_BYTES, LargeRequest, Splitter
from supervisor.transport.messages import LargeMessage, Message, apart, count_of
from supervisor.transport.tcp_info import Observed
from supervisor.transport.tls import ca_file, tls_context
from supervisor.transport.unread import UNREAD_S, Stretch, estimated_round_trip

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S: Final = 10.0
INBOX_BYTES: Final = 4 * 1024 * 1024
INBOX_MESSAGES: Final = 1024
"""Reading stops at either bound; the message that reaches it is still taken."""
WINDOW_BYTES: Final = 4 * 1024 * 1024
"""What the scheduler may send ahead of what the inbox took."""

_TRAILERS_S: Final = 0.05
"""Within this time after a stream's first sign of life a message or the end comes, or those were headers only."""

_ROUND_TRIPS: Final = 2
"""Until a peer has spoken HTTP/2: one for TCP, one for the SETTINGS."""
_ROUND_TRIPS_TLS: Final = 3

_TRIM_BYTES: Final = 16 * 1024 * 1024
"""After messages of this size malloc keeps what they took: 80 MiB after one of 64 MiB, 380 after one of 250."""
_TRIM_AFTER_S: Final = 0.5
"""Not between messages that follow each other: fresh pages cost a tenth of their rate."""

_SILENCE: Final = ("ping timeout", "keepalive watchdog", "Connection timed out")
"""In the details of a stream whose peer answered no ping, or whose data was never acknowledged."""

_OPTIONS: Final = (
    ("grpc.max_send_message_length", MESSAGE_LIMIT_BYTES),
    ("grpc.max_receive_message_length", MESSAGE_LIMIT_BYTES),
    # With data every 10 s (the heartbeat) a server with gRPC's defaults puts up with pings at this rate.
    ("grpc.keepalive_time_ms", 20_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Without this a ping has 60 s for its answer, whatever the line above says.
    ("grpc.http2.ping_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # grpc grows a stream's window by itself, and then some 30 MiB may lie unread in it. This fixed one fills 80 MB/s
    # over 50 ms, and costs nothing on a short way.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
    # A shared subchannel would hand its own backoff on to the next stream; the session's is the only one.
    ("grpc.use_local_subchannel_pool", 1),
    # A stream that was sent twice behind the session's back would be two workers to the scheduler.
    ("grpc.enable_retries", 0),
    ("grpc.service_config_disable_resolution", 1),
)


class GrpcioTransport:
    """Opens streams through grpcio. `tls` None: plain text. Large payloads go to `arena`, if there is one."""

    def __init__(
        self,
        tls: TlsFiles | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        *,
        arena: InputArena | None = None,
    ) -> None:
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._arena = arena

    async def open(self, target: str, metadata: Sequence[tuple[str, str]]) -> GrpcioStream:
        """See Transport.open. Certificates are read anew each time, since they get rotated."""
        if self._tls is None:
            channel = aio.insecure_channel(target, options=_OPTIONS)
        else:
            credentials = await asyncio.to_thread(_credentials, self._tls)
            channel = aio.secure_channel(target, credentials, options=_OPTIONS)
        began = time.monotonic()
        call = channel.stream_stream(METHOD)(metadata=tuple(metadata))
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await call.wait_for_connection()
        except TimeoutError:
            await _discard(channel, call)
            reason = f"{target} did not answer, or spoke no HTTP/2, within {self._connect_timeout_s:g} s"
            raise StreamClosed(StreamStatus(StatusCode.UNAVAILABLE, reason)) from None
        except aio.AioRpcError as error:
            await _discard(channel, call)
            raise StreamClosed(_status(error.code(), error.details())) from None
        except BaseException:
            await _discard(channel, call)
            raise
        dial_s = time.monotonic() - began
        connection = Observed.to_port(int(target.rpartition(":")[2]))
        round_trip_s = connection.round_trip_s
        if not round_trip_s:  # no Linux, or there is not just one
            round_trip_s = estimated_round_trip(dial_s, _ROUND_TRIPS if self._tls is None else _ROUND_TRIPS_TLS)
        return GrpcioStream(channel, call, connection, round_trip_s, self._arena)


class GrpcioStream:
    """One call. Made by GrpcioTransport."""

    def __init__(
        self,
        channel: aio.Channel,
        call: aio.StreamStreamCall[bytes, bytes],
        connection: Observed,
        round_trip_s: float,
        arena: InputArena | None = None,
    ) -> None:
        self._arena = arena
        self._round_trip_s = round_trip_s
        self._stretch = Stretch(time.monotonic())
        self._ended_at = math.inf
        """When the end came, or was first noticed."""
        self._writing_since = math.inf
        """Since when grpc has not taken the message under way; the last one, when the stream has ended."""
        self._channel = channel
        self._call = call
        self._connection = connection
        # The public write() turns every failure into INTERNAL and overwrites the status that the scheduler sent with
        # it: a redirect would be lost whenever a message is under way. What lies beneath leaves the status alone.
        self._write: Callable[[bytes], Awaitable[None]] = call._cython_call.send_serialized_message  # noqa: SLF001
        # The public read() looks at the call's state around each message, which is a twentieth of a run's latency; at
        # the end the reader asks for the status itself.
        self._receive: Callable[[], Awaitable[bytes]] = call._cython_call.receive_serialized_message  # noqa: SLF001
        self._inbox: deque[bytes | LargeRequest] = deque()
        self._inbox_bytes = 0
        self._gather = Gather(time.monotonic)
        self._gathering: asyncio.TimerHandle | None = None
        """Ends the time that what is in the inbox may gather."""
        self._trim: asyncio.TimerHandle | None = None
        self._answered = False
        self._closing = False
        self._over = False
        """A send failed: the stream has ended, though its status may lie behind messages."""
        self._status: StreamStatus | None = None
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()
        self._reader = asyncio.create_task(self._read(), name="grpcio-reader")

    async def established(self) -> None:
        headers = asyncio.ensure_future(self._call.initial_metadata())
        try:
            await asyncio.wait({headers, self._reader}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            headers.cancel()
        # A refusal has no headers, but grpc gives empty ones, just before the status.
        try:
            async with asyncio.timeout(_TRAILERS_S):
                await self._filled.wait()
        except TimeoutError:
            log.debug("headers came, and nothing else yet")
        if self._status is not None and not self._answered:
            raise StreamClosed(self._status)

    async def send(self, messages: Sequence[Message]) -> None:
        accepted = 0
        began = time.monotonic()
        try:
            for message in apart(messages):
                if self._call.done():
                    break
                if not isinstance(message, bytes):
                    message = await asyncio.to_thread(_in_memory, message)  # noqa: PLW2901
                self._writing_since = time.monotonic()
                await self._write(message)
                self._writing_since = math.inf
                accepted += 1
                size = len(message)
                del message  # as large as it may be, nobody else needs it
                if size >= _TRIM_BYTES:
                    self._trim_later()
        except aio.BaseError:
            pass  # the status says why
        except asyncio.CancelledError:
            self._note_end(by_us=True)
            self._call.cancel()  # whether the message at hand is out is not known: nothing may follow it
            raise
        self._stretch.sent(began, time.monotonic())
        if accepted < count_of(messages):
            self._note_end()
            # The status comes behind the last message, which the reader must take though nobody receives: a session
            # may wait for room that only this answer gives it. What is left is little, since nothing more comes.
            self._over = True
            self._emptied.set()
            raise StreamClosed(await self._ended(), accepted)

    async def receive(self) -> Sequence[bytes | LargeRequest]:
        while not (self._inbox and self._filled.is_set()):
            if self._status is not None:
                raise StreamClosed(self._status)
            self._filled.clear()
            await self._filled.wait()
        self._filled.clear()
        if self._gathering is not None:
            self._gathering.cancel()
            self._gathering = None
            self._gather.handed_over(len(self._inbox))
        messages = list(self._inbox)
        self._inbox.clear()
        self._inbox_bytes = 0
        self._emptied.set()
        return messages

    @property
    def unread_bytes(self) -> int:
        return 0  # grpc does not show its windows

    def unread(self) -> Unread:
        ended_at = min(self._ended_at, time.monotonic())
        stuck = ended_at - self._writing_since >= UNREAD_S
        return Unread(self._stretch.since(ended_at) - self._round_trip_s, saturated=stuck)

    def _note_end(self, *, by_us: bool = False) -> None:
        if self._ended_at == math.inf:
            self._ended_at = time.monotonic() - (0.0 if by_us else self._connection.since_end_s)
            self._connection.close()

    async def close(self, grace_s: float = 0.0) -> None:
        try:
            if grace_s > 0 and not self._closing and self._status is None:
                await self._half_close(grace_s)
        finally:
            self._closing = True
            self._note_end(by_us=True)
            self._call.cancel()
            self._emptied.set()
            await asyncio.wait({self._reader})
            await _discard(self._channel, self._call)

    async def _half_close(self, grace_s: float) -> None:
        """Say that nothing follows, and give the scheduler the time to end the stream its way."""
        try:
            async with asyncio.timeout(grace_s):
                await self._call.done_writing()
                await asyncio.wait({self._reader})
        except TimeoutError:
            log.debug("no status from the scheduler within %g s after the half-close", grace_s)
        except (aio.BaseError, aio.AioRpcError) as error:
            log.debug("the stream ended before it could be half-closed: %s", error)

    async def _read(self) -> None:
        """Fill the inbox until the stream ends, and then say so."""
        try:
            await self._call.initial_metadata()  # nothing may be read before
            while (message := await self._receive()) is not aio.EOF:
                size = len(message)
                taken = message if self._arena is None or size <= LARGE_BYTES else await _split(message, self._arena)
                del message
                self._inbox.append(taken)
                del taken
                self._inbox_bytes += size
                if size >= _TRIM_BYTES:
                    self._trim_later()
                self._answered = True
                self._tell()
                if self._gather.alone:
                    await asyncio.sleep(0)  # a turn for who receives, before grpc is asked for the next
                while self._is_full and not self._closing and not self._over:
                    self._emptied.clear()
                    await self._emptied.wait()
        except aio.AioRpcError:
            pass  # the status says why
        except asyncio.CancelledError:
            # grpc raises this for a call that `close` canceled; else this task itself is meant.
            if not self._closing:
                self._note_end(by_us=True)
                self._call.cancel()
                raise
        finally:
            self._note_end()
            self._status = await self._ended()
            self._filled.set()

    def _tell(self) -> None:
        """Say that a message came: now, or when others have come with it."""
        if self._gather.came() <= len(self._inbox) or self._is_full:
            self._filled.set()
        elif self._gathering is None and not self._filled.is_set():
            self._gathering = asyncio.get_running_loop().call_later(GATHER_S, self._filled.set)

    def _trim_later(self) -> None:
        """A large message is done with."""
        if self._trim is not None:
            self._trim.cancel()
        loop = asyncio.get_running_loop()
        self._trim = loop.call_later(_TRIM_AFTER_S, loop.run_in_executor, None, _give_back_memory)

    @property
    def _is_full(self) -> bool:
        return self._inbox_bytes >= INBOX_BYTES or len(self._inbox) >= INBOX_MESSAGES

    async def _ended(self) -> StreamStatus:
        """The status of a call that has ended or is about to."""
        status = _status(await self._call.code(), await self._call.details())
        if self._closing and status.code is StatusCode.CANCELLED:
            return StreamStatus(StatusCode.CANCELLED, "closed by this worker")
        return status


def _status(code: grpc.StatusCode, details: str | None) -> StreamStatus:
    text = details or ""
    silent = code is grpc.StatusCode.UNAVAILABLE and any(words in text for words in _SILENCE)
    return StreamStatus(StatusCode(code.value[0]), text, silent)


async def _split(message: bytes, arena: InputArena) -> bytes | LargeRequest:
    """A large message, taken apart piece by piece, with a turn of the loop in between."""
    splitter, view = Splitter(len(message), arena), memoryview(message)
    for start in range(0, len(message), PIECE_BYTES):
        splitter.feed(view[start : start + PIECE_BYTES])
        await asyncio.sleep(0)
    return splitter.message()


def _in_memory(message: LargeMessage) -> bytes:
    """In the memory of one object, as grpc needs it. For a thread: that gives the loop its turns between the pieces."""
    buffer = io.BytesIO()
    for piece in message.pieces():
        buffer.write(piece)
    return buffer.getvalue()


def _give_back_memory() -> None:
    """What malloc has free."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


async def _discard(channel: aio.Channel, call: aio.StreamStreamCall[bytes, bytes]) -> None:
    """Free what a stream held. Never raises."""
    call.cancel()
    try:
        await channel.close()
    except Exception:
        log.exception("a gRPC channel did not close cleanly")


def _credentials(tls: TlsFiles) -> grpc.ChannelCredentials:
    """Raises StreamClosed when a file is missing or not what it should be."""
    tls_context(tls)
    return grpc.ssl_channel_credentials(
        root_certificates=_file(ca_file(tls)),
        private_key=_file(tls.client_key_file),
        certificate_chain=_file(tls.client_cert_file),
    )


def _file(name: str | None) -> bytes | None:
    return None if name is None else Path(name).read_bytes()
