"""The checker of the torture, on made-up histories: what must pass, and one violation at a time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_worker.testing.torture.history import (
    BY_SCHEDULER,
    Arrival,
    Conversation,
    History,
    Interval,
    Light,
    Outcome,
    Peaks,
    Run,
    StreamRecord,
    What,
    Writing,
)
from gen_worker.testing.torture.invariants import (
    DOUBTFUL_S,
    Bounds,
    accepted_runs,
    check,
    doubtful,
    lit_seconds,
    unanswered,
)
from gen_worker.testing.torture.plan import LONG_TIMEOUT_MS
from gen_worker.testing.torture.report import render, summarize
from gen_worker.testing.torture.requests import BUSY, CRASHED, SUCCESS, Request

BOUNDS = Bounds(grace_s=1.0, slack_s=5.0)
ANSWER = Outcome(SUCCESS, retryable=False, safe_message="", error_message="", digest=b"1", output_fits=True)


def failed(kind: str, safe_message: str = "", *, digest: bytes = b"2", retryable: bool | None = None) -> Outcome:
    is_retryable = kind == "retryable" if retryable is None else retryable
    return Outcome(kind, is_retryable, safe_message, "", digest, output_fits=True)


def result(outcome: Outcome = ANSWER, *, stream: int = 0, at: float = 2.0) -> Arrival:
    return Arrival(stream, at, What.RESULT, outcome=outcome)


def deltas(*places: int, stream: int = 0, made_at: float = 1.5) -> list[Arrival]:
    return [Arrival(stream, made_at, What.DELTA, place, made_at=made_at) for place in places]


def completed(stream: int = 0) -> Arrival:
    return Arrival(stream, 1.9, What.COMPLETED)


class World:
    """A history of three streams, the last of which lives, and runs that were sent on the first."""

    def __init__(self) -> None:
        self.history = History(streams=[StreamRecord(0.0, 10.0), StreamRecord(11.0, 20.0), StreamRecord(21.0)])

    def run(
        self,
        *arrivals: Arrival,
        run_id: str = "",
        outcomes: tuple[str, ...] = (SUCCESS,),
        count: int | None = None,
        streams: tuple[int, ...] = (0,),
        timeout_ms: int = 10_000,
        at: float = 1.0,
    ) -> Run:
        request = Request("f", b"", frozenset(outcomes), deltas=count, incremental=count is not None)
        run = Run(run_id or f"r{len(self.history.runs)}", request, timeout_ms, arrivals=list(arrivals))
        for stream in streams:
            position = sum(w.stream == stream for other in self.history.runs.values() for w in other.writings)
            run.writings.append(Writing(stream, position, at))
        self.history.runs[run.run_id] = run
        return run

    def rules(self) -> list[str]:
        return [violation.rule for violation in check(self.history, BOUNDS)]


@pytest.fixture
def world() -> World:
    return World()


def test_an_ordinary_history_has_no_violation(world: World) -> None:
    world.run(result())
    world.run(*deltas(0, 1, 2), completed(), result(), count=3)
    world.run(completed(), result(), count=0)
    world.run(result(failed("validation")), outcomes=("validation",))
    world.run(result(failed("retryable", CRASHED)))
    world.run(*deltas(0), Arrival(0, 1.9, What.ERROR), result(failed("validation")), count=3, outcomes=("validation",))
    assert check(world.history, BOUNDS) == []


class TestAcceptance:
    def test_what_is_sure(self, world: World) -> None:
        world.run(run_id="before")
        world.run(result(), run_id="answered")
        world.run(run_id="behind")
        world.run(run_id="began")
        world.run(run_id="alive", streams=(2,))
        world.history.starts["began"] = 1
        assert accepted_runs(world.history) == {"before", "answered", "began", "alive"}
        assert [run.run_id for run in unanswered(world.history, BOUNDS)] == ["before", "began", "alive"]

    def test_an_accepted_run_without_a_result_is_lost(self, world: World) -> None:
        world.run()
        world.run(result())
        assert world.rules() == ["lost"]

    def test_a_run_that_a_cut_stream_swallowed_is_not(self, world: World) -> None:
        world.run(result())
        world.run()
        assert world.rules() == []

    def test_events_alone_are_no_answer(self, world: World) -> None:
        world.run(*deltas(0), count=1)
        assert world.rules() == ["lost"]

    def test_a_run_that_was_written_twice_says_nothing_of_its_neighbours(self, world: World) -> None:
        world.run()
        world.run(result(), streams=(0, 1))
        assert accepted_runs(world.history) == {"r1"}

    @pytest.mark.parametrize(("ended", "lost"), [(None, False), (3.5, False), (2.0, True)])
    def test_what_goes_with_a_killed_supervisor_and_what_does_not(
        self, world: World, ended: float | None, lost: bool
    ) -> None:
        run = world.run(*deltas(0), count=1)
        world.history.kills = [4.0]
        if ended is not None:
            world.history.ends[run.run_id] = ended
        assert world.rules() == ["lost"] * lost

    def test_what_was_sent_after_the_kill_is_the_next_ones(self, world: World) -> None:
        world.run(*deltas(0), count=1)
        world.history.kills = [0.5]
        assert world.rules() == ["lost"]


class TestOneResult:
    def test_the_same_result_on_a_later_stream(self, world: World) -> None:
        world.run(result(), result(stream=1, at=12.0), result(stream=2, at=22.0))
        assert world.rules() == []

    def test_twice_on_one_stream(self, world: World) -> None:
        world.run(result(), result(at=2.5))
        assert world.rules() == ["one result"]

    def test_two_different_ones(self, world: World) -> None:
        world.run(result(), result(failed("retryable", CRASHED), stream=1))
        assert world.rules() == ["one result"]

    def test_a_request_that_was_sent_twice_may_run_twice(self, world: World) -> None:
        world.run(result(), result(failed("retryable", CRASHED)), streams=(0, 0))
        assert world.rules() == []

    def test_but_not_three_times(self, world: World) -> None:
        third = failed("retryable", CRASHED, digest=b"3")
        world.run(result(), result(failed("retryable", CRASHED)), result(third), streams=(0, 0))
        assert world.rules() == ["one result", "one result"]  # too many, and too many on one stream

    def test_a_run_that_began_twice(self, world: World) -> None:
        run = world.run(result())
        world.history.starts[run.run_id] = 2
        assert world.rules() == ["one start"]


class TestOrder:
    def test_an_event_after_the_result(self, world: World) -> None:
        world.run(result(), Arrival(0, 2.1, What.OTHER))
        assert world.rules() == ["events first"]

    def test_an_event_on_a_later_stream_than_the_result(self, world: World) -> None:
        world.run(result(), Arrival(1, 12.0, What.OTHER))
        assert world.rules() == ["events first"]

    def test_a_stream_that_was_read_late(self, world: World) -> None:
        """The result came on stream 1 before what stream 0 had held back was read."""
        world.run(result(stream=1, at=2.0), Arrival(0, 2.1, What.OTHER))
        assert world.rules() == []

    def test_success_without_the_end_of_the_output(self, world: World) -> None:
        world.run(*deltas(0, 1), result(), count=2)
        assert world.rules() == ["events first"]

    def test_success_after_an_error_of_the_output(self, world: World) -> None:
        world.run(*deltas(0), Arrival(0, 1.9, What.ERROR), completed(), result(), count=1)
        assert world.rules() == ["events first", "events first"]


class TestDeltas:
    @pytest.mark.parametrize("said", [0, 1])
    def test_a_step_back_where_the_worker_saw_that_nobody_read(self, world: World, said: int) -> None:
        world.history.resendings = said
        arrivals = [*deltas(0, 1), completed(), result(), *deltas(1, stream=1), completed(1), result(stream=1)]
        world.run(*arrivals, count=2)
        assert world.rules() == ["deltas"] * (1 - said)

    @pytest.mark.parametrize("whole", [True, False])
    @pytest.mark.parametrize("pause_s", [0.0, 0.05])
    @pytest.mark.parametrize("early_s", [0.01, 0.12, 0.2])
    def test_a_gap_between_streams(self, world: World, whole: bool, pause_s: float, early_s: float) -> None:
        """Only what may have gone out in the last moment of a stream may be missing, where it was read."""
        last = deltas(0, made_at=10.0 - early_s)
        run = world.run(*last, *deltas(2, stream=1), completed(1), result(stream=1), count=3)
        run.request = replace(run.request, whole=whole, pause_s=pause_s)
        excused = not whole and early_s - pause_s <= DOUBTFUL_S
        assert world.rules() == ["deltas"] * (not excused)
        assert doubtful(world.history) == 1

    @pytest.mark.parametrize(
        ("stall", "excused"),
        [((9.9, 9.99), True), ((9.9, 10.5), True), ((9.99, 10.5), False), ((8.0, 8.5), False), ((10.0, 11.0), False)],
    )
    def test_a_gap_while_the_scheduler_had_no_turn(
        self, world: World, stall: tuple[float, float], excused: bool
    ) -> None:
        world.history.stalls.append(Interval(*stall))
        last = deltas(0, made_at=10.0 - DOUBTFUL_S - 0.05)
        world.run(*last, *deltas(2, stream=1), completed(1), result(stream=1), count=3)
        assert world.rules() == ["deltas"] * (not excused)

    @pytest.mark.parametrize("whole", [True, False])
    def test_an_end_that_is_missing(self, world: World, whole: bool) -> None:
        run = world.run(*deltas(0, made_at=9.95), result(stream=1), count=3)
        run.request = replace(run.request, whole=whole)
        assert world.rules() == ["deltas"] * whole

    def test_what_waited_for_a_stream_that_broke_at_once(self, world: World) -> None:
        world.history.streams[1].ended_at = 11.05
        world.run(*deltas(0, made_at=9.0), *deltas(2, stream=2), completed(2), result(stream=2), count=3)
        assert world.rules() == []

    @pytest.mark.parametrize(
        "arrivals",
        [
            [*deltas(0, 2), completed(), result()],
            [*deltas(0, 1, 1, 2), completed(), result()],
            [*deltas(1, 0, 2), completed(), result()],
            [*deltas(0, 1), completed(), result()],
            [*deltas(1, 2), completed(), result()],
            [*deltas(0, 1, 2, 3), completed(), result()],
            [*deltas(0, -1, 2), completed(), result()],
            [*deltas(0, 1), *deltas(1, 2, stream=1), completed(1), result(stream=1)],
            [*deltas(0), *deltas(1, stream=1), completed(1), result(stream=1)],
        ],
        ids=["gap", "twice", "out of order", "cut short", "no start", "too many", "foreign", "again", "tail"],
    )
    def test_violations(self, world: World, arrivals: list[Arrival]) -> None:
        world.run(*arrivals, count=3)
        assert "deltas" in world.rules()

    @pytest.mark.parametrize(
        "arrivals",
        [
            [*deltas(0, made_at=9.95), *deltas(2, stream=1), completed(1), result(stream=1)],
            [*deltas(2, stream=1), completed(1), result(stream=1)],
            [*deltas(0, made_at=9.95), result(stream=1)],
            [result(stream=1)],
            [*deltas(0, 1), result(failed("retryable", CRASHED))],
        ],
        ids=["between streams", "the first", "the last", "all", "no success"],
    )
    def test_what_a_stream_took_with_it(self, world: World, arrivals: list[Arrival]) -> None:
        world.run(*arrivals, count=3, at=9.92)
        assert world.rules() == []


class TestOutcome:
    @pytest.mark.parametrize(
        "outcome",
        [
            failed("internal"),
            failed("validation"),
            failed("canceled"),
            failed("retryable", BUSY),
            failed("retryable", "try again"),
            failed("fatal", "this request crashed the worker 3 times"),
            failed("oops"),
            failed("retryable", CRASHED, retryable=False),
            failed("timeout"),
            failed("retryable", CRASHED)._replace(safe_message="x" * 501),
            ANSWER._replace(output_fits=False),
        ],
        ids=lambda outcome: f"{outcome.kind} {outcome.safe_message[:10]}",
    )
    def test_not_of_a_run_that_can_only_succeed(self, world: World, outcome: Outcome) -> None:
        world.run(result(outcome))
        assert set(world.rules()) == {"outcome"}

    def test_stuck(self, world: World) -> None:
        run = world.run(result(failed("timeout"), at=31.5), timeout_ms=LONG_TIMEOUT_MS)
        assert world.rules() == []
        run.request = replace(run.request, brief=True)
        assert world.rules() == ["outcome"]

    def test_what_was_asked_for(self, world: World) -> None:
        world.run(result(failed("canceled"))).cancels.append(1.5)
        world.run(result(failed("timeout"), at=11.1))
        world.run(result(failed("fatal", "this request crashed the worker 3 times")), streams=(0, 0))
        flooded = failed("retryable", BUSY)._replace(error_message="too much waits already, and none of it gets on")
        world.run(result(flooded))
        world.history.stopped_at = 1.5
        world.run(result(failed("retryable", BUSY)))
        assert world.rules() == []


class TestTime:
    def test_late(self, world: World) -> None:
        world.run(result(at=17.5))
        assert world.rules() == ["late"]

    def test_time_in_the_dark_does_not_count(self, world: World) -> None:
        world.run(result(at=17.5))
        world.history.dark.append(Interval(3.0, 4.0))
        assert world.rules() == []

    def test_lit_seconds(self) -> None:
        dark = [Interval(1, 2), Interval(4, 6), Interval(9, 12)]
        assert lit_seconds(dark, 0, 3) == 2
        assert lit_seconds(dark, 1.5, 5) == 2
        assert lit_seconds(dark, 4.5, 5.5) == 0
        assert lit_seconds(dark, 7, 8) == 1
        assert lit_seconds([], 7, 8) == 1

    @given(st.lists(st.floats(0, 100), max_size=12, unique=True), st.tuples(*[st.floats(0, 100)] * 3))
    @settings(deadline=None)
    def test_lit_seconds_add_up(self, edges: list[float], cuts: tuple[float, float, float]) -> None:
        edges = sorted(edges)
        dark = [Interval(*pair) for pair in zip(edges[::2], edges[1::2], strict=False)]
        start, middle, end = sorted(cuts)
        whole = lit_seconds(dark, start, end)
        assert -1e-9 <= whole <= end - start + 1e-9
        assert whole == pytest.approx(lit_seconds(dark, start, middle) + lit_seconds(dark, middle, end), abs=1e-6)

    def test_light_has_several_reasons_to_be_out(self) -> None:
        history = History()
        light = Light(history)
        light.dim("a", 1)
        light.dim("b", 2)
        light.brighten("a", 3)
        assert light.is_dark
        light.brighten("b", 4)
        light.brighten("b", 5)
        light.dim("a", 6)
        light.close(7)
        assert history.dark == [(1, 4), (6, 7)]


def _too_much_memory(history: History) -> None:
    history.peaks = Peaks(supervisor_rss=BOUNDS.supervisor_rss + 1, executor_rss=BOUNDS.executor_rss)


def _too_many_descriptors(history: History) -> None:
    history.peaks = Peaks(fds_at_start=Counter(socket=40), fds_at_end=Counter(socket=41 + BOUNDS.more_fds))


@pytest.mark.parametrize(
    ("spoil", "rule"),
    [
        (lambda history: history.strays.append("a result for run 'x'"), "stray"),
        (lambda history: history.offences.append("no registration"), "protocol"),
        (lambda history: history.trouble.append("exit code 1"), "process"),
        (_too_much_memory, "memory"),
        (_too_many_descriptors, "descriptors"),
    ],
)
def test_what_concerns_no_run(world: World, spoil: Callable[[History], None], rule: str) -> None:
    spoil(world.history)
    assert world.rules() == [rule]


def test_the_report_counts_and_names_the_seed(world: World) -> None:
    world.run(result(), result(stream=1))
    world.run(run_id="gone", streams=(2,))
    report = summarize(
        world.history,
        seed=7,
        seconds=30,
        faults={"garbage": 2},
        executors_lost=1,
        lost=len(unanswered(world.history, BOUNDS)),
        violations=check(world.history, BOUNDS),
        reproduce="gen-worker torture --seed 7",
    )
    assert not report.ok
    assert (report.runs, report.accepted, report.lost, report.redelivered) == (2, 2, 1, 1)
    text = render(report)
    assert "VIOLATION lost: run gone of f" in text
    assert "reproduce with: gen-worker torture --seed 7" in text


# -- realtime sessions ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, ""),
        ({"end": BY_SCHEDULER, "reason": "closed", "heard": 1}, ""),
        ({"end": "fail", "reason": "error:ValueError"}, ""),
        ({"reason": "worker_crashed", "heard": 0}, ""),
        ({"reason": "timeout", "closed_at": 22.0, "heard": 0}, ""),
        ({"stream_ended": True, "reason": "", "heard": 1}, ""),
        ({"reason": ""}, "was not closed"),
        ({"reason": "timeout"}, "ended by a timeout after 2.0 s"),
        ({"reason": "slow_consumer"}, "ended slow_consumer, and was to end completed"),
        ({"end": BY_SCHEDULER}, "ended completed, and was to end closed"),
        ({"heard": 4}, "ended completed with 4 of 5 frames sent back"),
        ({"stream_ended": True, "disorder": "x"}, "got another frame than the next one: x"),
    ],
)
def test_sessions(fields: dict[str, Any], words: str) -> None:
    talk = Conversation("s", "return", 20.0, opened_at=1.0, closed_at=3.0, sent=5, heard=5, reason="completed")
    for name, value in fields.items():
        setattr(talk, name, value)
    found = [str(violation) for violation in check(History(conversations=[talk]), BOUNDS)]
    assert found == ([f"session: s {words}"] if words else [])
