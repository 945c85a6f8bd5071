"""The connection to the scheduler: one stream after the other, for as long as the worker lives.

Owns: the stream, the epoch (how many streams there were), and through Redial the redirect target and the backoff. It
knows neither runs nor messages: batches come from Outgoing, what arrives goes to Incoming.

1. `run` dials the address that is in turn, with the credential of the moment.
2. The first message on a stream is the registration. From then on three tasks use the stream: `_report` sends
   heartbeats, `_deliver` hands over what the outbox has, `_receive` hands on what comes.
3. Whatever ends the stream ends in one StreamEnd, which is logged in one line, and Redial says what comes next.
4. While Incoming is full nothing more is received, so that HTTP/2 makes the scheduler wait.
5. `stop` ends the stream at once; `drain` first lets the outbox empty, half-closes the stream and waits for the
   scheduler to end it, which tells that it has read all. If the stream breaks instead, what it may have lost goes out
   on another one. Both end `run`; only an error ends it else.

Heartbeats go before queued messages: `_report` and `_deliver` take turns at a fair lock, so that a heartbeat waits for
one batch at most. No send is ever canceled, since it would then be unknown what went out: the stream is closed, and the
send that was under way ends by that, with a count.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

from supervisor.auth import AuthError
from supervisor.backoff import Lifetime, ReconnectSettings
from supervisor.clock import Clock, SystemClock
from supervisor.observer import Observer
from supervisor.redial import Redial
from supervisor.stream_end import StreamEnd, age, description, shown
from supervisor.targets import MalformedRedirect, redirect_target
from supervisor.transport import StatusCode, Stream, StreamClosed, StreamStatus, Transport, Unread
from supervisor.transport.large import LargeRequest
from supervisor.transport.messages import Message, count_of

log = logging.getLogger(__name__)

HOLD_BACK_S: Final = 0.25
"""Queued messages wait this long for the scheduler's first answer: one that is not the leader says so within a round
trip, and what it was given would be lost. Not longer, since a leader may have nothing to say."""
ANNOUNCE_GAP_S: Final = 0.02
"""Changes within this time share one heartbeat."""
SAY_FULL_EACH_S: Final = 10.0
CLOSE_GRACE_S: Final = 2.0
"""How long a drained stream may take to be ended by the scheduler."""


class Outgoing(Protocol):
    """Where messages come from: the outbox."""

    async def take(self) -> Sequence[Message]:
        """Wait for the next batch, what is most urgent first. Canceled while it waits, it takes nothing.

        A heartbeat waits until the batch is out, so a batch is bounded: 256 KiB, or one message that is larger.
        """
        ...

    def accepted(self, count: int, unread_bytes: int) -> None:
        """The first `count` messages of the last batch went out, each joined one counted; the rest was not handed over.

        Follows every take. The scheduler may not have read `unread_bytes` of what went out (see Stream.unread_bytes).
        """

    def stream_opened(self) -> None:
        """A new stream takes messages from now on."""

    def stream_closed(self, status: StreamStatus | None, unread: Unread) -> None:
        """The stream is gone, and with it what is `unread`; `status` says how, if it ended by itself."""

    async def flushed(self) -> None:
        """Wait until nothing is left to take and the last batch is accepted."""


class Incoming(Protocol):
    """Where messages go to."""

    def handle(self, message: bytes | LargeRequest) -> None:
        """Cheap, and never raises for what a scheduler may send."""

    @property
    def full(self) -> bool:
        """Nothing more should be handed over now."""
        ...

    async def room(self) -> None:
        """Wait until it is not full."""

    def stream_closed(self) -> None:
        """The stream is gone, and all of it was handed over."""


class Credentials(Protocol):
    """What to dial with."""

    async def metadata(self) -> Sequence[tuple[str, str]]:
        """For one dial. Raises AuthError."""
        ...

    def close(self) -> None:
        """No dial follows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """SCHEDULER_ADDR and SCHEDULER_ADDRS in this order, HEARTBEAT_INTERVAL_SECONDS, and the RECONNECT_ variables."""

    addresses: tuple[str, ...]
    heartbeat_interval_s: float = 10.0
    reconnect: ReconnectSettings = field(default_factory=ReconnectSettings)


class GaveUp(Exception):
    """MAX_RECONNECT_ATTEMPTS dials in a row failed. `target` and `status` are the last one's."""

    def __init__(self, failed_dials: int, target: str, status: StreamStatus) -> None:
        super().__init__(f"gave up after {failed_dials} failed dials in a row; the last, to {target}: {shown(status)}")
        self.failed_dials = failed_dials
        self.target = target
        self.status = status


@dataclass(eq=False, slots=True)
class _Link:
    """One stream and what belongs to it alone."""

    stream: Stream
    target: str
    opened_at: float
    answered_at: float | None = None
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    got_message: bool = False
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)
    """Held while sending; asyncio's locks are fair."""
    registered: asyncio.Event = field(default_factory=asyncio.Event)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Nothing more can be sent; what was received is still handed on."""
    draining: asyncio.Event = field(default_factory=asyncio.Event)
    """All that there is went out on it: it is half-closed, for the scheduler to end."""
    status: asyncio.Future[StreamStatus] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """How it ended; set when the outbox knows of the end, canceled when it was none of the stream's."""

    @property
    def drained(self) -> bool:
        """It ended as a drain means it to: by the scheduler, or by us when that took too long."""
        if not self.draining.is_set() or self.status.cancelled():
            return False
        return self.status.result().code in (StatusCode.OK, StatusCode.CANCELLED)

    def unread(self, status: StreamStatus | None) -> Unread:
        """Nothing when the scheduler ended it after the half-close: it has read all."""
        if self.draining.is_set() and status is not None and status.code is StatusCode.OK:
            return Unread(math.inf)
        return self.stream.unread()

    def life(self, now: float) -> Lifetime:
        up_s = None if self.answered_at is None else now - self.answered_at
        return Lifetime(now - self.opened_at, up_s, self.got_message)


class Session:
    """See the module."""

    def __init__(  # noqa: PLR0913  (its neighbours, by name)
        self,
        *,
        settings: SessionSettings,
        transport: Transport,
        auth: Credentials,
        outgoing: Outgoing,
        incoming: Incoming,
        registration: Callable[[bool], bytes],
        clock: Clock | None = None,
        observer: Observer | None = None,
    ) -> None:
        """`registration` gives the encoded registration; its argument is `is_heartbeat`."""
        self._interval_s = settings.heartbeat_interval_s
        self._transport = transport
        self._auth = auth
        self._outgoing = outgoing
        self._incoming = incoming
        self._registration = registration
        self._clock = SystemClock() if clock is None else clock
        self._observer = observer or Observer()
        self._redial = Redial(settings.addresses, settings.reconnect)
        self._epoch = 0
        self._link: _Link | None = None
        self._changed = asyncio.Event()
        self._stopping = asyncio.Event()
        self._hurry = asyncio.Event()
        self._dial_limit: asyncio.Timeout | None = None
        self._drain_deadline = math.inf
        self._said_full_at = -math.inf
        self.drained = False
        """After `drain`: everything went out on a stream, and that stream did not break."""
        self.read_to_end = False
        """After `run`: the scheduler ended the drained stream by itself, so it has read all that went out on it."""

    @property
    def epoch(self) -> int:
        """Streams opened so far; the number of the present one while there is one."""
        return self._epoch

    @property
    def connected(self) -> bool:
        """Whether a stream is open and the scheduler has answered on it, which it may do late."""
        return self._link is not None and self._link.answered_at is not None

    @property
    def registered(self) -> bool:
        """Whether a stream is open and the registration went out on it. A scheduler need not answer to that."""
        return self._link is not None and self._link.registered.is_set() and not self._link.over.is_set()

    @property
    def failed_dials(self) -> int:
        """In a row, since a stream last stayed up."""
        return self._redial.failed_dials

    @property
    def target(self) -> str:
        """The address of the present stream, else the one that is dialed (next)."""
        return self._redial.target if self._link is None else self._link.target

    async def run(self) -> None:
        """Keep a stream to the scheduler until `stop` or `drain`. Raises GaveUp, or a final AuthError."""
        try:
            while not self._stopping.is_set():
                end = await self._one_stream(self._redial.target)
                self._observer.stream_ended(end)
                if self._stopping.is_set() or end.drained:
                    self.read_to_end = end.drained and end.status.code is StatusCode.OK
                    self._log_stopped(end)
                    break
                delay = self._plan(end)
                if self._redial.exhausted:
                    raise GaveUp(self._redial.failed_dials, end.target, end.status)
                await self._clock.wait_for(self._hurry.wait(), delay)
                self._hurry.clear()
        finally:
            self._auth.close()

    def announce(self) -> None:
        """What the registration says has changed: send it at once. Several calls in a row make one heartbeat."""
        self._changed.set()

    def stop(self) -> None:
        """End `run` now: the stream is canceled, or the dial, or the wait."""
        if not self._stopping.is_set() and self._dial_limit is not None:
            self._dial_limit.reschedule(asyncio.get_running_loop().time())
        self._stopping.set()
        self._hurry.set()

    async def drain(self, flush_timeout_s: float) -> bool:
        """Wait until the outbox is empty and the last stream is read, then end `run`. False when time is over first."""
        self._drain_deadline = self._clock.now() + flush_timeout_s
        while not self.drained and await self._flush(self._drain_deadline - self._clock.now()):
            link = self._link
            if link is None:
                # Unless a stream broke just now: then what it may have lost is queued again.
                self.drained = await self._flush(0)
            else:
                link.draining.set()
                await asyncio.wait([link.status])
                self.drained = link.drained
        self.stop()
        return self.drained

    async def _flush(self, timeout_s: float) -> bool:
        self._hurry.set()
        return await self._clock.wait_for(self._outgoing.flushed(), max(0.0, timeout_s))

    # -- one stream ---------------------------------------------------------------------------

    async def _one_stream(self, target: str) -> StreamEnd:
        """Dial, serve the stream, and say how it ended. Raises a final AuthError."""
        try:
            stream = await self._dial(target)
        except StreamClosed as closed:
            return StreamEnd(target, closed.status)
        except AuthError as error:
            if error.final:
                raise
            return StreamEnd(target, StreamStatus(StatusCode.UNAUTHENTICATED, str(error)), dialed=False)
        self._epoch += 1
        log.info("stream %d to %s is open", self._epoch, target)
        self._link = link = _Link(stream, target, self._clock.now())
        self._outgoing.stream_opened()
        status: StreamStatus | None = None
        try:
            status = await self._serve(link)
        except BaseException:
            link.status.cancel()
            raise
        finally:
            self._link = None
            self._outgoing.stream_closed(status, link.unread(status))
            self._incoming.stream_closed()
        link.status.set_result(status)
        return StreamEnd(target, status, link.life(self._clock.now()), self._epoch, drained=link.drained)

    async def _dial(self, target: str) -> Stream:
        """Raises StreamClosed, also when `stop` comes first, and AuthError."""
        # The limit is `stop`: it cancels what is awaited here, and no task stands between that could lose a stream.
        try:
            async with asyncio.timeout(None) as self._dial_limit:
                return await self._transport.open(target, await self._auth.metadata())
        except TimeoutError:
            raise StreamClosed(StreamStatus(StatusCode.CANCELLED, "the worker stops")) from None
        finally:
            self._dial_limit = None

    async def _serve(self, link: _Link) -> StreamStatus:
        """Use the stream until it ends or `stop`. Raises what a task raised that is no StreamClosed."""
        _, report, deliver = tasks = [
            asyncio.create_task(use(link), name=f"session{use.__name__}")
            for use in (self._receive, self._report, self._deliver)
        ]
        enough = [asyncio.create_task(event.wait()) for event in (self._stopping, link.draining)]
        try:
            await asyncio.wait([*tasks, *enough], return_when=asyncio.FIRST_COMPLETED)
        finally:
            # From here on each send fails with its count, and receive gives what is still here, then the status.
            link.over.set()
            await link.stream.close(self._close_grace(link))
            async with link.turn:
                for task in (report, deliver, *enough):
                    task.cancel()
            await asyncio.gather(*tasks, *enough, return_exceptions=True)
        ends = [task.exception() for task in tasks if not task.cancelled()]
        for error in ends:
            if error is not None and not isinstance(error, StreamClosed):
                raise error
        # The reader's comes first: it has the scheduler's last word.
        return next(error.status for error in ends if isinstance(error, StreamClosed))

    def _close_grace(self, link: _Link) -> float:
        """Seconds that the scheduler has to end the stream by itself."""
        if not link.draining.is_set():
            return 0.0
        return max(0.0, min(CLOSE_GRACE_S, self._drain_deadline - self._clock.now()))

    async def _receive(self, link: _Link) -> None:
        await link.stream.established()
        link.answered_at = self._clock.now()
        link.answered.set()
        log.debug("%s answered on stream %d", link.target, self._epoch)
        handle = self._incoming.handle
        while True:
            messages = await link.stream.receive()
            link.got_message = True
            for message in messages:
                handle(message)
            messages, message = (), b""  # a large payload that was refused goes now
            if self._incoming.full:
                await self._until_room(link)

    async def _until_room(self, link: _Link) -> None:
        """Wait until Incoming has room, or the stream is over: what is left to receive then is little."""
        now = self._clock.now()
        if now - self._said_full_at >= SAY_FULL_EACH_S:
            self._said_full_at = now
            log.info("so much waits here that nothing more is read from %s for now", link.target)
        waits = [asyncio.ensure_future(self._incoming.room()), asyncio.ensure_future(link.over.wait())]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def _report(self, link: _Link) -> None:
        """The registration, then heartbeats: each interval from the opening on, and after each `announce`."""
        await self._register(link, is_heartbeat=False)
        link.registered.set()
        due = link.opened_at + self._interval_s
        while True:
            last = self._clock.now()
            is_due = not await self._clock.wait_for(self._changed.wait(), due - last)
            if not is_due:
                await self._clock.sleep(last + ANNOUNCE_GAP_S - self._clock.now())
            await self._register(link, is_heartbeat=True)
            late = self._clock.now() - due
            if is_due or late >= 0:  # a loop's timers may be a millisecond early
                due += (math.floor(max(late, 0) / self._interval_s) + 1) * self._interval_s

    async def _register(self, link: _Link, *, is_heartbeat: bool) -> None:
        async with link.turn:
            self._changed.clear()
            await link.stream.send([self._registration(is_heartbeat)])

    async def _deliver(self, link: _Link) -> None:
        await link.registered.wait()
        await self._clock.wait_for(link.answered.wait(), HOLD_BACK_S)
        while True:
            batch = await self._outgoing.take()
            accepted = 0
            try:
                async with link.turn:
                    await link.stream.send(batch)
                accepted = count_of(batch)
            except StreamClosed as closed:
                accepted = closed.accepted
                raise
            finally:
                self._outgoing.accepted(accepted, link.stream.unread_bytes)

    # -- what comes next ----------------------------------------------------------------------

    def _plan(self, end: StreamEnd) -> float:
        """Decide what is dialed after how many seconds, and log why."""
        redirect = None
        if not end.dialed:
            delay = self._redial.not_dialed()
        else:
            try:
                redirect = redirect_target(end.status)
            except MalformedRedirect as error:
                log.warning("%s redirects, but %s; the redirect is ignored", end.target, error)
            delay = self._redial.after(end.life, redirect)
        level, what = description(end, redirect)
        log.log(level, "%s; next: %s in %.1f s", what, self._redial.target, delay)
        return delay

    def _log_stopped(self, end: StreamEnd) -> None:
        if end.epoch:
            log.info("stream %d to %s is closed, %s: %s", end.epoch, end.target, age(end.life), shown(end.status))
