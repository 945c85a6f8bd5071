"""The process that ends what a killed supervisor leaves behind, with real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from supervisor.guard import Guard

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
MARK = f"GEN_WORKER_TEST_MARK={os.getpid()}."


@pytest.fixture
def start() -> Iterator[Callable[[str], subprocess.Popen[bytes]]]:
    processes: list[subprocess.Popen[bytes]] = []

    def sleeper(entry: str) -> subprocess.Popen[bytes]:
        name, _, value = entry.partition("=")
        env = {name: value, "PATH": os.environ["PATH"]}
        processes.append(subprocess.Popen(["sleep", "60"], env=env, start_new_session=True))
        return processes[-1]

    yield sleeper
    for process in processes:
        process.kill()
        process.wait()


def test_it_kills_what_has_the_mark_and_nothing_else(start: Callable[[str], subprocess.Popen[bytes]]) -> None:
    guard = Guard.start(MARK)
    marked = [start(f"{MARK}{number}") for number in range(3)]
    others = [start(MARK.replace(".", "0.")), start("GEN_WORKER_TEST_MARK=")]
    guard.dismiss()
    assert [process.wait(5) for process in marked] == [-signal.SIGKILL] * 3
    assert [process.poll() for process in others] == [None, None]


def test_it_waits_as_long_as_the_supervisor_lives(start: Callable[[str], subprocess.Popen[bytes]]) -> None:
    guard = Guard.start(MARK)
    marked = start(f"{MARK}0")
    wait_until_it_sleeps(guard.pid)
    for number in ENDING:
        os.kill(guard.pid, number)
    assert marked.poll() is None
    guard.dismiss()
    assert marked.wait(5) == -signal.SIGKILL


def test_a_guard_that_is_dead_can_be_dismissed() -> None:
    guard = Guard.start(MARK)
    os.kill(guard.pid, signal.SIGKILL)
    guard.dismiss()
    guard.dismiss()


def wait_until_it_sleeps(pid: int) -> None:
    """Until it ignores all of them (some it may have been started with): it has begun."""
    end = time.monotonic() + 10
    while True:
        status = Path(f"/proc/{pid}/status").read_text().splitlines()
        ignored = next(int(line.split()[1], 16) for line in status if line.startswith("SigIgn:"))
        if all(ignored >> (number - 1) & 1 for number in ENDING):
            return
        assert time.monotonic() < end
        time.sleep(0.002)
