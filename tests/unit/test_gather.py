"""When messages gather, with a clock of its own."""

from __future__ import annotations

from supervisor.transport.gather import ALONE_S, ENOUGH, GATHER, MANY, PAUSE_S, SOME, Gather


class Stream:
    """Messages come one by one, each `gap_s` after the one before."""

    def __init__(self, gap_s: float = 0.0001) -> None:
        self.now = 100.0
        self.gap_s = gap_s
        self.gather = Gather(lambda: self.now)

    def came(self) -> int:
        self.now += self.gap_s
        return self.gather.came()

    def apart(self) -> int:
        """How many came one by one before the next that is to gather, which has come too."""
        for count in range(10 * MANY):
            if self.came() > 1:
                return count
        raise AssertionError("none gathered")

    def gathered(self, count: int) -> None:
        """A first one has come; the others do, and all are handed over."""
        for _ in range(count - 1):
            assert self.came() == GATHER
        self.gather.handed_over(count)


def test_the_first_go_one_by_one_and_then_some_together() -> None:
    stream = Stream()
    assert stream.apart() == SOME
    for count in [GATHER, ENOUGH] * 10:
        stream.gathered(count)
        assert stream.came() == GATHER


def test_a_pause_has_the_next_go_one_by_one() -> None:
    stream = Stream()
    stream.apart()
    stream.gathered(GATHER)
    stream.now += 2 * PAUSE_S
    assert stream.apart() == SOME


def test_slow_messages_never_gather() -> None:
    stream = Stream(2 * PAUSE_S)
    assert {stream.came() for _ in range(2 * MANY)} == {1}


def test_each_try_that_fails_makes_the_next_one_later() -> None:
    """One run after the other: a message comes only when the one before was handled."""
    stream = Stream()
    assert stream.apart() == SOME
    waits = []
    for _ in range(14):
        stream.gathered(1)
        waits.append(stream.apart())
    assert waits[:4] == [SOME, 2 * SOME, 4 * SOME, 8 * SOME]
    assert waits[-2:] == [MANY, MANY]


def test_tries_that_succeed_make_up_for_one_that_failed() -> None:
    stream = Stream()
    stream.apart()
    for _ in range(4):
        stream.gathered(1)
        stream.apart()
    for _ in range(10):
        stream.gathered(GATHER)
        assert stream.came() == GATHER
    stream.gathered(ENOUGH - 1)
    assert stream.apart() == SOME


def test_a_pause_does_not_shorten_the_wait_for_the_next_try() -> None:
    """Else a caller with a pause between its bursts would lose a millisecond in each."""
    stream = Stream()
    stream.apart()
    for _ in range(3):
        stream.gathered(1)
        stream.apart()
    stream.gathered(1)
    stream.now += 2 * PAUSE_S
    assert stream.apart() == 8 * SOME


def test_only_one_that_comes_by_itself_is_alone() -> None:
    stream = Stream(2 * ALONE_S)
    alone = []
    for _ in range(SOME):
        stream.came()
        alone.append(stream.gather.alone)
    assert all(alone)
    assert stream.came() == GATHER
    assert not stream.gather.alone, "it waits for others"
    stream.gather.handed_over(1)
    stream.gap_s = ALONE_S / 2
    stream.came()
    assert not stream.gather.alone, "others came just before"
