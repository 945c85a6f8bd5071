"""What a stream tells of the unread: windows, the last rush, and how long the way is."""

from __future__ import annotations

import pytest

from supervisor.transport.h2.window import DEFAULT_BYTES, IN_HAND_BYTES, SHORT_S, Window
from supervisor.transport.unread import (
    ROUND_TRIP_MAX_S,
    ROUND_TRIP_MIN_S,
    SLOWER,
    Stretch,
    estimated_round_trip,
)

MIB = 2**20


class TestWindow:
    def test_what_was_sent_may_be_unread_until_it_is_given_back(self) -> None:
        window = Window()
        window.resized(MIB)
        window.sent(MIB, 1.0)
        assert window.unread == MIB, "never more than was sent"
        window.sent(0, 2.0)
        window.opened(MIB, 2.0)
        assert window.unread == MIB, "a library may give a window back ahead of its program"
        window.sent(MIB, 2.0)
        window.opened(MIB, 3.0)
        assert window.unread == MIB + IN_HAND_BYTES

    @pytest.mark.parametrize("before", [0, 30_000, DEFAULT_BYTES])
    def test_a_window_that_grows_over_what_is_unread(self, before: int) -> None:
        window = Window()
        window.sent(before, 1.0)
        window.resized(4 * MIB)
        assert window.peak == 4 * MIB
        window.sent(4 * MIB - before, 2.0)
        assert window.unread == 4 * MIB

    def test_a_window_that_shrinks(self) -> None:
        window = Window()
        window.resized(4 * MIB)
        window.sent(2 * MIB, 1.0)
        window.resized(MIB)
        assert window.unread == 2 * MIB
        assert window.was_short(10.0)

    def test_it_is_short_when_more_than_half_was_not_given_back(self) -> None:
        window = Window()
        window.resized(MIB)
        window.sent(MIB // 2, 1.0)
        assert not window.was_short(10.0)
        window.sent(1, 1.0)
        assert window.was_short(10.0)
        window.opened(1, 1.0)
        assert not window.was_short(10.0)

    def test_it_was_short_when_something_waited_a_moment_ago(self) -> None:
        window = Window()
        window.waited(10.0)
        assert window.was_short(10.0 + SHORT_S)
        assert not window.was_short(10.1 + SHORT_S)

    def test_how_far_a_scheduler_is_behind(self) -> None:
        window = Window()
        for second in range(10):
            window.sent(1000, float(second))
        window.opened(3000, 10.0)
        assert window.behind_s == 10.0 - 3.0, "what went out at 3 is the first that it has not taken"
        window.opened(6999, 10.5)
        assert window.behind_s == 10.5 - 9.0
        window.opened(1, 11.0)
        assert window.behind_s == 0.0


class TestStretch:
    def test_a_send_that_waits(self) -> None:
        stretch = Stretch(0.0)
        stretch.sent(5.0, 6.0)
        assert stretch.since(6.0) == 5.0
        assert stretch.since(6.0 + SLOWER) == 5.0, "it may take longer to read than it took to send"
        assert stretch.since(6.1 + SLOWER) == 6.1 + SLOWER, "it has been read by now"

    def test_sends_that_follow_one_another_are_one_stretch(self) -> None:
        stretch = Stretch(0.0)
        for step in range(100):
            stretch.sent(1 + step / 100, 1 + step / 100 + 0.0097)
        assert stretch.since(2.0) == 1.0

    def test_a_send_after_a_pause_begins_another(self) -> None:
        stretch = Stretch(0.0)
        stretch.sent(1.0, 2.0)
        stretch.sent(3.5, 3.6)
        assert stretch.since(3.7) == 3.5

    def test_one_that_began_after_the_end(self) -> None:
        stretch = Stretch(0.0)
        stretch.sent(5.0, 6.0)
        assert stretch.since(4.5) == 4.5

    def test_a_slow_stream_of_sends_is_none(self) -> None:
        """However long it goes on, and whatever it began with."""
        stretch = Stretch(0.0)
        stretch.sent(0.0, 1.0)
        for step in range(1000, 2000):
            stretch.sent(1 + step / 1000, 1 + step / 1000 + 0.0001)
        assert stretch.since(2.999_2) == 2.999_2

    def test_sends_with_pauses_are_none(self) -> None:
        stretch = Stretch(0.0)
        for step in range(1000):
            stretch.sent(step / 1000, step / 1000 + 0.0001)
        assert stretch.since(1.0) == 1.0
        assert stretch.since(0.9992) == 0.9992


@pytest.mark.parametrize(
    ("seconds", "trips", "expected"),
    [(0.02, 2, 0.01), (0.03, 3, 0.01), (0.0, 2, ROUND_TRIP_MIN_S), (9.0, 3, ROUND_TRIP_MAX_S)],
)
def test_a_round_trip_from_the_time_of_the_dial(seconds: float, trips: int, expected: float) -> None:
    assert estimated_round_trip(seconds, trips) == pytest.approx(expected)
