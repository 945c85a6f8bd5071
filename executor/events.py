"""The events of one run, or the frames and events of one session, on their way to the pipe.

Owns: the run's credit window, and that no event follows the run's end. What is under way counts until the supervisor
says by a Credit that it went to the scheduler; a producer that would exceed the window waits, so a slow scheduler
slows the function instead of filling memory. How it waits:

- a thread (sync functions, threads of the tenant's own) blocks in `put`;
- an async generator awaits in `put_async`, a session's handler in `room`, and the event loop goes on;
- `ctx.emit()` in a coroutine can't await. It may go over by LOOP_WINDOWS - 1 windows, which holds what coroutines
  emit in practice; beyond that it blocks the event loop until there is room, since memory must stay bounded.

Deltas are joined as Nagle's algorithm joins bytes (RFC 896). The first goes at once. While one is under way those that
follow are held; they go together when a Credit comes, when they weigh DELTAS_BYTES, before any other event, and when
their producer has to wait. So a slow stream has no delay, and a flood costs one message for some fifty. A process that
dies takes what it holds with it.

An event that is larger than the window goes when nothing else is under way. A cancel ends every wait.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Final

from gen_worker.errors import RunCanceled, ValidationError, WorkerError
from gen_worker.pipe.frames import FRAME_CAP_BYTES
from gen_worker.pipe.messages import DELTAS_BYTES, EVENT_OVERHEAD_BYTES, Deltas, Event, Upward

DELTA: Final = "output.delta"
LOOP_WINDOWS: Final = 4
EVENT_CAP_BYTES: Final = FRAME_CAP_BYTES - 64 * 1024
"""An event is one frame; what is left is for its type and the message around it."""


class StalledError(Exception):
    """Nothing that is under way has left for too long."""


class EventStream:
    """See the module. Every method may be called from any thread, `put_async` and `room` from the event loop's."""

    __slots__ = (
        "_canceled", "_closed", "_credits", "_held", "_held_weight", "_key", "_lock", "_room", "_send", "_under_way",
        "_waiters", "_window",
    )  # fmt: skip

    def __init__(self, key: int, window: int, send: Callable[[Upward], None]) -> None:
        self._key = key
        self._window = window
        self._send = send
        self._under_way = 0
        self._held: list[bytes] = []
        """Deltas that were not sent yet, though they count as under way."""
        self._held_weight = 0
        self._credits = 0
        """How many came: tells whether anything leaves."""
        self._canceled = False
        self._closed = False
        self._lock = threading.Lock()
        self._room: threading.Condition | None = None
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    # -- producers ----------------------------------------------------------------------------

    def put(self, event_type: str, payload: bytes, windows: int = 1) -> None:
        """Send one event, blocking while there is no room in `windows` windows.

        Raises RunCanceled when it would have to wait in a canceled run, ValidationError for an event that is too
        large for the pipe, WorkerError after the run's end.
        """
        weight = _weigh(event_type, payload)
        with self._lock:
            while not self._put_if_room(event_type, payload, weight, windows):
                if self._canceled:
                    raise RunCanceled
                self._send_held()
                if self._room is None:
                    self._room = threading.Condition(self._lock)
                self._room.wait()

    async def put_async(self, event_type: str, payload: bytes) -> None:
        """As `put`, awaiting; a cancel of the task ends the wait."""
        weight = _weigh(event_type, payload)
        while True:
            with self._lock:
                if self._put_if_room(event_type, payload, weight, 1):
                    return
                if self._canceled:
                    raise asyncio.CancelledError
                self._send_held()
                room = self._wait()
            await room

    async def room(self, weight: int, stall_s: float) -> None:
        """Take room for what the caller sends right after, and credits when it can't; waits until there is some.

        Raises StalledError when it waited for stall_s seconds and no credit came, RunCanceled when the run was
        canceled.
        """
        while True:
            with self._lock:
                if self._canceled:
                    raise RunCanceled
                if self._take_room(weight, 1):
                    return
                room, credits_before = self._wait(), self._credits
            try:
                async with asyncio.timeout(stall_s):
                    await room
            except TimeoutError:
                if self._credits == credits_before:
                    raise StalledError from None

    def _wait(self) -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        room: asyncio.Future[None] = loop.create_future()
        self._waiters.append((loop, room))
        return room

    def _take_room(self, weight: int, windows: int) -> bool:
        if self._under_way and self._under_way + weight > self._window * windows:
            return False
        self._under_way += weight
        return True

    def _put_if_room(self, event_type: str, payload: bytes, weight: int, windows: int) -> bool:
        if self._closed:
            raise WorkerError(f"event {event_type!r} came after the end of its run")
        if not self._take_room(weight, windows):
            return False
        # Under the lock, so that the events of several threads go out in the order in which they found room, and
        # none after `close`. Sending does not wait.
        if event_type == DELTA:
            self._put_delta(payload, weight)
        else:
            self._send_held()
            self._send(Event(self._key, event_type, payload))
        return True

    def _put_delta(self, payload: bytes, weight: int) -> None:
        if self._held_weight + weight > DELTAS_BYTES:
            self._send_held()
        self._held.append(payload)
        self._held_weight += weight
        if self._held_weight == self._under_way or self._held_weight + EVENT_OVERHEAD_BYTES > DELTAS_BYTES:
            self._send_held()

    def _send_held(self) -> None:
        held = self._held
        if held:
            one = len(held) == 1
            self._send(Event(self._key, DELTA, held[0]) if one else Deltas(self._key, tuple(held)))
            held.clear()
            self._held_weight = 0

    def flush(self) -> None:
        """Send what is held, for a process that is about to leave."""
        with self._lock:
            self._send_held()

    # -- the run ------------------------------------------------------------------------------

    def credit(self, size: int) -> None:
        """`size` bytes are no longer under way."""
        with self._lock:
            self._under_way = max(0, self._under_way - size)
            self._credits += 1
            self._send_held()
            self._wake()

    def cancel(self) -> None:
        """Whoever waits, now or later, gives up."""
        with self._lock:
            self._canceled = True
            self._wake()

    def close(self, *last: tuple[str, bytes]) -> None:
        """Send the `last` events, whatever the window says, and take no more. They are few and small."""
        with self._lock:
            self._send_held()
            for event_type, payload in last:
                self._send(Event(self._key, event_type, payload))
            self._closed = True
            self._wake()

    def _wake(self) -> None:
        if self._room is not None:
            self._room.notify_all()
        if self._waiters:
            for loop, room in self._waiters:
                loop.call_soon_threadsafe(_resolve, room)
            self._waiters.clear()


def _weigh(event_type: str, payload: bytes) -> int:
    if len(payload) + len(event_type) > EVENT_CAP_BYTES:
        size = f"{len(payload)} bytes, at most {EVENT_CAP_BYTES} can be sent"
        raise ValidationError(f"event {event_type[:80]!r} has {size}")
    return len(payload) + EVENT_OVERHEAD_BYTES


def _resolve(room: asyncio.Future[None]) -> None:
    if not room.done():
        room.set_result(None)
