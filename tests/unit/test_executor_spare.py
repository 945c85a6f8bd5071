"""The executor's side of a spare: what it says, when it may be bound to a device, and its priority meanwhile."""

from __future__ import annotations

import ctypes
import os
import queue
import threading
from typing import Any

import pytest

from executor import spare, torch_state
from executor.boot import BootError
from executor.torch_state import cuda_use
from gen_worker.pipe.messages import PIPE_PROTOCOL, CudaUse, Init, Parked, Take, Upward

INIT = Init(PIPE_PROTOCOL, -1, "cuda:0", ("m",), "/", "/run", 1, 5.0, 0, 0, 0, {}, spare=True)
NOT_INITIALIZED = 3


class Driver:
    """libcuda as far as it is asked; `started`: cuInit was called; `contexts`: which devices have a primary one."""

    def __init__(self, *, started: bool, contexts: tuple[bool, ...] = ()) -> None:
        self.started, self.contexts = started, contexts

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802  (libcuda's)
        if not self.started:
            return NOT_INITIALIZED
        count._obj.value = len(self.contexts)
        return 0

    def cuDevicePrimaryCtxGetState(self, ordinal: int, flags: Any, active: Any) -> int:  # noqa: N802  (libcuda's)
        assert isinstance(flags._obj, ctypes.c_uint)
        active._obj.value = int(self.contexts[ordinal])
        return 0


class Link:
    def __init__(self) -> None:
        self.sent: list[Upward] = []

    def send(self, message: Upward) -> None:
        self.sent.append(message)


@pytest.mark.parametrize(
    ("driver", "use"),
    [
        (None, ""),
        (Driver(started=False), ""),
        (Driver(started=True, contexts=(False, False)), "driver"),
        (Driver(started=True, contexts=(False, True)), "context"),
    ],
)
def test_what_was_made_of_cuda(monkeypatch: pytest.MonkeyPatch, driver: Driver | None, use: CudaUse) -> None:
    def loaded(name: str, mode: int) -> Driver:
        assert mode & os.RTLD_NOLOAD, "asking must not load it"
        if driver is None:
            raise OSError(name)
        return driver

    monkeypatch.setattr(ctypes, "CDLL", loaded)
    assert cuda_use() == use


def test_torch_s_own_word_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_state, "initialized_cuda", object)
    assert cuda_use() == "context"


def wait(monkeypatch: pytest.MonkeyPatch, told: Take, uses: list[CudaUse]) -> tuple[Init, Link]:
    monkeypatch.setattr(spare, "cuda_use", lambda: uses.pop(0))
    link, take = Link(), queue.SimpleQueue[Take]()
    take.put(told)
    return spare.wait_for_slot(INIT, link, take), link  # type: ignore[arg-type]


def test_it_gets_its_slot_and_its_device_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0")
    init, link = wait(monkeypatch, Take(3, "cuda:0", "GPU-3"), ["", ""])
    assert link.sent == [Parked(PIPE_PROTOCOL, "")]
    assert (init.slot, init.device, init.modules, init.spare) == (3, "cuda:0", ("m",), False)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-3"


def test_a_driver_that_was_started_keeps_it_to_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0")
    with pytest.raises(BootError, match="'GPU-1' can't become visible") as caught:
        wait(monkeypatch, Take(1, "cuda:0", "GPU-1"), ["", "driver"])
    assert caught.value.fatal.reason == "device"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-0"
    init, link = wait(monkeypatch, Take(0, "cuda:0", "GPU-0"), ["driver", "driver"])
    assert (init.slot, link.sent) == (0, [Parked(PIPE_PROTOCOL, "driver")])


@pytest.mark.parametrize("privileged", [True, False])
def test_its_priority_is_low_and_comes_back(monkeypatch: pytest.MonkeyPatch, privileged: bool) -> None:
    """On a thread of its own: priorities are a thread's."""
    if privileged and not spare._may_return_to(0):
        pytest.skip("this user may not lower a nice value")
    if not privileged:
        monkeypatch.setattr(spare, "_may_return_to", lambda nice: False)
    seen: list[tuple[int, int]] = []

    def look() -> None:
        seen.append((os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)))

    def work() -> None:
        look()
        with spare.low_priority():
            look()
        look()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    before, low, after = seen
    assert after == before
    assert low == ((spare.LOW_PRIORITY, before[1]) if privileged else (before[0], os.SCHED_BATCH))


def test_nice_may_go_back_where_the_system_lets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever may not is told by the attempt alone: limits and capabilities say one thing, a user namespace another."""
    given: list[int] = []

    def set_priority(_which: int, _who: int, nice: int) -> None:
        if not allowed and nice < spare.LOW_PRIORITY:
            raise PermissionError
        given.append(nice)

    monkeypatch.setattr(os, "setpriority", set_priority)
    allowed = True
    assert spare._may_return_to(3)
    assert given == [spare.LOW_PRIORITY, 3]
    allowed = False
    assert not spare._may_return_to(3)
