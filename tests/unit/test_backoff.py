"""Backoff, Targets and Redial: pure, so time here is a number that is added up."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.backoff import BRIEF_STREAMS, MIN_DELAY_S, QUICK_S, STABLE_S, Backoff, Lifetime, ReconnectSettings
from supervisor.redial import Redial
from supervisor.targets import MAX_HOPS, MalformedRedirect, Targets, redirect_target
from supervisor.transport import StatusCode, StreamStatus

PLAIN = ReconnectSettings(jitter_s=0)
NO_STREAM = Lifetime()
STABLE = Lifetime(open_s=STABLE_S + 1, up_s=STABLE_S)
ENDED_AT_ONCE = Lifetime(open_s=0.01, up_s=0.01)
BRIEF_WITH_MESSAGE = Lifetime(open_s=0.02, up_s=0.01, got_message=True)

seconds = st.floats(0, 1000)
reconnects = st.builds(
    ReconnectSettings, delay_s=st.floats(0, 100), max_delay_s=st.floats(0, 1000), jitter_s=st.floats(0, 10)
)
fractions = st.floats(0, 1)
lifetimes = st.builds(
    lambda up, silent, message: Lifetime(silent + (up or 0), up, message and up is not None),
    st.none() | seconds,
    seconds,
    st.booleans(),
)


# -- Backoff --------------------------------------------------------------------------------------


def test_delays_double_from_the_first_to_the_longest() -> None:
    backoff = Backoff(PLAIN)
    assert [backoff.next_delay() for _ in range(6)] == [5, 10, 20, 40, 60, 60]


def test_jitter_is_added_on_top() -> None:
    backoff = Backoff(ReconnectSettings(delay_s=5, max_delay_s=60, jitter_s=4), uniform=lambda: 0.25)
    assert backoff.next_delay() == 6


@given(reconnects, fractions)
def test_delays_never_shrink_and_stay_within_bounds(settings: ReconnectSettings, fraction: float) -> None:
    backoff = Backoff(settings, uniform=lambda: fraction)
    delays = [backoff.next_delay() for _ in range(100)]
    assert delays == sorted(delays)
    assert delays[0] >= min(MIN_DELAY_S, settings.max_delay_s or MIN_DELAY_S)
    assert delays[-1] <= max(settings.max_delay_s, MIN_DELAY_S) + settings.jitter_s


@given(reconnects, st.integers(0, 20), fractions)
def test_a_stream_that_stayed_up_starts_anew(settings: ReconnectSettings, failures: int, fraction: float) -> None:
    backoff = Backoff(settings, uniform=lambda: fraction)
    first = backoff.next_delay()
    for _ in range(failures):
        backoff.next_delay()
    assert backoff.record(STABLE)
    assert backoff.quick_delay() <= QUICK_S
    assert backoff.next_delay() == first


@pytest.mark.parametrize(
    ("life", "stayed"),
    [
        (NO_STREAM, False),
        (ENDED_AT_ONCE, False),
        (BRIEF_WITH_MESSAGE, False),
        (STABLE, True),
        (Lifetime(open_s=59), False),
        (Lifetime(open_s=60), True),  # silent for as long as the longest wait
        (Lifetime(open_s=3600, up_s=1), False),
    ],
)
def test_what_counts_as_having_stayed_up(life: Lifetime, stayed: bool) -> None:
    assert Backoff(PLAIN).stayed_up(life) is stayed


def test_a_silent_stream_must_last_some_seconds_even_when_waits_are_short() -> None:
    backoff = Backoff(ReconnectSettings(max_delay_s=0.1))
    assert not backoff.stayed_up(Lifetime(open_s=STABLE_S - 1))


def test_few_brief_streams_are_replaced_quickly() -> None:
    backoff = Backoff(PLAIN)
    assert [backoff.record(BRIEF_WITH_MESSAGE) for _ in range(BRIEF_STREAMS + 2)] == [True] * BRIEF_STREAMS + [
        False
    ] * 2
    assert backoff.record(STABLE)
    assert backoff.record(BRIEF_WITH_MESSAGE)


# -- Targets --------------------------------------------------------------------------------------


def test_seeds_are_dialed_in_order_and_only_their_end_is_a_reason_to_wait() -> None:
    targets = Targets(["a:1", "b:1", "c:1", "b:1"])
    seen = [(targets.current, targets.failed()) for _ in range(6)]
    assert seen == [("a:1", False), ("b:1", False), ("c:1", True), ("a:1", False), ("b:1", False), ("c:1", True)]


def test_after_a_redirect_comes_the_whole_seed_list() -> None:
    targets = Targets(["a:1", "b:1"])
    assert targets.redirect("x:1")
    seen = [(targets.current, targets.failed()) for _ in range(4)]
    assert seen == [("x:1", False), ("a:1", False), ("b:1", True), ("a:1", False)]


def test_one_seed_alone_is_not_dialed_twice_in_a_row() -> None:
    targets = Targets(["a:1"])
    targets.keep()
    assert targets.failed()


def test_a_kept_address_is_dialed_again_and_then_the_list() -> None:
    targets = Targets(["a:1", "b:1"])
    targets.failed()
    targets.keep()
    seen = [(targets.current, targets.failed()) for _ in range(3)]
    assert seen == [("b:1", False), ("a:1", False), ("b:1", True)]


def test_no_seed_is_an_error() -> None:
    with pytest.raises(ValueError, match="no scheduler address"):
        Targets([])


def test_hops_are_limited_until_a_stream_stays_up() -> None:
    targets = Targets(["a:1"])
    hops = [targets.redirect(f"x:{port}") for port in range(1, MAX_HOPS + 3)]
    assert hops == [True] * MAX_HOPS + [False] * 2
    assert targets.current == f"x:{MAX_HOPS + 2}"  # it is followed nevertheless, later
    targets.stayed_up()
    assert targets.redirect("y:1")


@given(st.lists(st.sampled_from(["failed", "keep", "redirect", "stayed_up"])), st.integers(1, 4))
def test_every_seed_gets_its_turn_whatever_happened_before(steps: list[str], count: int) -> None:
    seeds = [f"s{number}:1" for number in range(count)]
    targets = Targets(seeds)
    for step in steps:
        if step == "redirect":
            targets.redirect("x:1")
        else:
            getattr(targets, step)()
    seen = []
    for _ in range(2 * count + 1):
        seen.append(targets.current)
        targets.failed()
    assert set(seeds) <= set(seen)


# -- redirects ------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["10.0.0.7:8080", "scheduler-2.internal:443", "[::1]:8080"])
def test_a_redirect_names_an_address(address: str) -> None:
    assert redirect_target(StreamStatus(StatusCode.FAILED_PRECONDITION, f"not_leader:{address}")) == address


@pytest.mark.parametrize(
    "status",
    [
        StreamStatus(StatusCode.FAILED_PRECONDITION, ""),
        StreamStatus(StatusCode.FAILED_PRECONDITION, "worker too old"),
        StreamStatus(StatusCode.FAILED_PRECONDITION, "not_leader:"),
        StreamStatus(StatusCode.FAILED_PRECONDITION, "not_leader: "),
        StreamStatus(StatusCode.UNAVAILABLE, "not_leader:a:1"),
    ],
)
def test_what_is_no_redirect(status: StreamStatus) -> None:
    assert redirect_target(status) is None


@pytest.mark.parametrize(
    "named",
    [
        "a",
        "a:",
        ":80",
        "a:0",
        "a:65536",
        "a:x",
        "http://a:80",
        "unix:/tmp/x",
        "a b:80",
        "a:80/x",
        "u@a:80",
        "::1:80",
        "a\n:80",
    ],
)
def test_a_malformed_redirect_is_told_apart(named: str) -> None:
    with pytest.raises(MalformedRedirect, match=r"^[^\n]*host:port[^\n]*$"):
        redirect_target(StreamStatus(StatusCode.FAILED_PRECONDITION, f"not_leader:{named}"))


@given(st.text(max_size=300))
def test_no_redirect_is_more_than_a_host_and_a_port(named: str) -> None:
    target = None
    with contextlib.suppress(MalformedRedirect):
        target = redirect_target(StreamStatus(StatusCode.FAILED_PRECONDITION, f"not_leader:{named}"))
    assert target is None or (target == named.strip() and target.isascii() and not set(target) & set("/@ \n"))


# -- Redial: dials over time ----------------------------------------------------------------------


def dial_times(
    redial: Redial, lives: Iterable[tuple[Lifetime, str | None]], until_s: float = 3600
) -> list[tuple[float, str]]:
    """When and where is dialed if each dial ends like that; the streams' own time counts."""
    now, dials = 0.0, []
    for life, redirect in lives:
        if now > until_s:
            break
        dials.append((now, redial.target))
        now += life.open_s + redial.after(life, redirect)
    return dials


def busiest(times: list[float], window_s: float) -> int:
    """The most dials in any window."""
    return max(sum(start <= time < start + window_s for time in times) for start in times)


@pytest.mark.parametrize("life", [ENDED_AT_ONCE, BRIEF_WITH_MESSAGE, NO_STREAM])
@pytest.mark.parametrize("delay_s", [5.0, 0.1, 0.0])
def test_a_scheduler_that_ends_every_stream_at_once_is_soon_left_alone(life: Lifetime, delay_s: float) -> None:
    redial = Redial(["a:1"], ReconnectSettings(delay_s=delay_s), uniform=lambda: 0.0)
    times = [time for time, _ in dial_times(redial, [(life, None)] * 400)]
    assert busiest(times, 10.0) <= 12  # the first few tries
    later = times[12:]
    assert busiest(later, 1.0) == 1
    assert busiest(later, 60.0) <= 2


@given(
    st.lists(st.tuples(lifetimes, st.none() | st.sampled_from(["x:1", "y:1"])), max_size=300),
    st.integers(1, 4),
    fractions,
)
def test_no_scheduler_can_make_the_worker_dial_without_end(
    lives: list[tuple[Lifetime, str | None]], seeds: int, fraction: float
) -> None:
    redial = Redial([f"s{n}:1" for n in range(seeds)], ReconnectSettings(), uniform=lambda: fraction)
    times = [time for time, _ in dial_times(redial, lives, until_s=1e9)]
    # At once: a quick dial, the hops, the brief streams, and once round the list for each of those.
    assert not times or busiest(times, STABLE_S) <= (2 + MAX_HOPS + BRIEF_STREAMS) * (seeds + 1)


def test_a_scheduler_that_restarts_after_hours_is_redialed_fast() -> None:
    redial = Redial(["a:1"], ReconnectSettings(), uniform=lambda: 1.0)
    for _ in range(10):
        redial.after(NO_STREAM)
    assert redial.after(Lifetime(open_s=7200, up_s=7200, got_message=True)) <= QUICK_S
    assert redial.after(NO_STREAM) == 5 + 1


def test_schedulers_that_point_at_each_other_are_left_alone_too() -> None:
    redial = Redial(["a:1"], ReconnectSettings(), uniform=lambda: 0.0)
    around: list[tuple[Lifetime, str | None]] = [(ENDED_AT_ONCE, "b:1"), (ENDED_AT_ONCE, "a:1")] * 20
    dials = dial_times(redial, around)
    at_once = [target for time, target in dials if time < 1]
    assert at_once == ["a:1", "b:1", "a:1", "b:1", "a:1", "b:1"]
    assert busiest([time for time, _ in dials[MAX_HOPS + 1 :]], 4.0) == 1


def test_a_redirect_is_followed_at_once_and_its_failure_leads_through_the_seeds() -> None:
    redial = Redial(["a:1", "b:1"], PLAIN)
    dials = dial_times(
        redial, [(ENDED_AT_ONCE, "x:1"), (NO_STREAM, None), (NO_STREAM, None), (NO_STREAM, None), (NO_STREAM, None)]
    )
    assert [target for _, target in dials] == ["a:1", "x:1", "a:1", "b:1", "a:1"]
    waits = [after[0] - before[0] for before, after in itertools.pairwise(dials)]
    assert waits == pytest.approx([ENDED_AT_ONCE.open_s, 0, 0, 5])


def test_failed_dials_in_a_row_are_counted() -> None:
    redial = Redial(["a:1", "b:1"], ReconnectSettings(max_attempts=3))
    redial.after(NO_STREAM)
    redial.after(ENDED_AT_ONCE, "x:1")  # a redirect is no failure
    redial.after(NO_STREAM)
    assert (redial.failed_dials, redial.exhausted) == (2, False)
    redial.after(STABLE)
    assert redial.failed_dials == 0
    redial.not_dialed()
    redial.after(NO_STREAM)
    redial.after(NO_STREAM)
    assert redial.exhausted


def test_without_a_maximum_it_is_never_exhausted() -> None:
    redial = Redial(["a:1"], PLAIN)
    for _ in range(1000):
        redial.after(NO_STREAM)
    assert not redial.exhausted


def test_without_a_credential_the_address_stays_in_turn() -> None:
    redial = Redial(["a:1", "b:1"], PLAIN)
    assert [redial.not_dialed(), redial.not_dialed()] == [5, 10]
    assert redial.target == "a:1"
