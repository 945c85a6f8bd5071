"""Strikes hit tenant code and nothing else, at every interleaving that can be provoked."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from executor import gate as gate_module
from executor.gate import Gate
from gen_worker.errors import RunCanceled


@pytest.fixture
def eager_switches() -> Iterator[None]:
    """Threads take the GIL from each other as often as CPython lets them.

    No garbage collection meanwhile: a strike may land in a destructor that it runs, which reports it as ignored.
    """
    before = sys.getswitchinterval()
    gc.collect()
    gc.disable()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)
    gc.enable()


def test_hands_back_what_was_returned_or_raised() -> None:
    assert Gate().call(lambda x, *, y: x + y, 1, y=2) == (3, None)
    value, error = Gate().call(int, "no")
    assert value is None
    assert isinstance(error, ValueError)


def test_a_strike_ends_a_loop() -> None:
    gate, started = Gate(), threading.Event()
    ended: list[tuple[object, BaseException | None]] = []

    def loop() -> None:
        started.set()
        while True:
            pass

    thread = threading.Thread(target=lambda: ended.append(gate.call(loop)))
    assert gate.strike(), "not begun: to be tried again"
    thread.start()
    started.wait()
    assert gate.strike()
    thread.join(10)
    assert isinstance(ended[0][1], RunCanceled)
    assert not gate.strike(), "it has left"


def test_code_that_swallows_is_struck_again() -> None:
    gate, started = Gate(), threading.Event()
    swallowed: list[BaseException] = []

    def loop() -> str:
        started.set()
        while len(swallowed) < 3:
            try:
                while True:
                    pass
            except BaseException as error:  # noqa: BLE001
                swallowed.append(error)
        return "done"

    ended: list[object] = []
    thread = threading.Thread(target=lambda: ended.append(gate.call(loop)))
    thread.start()
    started.wait()
    while thread.is_alive():
        gate.strike()
        thread.join(0.01)
    assert len(swallowed) == 3
    assert ended == [("done", None)]


def test_no_strike_lands_inside_of_a_shield() -> None:
    gate = Gate()
    events: list[str] = []
    inside, go_on = threading.Event(), threading.Event()

    def work() -> None:
        with gate.shielded():
            inside.set()
            go_on.wait()
            for _ in range(10000):
                pass
            events.append("whole")
        while True:
            pass

    ended: list[tuple[object, BaseException | None]] = []
    thread = threading.Thread(target=lambda: ended.append(gate.call(work)))
    thread.start()
    inside.wait()
    assert gate.strike(), "skipped, to be tried again"
    go_on.set()
    while thread.is_alive():
        gate.strike()
        thread.join(0.005)
    assert events == ["whole"]
    assert isinstance(ended[0][1], RunCanceled)


def test_after_a_strike_every_shield_refuses() -> None:
    gate, swallowed = Gate(), threading.Event()
    refused: list[str] = []
    started = threading.Event()

    def work() -> None:
        try:
            started.set()
            while True:
                pass
        except RunCanceled:
            swallowed.set()
        for _ in range(2):
            with pytest.raises(RunCanceled), gate.shielded():
                refused.append("entered")

    thread = threading.Thread(target=gate.call, args=(work,))
    thread.start()
    started.wait()
    gate.strike()
    thread.join(10)
    assert swallowed.is_set()
    assert refused == []


@pytest.mark.usefixtures("eager_switches")
def test_a_strike_that_began_before_the_return_stays_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """The latest that a strike can be: it has looked, then the function returns, then it raises."""
    really_raise = gate_module._set_async_exc
    for _ in range(50):
        gate, return_now = Gate(), threading.Event()

        def raise_late(thread: int, error: type, gate: Gate = gate, go: threading.Event = return_now) -> int:
            go.set()
            while not gate._left:
                time.sleep(0)
            return int(really_raise(thread, error))

        monkeypatch.setattr(gate_module, "_set_async_exc", raise_late)
        ended: list[object] = []

        def run(gate: Gate = gate, go: threading.Event = return_now, ended: list[object] = ended) -> None:
            ended.append(gate.call(go.wait)[0])
            ended.append(sum(own_code() for _ in range(100)))

        thread = threading.Thread(target=run)
        thread.start()
        while not return_now.is_set():
            gate.strike()
        thread.join(10)
        assert ended == [True, 3000]


def own_code() -> int:
    """What runs between two runs: an exception in here is a leak."""
    total = 0
    for number in range(30):
        total += len([number])
    return total


def shielded_work(gate: Gate) -> int:
    total = 0
    for number in range(20):
        with gate.shielded():
            total += number
    return total


def plain_work(_gate: Gate) -> int:
    return sum(len([number]) for number in range(20))


@pytest.mark.usefixtures("eager_switches")
@pytest.mark.parametrize("tenant", [plain_work, shielded_work])
def test_a_strike_at_the_moment_of_the_return_never_leaks(tenant: Callable[[Gate], int]) -> None:
    """Two pool threads finish short runs as fast as they can while a third strikes whatever runs."""
    current: dict[int, Gate] = {}
    leaks: list[BaseException] = []
    outcomes = {"returned": 0, "struck": 0}
    end = time.monotonic() + 20.0

    def pool_thread(slot: int) -> None:
        try:
            while time.monotonic() < end and (outcomes["struck"] < 50 or outcomes["returned"] < 1000):
                gate = Gate()
                current[slot] = gate
                _, error = gate.call(tenant, gate)
                own_code()
                assert error is None or isinstance(error, RunCanceled)
                outcomes["returned" if error is None else "struck"] += 1
        except BaseException as leak:  # noqa: BLE001
            leaks.append(leak)

    threads = [threading.Thread(target=pool_thread, args=(slot,)) for slot in range(2)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        for gate in list(current.values()):
            gate.strike()
    assert leaks == []
    assert outcomes["struck"] >= 50
