"""What is still to be delivered to the scheduler, in order, and results until they are known delivered.

Owns: every message between the moment a run produced it and the moment the scheduler has it. The session takes
batches and says what went out; when a stream ends, what may have been lost with it is queued again.

1. Results of runs that have no event waiting, and answers to commands, are urgent: they go first.
2. Events wait in one queue per run; runs take turns, so that a flood of one delays no other. A run's result goes
   behind its own events.
   Events that came in one (`Joined`) travel in one, and are retained so; a stream that ends amid them cuts them apart.
3. What an event weighed is credited back to its run when the event went out: an executor has only a window of
   bytes under way per run, which bounds this object while no one reads.
4. The protocol has no acknowledgements. A result that went out is retained, and sent again on the next stream
   (the scheduler drops duplicates by run_id), until it is known to have arrived: DELIVERED_BYTES have followed it,
   more than a connection can hold, or the stream outlived it by DELIVERED_S, longer than keepalive takes to find a
   dead peer.
5. A scheduler can't tell a repeated event from a new one. So events go again that may not have been read, and no
   others: of a stream that there was more for than it took, or whose peer had gone silent, all that may lie unread; of
   another one what went out so late that it can't have been read. docs/adr/0004-known-delivered.md has the reasons.
6. A result that scheduler after scheduler refuses for its size is replaced by a failure that says so.
7. A large output stays in its executor's shared memory until its result is known to have arrived, and is read from
   there each time that it is sent.
8. A Keeper, when there is one, has every result from when it is put until it is known to have arrived.
9. What a realtime session sends is transient: it belongs to the stream that the session was opened on, and is dropped
   with it. Only its close goes out on the next one.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Final, NamedTuple, Protocol

from supervisor.backlog import Backlog
from supervisor.held_output import LargeResult
from supervisor.oversize import Name, Oversize, refuses_size
from supervisor.retention import Pack, Retention, Sent, messages
from supervisor.transport import StreamStatus, Unread
from supervisor.transport.messages import Joined, count_of, wire_size
from supervisor.transport.unread import RUSH_S, UNREAD_S
from supervisor.turns import Turns

_Message = bytes | Joined | LargeResult

log = logging.getLogger(__name__)

BATCH_MESSAGES: Final = 128
BATCH_BYTES: Final = 256 * 1024
TURN_BYTES: Final = 16 * 1024
"""What one run's events may put into a batch before the next run's turn."""

DELIVERED_BYTES: Final = 32 * 1024 * 1024
"""Twice what the largest usual HTTP/2 window (16 MiB) holds; a stalled grpcio server was seen to take 16.3 MiB."""
DELIVERED_BYTES_MAX: Final = 64 * 1024 * 1024
"""Where a transport sees a larger window it is twice that, up to this: a grpcio server's grows with the rate, and
18 MiB were seen unread over h2."""
EVENTS_BYTES: Final = 32 * 1024 * 1024
"""The same for events, which a transport that sees its windows need not send again all."""
READ_S: Final = 0.0003
READ_BYTES_A_SECOND: Final = 20e6
BEHIND_S: Final = 2.0
"""What a scheduler may take to read an event, and how far a rush may leave it behind: as a loaded one in Python was."""
DELIVERED_S: Final = 60.0
"""Twice what keepalive (20 s, then 10 s for the answer) needs to notice a broken connection."""
_OVERHEAD_BYTES: Final = 256
"""What a waiting message costs beyond its bytes; counted, so that tiny results don't pile up."""


class Keeper(Protocol):
    """Has results for the supervisor after this one, in case this one dies."""

    def keep(self, message: bytes | LargeResult) -> int:
        """Take a result; returns the ticket by which it is named later."""
        ...

    def forget(self, ticket: int) -> None:
        """It has arrived."""


class _NoKeeper:
    """Without WORKER_OUTBOX_DIR."""

    def keep(self, message: bytes | LargeResult) -> int:  # noqa: ARG002  (the protocol's)
        return 0

    def forget(self, ticket: int) -> None:
        pass


class _Answer(NamedTuple):
    """A result, or what answers a command."""

    data: bytes | LargeResult
    size: int
    ticket: int | None
    """The keeper's; None: not a result, so it is not sent again."""
    key: int = 0
    """Of the run; 0: of none that this supervisor started."""

    @property
    def cost(self) -> int:
        """What it counts for while it waits."""
        return self.size + _OVERHEAD_BYTES


class _RunQueue:
    """The events of one run that wait, and its result behind them."""

    __slots__ = ("credit", "items", "key", "queued", "result", "transient")

    def __init__(self, key: int) -> None:
        self.key = key
        self.items: deque[tuple[_Message, int]] = deque()
        self.result: _Answer | None = None
        self.credit = 0
        self.queued = False
        """Whether it has its place in the turns."""
        self.transient = False
        """Whether what waits in it goes with the stream."""

    def put_first(self, events: Sequence[_Message]) -> None:
        """These go again; their credit was given when they went out before."""
        self.items.extendleft((data, 0) for data in reversed(events))


class _Taken(NamedTuple):
    data: _Message
    queue: _RunQueue | None
    weight: int
    answer: _Answer | None
    """None: an event."""


def _fits(size: int, room: int, taken: Sequence[_Taken]) -> bool:
    """A heartbeat waits until a batch is out, so what is larger than a batch goes alone."""
    return size <= room or not taken


def _split(taken: list[_Taken], count: int) -> tuple[list[_Taken], list[_Taken]]:
    """What the first `count` messages are of, and the others."""
    for number, item in enumerate(taken):
        own = count_of((item.data,))
        if own > count:
            gone, left = taken[:number], taken[number:]
            if count and isinstance(item.data, Joined):
                first, others = item.data.cut(count)
                # All of its credit comes when the others have gone too.
                gone.append(item._replace(data=first, weight=0))
                left[0] = item._replace(data=others)
            return gone, left
        count -= own
    return taken, []


def _event(sent: Sent) -> _Message:
    """As it was when it was put."""
    return Joined(sent.data, sent.ticket) if sent.ticket and isinstance(sent.data, bytes) else sent.data


class Outbox:
    """See the module. `credit(key, size)` is called as a run's events go out; `call_soon` is the event loop's."""

    def __init__(
        self,
        credit: Callable[[int, int], None],
        clock: Callable[[], float],
        backlog: Backlog | None = None,
        keeper: Keeper | None = None,
        call_soon: Callable[[Callable[[], None]], object] = lambda call: call(),
    ) -> None:
        self._credit = credit
        self._clock = clock
        self._backlog = backlog or Backlog(clock)
        self._keeper = keeper or _NoKeeper()
        self._urgent: deque[_Answer] = deque()
        self._queues: dict[int, _RunQueue] = {}
        self._turns: deque[_RunQueue] = deque()
        self._taken: list[_Taken] = []
        self._places = 0
        """How many messages the batch may still get."""
        self._taken_at = 0.0
        self._retained = Retention(DELIVERED_BYTES, press=True)
        self._events = Retention(EVENTS_BYTES)
        """Events that went out, for the case that they were not read; each with the time by which it will have been."""
        self._read_at = -math.inf
        """The last one's."""
        self._event_turns = Turns(call_soon, clock)
        self._again: deque[Pack] = deque()
        """Results that go out once more, before all others."""
        self._unpacked: deque[_Answer] = deque()
        """Those of the pack whose turn it is."""
        self._just_closed = 0
        """How many packs at the head of `_again` went out on the stream that was closed last."""
        self._oversize = Oversize()
        self._position = 0
        """Bytes that went out, on all streams together."""
        self._was_unread = False
        """The last batch was stuck when its stream ended."""
        self._refused: _Answer | None = None
        """What the last stream was being given when it ended."""
        self._wake = asyncio.Event()
        self._handed_over = asyncio.Event()

    # -- producers ----------------------------------------------------------------------------

    def put_event(self, key: int, message: _Message, weight: int, *, transient: bool = False) -> None:
        """Queue an event of run `key`, several joined, or a frame of a session; `weight` is its part of the window."""
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = _RunQueue(key)
        queue.transient = transient
        queue.items.append((message, weight))
        self._queue_turn(queue)
        self._wake.set()

    def put_result(self, key: int, message: bytes | LargeResult) -> None:
        """Queue the result of run `key`: the last that is ever put for this key."""
        self._put_last(key, _Answer(message, len(message), self._keeper.keep(message), key))

    def put_close(self, key: int, message: bytes) -> None:
        """Queue the close of session `key`, the last that is ever put for it. It is not sent twice."""
        self._put_last(key, _Answer(message, len(message), None))

    def _put_last(self, key: int, result: _Answer) -> None:
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
        result = _Answer(message, len(message), ticket)
        self._waits(result)
        self._urgent.append(result)

    def put_control(self, message: bytes) -> None:
        """Queue an answer that belongs to no run."""
        answer = _Answer(message, len(message), None)
        self._waits(answer)
        self._urgent.append(answer)

    @property
    def depth(self) -> int:
        """Messages that wait, including those being handed over."""
        waiting = sum(
            count_of(message for message, _ in queue.items) + (queue.result is not None) for queue in self._turns
        )
        again = sum(map(len, self._again)) + len(self._unpacked)
        return again + len(self._urgent) + waiting + count_of(item.data for item in self._taken)

    # -- the session --------------------------------------------------------------------------

    async def take(self) -> Sequence[_Message]:
        """The next batch; waits until there is one. A batch that `accepted` did not follow is taken again."""
        if self._taken:
            self.accepted(0)
        while not self._has_waiting:
            self._wake.clear()
            await self._wake.wait()
        self._just_closed = 0
        self._taken_at = self._clock()
        room = BATCH_BYTES
        taken = self._taken
        self._places = BATCH_MESSAGES
        while self._places > 0:
            answers = self._answers()
            if not answers or not _fits(answers[0].size, room, taken):
                break
            taken.append(self._take(answers.popleft(), None))
            room -= len(taken[-1].data)
        while self._turns and room > 0 and self._places > 0:
            queue = self._turns.popleft()
            queue.queued = False
            room -= self._take_turn(queue, room)
        return [item.data for item in taken]

    async def flushed(self) -> None:
        """Wait until everything that was put is handed over."""
        while self._taken or self._has_waiting:
            self._handed_over.clear()
            await self._handed_over.wait()

    def accepted(self, count: int, unread_bytes: int = 0) -> None:
        """The first `count` messages of the last batch went out, each joined one counted; the rest is queued again.

        Of what went out on this stream `unread_bytes` may be unread, as far as its transport can tell.
        """
        taken, self._taken = self._taken, []
        self._retained.limit_bytes = max(self._retained.limit_bytes, min(2 * unread_bytes, DELIVERED_BYTES_MAX))
        now = self._clock()
        gone, left = _split(taken, count)
        if left:
            # A short wait says nothing while nothing has gone out since a long one.
            self._was_unread = now - self._taken_at >= UNREAD_S or (self._was_unread and not gone)
            self._refused = left[0].answer
        for item in gone:
            self._went_out(item, now)
        for item in reversed(left):
            self._put_back(item)
        self._settle(taken)
        self.forget_delivered()
        self._handed_over.set()

    def stream_opened(self) -> None:
        """A new stream stands; what must go again was queued when the last one closed."""
        self._was_unread, self._refused, self._read_at = False, None, -math.inf
        self._retained.limit_bytes = DELIVERED_BYTES

    def stream_closed(self, status: StreamStatus | None = None, unread: Unread | None = None) -> None:
        """What the stream may have swallowed is sent again, before anything newer: results, and unread events.

        `status` says how it ended, if it was not by us. Without `unread` only a batch that was stuck tells of it.
        """
        if self._taken:
            self.accepted(0)
        self._drop_transient()
        self.forget_delivered()
        self._urgent.extendleft(reversed(self._unpacked))
        self._unpacked.clear()
        results, events = self._retained.take_all(), self._events.take_all()
        if status is not None and refuses_size(status):
            self._note_refusal(status, results)
        unread = unread or Unread(math.inf)
        if unread.noticed_at < math.inf:
            unread = replace(unread, since=min(unread.since, self._event_turns.unseen_since(unread.noticed_at)))
        if self._was_unread or (status is not None and status.silent):
            unread = replace(unread, saturated=True)
        results = self._send_events_again(self._of(events, unread), results)
        self._again.extendleft(reversed(results))
        self._just_closed = len(results)
        for pack in results:
            self._backlog.answer_waits(pack.size)
        if self._again:
            self._wake.set()

    def stream_read_to_end(self) -> None:
        """The scheduler has read all of the stream that was closed last: nothing of it needs to go again."""
        for _ in range(self._just_closed):
            pack = self._again.popleft()
            self._backlog.answer_left(pack.size)
            self._forget(pack)
        self._just_closed = 0

    def forget_delivered(self) -> None:
        """Let go of what is known to have arrived by now.

        Time proves nothing while a batch is stuck, nor when the stream ended then: a scheduler's library answers pings
        that its program never sees.
        """
        before = None if self._taken or self._was_unread else self._clock() - DELIVERED_S
        for pack in self._retained.arrived(self._position, before):
            self._forget(pack)
        for _ in self._events.arrived(self._position, before):
            pass

    # -- inside -------------------------------------------------------------------------------

    @property
    def _has_waiting(self) -> bool:
        """Whether there is anything to take."""
        return bool(self._urgent or self._turns or self._again or self._unpacked)

    def _waits(self, answer: _Answer) -> None:
        self._backlog.answer_waits(answer.cost)
        self._wake.set()

    def _went_out(self, item: _Taken, now: float) -> None:
        data, queue, answer = item.data, item.queue, item.answer
        self._position += wire_size(data)
        if answer is not None:
            self._backlog.answer_left(answer.cost)
            if answer.ticket is not None and not isinstance(data, Joined):  # no result is joined
                self._retained.add(answer.key, answer.ticket, data, self._position, now)
        elif queue is not None:
            if not queue.transient:
                joined, data = (data.count, data.data) if isinstance(data, Joined) else (0, data)
                read_s = READ_S * (joined or 1) + len(data) / READ_BYTES_A_SECOND
                # grpcio says that a message went out a little later than it did: the scheduler may have acted on it.
                sent_at = self._taken_at if now - self._taken_at < RUSH_S else now
                self._event_turns.sent(sent_at)
                self._read_at = min(max(sent_at, self._read_at + read_s), now + BEHIND_S)
                self._events.add(queue.key, joined, data, self._position, self._read_at)
            queue.credit += item.weight

    def _note_refusal(self, status: StreamStatus, results: Sequence[Pack]) -> None:
        """It may have ended since a result was too large: one that went out on it, or was about to."""
        named = [(Name(sent.key, sent.ticket), len(sent.data)) for sent in messages(results)]
        last = self._refused
        if last is not None and last.ticket is not None:
            named.append((Name(last.key, last.ticket), len(last.data)))
        self._oversize.refused(status, named)

    def _forget(self, pack: Pack) -> None:
        pack.release()
        for ticket in pack.kept():
            self._keeper.forget(ticket)

    def _answers(self) -> deque[_Answer]:
        """What goes first: results that go again, a pack at a time, then what is urgent."""
        if not self._unpacked and self._again:
            pack = self._again.popleft()
            self._backlog.answer_left(pack.size)
            self._unpacked.extend(_Answer(data, len(data), ticket, key) for key, ticket, data in pack)
            for answer in self._unpacked:
                self._backlog.answer_waits(answer.cost)
        return self._unpacked or self._urgent

    def _of(self, events: Sequence[Pack], unread: Unread) -> list[Pack]:
        """Those that are unread."""
        since = -math.inf if unread.saturated else unread.since
        position = 0 if unread.size is None else max(0, self._position - unread.size)
        return list(takewhile(len, (pack.after(position, since) for pack in reversed(events))))[::-1]

    def _send_events_again(self, events: Sequence[Pack], results: Sequence[Pack]) -> list[Pack]:
        """Queue events once more, and behind them the results of their runs. Returns the results that are left.

        A run whose result has arrived is over, and so are its events.
        """
        by_run: dict[int, list[_Message]] = {}
        for sent in messages(events):
            by_run.setdefault(sent.key, []).append(_event(sent))
        ends = {sent.key: sent for sent in messages(results) if sent.key in by_run}
        ends_waiting = {answer.key: answer for answer in self._urgent if answer.key in by_run}
        queues = {queue.key: queue for queue in (*self._turns, *self._queues.values())}
        again = 0
        for key, items in by_run.items():
            queue = queues.get(key)
            if queue is None and key not in ends and key not in ends_waiting:
                continue
            queue = queue or _RunQueue(key)
            queue.put_first(items)
            again += count_of(items)
            if (end := ends.get(key)) is not None:
                queue.result = _Answer(end.data, len(end.data), end.ticket, key)
                self._waits(queue.result)
            elif key in ends_waiting:
                queue.result = ends_waiting[key]
            self._queue_turn(queue)
        if ends_waiting:
            self._urgent = deque(answer for answer in self._urgent if answer.key not in ends_waiting)
        if again:
            log.info("%d events that may not have been read are sent again; some may come twice", again)
            self._wake.set()
        return [left for pack in results if len(left := pack.without(ends.__contains__))] if ends else list(results)

    def _take(self, answer: _Answer, queue: _RunQueue | None) -> _Taken:
        """For a batch. A result that no scheduler takes is a failure from here on."""
        data = answer.data
        if answer.ticket is not None and self._oversize.has_replacements:
            failure = self._oversize.replacement(Name(answer.key, answer.ticket), data)
            if failure is not None:
                self._backlog.answer_left(answer.cost)
                self._keeper.forget(answer.ticket)
                if not isinstance(data, bytes):
                    data.release()
                data, answer = failure, _Answer(failure, len(failure), self._keeper.keep(failure), answer.key)
                self._backlog.answer_waits(answer.cost)
        self._places -= 1
        return _Taken(data, queue, 0, answer)

    def _take_turn(self, queue: _RunQueue, room: int) -> int:
        used, allowance = 0, min(room, TURN_BYTES)
        while queue.items and used < allowance and self._places > 0:
            data, weight = queue.items.popleft()
            self._taken.append(_Taken(data, queue, weight, None))
            self._places -= data.count if isinstance(data, Joined) else 1
            used += len(data)
        result_is_next = queue.result is not None and not queue.items and self._places > 0
        if queue.result is not None and result_is_next and _fits(queue.result.size, room - used, self._taken):
            self._taken.append(self._take(queue.result, queue))
            used += len(self._taken[-1].data)
            queue.result = None
        self._queue_turn(queue)
        return used

    def _queue_turn(self, queue: _RunQueue) -> None:
        """Give a queue its place in the turns when events wait in it, once."""
        if queue.items and not queue.queued:
            queue.queued = True
            self._turns.append(queue)

    def _drop_transient(self) -> None:
        """Frames of sessions that end with their stream; a close that waits behind some stays."""
        for queue in [queue for queue in self._turns if queue.transient]:
            queue.items.clear()
            queue.queued = False
            self._turns.remove(queue)
            if queue.result is not None:
                self._urgent.append(queue.result)
                queue.result = None

    def _put_back(self, item: _Taken) -> None:
        if item.answer is None:
            if item.queue is not None:
                item.queue.items.appendleft((item.data, item.weight))
        elif item.queue is None:
            (self._unpacked or self._urgent).appendleft(item.answer)
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
