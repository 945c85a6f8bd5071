"""Orphans that come to us, with real processes; in a process of its own, since a parent of orphans stays one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PREAMBLE = """
import asyncio, os, signal, subprocess, sys, time
from supervisor.family import MARK, Family

def orphan(command, mark=None):
    '''The pid of a process whose parent is gone and which has a session of its own.'''
    env = {"PATH": os.environ["PATH"], **({MARK: mark} if mark else {})}
    script = 'setsid sh -c "echo \\\\$\\\\$; exec >/dev/null 2>&1; %s" &' % command
    # The shell in between leads a session too, as an executor does.
    done = subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, env=env, check=True, start_new_session=True)
    return int(done.stdout)

def state(pid):
    try:
        return open("/proc/%d/stat" % pid).read().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return "gone"

def until(pid, wanted):
    end = time.monotonic() + 10
    while (now := state(pid)) not in wanted:
        assert time.monotonic() < end, (now, wanted)
        time.sleep(0.002)

family = Family()
"""


def run(script: str) -> None:
    env = {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "PATH": os.environ["PATH"]}
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + script], env=env, capture_output=True, text=True, timeout=30, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_dead_orphan_is_reaped() -> None:
    run("""
family.adopt()
pid = orphan("exit 3")
until(pid, "Z")
family.sweep()
assert state(pid) == "gone"
""")


def test_a_status_that_a_popen_waits_for_is_left_to_it() -> None:
    run("""
family.adopt()
ours = subprocess.Popen(["sh", "-c", "exit 5"], start_new_session=True)
family.claim(ours.pid, family.new_mark())
librarys = subprocess.Popen(["sh", "-c", "exit 6"])
for each in (ours, librarys):
    until(each.pid, "Z")
family.sweep()
assert (ours.wait(), librarys.wait()) == (5, 6)
""")


def test_a_child_from_before_the_exec_is_reaped_too() -> None:
    run("""
child = subprocess.Popen(["sh", "-c", "exit 3"])  # kept: a Popen that is dropped reaps what is dead by then
pid = child.pid
family.adopt()
until(pid, "Z")
family.sweep()
assert state(pid) == "gone"
""")


def test_what_lives_is_killed_when_its_executor_is_dead_and_not_before() -> None:
    run("""
family.adopt()
executor = subprocess.Popen(["sleep", "60"], start_new_session=True)
mark = family.new_mark()
family.claim(executor.pid, mark)
its, others, unmarked = [orphan("exec sleep 60", each) for each in (mark, "another-supervisors.0", None)]
family.sweep()
assert [state(pid) for pid in (its, others, unmarked)].count("gone") == 0
executor.kill()
executor.wait()
family.disclaim(executor.pid)
until(its, ("Z", "gone"))
family.sweep()
assert state(its) == "gone"
assert state(others) != "gone" and state(unmarked) != "gone"
for pid in (others, unmarked):
    os.kill(pid, signal.SIGKILL)
""")


def test_the_signal_of_a_child_is_enough() -> None:
    """Also on uvloop, and for what a killed process leaves to us in turn."""
    run("""
import uvloop

def children_of(pid):
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            if int(open(f"/proc/{name}/stat").read().rpartition(")")[2].split()[1]) == pid:
                yield int(name)
        except FileNotFoundError:
            pass

async def main():
    family.follow(asyncio.get_running_loop())
    executor = subprocess.Popen(["sleep", "60"], start_new_session=True)
    mark = family.new_mark()
    family.claim(executor.pid, mark)
    pid = orphan("sleep 60 & wait", mark)
    async with asyncio.timeout(10):
        while not (below := list(children_of(pid))):
            await asyncio.sleep(0.002)
        executor.kill()
        executor.wait()
        family.disclaim(executor.pid)
        while {state(each) for each in (pid, *below)} != {"gone"}:
            await asyncio.sleep(0.002)
    family.unfollow()
    assert signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL

family.adopt()
uvloop.run(main())
""")


def test_one_that_adopts_nobody_touches_nobody() -> None:
    run("""
child = subprocess.Popen(["sh", "-c", "exit 4"], start_new_session=True)
until(child.pid, "Z")
family.sweep()
assert child.wait() == 4
""")


def test_marks_are_never_used_twice() -> None:
    run("""
assert len({family.new_mark() for _ in range(100)} | {Family().new_mark()}) == 101
assert all(mark.startswith(family.prefix) for mark in [family.new_mark()])
""")
