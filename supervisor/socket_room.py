"""How much waits for websocket handlers, and which handler is too slow.

Owns: the frames of sessions that no executor has, and how much of each session an executor has.

1. An executor gets frames of a session while less than its window is under way; the rest waits here.
2. A session for which QUEUE_BYTES wait makes this `full`, and so do all together with QUEUES_BYTES: nothing more is
   read from the scheduler, so that HTTP/2 makes it wait. Everything else comes on the same stream, so that must be
   short: until RESUMED_BYTES less wait, for HOLD_S at most, and while the handler takes something every STALE_S.
3. Who needs longer is too slow; and so is one that no executor has yet. When all together need longer, the session for
   which most waits is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final, NamedTuple

from supervisor.runs import RunState
from supervisor.socket_session import SocketSession, WaitingFrame

QUEUE_BYTES: Final = 16 * 1024 * 1024
"""What may wait for one handler, each frame counted with EVENT_OVERHEAD_BYTES: some 60,000 tiny ones. A larger frame is
taken when nothing else waits."""
QUEUES_BYTES: Final = 64 * 1024 * 1024
"""What may wait for all handlers together."""
RESUMED_BYTES: Final = 4 * 1024 * 1024
LATE_BYTES: Final = 16 * 1024 * 1024
"""What may still come when reading stops: it was on its way."""
HOLD_S: Final = 2.0
"""A handler that takes 2 MiB/s keeps its session whatever comes."""
STALE_S: Final = 0.5


class _Crowd(NamedTuple):
    since: float
    waiting_bytes: int


class SocketRoom:
    """See the module. `too_slow(session, detail)` ends a session, which includes `drop_waiting`."""

    def __init__(self, clock: Callable[[], float], too_slow: Callable[[SocketSession, str], None]) -> None:
        """`clock` gives monotonic seconds."""
        self._clock = clock
        self._too_slow = too_slow
        self._waiting: dict[SocketSession, None] = {}
        """The sessions that have frames here."""
        self._crowded: dict[SocketSession | None, _Crowd] = {}
        """For whom too much waits; None: for all together."""
        self._took_at = 0.0
        self._less = asyncio.Event()
        self.waiting_bytes = 0
        """Of all sessions."""

    @property
    def full(self) -> bool:
        """Nothing more should be read from the scheduler now."""
        return bool(self._crowded)

    async def room(self) -> None:
        """Wait until it is not full; that is soon."""
        while self._crowded:
            self._less.clear()
            try:
                async with asyncio.timeout(max(0.0, min(map(self._patience, self._crowded)))):
                    await self._less.wait()
            except TimeoutError:
                for session in [each for each in self._crowded if self._patience(each) <= 0]:
                    self._lose_patience(session)

    def add(self, session: SocketSession, frame: WaitingFrame) -> None:
        """A frame came. It waits, unless its session is too slow."""
        waiting = session.waiting_bytes
        if waiting and waiting + frame.weight > QUEUE_BYTES:
            crowd = self._crowded.setdefault(session, _Crowd(self._clock(), waiting))
            if session.state is not RunState.RUNNING or waiting > crowd.waiting_bytes + LATE_BYTES:
                self._too_slow(session, f"{waiting} bytes wait for its handler already")
                return
        if self.waiting_bytes > QUEUES_BYTES:
            crowd = self._crowded.setdefault(None, _Crowd(self._clock(), self.waiting_bytes))
            if self.waiting_bytes > crowd.waiting_bytes + LATE_BYTES:
                self._close_the_slowest()
        if not session.reason:
            session.waiting.append(frame)
            self._count(session, frame.weight)

    def next_frame(self, session: SocketSession, *, windowed: bool = True) -> WaitingFrame | None:
        """The next frame for its executor, which is under way from here on; None: it has none, or no room for one."""
        if not session.waiting or (windowed and session.under_way >= session.window):
            return None
        frame = session.waiting.popleft()
        session.under_way += frame.weight
        self._count(session, -frame.weight)
        return frame

    def took(self, session: SocketSession, size: int) -> None:
        """Its handler took `size` bytes."""
        session.under_way = max(0, session.under_way - size)
        session.took_at = self._took_at = self._clock()

    def drop_waiting(self, session: SocketSession) -> None:
        """What waits is not wanted any more."""
        session.waiting.clear()
        self._count(session, -session.waiting_bytes)

    # -- inside -------------------------------------------------------------------------------

    def _count(self, session: SocketSession, change: int) -> None:
        self.waiting_bytes += change
        session.waiting_bytes += change
        if session.waiting:
            self._waiting[session] = None
        else:
            self._waiting.pop(session, None)
        if session.waiting_bytes <= QUEUE_BYTES - RESUMED_BYTES:
            self._relax(session)
        if self.waiting_bytes <= QUEUES_BYTES - RESUMED_BYTES:
            self._relax(None)

    def _relax(self, session: SocketSession | None) -> None:
        if self._crowded.pop(session, None) is not None:
            self._less.set()

    def _patience(self, session: SocketSession | None) -> float:
        """Seconds that the stream may still be held up for it."""
        since = self._crowded[session].since
        took_at = self._took_at if session is None else session.took_at
        return min(since + HOLD_S, max(since, took_at) + STALE_S) - self._clock()

    def _lose_patience(self, session: SocketSession | None) -> None:
        if session is not None:
            detail = f"{session.waiting_bytes} bytes wait for its handler, which does not get on with them"
            self._too_slow(session, detail)
            return
        while None in self._crowded and self._close_the_slowest():
            pass
        if None in self._crowded:
            self._crowded[None] = _Crowd(self._clock(), self.waiting_bytes)

    def _close_the_slowest(self) -> bool:
        """False when there is none: one for which a single frame waits is not slow, its frame is large."""
        slow = [session for session in self._waiting if len(session.waiting) > 1]
        if not slow:
            return False
        most = max(slow, key=lambda session: session.waiting_bytes)
        detail = f"{self.waiting_bytes} bytes wait for all handlers, {most.waiting_bytes} of them for this one"
        self._too_slow(most, detail)
        return True
