"""Realtime sessions in the supervisor: placed as runs are, in order, bounded, and closed once, whatever happens."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gen_worker.pipe.arena import BLOB_THRESHOLD_BYTES, ArenaWriter, create_arena
from gen_worker.pipe.frames import FRAME_CAP_BYTES
from gen_worker.pipe.messages import (
    EVENT_OVERHEAD_BYTES,
    Blob,
    Cancel,
    Event,
    Failure,
    Free,
    ModelLoaded,
    Result,
    SocketClose,
    SocketCredit,
    SocketFrame,
    SocketOpen,
)
from gen_worker.wire import worker_scheduler_pb2 as pb
from supervisor import executor_handle, socket_room, sockets
from supervisor.dispatcher import WINDOW_BYTES, Limits
from supervisor.socket_room import LATE_BYTES, QUEUE_BYTES, QUEUES_BYTES, RESUMED_BYTES
from tests.support.rig import Executor, Rig, function, until, use_recording_children

A, B = "cozy:org/a:latest", "cozy:org/b:latest"
TALK = function("talk", "websocket")
MIB = 1024 * 1024
MakeRig = Callable[..., "Room"]


class Room(Rig):
    """A rig whose scheduler opens sessions and reads what they get."""

    def open(self, session_id: str = "s", name: str = "talk", **fields: Any) -> None:
        self.dispatcher.sockets.open(pb.RealtimeOpenCommand(session_id=session_id, function_name=name, **fields))

    def send(self, session_id: str, *frames: bytes, is_text: bool = False) -> None:
        for data in frames:
            self.dispatcher.sockets.take_frame(pb.RealtimeFrame(session_id=session_id, data=data, is_text=is_text))

    def close_session(self, session_id: str = "s") -> None:
        self.dispatcher.sockets.close(pb.RealtimeCloseCommand(session_id=session_id, reason="bye"))

    def heard(self) -> list[tuple[str, Any]]:
        """What the scheduler got since the last call: frames by session, closes by session, other messages by kind."""
        heard: list[tuple[str, Any]] = []
        for message in self.messages():
            kind = str(message.WhichOneof("msg"))
            if kind == "realtime_frame":
                heard.append((message.realtime_frame.session_id, message.realtime_frame.data))
            elif kind == "realtime_close_cmd":
                heard.append((message.realtime_close_cmd.session_id, message.realtime_close_cmd.reason))
            else:
                heard.append((kind, message))
        return heard


def key_of(executor: Executor, session_id: str = "s") -> int:
    return next(int(each.key) for each in reversed(executor.sent(SocketOpen)) if each.session_id == session_id)


def frames(executor: Executor, session_id: str = "s") -> list[bytes]:
    key = key_of(executor, session_id)
    return [bytes(each.data) for each in executor.sent(SocketFrame) if each.key == key]


def end(executor: Executor, session_id: str = "s", reason: str = "completed") -> None:
    """Its handler ends."""
    key = key_of(executor, session_id)
    executor.say(SocketClose(key, reason))
    failure = None if reason == "completed" else Failure("internal", "internal error", reason)
    executor.say(Result(key, failure=failure))


@pytest.fixture
async def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    use_recording_children(monkeypatch.setattr)
    rigs: list[Room] = []

    def make_rig(*args: Any, **kwargs: Any) -> Room:
        rigs.append(Room(*(args or ([TALK],)), **kwargs))
        return rigs[-1]

    yield make_rig
    for rig in rigs:
        rig.close()
        assert rig.dispatcher.backlog._runs_bytes == 0
        assert rig.dispatcher.sockets.room.waiting_bytes == 0


# -- a session's life -----------------------------------------------------------------------------


async def test_frames_go_both_ways_and_the_handlers_end_closes(make: MakeRig) -> None:
    rig = make()
    rig.open(tenant_id="t", user_id="u")
    (executor,) = rig.executors
    (opened,) = executor.sent(SocketOpen)
    assert (opened.session_id, opened.function, opened.models, opened.timeout_ms) == ("s", "talk", {}, 0)
    assert (opened.deadline, opened.tenant_id, opened.user_id) == (0.0, "t", "u")
    assert opened.window == WINDOW_BYTES
    rig.send("s", b"hello", is_text=True)
    rig.send("s", b"\x00")
    assert executor.sent(SocketFrame) == [SocketFrame(opened.key, b"hello", True), SocketFrame(opened.key, b"\x00")]
    executor.say(SocketFrame(opened.key, b"answer", True))
    executor.say(Event(opened.key, "job.log", b"{}"))
    (frame, event) = rig.messages()
    assert frame.realtime_frame == pb.RealtimeFrame(session_id="s", data=b"answer", is_text=True)
    assert event.worker_event == pb.WorkerEvent(run_id="s", event_type="job.log", payload_json=b"{}")
    assert rig.dispatcher.active == executor.handle.load == 1
    end(executor)
    assert rig.heard() == [("s", "completed")]
    assert rig.dispatcher.active == executor.handle.load == 0


async def test_the_close_follows_the_last_frame(make: MakeRig) -> None:
    rig = make()
    rig.open()
    (executor,) = rig.executors
    for number in range(3):
        executor.say(SocketFrame(key_of(executor), b"%d" % number))
    end(executor)
    executor.say(SocketFrame(key_of(executor), b"after the end"))
    assert rig.heard() == [("s", b"0"), ("s", b"1"), ("s", b"2"), ("s", "completed")]


async def test_a_failing_handler(make: MakeRig) -> None:
    rig = make()
    rig.open()
    end(rig.executors[0], reason="error:KeyError")
    assert rig.heard() == [("s", "error:KeyError")]


async def test_a_handler_that_closes_may_end_in_its_own_time(make: MakeRig) -> None:
    rig = make(limits=Limits(0, 1, 0.01, 0))
    rig.open()
    (executor,) = rig.executors
    executor.say(SocketClose(key_of(executor), "closed"))
    assert rig.heard() == [("s", "closed")]
    rig.send("s", b"late")
    executor.say(SocketFrame(key_of(executor), b"late"))
    executor.say(Event(key_of(executor), "job.log", b"{}"))
    await asyncio.sleep(0.05)
    assert executor.sent(Cancel) == []
    assert frames(executor) == []
    assert rig.dispatcher.active == 1
    executor.say(Result(key_of(executor)))
    assert rig.heard() == []
    assert rig.dispatcher.active == 0


@pytest.mark.parametrize("reason", ["slow_consumer", "frame_too_large"])
async def test_a_handler_that_broke_a_bound_is_canceled_after_the_grace(make: MakeRig, reason: str) -> None:
    rig = make(limits=Limits(0, 1, 0.02, 0))
    rig.open()
    (executor,) = rig.executors
    executor.say(SocketClose(key_of(executor), reason))
    assert rig.heard() == [("s", reason)]
    await until(lambda: bool(executor.sent(Cancel)))
    end(executor)
    assert rig.heard() == []


async def test_a_reason_is_cut(make: MakeRig) -> None:
    rig = make()
    rig.open()
    end(rig.executors[0], reason="error:" + "X" * 10_000)
    ((_, reason),) = rig.heard()
    assert reason == "error:" + "X" * 194


async def test_a_close_of_the_scheduler_comes_after_its_frames(make: MakeRig) -> None:
    rig = make()
    rig.open()
    (executor,) = rig.executors
    rig.send("s", *[b"x" * 60_000] * 10)
    assert len(frames(executor)) < 10  # a window's worth
    rig.close_session()
    rig.send("s", b"late")
    rig.close_session()
    key = key_of(executor)
    assert executor.child.sent[-1] == SocketClose(key, "closed")
    assert len(frames(executor)) == 10
    executor.say(SocketFrame(key, b"to nobody"))
    assert rig.heard() == []
    end(executor, reason="error:CanceledError")
    assert rig.heard() == [("s", "closed")]
    assert executor.sent(SocketClose) == [SocketClose(key, "closed")]


async def test_a_handler_that_outlives_the_close_is_canceled_then_killed(make: MakeRig) -> None:
    rig = make(limits=Limits(0, 1, 0.02, 0))
    rig.open()
    rig.open("other")
    (executor,) = rig.executors
    rig.close_session()
    assert executor.sent(Cancel) == []
    await until(lambda: bool(executor.sent(Cancel)))
    assert executor.sent(Cancel) == [Cancel(key_of(executor), "canceled")]
    await until(lambda: bool(executor.child.killed))
    assert rig.heard() == [("s", "closed")]
    executor.die()
    assert rig.heard() == [("other", "worker_crashed")]


async def test_a_timeout_cancels_at_once(make: MakeRig) -> None:
    rig = make()
    rig.open(timeout_ms=20)
    (executor,) = rig.executors
    (opened,) = executor.sent(SocketOpen)
    assert opened.timeout_ms == 20
    assert opened.deadline > 0
    await until(lambda: bool(executor.sent(Cancel)))
    assert executor.sent(Cancel) == [Cancel(opened.key, "timeout")]
    assert rig.heard() == []
    end(executor, reason="error:CancelledError")
    assert rig.heard() == [("s", "timeout")]
    assert executor.child.killed == []


async def test_a_timeout_that_nothing_answers_kills(make: MakeRig) -> None:
    rig = make(limits=Limits(0, 1, 0.02, 0))
    rig.open(timeout_ms=20)
    (executor,) = rig.executors
    await until(lambda: bool(executor.child.killed))
    assert rig.heard() == [("s", "timeout")]


async def test_a_deadline_holds_for_a_handler_that_has_closed(make: MakeRig) -> None:
    rig = make(limits=Limits(0, 1, 0.02, 0))
    rig.open(timeout_ms=30)
    (executor,) = rig.executors
    executor.say(SocketClose(key_of(executor), "closed"))
    await until(lambda: bool(executor.child.killed))
    assert rig.heard() == [("s", "closed")]


async def test_a_crash(make: MakeRig) -> None:
    rig = make(executors=2)
    for session in "abc":
        rig.open(session)
    first, second = rig.executors
    first.say(SocketFrame(key_of(first, "a"), b"last words"))
    first.die()
    heard = rig.heard()
    assert [what for session, what in heard if session == "a"] == [b"last words", "worker_crashed"]
    assert [what for session, what in heard if session != "a"] == ["worker_crashed"]
    rig.send("b", b"on")
    assert frames(second, "b") == [b"on"]


async def test_a_session_id_may_be_used_again(make: MakeRig, caplog: pytest.LogCaptureFixture) -> None:
    rig = make()
    rig.open()
    rig.open()
    assert "session s is open already" in caplog.text
    (executor,) = rig.executors
    assert len(executor.sent(SocketOpen)) == 1
    old = key_of(executor)
    end(executor)
    rig.open()
    executor.say(SocketFrame(old, b"of the first"))
    executor.say(SocketFrame(key_of(executor), b"of the second"))
    assert rig.heard() == [("s", "completed"), ("s", b"of the second")]


async def test_a_session_id_may_be_used_again_while_the_old_handler_ends(make: MakeRig) -> None:
    rig = make()
    rig.open()
    (executor,) = rig.executors
    old = key_of(executor)
    executor.say(SocketFrame(old, b"of the old stream"))
    rig.dispatcher.outbox.stream_closed()
    rig.dispatcher.sockets.stream_closed()
    rig.open()
    assert rig.dispatcher.active == 2
    rig.send("s", b"for the second")
    executor.say(SocketFrame(old, b"of the first"))
    executor.say(SocketFrame(key_of(executor), b"of the second"))
    executor.say(Result(old))
    assert rig.heard() == [("s", "closed"), ("s", b"of the second")]
    assert frames(executor) == [b"for the second"]
    end(executor)
    assert rig.heard() == [("s", "completed")]


# -- placement ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"name": "nobody"}, "unknown_function"),
        ({"name": "run"}, "unknown_function"),
        ({"name": "model", "required_models": ["cozy:org/no"]}, "error:ValidationError"),
        ({"session_id": ""}, "error:ValidationError"),
        ({"tenant_id": "t" * (FRAME_CAP_BYTES + 1)}, "error:ValidationError"),
    ],
    ids=["unknown", "no handler", "model", "no id", "too large"],
)
async def test_refused(make: MakeRig, fields: dict[str, Any], reason: str) -> None:
    rig = make([TALK, function("run"), function("model", "websocket", models=["a"])], models=[A], labels={"a": A})
    rig.open(**fields)
    assert [close for _, close in rig.heard()] == [reason]
    assert rig.dispatcher.active == 0
    assert rig.executors[0].handle.load == 0
    rig.send(fields.get("session_id", "s"), b"dropped in silence")


async def test_a_handler_is_not_run_as_a_function(make: MakeRig) -> None:
    rig = make()
    rig.submit("r", "talk")
    result = rig.results()["r"]
    assert (result.error_type, result.safe_message) == ("validation", "unknown function")
    assert "websocket handler" in result.error_message


async def test_the_workers_limit_counts_runs_and_sessions(make: MakeRig) -> None:
    rig = make([TALK, function("f", "async")], limits=Limits(2, 1, 5.0, 0))
    rig.open("a")
    rig.submit("r1")
    rig.open("b")
    rig.submit("r2")
    assert [text for _, text in rig.heard() if isinstance(text, str)] == ["error:RetryableError"]
    end(rig.executors[0], "a")
    rig.open("c")
    assert [close for _, close in rig.heard()] == ["completed"]


async def test_function_limits_make_a_session_wait_in_order(make: MakeRig) -> None:
    rig = make([function("talk", "websocket", limit=1)])
    (executor,) = rig.executors
    for session in "abc":
        rig.open(session)
        rig.send(session, b"1", b"2")
    assert [each.session_id for each in executor.sent(SocketOpen)] == ["a"]
    rig.close_session("b")  # while it waits
    end(executor, "a")
    assert [each.session_id for each in executor.sent(SocketOpen)] == ["a", "c"]
    assert frames(executor, "c") == [b"1", b"2"]
    assert rig.heard() == [("b", "closed"), ("a", "completed")]


async def test_a_suspect_does_not_wait_for_a_session_to_end(make: MakeRig) -> None:
    rig = make([TALK, function("f", "async")])
    for attempt in range(2):
        rig.submit(f"bad{attempt}", "f", b"\x01")
        rig.executors[-1].die()
        rig.add_executor()
    executor = rig.executors[-1]
    rig.open("beside")
    rig.submit("suspect", "f", b"\x01")
    assert executor.runs == ["suspect"]
    rig.open("waits")
    assert [each.session_id for each in executor.sent(SocketOpen)] == ["beside"]
    executor.succeed("suspect")
    assert [each.session_id for each in executor.sent(SocketOpen)] == ["beside", "waits"]


async def test_models_are_loaded_before_it_opens(make: MakeRig) -> None:
    rig = make([function("talk", "websocket", models=["a"])], models=[A, B], labels={"a": A})
    (executor,) = rig.executors
    rig.open(required_models=[B])
    rig.send("s", b"early")
    assert executor.sent(SocketOpen) == []
    executor.load_done(B)
    (opened,) = executor.sent(SocketOpen)
    assert opened.models == {"p0": B}
    assert frames(executor) == [b"early"]
    assert rig.residency.ledger(executor.handle).is_pinned(B)
    end(executor)
    assert not rig.residency.ledger(executor.handle).is_pinned(B)


@pytest.mark.parametrize("crash", [False, True])
async def test_a_model_that_can_not_be_loaded(make: MakeRig, crash: bool) -> None:
    rig = make([function("talk", "websocket", models=["a"])], models=[A], labels={"a": A})
    rig.open()
    (executor,) = rig.executors
    if crash:
        executor.die()
    else:
        executor.say(ModelLoaded(A, "t.T", 0, 0.1, Failure("resource", "out of memory", "too big")))
    assert rig.heard() == [("s", "worker_crashed" if crash else "error:ResourceError")]
    assert rig.dispatcher.active == 0


async def test_a_timeout_while_it_waits(make: MakeRig) -> None:
    rig = make(ready=False)
    rig.dispatcher.functions["talk"] = TALK
    rig.open(timeout_ms=10)
    await until(lambda: not rig.dispatcher.active)
    assert rig.heard() == [("s", "timeout")]


async def test_drain(make: MakeRig) -> None:
    rig = make([function("talk", "websocket", limit=1)])
    (executor,) = rig.executors
    rig.open("open")
    rig.open("waits")
    rig.dispatcher.drain()
    assert rig.heard() == [("waits", "error:RetryableError")]
    rig.open("late")
    assert rig.heard() == [("late", "error:RetryableError")]
    waiting = asyncio.create_task(rig.dispatcher.wait_idle(10))
    executor.say(SocketFrame(key_of(executor, "open"), b"still served"))
    await asyncio.sleep(0)
    assert not waiting.done()
    end(executor, "open")
    assert await waiting
    assert rig.heard() == [("open", b"still served"), ("open", "completed")]


async def test_close_all_tells_both_ends(make: MakeRig) -> None:
    rig = make()
    rig.open("a")
    rig.open("b")
    (executor,) = rig.executors
    rig.dispatcher.sockets.close_all("the worker shuts down")
    assert rig.heard() == [("a", "closed"), ("b", "closed")]
    assert [each.reason for each in executor.sent(SocketClose)] == ["closed", "closed"]
    end(executor, "a")
    assert not await rig.dispatcher.wait_sockets(0.01)
    rig.dispatcher.abandon("the worker was shut down")
    assert await rig.dispatcher.wait_sockets(0)
    assert rig.heard() == []
    assert executor.handle.load == 0


# -- the stream -----------------------------------------------------------------------------------


async def test_sessions_end_with_their_stream(make: MakeRig) -> None:
    rig = make([function("talk", "websocket", limit=3)])
    (executor,) = rig.executors
    for session in ("open", "ended", "told", "waits"):
        rig.open(session)
    executor.say(SocketFrame(key_of(executor, "open"), b"of the old stream"))
    executor.say(SocketFrame(key_of(executor, "told"), b"of the old stream"))
    executor.say(SocketClose(key_of(executor, "told"), "closed"))
    end(executor, "ended")
    rig.dispatcher.outbox.stream_closed()
    rig.dispatcher.sockets.stream_closed()
    assert sorted(rig.heard()) == [
        ("ended", "completed"), ("open", "closed"), ("told", "closed"), ("waits", "closed"),
    ]  # fmt: skip
    assert SocketClose(key_of(executor, "open"), "closed") in executor.child.sent
    executor.say(SocketFrame(key_of(executor, "open"), b"of the old stream"))
    end(executor, "open")
    assert rig.heard() == []


# -- bounds ---------------------------------------------------------------------------------------


async def test_an_executor_gets_a_window_and_more_as_it_takes(make: MakeRig) -> None:
    rig = make()
    rig.open()
    (executor,) = rig.executors
    sent = [bytes([number]) * 50_000 for number in range(20)]
    rig.send("s", *sent)
    taken = 0
    while len(frames(executor)) < 20:
        here = len(frames(executor))
        assert 50_000 * (here - taken) < WINDOW_BYTES + 50_000
        executor.say(SocketCredit(key_of(executor), (50_000 + EVENT_OVERHEAD_BYTES) * (here - taken)))
        taken = here
    assert frames(executor) == sent


async def flood(rig: Room, frame: bytes, session_id: str = "s") -> int:
    """Send as the session with the scheduler does, until no more is read; how many."""
    sent = 0
    while not rig.dispatcher.sockets.room.full:
        rig.send(session_id, frame)
        sent += 1
    return sent


async def test_a_handler_that_takes_nothing_is_closed(make: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_room, "STALE_S", 0.02)
    rig = make(limits=Limits(0, 1, 0.02, 0))
    rig.open()
    rig.open("other")
    (executor,) = rig.executors
    sent = await flood(rig, b"x" * 100_000)
    assert QUEUE_BYTES < sent * 100_000 < QUEUE_BYTES + WINDOW_BYTES + 200_000
    assert rig.heard() == []
    await rig.dispatcher.sockets.room.room()
    assert rig.heard() == [("s", "slow_consumer")]
    assert not rig.dispatcher.sockets.room.full
    under_way = len(frames(executor))
    assert under_way * 100_000 < WINDOW_BYTES + 100_000
    rig.send("s", b"dropped")
    assert SocketClose(key_of(executor), "slow_consumer") in executor.child.sent
    await until(lambda: bool(executor.sent(Cancel)))
    end(executor, reason="error:CancelledError")
    assert rig.heard() == []
    assert len(frames(executor)) == under_way
    assert rig.dispatcher.sockets.room.waiting_bytes == 0


async def test_a_burst_makes_the_scheduler_wait_for_a_handler_that_gets_on(make: MakeRig) -> None:
    rig = make()
    rig.open()
    (executor,) = rig.executors
    await flood(rig, b"x" * 100_000)
    waiting = asyncio.create_task(rig.dispatcher.sockets.room.room())
    taken = 0
    while rig.dispatcher.sockets.room.waiting_bytes > QUEUE_BYTES - RESUMED_BYTES:
        await asyncio.sleep(0)
        assert not waiting.done()
        here = len(frames(executor))
        executor.say(SocketCredit(key_of(executor), (100_000 + EVENT_OVERHEAD_BYTES) * (here - taken)))
        taken = here
    await asyncio.wait_for(waiting, 5)
    assert rig.heard() == []
    assert not rig.dispatcher.sockets.room.full


async def test_a_handler_that_gets_on_too_slowly_is_closed(make: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_room, "HOLD_S", 0.1)
    rig = make()
    rig.open()
    (executor,) = rig.executors
    await flood(rig, b"x" * 100_000)
    waiting = asyncio.create_task(rig.dispatcher.sockets.room.room())
    while not waiting.done():
        executor.say(SocketCredit(key_of(executor), 1))
        await asyncio.sleep(0.001)
    assert rig.heard() == [("s", "slow_consumer")]


async def test_what_was_on_its_way_is_bounded_too(make: MakeRig) -> None:
    rig = make()
    rig.open()
    sent = 0
    while not (heard := rig.heard()):
        rig.send("s", b"x" * MIB)  # as one batch that the scheduler had sent
        sent += 1
    assert heard == [("s", "slow_consumer")]
    assert QUEUE_BYTES + LATE_BYTES < sent * MIB < QUEUE_BYTES + LATE_BYTES + 4 * MIB


async def test_a_session_that_ends_makes_room(make: MakeRig) -> None:
    rig = make()
    rig.open()
    await flood(rig, b"x" * 100_000)
    waiting = asyncio.create_task(rig.dispatcher.sockets.room.room())
    await asyncio.sleep(0)
    end(rig.executors[0])
    await asyncio.wait_for(waiting, 5)
    assert rig.heard() == [("s", "completed")]


async def test_tiny_frames_are_counted_too(make: MakeRig) -> None:
    rig = make()
    rig.open()
    count = (QUEUE_BYTES + WINDOW_BYTES) // EVENT_OVERHEAD_BYTES
    assert count <= await flood(rig, b"") <= count + 2


async def test_frames_that_wait_for_an_executor_are_bounded(make: MakeRig) -> None:
    rig = make([function("talk", "websocket", models=["a"])], models=[A], labels={"a": A})
    rig.open()
    rig.send("s", *[b"x" * MIB] * 20)
    assert rig.heard() == [("s", "slow_consumer")]
    assert rig.dispatcher.sockets.room.waiting_bytes == 0
    rig.executors[0].load_done(A)
    assert rig.executors[0].sent(SocketOpen) == []


def fill(rig: Room, *, until_bytes: int) -> list[str]:
    """Sessions for whose handlers so much waits, none of them too much by itself; the first one's least."""
    sessions: list[str] = []
    while rig.dispatcher.sockets.room.waiting_bytes <= until_bytes:
        sessions.append(f"s{len(sessions)}")
        rig.open(sessions[-1])
        for _ in range(10 + len(sessions)):
            rig.send(sessions[-1], b"x" * 512 * 1024)
    return sessions


async def test_all_sessions_together_are_bounded(make: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_room, "STALE_S", 0.02)
    rig = make()
    room = rig.dispatcher.sockets.room
    sessions = fill(rig, until_bytes=QUEUES_BYTES)
    assert room.full
    assert rig.heard() == []
    await room.room()
    assert not room.full
    assert room.waiting_bytes <= QUEUES_BYTES - RESUMED_BYTES
    closed = rig.heard()
    assert {reason for _, reason in closed} == {"slow_consumer"}
    assert {session for session, _ in closed} <= set(sessions[-4:])  # those for which most waits


async def test_a_burst_over_all_sessions_makes_the_scheduler_wait(make: MakeRig) -> None:
    rig = make()
    room, (executor,) = rig.dispatcher.sockets.room, rig.executors
    sessions = fill(rig, until_bytes=QUEUES_BYTES)
    waiting = asyncio.create_task(room.room())
    taken = dict.fromkeys(sessions, 0)
    while room.waiting_bytes > QUEUES_BYTES - RESUMED_BYTES:
        await asyncio.sleep(0)
        assert not waiting.done()
        for session in sessions:
            here = len(frames(executor, session))
            size = (512 * 1024 + EVENT_OVERHEAD_BYTES) * (here - taken[session])
            executor.say(SocketCredit(key_of(executor, session), size))
            taken[session] = here
    await asyncio.wait_for(waiting, 5)
    assert rig.heard() == []


async def test_all_sessions_are_bounded_by_what_was_on_its_way_too(make: MakeRig) -> None:
    rig = make()
    fill(rig, until_bytes=QUEUES_BYTES)
    assert rig.heard() == []
    most = 0
    for number in range(100):
        rig.open(f"t{number}")
        rig.send(f"t{number}", *[b"x" * 512 * 1024] * 4)
        most = max(most, rig.dispatcher.sockets.room.waiting_bytes)
    assert {reason for _, reason in rig.heard()} == {"slow_consumer"}
    assert QUEUES_BYTES + LATE_BYTES < most < QUEUES_BYTES + LATE_BYTES + 2 * MIB


async def test_large_frames_of_many_sessions_are_waited_for(make: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket_room, "STALE_S", 0.01)
    rig = make()
    (executor,) = rig.executors
    for session in "abc":
        rig.open(session)
        rig.send(session, b"x" * 300_000, b"y" * 35 * MIB)  # the first fills the window, the second waits
    waiting = asyncio.create_task(rig.dispatcher.sockets.room.room())
    await asyncio.sleep(0.05)
    assert not waiting.done()
    assert rig.heard() == []
    executor.say(SocketCredit(key_of(executor, "a"), 400_000))
    executor.say(SocketCredit(key_of(executor, "b"), 400_000))
    await asyncio.wait_for(waiting, 5)
    assert rig.heard() == []


async def test_large_frames_go_through_shared_memory(make: MakeRig) -> None:
    rig = make()
    rig.open()
    (executor,) = rig.executors
    data = b"x" * 70 * MIB  # more than may wait, but it is on its way at once
    rig.send("s", data)
    (frame,) = executor.sent(SocketFrame)
    assert isinstance(frame.data, Blob)
    assert frame.data.size == len(data)
    rig.send("s", b"small")
    assert not rig.dispatcher.sockets.room.full
    rig.send("s", data)
    assert rig.dispatcher.sockets.room.full
    assert rig.heard() == []
    executor.say(Free(frame.data.offset))
    executor.say(SocketCredit(key_of(executor), 70 * MIB))
    assert not rig.dispatcher.sockets.room.full
    assert [getattr(each.data, "size", each.data) for each in executor.sent(SocketFrame)[1:]] == [b"small", 70 * MIB]


async def test_a_large_frame_of_a_handler(make: MakeRig) -> None:
    rig = make()
    rig.open()
    (executor,) = rig.executors
    fd = create_arena("up")
    writer = ArenaWriter(fd)
    executor.child.arena_up.close()
    executor.child.arena_up = type(executor.child.arena_up)(fd)
    blob = writer.put(b"y" * BLOB_THRESHOLD_BYTES)
    executor.say(SocketFrame(key_of(executor), blob))
    assert executor.child.sent[-1] == Free(blob.offset)
    ((_, data),) = rig.heard()
    assert data == b"y" * BLOB_THRESHOLD_BYTES


async def test_the_frame_limit_both_ways(make: MakeRig) -> None:
    rig = make(limits=Limits(0, 1, 5.0, 0, 10))
    (executor,) = rig.executors
    for session in "ab":
        rig.open(session)
        assert executor.sent(SocketOpen)[-1].max_frame_bytes == 10
        rig.send(session, b"x" * 10)
    rig.send("a", b"x" * 11)
    assert frames(executor, "a") == [b"x" * 10]
    executor.say(SocketFrame(key_of(executor, "b"), b"x" * 10))
    executor.say(SocketFrame(key_of(executor, "b"), b"x" * 11))
    assert rig.heard() == [("a", "frame_too_large"), ("b", b"x" * 10), ("b", "frame_too_large")]


async def test_a_frame_over_the_transports_limit(make: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_handle, "OUTPUT_CAP_BYTES", 2 * MIB)
    rig = make()
    rig.open()
    (executor,) = rig.executors
    executor.say(SocketFrame(key_of(executor), Blob(0, 2 * MIB + 1)))
    assert rig.heard() == [("s", "frame_too_large")]
    assert executor.child.sent[-1] == Free(0)


async def test_without_shared_memory_a_session_ends(make: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make(limits=Limits(0, 1, 0.02, 0))
    rig.open()
    (executor,) = rig.executors

    def no_memory(data: bytes) -> Blob:
        raise OSError(28, "no space")

    monkeypatch.setattr(executor.child.arena_down, "put", no_memory)
    rig.send("s", b"x" * BLOB_THRESHOLD_BYTES, b"after it")
    assert rig.heard() == [("s", "error:ResourceError")]
    assert frames(executor) == []
    assert len(executor.sent(Cancel)) == 1


async def test_what_goes_out_is_credited(make: MakeRig) -> None:
    rig = make()
    rig.open()
    (executor,) = rig.executors
    key = key_of(executor)
    executor.say(SocketFrame(key, b"x" * 100))
    executor.say(Event(key, "job.log", b"{}"))
    assert executor.sent(SocketCredit) == []
    rig.messages()
    assert executor.sent(SocketCredit) == [SocketCredit(key, 102 + 2 * EVENT_OVERHEAD_BYTES)]


async def test_frames_of_no_session_are_said_once(make: MakeRig, caplog: pytest.LogCaptureFixture) -> None:
    rig = make()
    rig.send("nobody", b"1", b"2")
    rig.close_session("nobody")
    rig.open()
    end(rig.executors[0])
    rig.send("s", b"crossed the close")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["frames of session nobody are dropped: it is not open"]


async def test_strangers_are_not_remembered_for_ever(make: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sockets, "REMEMBERED", 3)
    rig = make()
    for number in range(10):
        rig.send(f"nobody{number}", b"")
    assert len(rig.dispatcher.sockets._over) == 3


# -- whatever happens -----------------------------------------------------------------------------


class Sessions(RuleBasedStateMachine):
    """Anything in any order: one close per session, frames in order before it, nothing counted twice or left."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        self.loop = asyncio.new_event_loop()
        self.loop.run_until_complete(self._start())
        self.opened: dict[str, int] = {}
        self.closes: dict[str, str] = {}
        self.produced: dict[str, list[bytes]] = {}
        self.received: dict[str, list[bytes]] = {}
        self.sent: dict[str, list[bytes]] = {}
        self.handled: dict[str, list[bytes]] = {}
        self.ended: set[int] = set()
        self.numbers = 0

    async def _start(self) -> None:
        use_recording_children(self.patch.setattr)
        self.rig = Room([function("talk", "websocket", limit=2)], executors=2, limits=Limits(0, 1, 60.0, 0, 1000))

    def teardown(self) -> None:
        self.loop.run_until_complete(self._stop())
        self.loop.close()
        self.patch.undo()

    async def _stop(self) -> None:
        self.rig.dispatcher.abandon("the test ends")
        self.look()
        assert set(self.closes) == set(self.opened)
        assert len(self.rig.dispatcher.sockets) == self.rig.dispatcher.sockets.room.waiting_bytes == 0
        assert self.rig.dispatcher.backlog._runs_bytes == 0
        for each in self.rig.executors:
            each.child.close()

    def look(self) -> None:
        """Read all that the scheduler gets."""
        for session, what in self.rig.heard():
            if isinstance(what, str):
                assert session not in self.closes, "two closes"
                self.closes[session] = what
            else:
                assert session not in self.closes, "a frame after the close"
                self.received[session].append(what)

    def live(self) -> list[tuple[Executor, int, str]]:
        """The sessions that an executor has, with their keys."""
        return [
            (executor, each.key, each.session_id)
            for executor in self.rig.executors
            if not executor.handle.state.is_terminal
            for each in executor.sent(SocketOpen)
            if each.key not in self.ended
        ]

    def number(self) -> bytes:
        self.numbers += 1
        return b"%d" % self.numbers

    async def on_loop(self, calls: tuple[Callable[[], object], ...]) -> None:
        for call in calls:
            call()
        await asyncio.sleep(0)

    def do(self, *calls: Callable[[], object]) -> None:
        self.loop.run_until_complete(self.on_loop(calls))

    @rule()
    def open(self) -> None:
        session = f"s{len(self.opened)}"
        self.opened[session] = 1
        for record in (self.produced, self.received, self.sent, self.handled):
            record[session] = []
        self.do(lambda: self.rig.open(session))

    @precondition(lambda self: self.opened)
    @rule(data=st.data(), size=st.sampled_from([1, 1, 1, 1001]))
    def scheduler_sends(self, data: st.DataObject, size: int) -> None:
        session = data.draw(st.sampled_from(sorted(self.opened)))
        frame = self.number() if size == 1 else b"x" * size
        self.sent[session].append(frame)
        self.do(lambda: self.rig.send(session, frame))

    @precondition(lambda self: self.opened)
    @rule(data=st.data())
    def scheduler_closes(self, data: st.DataObject) -> None:
        session = data.draw(st.sampled_from(sorted(self.opened)))
        self.do(lambda: self.rig.close_session(session))

    @precondition(lambda self: self.live())
    @rule(data=st.data(), size=st.sampled_from([1, 1, 1, 1001]))
    def handler_sends(self, data: st.DataObject, size: int) -> None:
        executor, key, session = data.draw(st.sampled_from(self.live()))
        frame = self.number() if size == 1 else b"x" * size
        self.produced[session].append(frame)
        self.do(lambda: executor.say(SocketFrame(key, frame)))

    @precondition(lambda self: self.live())
    @rule(data=st.data(), size=st.sampled_from([1, 300, 10**9]))
    def handler_takes(self, data: st.DataObject, size: int) -> None:
        executor, key, _ = data.draw(st.sampled_from(self.live()))
        self.do(lambda: executor.say(SocketCredit(key, size)))

    @precondition(lambda self: self.live())
    @rule(data=st.data(), reason=st.sampled_from(["closed", "slow_consumer", "frame_too_large"]))
    def handler_closes(self, data: st.DataObject, reason: str) -> None:
        executor, key, _ = data.draw(st.sampled_from(self.live()))
        self.do(lambda: executor.say(SocketClose(key, reason)))

    @precondition(lambda self: self.live())
    @rule(data=st.data(), reason=st.sampled_from(["completed", "error:X"]))
    def handler_ends(self, data: st.DataObject, reason: str) -> None:
        executor, key, _ = data.draw(st.sampled_from(self.live()))
        self.ended.add(key)
        self.do(lambda: executor.say(SocketClose(key, reason)), lambda: executor.say(Result(key)))

    @precondition(lambda self: self.live())
    @rule(data=st.data())
    def executor_dies(self, data: st.DataObject) -> None:
        executor, _, _ = data.draw(st.sampled_from(self.live()))
        self.do(executor.die, self.rig.add_executor)

    @rule()
    def stream_ends(self) -> None:
        self.do(self.rig.dispatcher.outbox.stream_closed, self.rig.dispatcher.sockets.stream_closed)

    @rule()
    def scheduler_reads(self) -> None:
        self.do(self.look)

    @invariant()
    def frames_are_in_order(self) -> None:
        for session, received in self.received.items():
            produced = self.produced[session]
            assert received == produced[: len(received)], "a gap, or another order"
        by_key = {
            (executor.handle.slot, each.key): each.session_id
            for executor in self.rig.executors
            for each in executor.sent(SocketOpen)
        }
        handled: dict[str, list[bytes]] = {}
        for executor in self.rig.executors:
            for each in executor.sent(SocketFrame):
                handled.setdefault(by_key[executor.handle.slot, each.key], []).append(each.data)
        for session, taken in handled.items():
            assert taken == self.sent[session][: len(taken)]

    @invariant()
    def the_count_is_right(self) -> None:
        held = self.rig.dispatcher.sockets
        waiting = {each.run_id: sum(frame.weight for frame in each.waiting) for each in held._by_key.values()}
        assert waiting == {each.run_id: each.waiting_bytes for each in held._by_key.values()}
        assert held.room.waiting_bytes == sum(waiting.values())
        assert all(each.under_way >= 0 for each in held._by_key.values())


TestSessions = Sessions.TestCase
