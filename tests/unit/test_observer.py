"""Several observers: all are told, and one that fails harms nobody."""

from __future__ import annotations

from typing import Any, cast

import pytest

from supervisor.observer import Observer, Observers


def test_every_report_reaches_all() -> None:
    told: list[str] = []

    class Noting(Observer):
        def __getattribute__(self, name: str) -> Any:
            return lambda *_: told.append(name)

    reports = [name for name in vars(Observer) if not name.startswith("_")]
    both: Any = Observers(Noting(), None, Noting())
    for name in reports:
        both_method = getattr(both, name)
        both_method(*[None] * (both_method.__code__.co_argcount - 1))
    assert told == [name for name in reports for _ in range(2)]


def test_one_that_fails_is_told_nothing_more(caplog: pytest.LogCaptureFixture) -> None:
    told: list[str] = []

    class Broken(Observer):
        def run_started(self, run: object) -> None:
            told.append("broken")
            raise ZeroDivisionError

    class Fine(Observer):
        def run_started(self, run: object) -> None:
            told.append("fine")

    observers = Observers(Broken(), Fine())
    for _ in range(3):
        observers.run_started(cast("Any", None))
    assert told == ["broken", "fine", "fine", "fine"]
    assert caplog.text.count("Broken takes note of nothing any more") == 1
