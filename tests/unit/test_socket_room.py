"""How long the stream may be held up for slow handlers, on a clock of the test's."""

from __future__ import annotations

from typing import Any

import pytest

from gen_worker.wire import worker_scheduler_pb2 as pb
from supervisor.runs import RunState
from supervisor.socket_room import HOLD_S, LATE_BYTES, QUEUE_BYTES, QUEUES_BYTES, STALE_S, SocketRoom
from supervisor.socket_session import SLOW_CONSUMER, SocketSession, WaitingFrame

MIB = 1024 * 1024


class Place:
    """A room, its clock, and sessions that an executor has."""

    def __init__(self) -> None:
        self.now = 100.0
        self.closed: list[str] = []
        self.room = SocketRoom(lambda: self.now, self._too_slow)

    def _too_slow(self, session: SocketSession, detail: str) -> None:
        session.reason = SLOW_CONSUMER
        self.closed.append(session.run_id)
        self.room.drop_waiting(session)

    def session(self, name: str = "s") -> SocketSession:
        session = SocketSession(1, pb.RealtimeOpenCommand(session_id=name), "talk", (), 0.0)
        session.state = RunState.RUNNING
        session.window = 1
        return session

    def fill(self, session: SocketSession, size: int, frame: int = MIB) -> None:
        while session.waiting_bytes <= size:
            self.room.add(session, WaitingFrame(b"x" * frame, is_text=False))

    def patience(self, session: SocketSession | None) -> Any:
        return self.room._patience(session)


@pytest.fixture
async def place() -> Place:
    return Place()


async def test_a_handler_that_takes_nothing_has_little_time(place: Place) -> None:
    session = place.session()
    place.fill(session, QUEUE_BYTES)
    assert place.room.full
    assert place.patience(session) == pytest.approx(STALE_S)
    place.now += STALE_S
    await place.room.room()
    assert place.closed == ["s"]
    assert not place.room.full


async def test_one_that_gets_on_has_more(place: Place) -> None:
    session = place.session()
    place.fill(session, QUEUE_BYTES)
    began = place.now
    while place.now < began + HOLD_S - 2 * STALE_S:
        place.now += STALE_S * 0.8
        place.room.took(session, 1)
        assert place.patience(session) == pytest.approx(STALE_S)
    place.now = began + HOLD_S - 0.1
    place.room.took(session, 1)
    assert place.patience(session) == pytest.approx(0.1)


async def test_together_they_have_the_same_time(place: Place) -> None:
    sessions = [place.session(f"s{number}") for number in range(5)]
    for session in sessions:
        place.fill(session, QUEUES_BYTES // 5)
    assert place.room.full
    assert place.patience(None) == pytest.approx(STALE_S)
    place.now += STALE_S / 2
    place.room.took(sessions[0], 1)
    assert place.patience(None) == pytest.approx(STALE_S)
    place.now += STALE_S
    await place.room.room()
    assert place.closed
    assert not place.room.full


async def test_nobody_is_closed_for_one_large_frame_and_the_wait_goes_on(place: Place) -> None:
    sessions = [place.session(name) for name in "ab"]
    for session in sessions:
        place.fill(session, 0, QUEUES_BYTES)
    place.now += HOLD_S
    place.room._lose_patience(None)
    assert place.closed == []
    assert place.room.full
    assert place.patience(None) > 0


async def test_the_bounds_fit_together() -> None:
    assert QUEUE_BYTES + LATE_BYTES <= QUEUES_BYTES
