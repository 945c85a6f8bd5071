"""What is still to be delivered to the scheduler, in order, and results until they are known delivered.

Owns: every message between the moment a run produced it and the moment the scheduler has it. The session takes
batches and says what went out; when a stream ends, what may have been lost with it is queued again.

1. Results of runs that have no event waiting, and answers to commands, are urgent: they go first.
2. Events wait in one queue per run; runs take turns, so that a flood of one delays no other. A run's result goes
   behind its own events.
3. What an event weighed is credited back to its run when the event went out: an executor has only a window of
   bytes under way per run, which bounds this object while no one reads.
4. The protocol has no acknowledgements. A result that went out is retained, and sent again on the next stream
   (the scheduler drops duplicates by run_id), until it is known to have arrived: DELIVERED_BYTES have followed
   it, more than a connection can hold, or the stream outlived it by DELIVERED_S, longer than keepalive
   takes to find a dead peer.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

BATCH_MESSAGES: Final = 128
BATCH_BYTES: Final = 256 * 1024
TURN_BYTES: Final = 16 * 1024
"""What one run's events may put into a batch before the next run's turn."""

DELIVERED_BYTES: Final = 8 * 1024 * 1024
"""Socket buffers of both ends and HTTP/2 windows together hold less."""
DELIVERED_S: Final = 60.0
"""Twice what keepalive (20 s, then 10 s for the answer) needs to notice a broken connection."""
_OVERHEAD_BYTES: Final = 256
"""What a retained message costs beyond its bytes; counted, so that tiny results don't pile up."""


class _RunQueue:
    """The events of one run that wait, and its result behind them."""

    __slots__ = ("credit", "items", "key", "queued", "result")

    def __init__(self, key: int) -> None:
        self.key = key
        self.items: deque[tuple[bytes, int]] = deque()
        self.result: bytes | None = None
        self.credit = 0
        self.queued = False
        """Whether it has its place in the turns."""


class _Taken(NamedTuple):
    data: bytes
    queue: _RunQueue | None
    weight: int
    is_result: bool


class _Retained(NamedTuple):
    data: bytes
    mark: int
    sent_at: float


def _fits(message: bytes, room: int, taken: Sequence[_Taken]) -> bool:
    """A heartbeat waits until a batch is out, so what is larger than a batch goes alone."""
    return len(message) <= room or not taken


class Outbox:
    """See the module. `credit(key, size)` is called as a run's events go out."""

    def __init__(self, credit: Callable[[int, int], None], clock: Callable[[], float]) -> None:
        self._credit = credit
        self._clock = clock
        self._urgent: deque[tuple[bytes, bool]] = deque()
        self._queues: dict[int, _RunQueue] = {}
        self._turns: deque[_RunQueue] = deque()
        self._taken: list[_Taken] = []
        self._retained: deque[_Retained] = deque()
        self._sent_bytes = 0
        self._wake = asyncio.Event()
        self._handed_over = asyncio.Event()

    # -- producers ----------------------------------------------------------------------------

    def put_event(self, key: int, message: bytes, weight: int) -> None:
        """Queue an event of run `key`; `weight` is what it took of the run's window."""
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = _RunQueue(key)
        queue.items.append((message, weight))
        self._queue_turn(queue)
        self._wake.set()

    def put_result(self, key: int, message: bytes) -> None:
        """Queue the result of run `key`: the last that is ever put for this key."""
        queue = self._queues.pop(key, None)
        if queue is not None and queue.items:
            queue.result = message
        elif queue is not None and any(taken.queue is queue for taken in self._taken):
            # Its last events are being handed over; if that fails they must still come first.
            queue.result = message
        else:
            self._urgent.append((message, True))
        self._wake.set()

    def put_control(self, message: bytes) -> None:
        """Queue an answer that belongs to no run."""
        self._urgent.append((message, False))
        self._wake.set()

    @property
    def depth(self) -> int:
        """Messages that wait, including those being handed over."""
        waiting = sum(len(queue.items) + (queue.result is not None) for queue in self._turns)
        return len(self._urgent) + waiting + len(self._taken)

    # -- the session --------------------------------------------------------------------------

    async def take(self) -> Sequence[bytes]:
        """The next batch; waits until there is one. A batch that `accepted` did not follow is taken again."""
        if self._taken:
            self.accepted(0)
        while not self._urgent and not self._turns:
            self._wake.clear()
            await self._wake.wait()
        room = BATCH_BYTES
        taken = self._taken
        while self._urgent and len(taken) < BATCH_MESSAGES and _fits(self._urgent[0][0], room, taken):
            data, is_result = self._urgent.popleft()
            taken.append(_Taken(data, None, 0, is_result))
            room -= len(data)
        while self._turns and room > 0 and len(taken) < BATCH_MESSAGES:
            queue = self._turns.popleft()
            queue.queued = False
            room -= self._take_turn(queue, room)
        return [item.data for item in taken]

    async def flushed(self) -> None:
        """Wait until everything that was put is handed over."""
        while self.depth:
            self._handed_over.clear()
            await self._handed_over.wait()

    def accepted(self, count: int) -> None:
        """The first `count` messages of the last batch went out; the rest is queued again, in order."""
        taken, self._taken = self._taken, []
        now = self._clock()
        for item in taken[:count]:
            self._sent_bytes += len(item.data) + _OVERHEAD_BYTES
            if item.is_result:
                self._retained.append(_Retained(item.data, self._sent_bytes, now))
            if item.queue is not None:
                item.queue.credit += item.weight
        for item in reversed(taken[count:]):
            self._put_back(item)
        self._settle(taken)
        self._forget_delivered(now)
        self._handed_over.set()

    def stream_opened(self) -> None:
        """A new stream stands: nothing to do, since what must go again was queued when the last one closed."""

    def stream_closed(self) -> None:
        """Results that the stream may have swallowed are sent again, before anything newer."""
        if self._taken:
            self.accepted(0)
        self._forget_delivered(self._clock())
        while self._retained:
            self._urgent.appendleft((self._retained.pop().data, True))
        if self._urgent:
            self._wake.set()

    # -- inside -------------------------------------------------------------------------------

    def _take_turn(self, queue: _RunQueue, room: int) -> int:
        used, allowance = 0, min(room, TURN_BYTES)
        while queue.items and used < allowance and len(self._taken) < BATCH_MESSAGES:
            data, weight = queue.items.popleft()
            self._taken.append(_Taken(data, queue, weight, is_result=False))
            used += len(data)
        result_is_next = queue.result is not None and not queue.items and len(self._taken) < BATCH_MESSAGES
        if queue.result is not None and result_is_next and _fits(queue.result, room - used, self._taken):
            self._taken.append(_Taken(queue.result, queue, 0, is_result=True))
            used += len(queue.result)
            queue.result = None
        self._queue_turn(queue)
        return used

    def _queue_turn(self, queue: _RunQueue) -> None:
        """Give a queue its place in the turns when something waits in it, once."""
        if not queue.queued and (queue.items or queue.result is not None):
            queue.queued = True
            self._turns.append(queue)

    def _put_back(self, item: _Taken) -> None:
        queue = item.queue
        if queue is None:
            self._urgent.appendleft((item.data, item.is_result))
        elif item.is_result:
            queue.result = item.data
        else:
            queue.items.appendleft((item.data, item.weight))

    def _settle(self, taken: list[_Taken]) -> None:
        """After a hand-over: give credits, and put queues that wait again into the turns."""
        for queue in {id(item.queue): item.queue for item in taken if item.queue is not None}.values():
            if queue.credit:
                self._credit(queue.key, queue.credit)
                queue.credit = 0
            self._queue_turn(queue)

    def _forget_delivered(self, now: float) -> None:
        retained = self._retained
        while retained and (
            self._sent_bytes - retained[0].mark >= DELIVERED_BYTES or now - retained[0].sent_at >= DELIVERED_S
        ):
            retained.popleft()
