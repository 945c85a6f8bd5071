"""What the development server says is wrong, from the lines of its worker's log."""

from __future__ import annotations

from pathlib import Path

import pytest

from gen_worker.serve.local_worker import LocalOptions, LocalWorker
from gen_worker.serve.state import RENEWED, DevState, Phase
from gen_worker.serve.worker_log import LogLine


@pytest.fixture
def state(tmp_path: Path) -> DevState:
    state = DevState("a project", LocalWorker(LocalOptions(tmp_path, {})))
    state.enter(Phase.SERVING)
    return state


def error(state: DevState, message: str, logger: str = "supervisor.pool") -> None:
    state.take_line(LogLine(message, level="error", logger=logger))


def ready(state: DevState, name: str) -> None:
    state.take_line(LogLine(f"executor {name} is ready: greet", level="info", logger="supervisor.dispatcher"))


def test_an_executor_that_is_back_is_no_problem(state: DevState) -> None:
    error(state, "executor of slot 0 died: killed by SIGSEGV; replaced in 0 s")
    assert state.problem.startswith("executor of slot 0 died")
    ready(state, "0.1")
    assert state.problem == ""


def test_only_its_own_slot_clears_it(state: DevState) -> None:
    error(state, "executor of slot 0 died: killed by SIGSEGV; replaced in 0 s")
    error(state, "executor of slot 1 failed to start (1 of 3): no module; replaced in 1 s")
    ready(state, "2")
    assert state.problem.startswith("executor of slot 1")
    ready(state, "1.1")
    assert state.problem.startswith("executor of slot 0"), "that one is still away"
    ready(state, "0.3")
    assert state.problem == ""


def test_code_that_does_not_start_stays_a_problem_until_it_does(state: DevState) -> None:
    error(state, "the new executor of slot 0 does not serve: 1 others keep what they have", "supervisor.renewal")
    ready(state, "1")
    assert "slot 0 does not serve" in state.problem
    state.take_line(LogLine(RENEWED, level="info", logger="supervisor.renewal"))
    assert state.problem == ""


def test_another_problem_is_not_cleared_by_an_executor(state: DevState) -> None:
    state.enter(Phase.SERVING, "something else")
    ready(state, "0")
    assert state.problem == "something else"


def test_errors_of_tenants_are_no_problem_of_the_worker(state: DevState) -> None:
    error(state, "executor of slot 0 died, says a function", logger="executor")
    assert state.problem == ""
