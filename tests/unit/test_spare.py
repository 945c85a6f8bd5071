"""The spare: when there is one, who gets it, and what becomes of one that is of no use. No process is started."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from gen_worker.pipe.messages import PIPE_PROTOCOL, CudaUse, Fatal, FunctionInfo, Init, Parked, Ready, Take, encode
from supervisor import respawn
from supervisor.child import ExitCause
from supervisor.devices import Device
from supervisor.executor_handle import HandleState
from supervisor.pool import BOOT_FAILURES
from supervisor.spare import ASK_NVML
from tests.support.rig import until, use_recording_children
from tests.unit.test_pool import Slots, SpawningChild

GPUS = [Device(f"GPU-{index}", "H100", 80, "90", "cuda:0", f"GPU-{index}") for index in range(2)]


class SpareChild(SpawningChild):
    """Those that were started as spares, the newest last."""

    all: list[SpareChild] = []  # noqa: RUF012  (emptied for each test)
    env: dict[str, str]

    async def spawn(self, *command: object) -> None:
        await super().spawn(*command)
        self.env = dict(command[2])  # type: ignore[call-overload]
        self.all.append(self)


class Spares(Slots):
    @property
    def spare(self) -> SpareChild:
        return SpareChild.all[-1]

    async def serving(self) -> None:
        """All slots serve, and the spare was started."""
        count = len(SpareChild.all) + 1
        self.pool.start()
        await self.started(len(self.pool.slots))
        for slot in self.pool.slots:
            self.ready(slot.number)
        await self.spares(count)

    async def spares(self, count: int) -> None:
        await until(lambda: len(SpareChild.all) == count and bool(self.spare.sent))

    def park(self, cuda: CudaUse = "") -> None:
        self.spare.on_frame(encode(Parked(PIPE_PROTOCOL, cuda)))

    def is_in(self, slot: int) -> bool:
        handle = self.pool._slots[slot].handle
        return handle is not None and handle._child is self.spare  # type: ignore[comparison-overlap]

    def die(self, slot: int = 0) -> None:
        self.child(slot).on_exit(ExitCause(-9, ""))


@pytest.fixture
async def slots(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Spares]:
    use_recording_children(monkeypatch.setattr)
    monkeypatch.setattr("supervisor.executor_handle.Child", SpawningChild)
    monkeypatch.setattr("supervisor.spare.Child", SpareChild)
    monkeypatch.setattr(SpareChild, "all", [])
    monkeypatch.setattr(respawn, "BACKOFF_FIRST_S", 0.001)
    slots = Spares(2, GPUS, warm_spare=True)
    yield slots
    await slots.pool.stop("the test ends", 0.0)


async def test_it_starts_when_all_slots_serve_and_not_before(slots: Spares) -> None:
    slots.pool.start()
    await slots.started(2)
    slots.ready(0)
    await asyncio.sleep(0.01)
    assert SpareChild.all == []
    slots.ready(1)
    await slots.spares(1)
    (init,) = slots.spare.sent
    assert isinstance(init, Init)
    assert init.spare
    assert slots.spare.env == ASK_NVML
    view = slots.pool.spare
    assert view is not None
    assert not view.parked
    assert len(slots.pool.handles) == len(slots.pool.ready) == 2, "it is in no count of executors"


async def test_the_slot_of_a_dead_executor_takes_it(slots: Spares) -> None:
    await slots.serving()
    slots.park()
    slots.die(1)
    await until(lambda: slots.is_in(1))
    assert slots.spare.sent[1:] == [Take(1, "cuda:0", "GPU-1")]
    assert (slots.pool.spare, slots.pool.ready[0].slot) == (None, 0)
    handle = slots.pool.handles[1]
    assert (handle.name, handle.state) == ("1.1", HandleState.STARTING)
    slots.ready(1)
    assert handle.state is HandleState.READY
    await slots.spares(2)
    assert slots.pool._slots[1].deaths_in_a_row == 1


async def test_one_that_still_imports_is_not_waited_for(slots: Spares) -> None:
    await slots.serving()
    slots.die(0)
    await slots.started(2)
    assert not slots.is_in(0)
    slots.ready(0)
    slots.park()
    await asyncio.sleep(0.01)
    assert len(SpareChild.all) == 1, "there is one already"
    slots.die(0)
    await until(lambda: slots.is_in(0))


async def test_a_crash_loop_does_not_get_faster(slots: Spares, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(respawn, "BACKOFF_FIRST_S", 3600.0)
    await slots.serving()
    slots.park()
    slots.die(0)
    await until(lambda: slots.is_in(0))
    slots.ready(0)
    await slots.spares(2)
    slots.park()
    slots.die(0)
    await asyncio.sleep(0.01)
    assert slots.pool._slots[0].handle is None, "its slot waits as it would without a spare"
    assert slots.pool.spare is not None
    slots.die(1)
    await until(lambda: slots.is_in(1))


async def test_a_recycled_executor_s_slot_takes_it(slots: Spares) -> None:
    await slots.serving()
    slots.park()
    slots.pool.ready[0].recycle("it kept 3 GiB")
    slots.child(0).on_exit(ExitCause(0, ""))
    await until(lambda: slots.is_in(0))


async def test_slots_that_are_given_up_are_not_waited_for(slots: Spares) -> None:
    slots.pool.start()
    await slots.started(2)
    slots.ready(0)
    for _ in range(BOOT_FAILURES):
        await until(lambda: slots.pool._slots[1].handle is not None)
        slots.child(1).on_exit(ExitCause(1, ""))
    await slots.spares(1)


async def test_one_that_dies_in_reserve_counts_against_no_slot(slots: Spares, caplog: pytest.LogCaptureFixture) -> None:
    await slots.serving()
    for count in range(2, 6):
        slots.spare.on_frame(encode(Fatal("import", "no module x")))
        slots.spare.on_exit(ExitCause(3, ""))
        await slots.spares(count)
    assert slots.pool._spare is not None
    assert slots.pool._spare._respawn.deaths_in_a_row == 4
    assert [(slot.boot_failures, slot.deaths_in_a_row) for slot in slots.pool._slots] == [(0, 0), (0, 0)]
    assert slots.listener.died == []
    assert "the spare was lost: no module x (exited with code 3)" in caplog.text


async def test_one_that_keeps_dying_is_started_later_and_later(slots: Spares, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(respawn, "BACKOFF_FIRST_S", 3600.0)
    await slots.serving()
    slots.spare.on_exit(ExitCause(-11, ""))
    await slots.spares(2)
    slots.spare.on_exit(ExitCause(-11, ""))
    slots.die(0)
    await slots.started(2)
    slots.ready(0)
    await asyncio.sleep(0.01)
    assert len(SpareChild.all) == 2, "also when a slot serves again meanwhile"


async def test_one_that_dies_between_its_slot_and_its_first_run(slots: Spares) -> None:
    await slots.serving()
    slots.park()
    slots.die(0)
    await until(lambda: slots.is_in(0))
    slots.die(0)
    await until(lambda: slots.pool._slots[0].handle is not None)
    assert not slots.is_in(0)
    slot = slots.pool._slots[0]
    assert (slot.boot_failures, slot.deaths_in_a_row) == (0, 1), "the first death alone was the slot's"
    slots.ready(0)
    await slots.spares(2)


async def test_one_that_does_not_serve_when_told_to_is_killed(slots: Spares, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervisor.executor_handle.TAKE_S", 0.001)
    await slots.serving()
    slots.park()
    spare = slots.spare
    slots.die(0)
    await until(lambda: spare.killed == ["as a spare it had 0.001 s to serve its slot"])
    await until(lambda: slots.pool._slots[0].handle is not None and not slots.is_in(0))


async def test_one_that_serves_in_time_is_left_alone(slots: Spares, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("supervisor.executor_handle.TAKE_S", 0.02)
    await slots.serving()
    slots.park()
    spare = slots.spare
    slots.die(0)
    await until(lambda: slots.is_in(0))
    slots.ready(0)
    await asyncio.sleep(0.04)
    assert spare.killed == []


@pytest.mark.parametrize("cuda", ["context", "driver"])
async def test_modules_that_start_cuda_have_none_and_the_log_says_it_once(
    slots: Spares, cuda: CudaUse, caplog: pytest.LogCaptureFixture
) -> None:
    await slots.serving()
    slots.park(cuda)
    assert slots.pool.spare is None
    assert len(slots.spare.killed) == 1
    for _ in range(2):
        slots.die(0)
        await slots.started(2)
        slots.ready(0)
    await asyncio.sleep(0.01)
    assert len(SpareChild.all) == 1
    assert caplog.text.count("no spare is kept") == 1
    slots.pool.new_code()
    slots.die(0)
    await slots.started(2)
    slots.ready(0)
    await slots.spares(2)


async def test_with_one_gpu_its_driver_may_be_started(monkeypatch: pytest.MonkeyPatch, slots: Spares) -> None:
    one = Spares(1, GPUS[:1], warm_spare=True)
    await one.serving()
    one.park("driver")
    one.die(0)
    await until(lambda: one.is_in(0))
    await one.pool.stop("the test ends", 0.0)


async def test_new_code_discards_it(slots: Spares) -> None:
    await slots.serving()
    slots.park()
    old = slots.spare
    slots.pool.new_code()
    assert old.killed == ["there is new code"]
    assert slots.pool.spare is None
    slots.die(0)
    await slots.started(2)
    assert not slots.is_in(0)
    slots.ready(0)
    await slots.spares(2)


@pytest.mark.parametrize("parked", [False, True])
async def test_stop_ends_it_and_no_other_starts(slots: Spares, parked: bool) -> None:
    await slots.serving()
    if parked:
        slots.park()
    await slots.pool.stop("the worker shuts down", 0.0)
    assert slots.spare.killed == ["the worker shuts down"]
    assert slots.pool._spare is not None
    assert slots.pool._spare._living == set(), "its end was waited for"
    await asyncio.sleep(0.01)
    assert len(SpareChild.all) == 1


@pytest.mark.parametrize(
    "said", [encode(Ready(PIPE_PROTOCOL, (FunctionInfo("f", "sync"),), {})), b"\xc1", encode(Parked(PIPE_PROTOCOL + 1))]
)
async def test_one_that_says_what_it_may_not_is_killed(slots: Spares, said: bytes) -> None:
    await slots.serving()
    slots.spare.on_frame(said)
    assert len(slots.spare.killed) == 1
    await slots.spares(2)


async def test_an_executor_that_has_a_slot_may_not_wait_for_one(slots: Spares) -> None:
    await slots.serving()
    slots.child(0).on_frame(encode(Parked(PIPE_PROTOCOL)))
    assert slots.child(0).killed == ["it said that it waits for a slot, and has one"]


async def test_one_that_can_not_be_started(slots: Spares, monkeypatch: pytest.MonkeyPatch) -> None:
    slots.pool.start()
    await slots.started(2)
    monkeypatch.setattr(SpareChild, "error", OSError(12, "Cannot allocate memory"))
    slots.ready(0)
    slots.ready(1)
    await until(lambda: SpareChild.spawned >= 2)
    monkeypatch.setattr(SpareChild, "error", None)
    await slots.spares(1)


async def test_without_the_setting_there_is_none(slots: Spares) -> None:
    plain: Any = Slots(1)
    plain.pool.start()
    await plain.started(1)
    plain.ready(0)
    await asyncio.sleep(0.01)
    assert SpareChild.all == []
    assert plain.pool.spare is None
    await plain.pool.stop("the test ends", 0.0)
