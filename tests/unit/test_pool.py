"""Slots and their executors: replacement, backoff, the breaker, and the way down. No process is started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

import supervisor.respawn as module
from gen_worker.pipe.messages import PIPE_PROTOCOL, Fatal, FunctionInfo, Init, Ready, Shutdown, encode
from supervisor.child import ExitCause
from supervisor.devices import CpuProbe, Device
from supervisor.executor_handle import ExecutorHandle, HandleState
from supervisor.pool import BOOT_FAILURES, Pool, _Slot
from supervisor.respawn import ALIVE_S, BACKOFF_MAX_S
from tests.support.rig import RecordingChild, until, use_recording_children


class SpawningChild(RecordingChild):
    """Starts at once, or not at all."""

    error: Exception | None = None
    spawned = 0

    async def spawn(self, *command: object) -> None:
        type(self).spawned += 1
        if self.error:
            raise self.error

    def kill(self, reason: str) -> None:
        super().kill(reason)
        asyncio.get_running_loop().call_soon(self.on_exit, ExitCause(-9, reason))


class Listener:
    """HandleEvents that only count."""

    def __init__(self) -> None:
        self.died: list[tuple[ExecutorHandle, str]] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None

    def executor_died(self, handle: ExecutorHandle, cause: ExitCause) -> None:
        self.died.append((handle, str(cause)))


class Slots:
    def __init__(self, count: int, devices: Sequence[Device] | None = None, *, warm_spare: bool = False) -> None:
        self.listener = Listener()
        self.all_closed = 0
        init = Init(PIPE_PROTOCOL, 0, "cpu", (), "/", "/run", 1, 5.0, 0, 0, 0, {})
        self.pool = Pool(
            devices or CpuProbe(count).devices,
            init=lambda _slot, _device: init,
            env=lambda _device: {},
            threads=1,
            events=self.listener,
            on_all_closed=self._closed,
            warm_spare=warm_spare,
        )

    def _closed(self) -> None:
        self.all_closed += 1

    def child(self, slot: int = 0) -> RecordingChild:
        handle = self.pool._slots[slot].handle
        assert handle is not None
        child: Any = handle._child
        assert isinstance(child, RecordingChild)
        return child

    def ready(self, slot: int = 0) -> None:
        self.child(slot).on_frame(encode(Ready(PIPE_PROTOCOL, (FunctionInfo("f", "sync"),), {})))

    async def started(self, count: int) -> None:
        await until(lambda: len(self.pool.handles) == count)


@pytest.fixture
async def slots(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Slots]:
    use_recording_children(monkeypatch.setattr)
    monkeypatch.setattr("supervisor.executor_handle.Child", SpawningChild)
    monkeypatch.setattr(SpawningChild, "error", None)
    monkeypatch.setattr(SpawningChild, "spawned", 0)
    monkeypatch.setattr(module, "BACKOFF_FIRST_S", 0.001)
    slots = Slots(2)
    yield slots
    await slots.pool.stop("the test ends", 0.0)


def test_backoff() -> None:
    slot = _Slot(0, CpuProbe(1).devices[0])
    delays = [slot.delay_after_death(1.0) for _ in range(2000)]
    assert delays[:9] == [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0]
    assert set(delays[8:]) == {BACKOFF_MAX_S}, "a slot may die for days"
    assert slot.delay_after_death(ALIVE_S) == 0.0
    assert slot.delay_after_death(ALIVE_S - 1) == 1.0


async def test_a_recycled_executor_is_replaced_at_once_however_often(
    slots: Slots, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "BACKOFF_FIRST_S", 3600.0)
    slots.pool.start()
    await slots.started(2)
    for incarnation in range(1, 4):
        slots.ready(0)
        handle = slots.pool.ready[0]
        handle.recycle("it kept 3 GiB")
        handle.recycle("and again")
        assert (handle.state, slots.pool.ready) == (HandleState.DRAINING, [])
        assert slots.child(0).sent[-1] == Shutdown()
        slots.child(0).on_exit(ExitCause(0, ""))
        await until(lambda: slots.pool._slots[0].handle is not None)
        assert slots.pool.handles[0].incarnation == incarnation
    assert "died" not in caplog.text
    assert slots.pool._slots[0].deaths_in_a_row == 0


async def test_a_recycled_executor_that_stays_is_helped(slots: Slots, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervisor.executor_handle.LEAVE_S", 0.001)
    slots.pool.start()
    await slots.started(2)
    slots.ready(0)
    child = slots.child(0)
    slots.pool.ready[0].recycle("it kept 3 GiB")
    await until(lambda: child.killed == ["it stayed after it was asked to leave"])
    await until(lambda: slots.pool.handles[0].incarnation == 1)


async def test_a_dead_executor_is_replaced_by_a_new_incarnation(slots: Slots) -> None:
    slots.pool.start()
    await slots.started(2)
    slots.ready(0)
    (first,) = slots.pool.ready
    slots.child(0).on_exit(ExitCause(-9, ""))
    assert first.state is HandleState.DEAD
    assert slots.listener.died == [(first, "killed by SIGKILL")]
    assert slots.pool.ready == []
    await slots.started(2)
    assert sorted(handle.name for handle in slots.pool.handles) == ["0.1", "1"]
    assert slots.pool.open_slots == 2


async def test_three_failed_starts_close_the_slot(slots: Slots) -> None:
    slots.pool.start()
    for slot in (0, 1):
        for _ in range(BOOT_FAILURES):
            await until(lambda slot=slot: slots.pool._slots[slot].handle is not None)  # type: ignore[misc]
            slots.child(slot).on_frame(encode(Fatal("no_functions", "no functions in module x")))
            slots.child(slot).on_exit(ExitCause(1, ""))
        assert slots.pool.open_slots == 1 - slot
    assert slots.all_closed == 1
    assert slots.pool.last_reason == "no_functions"
    assert slots.pool.last_failure == "no functions in module x (exited with code 1)"


async def test_one_good_start_forgives_the_failed_ones(slots: Slots) -> None:
    slots.pool.start()
    for good in (False, False, True, False, False):
        await until(lambda: slots.pool._slots[0].handle is not None)
        if good:
            slots.ready(0)
        slots.child(0).on_exit(ExitCause(1, ""))
    assert slots.pool.open_slots == 2


@pytest.mark.parametrize("error", [OSError(12, "Cannot allocate memory"), ValueError("embedded null byte")])
async def test_processes_that_can_not_be_started(slots: Slots, error: Exception) -> None:
    SpawningChild.error = error
    slots.pool.start()
    await until(lambda: slots.all_closed == 1)
    assert SpawningChild.spawned == 2 * BOOT_FAILURES
    assert str(error) in slots.pool.last_failure
    assert slots.pool.handles == []


async def test_stop_asks_first_and_kills_then(slots: Slots) -> None:
    slots.pool.start()
    await slots.started(2)
    polite, stubborn = slots.child(0), slots.child(1)
    stopping = asyncio.ensure_future(slots.pool.stop("the worker shuts down", 0.02))
    await until(lambda: bool(polite.sent and isinstance(polite.sent[-1], Shutdown)))
    polite.on_exit(ExitCause(0, ""))
    await stopping
    assert polite.killed == []
    assert stubborn.killed == ["the worker shuts down"]
    assert slots.pool.handles == []
    await asyncio.sleep(0.01)
    assert SpawningChild.spawned == 2, "nothing is replaced any more"


async def test_a_start_that_was_due_at_the_stop_does_not_happen(slots: Slots) -> None:
    slots.pool.start()
    await slots.pool.stop("the worker shuts down", 1.0)
    await asyncio.sleep(0.01)
    assert SpawningChild.spawned == 0
    assert slots.pool.handles == []
