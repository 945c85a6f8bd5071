"""Replacing executors on purpose: one by one, drained, without backoff; and what broken code costs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
import pytest

from gen_worker.pipe.messages import PIPE_PROTOCOL, FunctionInfo, InjectionInfo, Ready, Shutdown
from supervisor.child import ExitCause
from supervisor.executor_handle import HandleState
from supervisor.pool import BOOT_FAILURES
from supervisor.renewal import Renewal
from tests.support.rig import Rig, function, until, use_recording_children
from tests.unit.test_pool import Slots, SpawningChild, slots

__all__ = ["slots"]  # a fixture


async def serving(slots: Slots) -> None:
    slots.pool.start()
    await slots.started(2)
    slots.ready(0)
    slots.ready(1)


def renewal(slots: Slots, prepare: Callable[[], bool] = lambda: True, drain_s: float = 30.0) -> Renewal:
    return Renewal(lambda: slots.pool, drain_s, prepare)


def is_asked_to_leave(slots: Slots, slot: int) -> bool:
    return any(isinstance(message, Shutdown) for message in slots.child(slot).sent)


async def test_slots_are_renewed_one_after_the_other(slots: Slots) -> None:
    await serving(slots)
    renewal(slots).request()
    await until(lambda: is_asked_to_leave(slots, 0))
    assert [handle.name for handle in slots.pool.ready] == ["1"], "the other one serves meanwhile"
    slots.child(0).on_exit(ExitCause(0, ""))
    await until(lambda: len(slots.pool.handles) == 2)
    assert not is_asked_to_leave(slots, 1), "the first is not back yet"
    slots.ready(0)
    await until(lambda: is_asked_to_leave(slots, 1))
    slots.child(1).on_exit(ExitCause(0, ""))
    await until(lambda: len(slots.pool.handles) == 2)
    slots.ready(1)
    assert sorted(handle.name for handle in slots.pool.ready) == ["0.1", "1.1"]
    assert SpawningChild.spawned == 4
    assert slots.pool._slots[0].deaths_in_a_row == 0, "a wanted death costs no backoff"


async def test_broken_code_costs_one_slot_until_the_next_renewal(slots: Slots) -> None:
    await serving(slots)
    renew = renewal(slots)
    renew.request()
    await until(lambda: is_asked_to_leave(slots, 0))
    slots.child(0).on_exit(ExitCause(0, ""))
    for _ in range(BOOT_FAILURES):
        await until(lambda: slots.pool._slots[0].handle is not None)
        slots.child(0).on_exit(ExitCause(3, ""))
    await until(lambda: renew._task is not None and renew._task.done())
    assert slots.pool.open_slots == 1
    assert [handle.name for handle in slots.pool.ready] == ["1"], "it keeps the code that works"
    renew.request()
    await until(lambda: slots.pool._slots[0].handle is not None)
    slots.ready(0)
    await until(lambda: is_asked_to_leave(slots, 1))
    assert slots.pool.open_slots == 2


async def test_requests_during_a_renewal_are_one_more_renewal(slots: Slots) -> None:
    prepared: list[int] = []

    def prepare() -> bool:
        prepared.append(1)
        return False

    renew = renewal(slots, prepare)
    for _ in range(3):
        renew.request()
    await until(lambda: renew._task is not None and renew._task.done())
    assert len(prepared) == 1, "nothing was under way, so one does for all"
    assert SpawningChild.spawned == 0, "a project that can't be used renews nothing"


async def test_what_does_not_drain_or_leave_is_killed(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervisor.pool.LEAVE_S", 0.01)
    await serving(slots)
    busy = slots.pool._slots[0].handle
    assert busy is not None
    busy._idle.clear()  # as with a run
    renewal(slots, drain_s=0.01).request()
    child = slots.child(0)
    await until(lambda: bool(child.killed))
    assert child.killed[0] == "it was asked for new executors, and it had runs after 0.01 s"
    await until(lambda: len(slots.pool.handles) == 2 and slots.child(0) is not child)
    slots.ready(0)
    stubborn = slots.child(1)  # is asked to leave and does not
    await until(lambda: bool(stubborn.killed))
    assert stubborn.killed == ["it was asked for new executors"]


async def test_a_slot_that_is_being_filled_gets_one_executor(slots: Slots) -> None:
    await serving(slots)
    slots.child(0).on_exit(ExitCause(-9, ""))
    renewing = asyncio.ensure_future(slots.pool.renew(0, "new code", 30.0))
    slots.pool._spawn(slots.pool._slots[0])  # as the timer of its replacement does, before the renewal's first step
    await until(lambda: len(slots.pool.handles) == 2)
    slots.ready(0)
    assert await renewing is True
    assert SpawningChild.spawned == 3


async def test_an_executor_that_fails_to_start_while_it_is_renewed(
    slots: Slots, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = asyncio.Event()

    async def spawn(*_: object) -> None:
        if SpawningChild.error is not None:
            await go_on.wait()
            raise SpawningChild.error

    monkeypatch.setattr(SpawningChild, "spawn", spawn)
    SpawningChild.error = OSError(12, "Cannot allocate memory")
    slots.pool.start()
    await slots.started(2)
    first = slots.child(0)
    renewing = asyncio.ensure_future(slots.pool.renew(0, "new code", 30.0))
    await until(lambda: is_asked_to_leave(slots, 0))
    go_on.set()
    await until(lambda: not slots.pool._slots[0].renewing)
    SpawningChild.error = None
    await until(lambda: slots.pool._slots[0].handle is not None and slots.child(0) is not first)
    slots.ready(0)
    assert await asyncio.wait_for(renewing, 5), "it does not wait for the end of what never began"


async def test_a_stop_during_a_renewal_is_a_stop(slots: Slots) -> None:
    await serving(slots)
    renewing = asyncio.ensure_future(slots.pool.renew(0, "new code", 30.0))
    await until(lambda: is_asked_to_leave(slots, 0))
    await slots.pool.stop("the worker shuts down", 0.0)
    assert await renewing is False
    assert SpawningChild.spawned == 2


async def test_a_handle_says_when_it_has_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    use_recording_children(monkeypatch.setattr)
    rig = Rig([function()])
    handle = rig.executors[0].handle
    assert await handle.wait_idle(0) is True
    rig.submit("r")
    assert await handle.wait_idle(0.001) is False
    waiting = asyncio.ensure_future(handle.wait_idle(5.0))
    rig.executors[0].succeed("r")
    assert await waiting is True
    rig.close()


# -- functions of other code ----------------------------------------------------------------------


async def test_functions_that_no_executor_has_any_more_are_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    use_recording_children(monkeypatch.setattr)
    rig = Rig([function("old", limit=1), function("both", limit=1)], executors=2)
    old, other = rig.executors
    for run_id, name in (("a", "old"), ("b", "old"), ("c", "old"), ("d", "both")):
        rig.submit(run_id, name)
    old.succeed("a")
    old.handle.drain()
    new = rig.add_executor(ready=False)
    new.say(Ready(PIPE_PROTOCOL, (function("both", limit=1), function("new")), {}))
    assert sorted(rig.dispatcher.functions) == ["both", "new", "old"], "the other executor still has it"
    other.succeed("b")
    other.handle.drain()
    rig.submit("e", "old")
    newer = rig.add_executor(ready=False)
    newer.say(Ready(PIPE_PROTOCOL, (function("both", limit=1), function("new")), {}))
    assert sorted(rig.dispatcher.functions) == ["both", "new"]
    refused = rig.results()["e"]
    assert (refused.error_type, refused.safe_message) == ("validation", "unknown function")
    assert old.handle.state is HandleState.DRAINING
    rig.close()


async def test_a_function_with_other_limits_and_models_is_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    use_recording_children(monkeypatch.setattr)
    rig = Rig([function("f", limit=1), function("g", limit=1)], models=["cozy:o/m:latest"], labels={"m": "cozy:o/m"})
    first = rig.executors[0]
    for run_id, name in (("f1", "f"), ("f2", "f"), ("f3", "f"), ("g1", "g"), ("g2", "g")):
        rig.submit(run_id, name)
    assert first.runs == ["f1", "g1"]
    first.handle.drain()
    wider = function("f", limit=2)
    other_models = msgspec.structs.replace(
        function("g", limit=1), injections=(InjectionInfo("p0", "t.T", "deployment", "m"),)
    )
    second = rig.add_executor(ready=False)
    second.say(Ready(PIPE_PROTOCOL, (wider, other_models), {}))
    assert second.runs == ["f2", "f3"], "two at once now"
    answer = rig.results()["g2"]
    assert (answer.error_type, answer.retryable, answer.safe_message) == ("retryable", True, "worker busy")
    assert "models of its function changed" in answer.error_message
    rig.close()


async def test_new_code_forgives_what_killed_the_old(monkeypatch: pytest.MonkeyPatch) -> None:
    use_recording_children(monkeypatch.setattr)
    rig = Rig([FunctionInfo("f", "sync")])
    for number in range(3):
        rig.submit(f"r{number}")
        rig.executors[-1].die()
        rig.add_executor()
    rig.results()
    rig.submit("refused")
    assert rig.results()["refused"].error_type == "fatal"
    rig.dispatcher.new_code()
    rig.submit("again")
    assert rig.executors[-1].runs == ["again"]
    rig.close()
