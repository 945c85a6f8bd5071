"""A run's states: every move is one that the diagram has, and the end comes once."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from gen_worker.pipe.messages import Failure
from supervisor import runs
from supervisor.runs import Run, RunState

MOVES = {
    RunState.QUEUED: {RunState.WAITING_MODEL, RunState.RUNNING, RunState.SUCCEEDED, RunState.FAILED},
    RunState.WAITING_MODEL: {RunState.RUNNING, RunState.SUCCEEDED, RunState.FAILED},
    RunState.RUNNING: {RunState.CANCELING, RunState.SUCCEEDED, RunState.FAILED},
    RunState.CANCELING: {RunState.SUCCEEDED, RunState.FAILED},
    RunState.SUCCEEDED: set(),
    RunState.FAILED: set(),
}


class Timer:
    def __init__(self) -> None:
        self.canceled = 0

    def cancel(self) -> None:
        self.canceled += 1


def new_run() -> Run:
    return Run(1, "run-1", "draw", b"payload", (("pipe", "m"),), 1500, "tenant", "user", 10.0)


class RunMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.run = new_run()
        self.timer = Timer()
        self.run.timer = cast("asyncio.TimerHandle", self.timer)
        self.last = self.run.state
        self.ends = 0
        self.causes: list[str] = []

    @rule()
    def wait(self) -> None:
        self.run.wait_for_model()

    @rule(handle=st.sampled_from(["a", "b"]))
    def start(self, handle: Any) -> None:
        could = self.last in (RunState.QUEUED, RunState.WAITING_MODEL)
        assert self.run.start(handle, 12.0) is could
        if could:
            assert (self.run.handle, self.run.started, self.run.payload) == (handle, 12.0, b"")

    @rule(cause=st.sampled_from(["canceled", "timeout"]))
    def cancel(self, cause: Any) -> None:
        could = self.last is RunState.RUNNING
        assert self.run.begin_cancel(cause) is could
        if could:
            self.causes.append(cause)
        if self.causes:
            assert self.run.cause == self.causes[0]

    @rule(failure=st.sampled_from([None, runs.canceled(), runs.crashed("x")]))
    def finish(self, failure: Failure | None) -> None:
        ended = self.run.finish(failure)
        assert ended is (self.ends == 0)
        self.ends += ended
        assert self.ends == 1
        assert self.run.timer is None
        assert self.timer.canceled == 1
        assert self.run.payload == b""
        if ended:
            assert self.run.state is (RunState.SUCCEEDED if failure is None else RunState.FAILED)

    @invariant()
    def only_moves_of_the_diagram(self) -> None:
        if self.run.state is not self.last:
            assert self.run.state in MOVES[self.last]
            self.last = self.run.state
        assert self.run.state.is_terminal is (self.ends == 1)
        assert len(self.causes) <= 1


TestRunMachine = RunMachine.TestCase


def test_terminal_states() -> None:
    assert {state for state in RunState if state.is_terminal} == {RunState.SUCCEEDED, RunState.FAILED}


def test_answers_are_what_the_protocol_says() -> None:
    assert runs.busy("d") == Failure("retryable", "worker busy", "d", retryable=True)
    assert runs.crashed("d") == Failure("retryable", "worker process crashed", "d", retryable=True)
    assert runs.invalid("no") == Failure("validation", "no", "no")
    assert runs.invalid("no", "more") == Failure("validation", "no", "more")
    assert runs.canceled() == Failure("canceled", "canceled", "canceled by the scheduler")


def test_a_canceled_run_is_answered_by_its_cause() -> None:
    run = new_run()
    run.start(cast("Any", "handle"), 1.0)
    run.begin_cancel("timeout")
    assert run.failure_of_cancel("killed") == Failure(
        "timeout", "deadline exceeded", "the run did not end within its timeout_ms of 1500; killed"
    )
    run = new_run()
    run.start(cast("Any", "handle"), 1.0)
    run.begin_cancel("canceled")
    assert run.failure_of_cancel("it stopped") == Failure("canceled", "canceled", "it stopped")
