"""What is still to be delivered to the scheduler, in order, and results until they are known delivered.

Owns: every message between the moment a run produced it and the moment the scheduler has it. The session takes
batches and says what went out; when a stream ends, what may have been lost with it is queued again.

1. Results of runs that have no event waiting, and answers to commands, are urgent: they go first.
2. Events wait in one queue per run; runs take turns, so that a flood of one delays no other. A run's result goes
   behind its own events.
3. What an event weighed is credited back to its run when the event went out: an executor has only a window of
   bytes under way per run, which bounds this object while no one reads.
4. The protocol has no acknowledgements. A result that went out is retained, and sent again on the next stream
   (the scheduler drops duplicates by run_id), until it is known to have arrived: DELIVERED_BYTES or DELIVERED_RESULTS
   have followed it, more than a connection can hold, or the stream outlived it by DELIVERED_S, longer than keepalive
   takes to find a dead peer.
5. A Keeper, when there is one, has every result from when it is put until it is known to have arrived.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from supervisor.backlog import Backlog

BATCH_MESSAGES: Final = 128
BATCH_BYTES: Final = 256 * 1024
TURN_BYTES: Final = 16 * 1024
"""What one run's events may put into a batch before the next run's turn."""

DELIVERED_BYTES: Final = 32 * 1024 * 1024
"""Twice what the largest usual HTTP/2 window (16 MiB) holds; a stalled grpcio server was seen to take 10.5 MiB."""
DELIVERED_BYTES_MAX: Final = 64 * 1024 * 1024
"""Where a transport sees a larger window it is twice that, up to this: a grpcio server's grows with the rate, and
18 MiB were seen unread over h2."""
DELIVERED_RESULTS: Final = 20_000
"""The same for tiny results, of which the bytes above would be a heap of objects: more than a scheduler that
does not read has runs under way with one worker."""
DELIVERED_S: Final = 60.0
"""Twice what keepalive (20 s, then 10 s for the answer) needs to notice a broken connection."""
_OVERHEAD_BYTES: Final = 256
"""What a retained message costs beyond its bytes; counted, so that tiny results don't pile up."""


class Keeper(Protocol):
    """Has results for the supervisor after this one, in case this one dies."""

    def keep(self, message: bytes) -> int:
        """Take a result; returns the ticket by which it is named later."""
        ...

    def forget(self, ticket: int) -> None:
        """It has arrived."""


class _NoKeeper:
    """Without WORKER_OUTBOX_DIR."""

    def keep(self, message: bytes) -> int:  # noqa: ARG002  (the protocol's)
        return 0

    def forget(self, ticket: int) -> None:
        pass


class _Answer(NamedTuple):
    """A result, or what answers a command."""

    data: bytes
    ticket: int | None
    """The keeper's; None: not a result, so it is not sent again."""


class _RunQueue:
    """The events of one run that wait, and its result behind them."""

    __slots__ = ("credit", "items", "key", "queued", "result")

    def __init__(self, key: int) -> None:
        self.key = key
        self.items: deque[tuple[bytes, int]] = deque()
        self.result: _Answer | None = None
        self.credit = 0
        self.queued = False
        """Whether it has its place in the turns."""


class _Taken(NamedTuple):
    data: bytes
    queue: _RunQueue | None
    weight: int
    answer: _Answer | None
    """None: an event."""


class _Retained(NamedTuple):
    result: _Answer
    mark: int
    sent_at: float


def _fits(message: bytes, room: int, taken: Sequence[_Taken]) -> bool:
    """A heartbeat waits until a batch is out, so what is larger than a batch goes alone."""
    return len(message) <= room or not taken


class Outbox:
    """See the module. `credit(key, size)` is called as a run's events go out."""

    def __init__(
        self,
        credit: Callable[[int, int], None],
        clock: Callable[[], float],
        backlog: Backlog | None = None,
        keeper: Keeper | None = None,
    ) -> None:
        self._credit = credit
        self._clock = clock
        self._backlog = backlog or Backlog(clock)
        self._keeper = keeper or _NoKeeper()
        self._urgent: deque[_Answer] = deque()
        self._queues: dict[int, _RunQueue] = {}
        self._turns: deque[_RunQueue] = deque()
        self._taken: list[_Taken] = []
        self._retained: deque[_Retained] = deque()
        self._again = 0
        """How many at the head of `_urgent` went out on the stream that was closed last."""
        self._sent_bytes = 0
        self._delivered_bytes = DELIVERED_BYTES
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
        result = _Answer(message, self._keeper.keep(message))
        self._waits(result)
        queue = self._queues.pop(key, None)
        if queue is not None and queue.items:
            queue.result = result
        elif queue is not None and any(taken.queue is queue for taken in self._taken):
            # Its last events are being handed over; if that fails they must still come first.
            queue.result = result
        else:
            self._urgent.append(result)

    def put_kept(self, message: bytes, ticket: int) -> None:
        """Queue a result that the keeper had before, of a run of an earlier supervisor."""
        result = _Answer(message, ticket)
        self._waits(result)
        self._urgent.append(result)

    def put_control(self, message: bytes) -> None:
        """Queue an answer that belongs to no run."""
        answer = _Answer(message, None)
        self._waits(answer)
        self._urgent.append(answer)

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
        self._again = 0
        room = BATCH_BYTES
        taken = self._taken
        while self._urgent and len(taken) < BATCH_MESSAGES and _fits(self._urgent[0].data, room, taken):
            answer = self._urgent.popleft()
            taken.append(_Taken(answer.data, None, 0, answer))
            room -= len(answer.data)
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

    def accepted(self, count: int, unread_bytes: int = 0) -> None:
        """The first `count` messages of the last batch went out; the rest is queued again, in order.

        Of what went out on this stream `unread_bytes` may be unread, as far as its transport can tell.
        """
        taken, self._taken = self._taken, []
        self._delivered_bytes = max(self._delivered_bytes, min(2 * unread_bytes, DELIVERED_BYTES_MAX))
        now = self._clock()
        for item in taken[:count]:
            self._sent_bytes += len(item.data)
            if item.answer is not None:
                self._backlog.answer_left(len(item.data) + _OVERHEAD_BYTES)
                if item.answer.ticket is not None:
                    self._retained.append(_Retained(item.answer, self._sent_bytes, now))
            if item.queue is not None:
                item.queue.credit += item.weight
        for item in reversed(taken[count:]):
            self._put_back(item)
        self._settle(taken)
        self.forget_delivered()
        self._handed_over.set()

    def stream_opened(self) -> None:
        """A new stream stands; what must go again was queued when the last one closed."""
        self._delivered_bytes = DELIVERED_BYTES

    def stream_closed(self) -> None:
        """Results that the stream may have swallowed are sent again, before anything newer."""
        if self._taken:
            self.accepted(0)
        self.forget_delivered()
        while self._retained:
            result = self._retained.pop().result
            self._waits(result)
            self._urgent.appendleft(result)
            self._again += 1

    def stream_read_to_end(self) -> None:
        """The scheduler has read all of the stream that was closed last: nothing of it needs to go again."""
        while self._again:
            self._again -= 1
            answer = self._urgent.popleft()
            self._backlog.answer_left(len(answer.data) + _OVERHEAD_BYTES)
            if answer.ticket is not None:
                self._keeper.forget(answer.ticket)

    # -- inside -------------------------------------------------------------------------------

    def _waits(self, answer: _Answer) -> None:
        self._backlog.answer_waits(len(answer.data) + _OVERHEAD_BYTES)
        self._wake.set()

    def _take_turn(self, queue: _RunQueue, room: int) -> int:
        used, allowance = 0, min(room, TURN_BYTES)
        while queue.items and used < allowance and len(self._taken) < BATCH_MESSAGES:
            data, weight = queue.items.popleft()
            self._taken.append(_Taken(data, queue, weight, None))
            used += len(data)
        result_is_next = queue.result is not None and not queue.items and len(self._taken) < BATCH_MESSAGES
        if queue.result is not None and result_is_next and _fits(queue.result.data, room - used, self._taken):
            self._taken.append(_Taken(queue.result.data, queue, 0, queue.result))
            used += len(queue.result.data)
            queue.result = None
        self._queue_turn(queue)
        return used

    def _queue_turn(self, queue: _RunQueue) -> None:
        """Give a queue its place in the turns when events wait in it, once."""
        if queue.items and not queue.queued:
            queue.queued = True
            self._turns.append(queue)

    def _put_back(self, item: _Taken) -> None:
        if item.answer is None:
            if item.queue is not None:
                item.queue.items.appendleft((item.data, item.weight))
        elif item.queue is None:
            self._urgent.appendleft(item.answer)
        else:
            item.queue.result = item.answer

    def _settle(self, taken: list[_Taken]) -> None:
        """After a hand-over: give credits, and put queues that wait again into the turns."""
        for queue in {id(item.queue): item.queue for item in taken if item.queue is not None}.values():
            if queue.credit:
                self._credit(queue.key, queue.credit)
                queue.credit = 0
            self._queue_turn(queue)
            if queue.result is not None and not queue.items:
                self._urgent.append(queue.result)  # its events went out, so it waits for nothing any more
                queue.result = None

    def forget_delivered(self) -> None:
        """Let go of the results that are known to have arrived by now.

        Time proves nothing while a batch is stuck: a scheduler's library answers pings that its program never sees.
        """
        now = self._clock()
        retained = self._retained
        while retained and (
            self._sent_bytes - retained[0].mark >= self._delivered_bytes
            or len(retained) > DELIVERED_RESULTS
            or (not self._taken and now - retained[0].sent_at >= DELIVERED_S)
        ):
            ticket = retained.popleft().result.ticket
            if ticket is not None:
                self._keeper.forget(ticket)
