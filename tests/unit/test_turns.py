"""What was sent before the loop looked at its connections again."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import pytest

from supervisor.turns import LOOKS, Turns


class Loop:
    """Runs what was called for the next turn when the test says so."""

    def __init__(self) -> None:
        self.now = 10.0
        self._next: deque[Callable[[], None]] = deque()

    def call_soon(self, call: Callable[[], None]) -> None:
        self._next.append(call)

    def turn(self) -> None:
        for _ in range(len(self._next)):
            self._next.popleft()()

    @property
    def is_idle(self) -> bool:
        return not self._next


@pytest.fixture
def loop() -> Loop:
    return Loop()


@pytest.fixture
def turns(loop: Loop) -> Turns:
    return Turns(loop.call_soon, lambda: loop.now)


def test_a_send_is_unseen_until_the_loop_has_looked(loop: Loop, turns: Turns) -> None:
    assert turns.unseen_since(10.0) == math.inf
    turns.sent(10.0)
    for _ in range(LOOKS):
        assert turns.unseen_since(11.0) == 10.0
        loop.turn()
    assert turns.unseen_since(11.0) == math.inf
    assert loop.is_idle, "it costs nothing while nothing is sent"


def test_an_end_that_was_noticed_before_the_look(loop: Loop, turns: Turns) -> None:
    """The process stood still, sent first, and found then that the stream had ended."""
    turns.sent(10.0)
    loop.now = 10.5
    for _ in range(LOOKS):
        loop.turn()
    assert turns.unseen_since(10.2) == 10.0
    assert turns.unseen_since(10.5) == math.inf


def test_what_is_sent_meanwhile_has_turns_of_its_own(loop: Loop, turns: Turns) -> None:
    turns.sent(10.0)
    loop.turn()
    turns.sent(10.1)
    turns.sent(10.2)
    for _ in range(LOOKS - 1):
        loop.turn()
    assert turns.unseen_since(11.0) == 10.1
    for _ in range(LOOKS):
        loop.turn()
    assert turns.unseen_since(11.0) == math.inf
    assert loop.is_idle
