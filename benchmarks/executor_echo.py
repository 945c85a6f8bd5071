"""What one tiny run costs an executor by itself: no supervisor, no gRPC, the pipe's other end is this program.

Keeps a window of runs under way and prints microseconds of wall time per run, the best and the median of the rounds,
and the executor's own CPU time per run.

    python benchmarks/executor_echo.py [--window 64] [--runs 20000] [--rounds 5] [--function echo] [--profile FILE]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec
import psutil

from gen_worker.pipe.arena import create_arena
from gen_worker.pipe.frames import FrameDecoder, encode_frame
from gen_worker.pipe.messages import PIPE_PROTOCOL, Init, Ready, Result, Run, Shutdown, decode_upward, encode

TENANT = """
import msgspec
from gen_worker import ActionContext, worker_function

class Echo(msgspec.Struct):
    text: str

@worker_function()
def echo(ctx: ActionContext, payload: Echo) -> Echo:
    return payload

@worker_function()
async def echo_async(ctx: ActionContext, payload: Echo) -> Echo:
    return payload
"""
PROFILED = """
import cProfile, os, sys, threading
from executor import process
from executor.service import Service
handle, profile = Service.handle, cProfile.Profile()
def profiled(self, frames):
    profile.enable()
    handle(self, frames)
    profile.disable()
Service.handle = profiled
from executor.runner import Runner
work, threads = Runner.run_in_thread, {}
def run(self, item):
    mine = threads.setdefault(threading.get_ident(), cProfile.Profile())
    mine.enable()
    work(self, item)
    mine.disable()
Runner.run_in_thread = run
stop = process.Departure.stop
def report(self):
    import pstats
    stats = pstats.Stats(profile)
    for other in threads.values():
        stats.add(other)
    stats.dump_stats(os.path.join(sys.path[0], "executor.prof"))
    stop(self)
process.Departure.stop = report
"""


class Executor:
    """A real executor process and the other end of its pipe."""

    def __init__(self, root: Path, *, profile: bool) -> None:
        (root / "echo_tenant.py").write_text(TENANT)
        ours, theirs = multiprocessing.Pipe()
        down, up = create_arena("down"), create_arena("up")
        command = [sys.executable, "-P", "-m", "executor"]
        if profile:
            (root / "profiled.py").write_text(PROFILED)
            start = "import profiled; runpy.run_module('executor', run_name='__main__', alter_sys=True)"
            command = [sys.executable, "-P", "-c", f"import sys, runpy; sys.path.insert(0, {str(root)!r}); {start}"]
        fds = {"pipe": theirs.fileno(), "down": down, "up": up}
        command += [word for name, fd in fds.items() for word in (f"--{name}-fd", str(fd))]
        self.process = subprocess.Popen([*command, "--parent-pid", str(os.getpid())], pass_fds=fds.values(), cwd=root)
        theirs.close()
        self._socket = socket.socket(fileno=os.dup(ours.fileno()))
        ours.close()
        self._decoder = FrameDecoder()
        init = Init(PIPE_PROTOCOL, 0, "cpu", ("echo_tenant",), str(root), str(root), 64, 5.0, 0, 0, 0, {})
        self._socket.sendall(encode_frame(encode(init)))
        ready = [message for message in self._receive() if isinstance(message, Ready)]
        assert ready, "the executor did not start"

    def _receive(self) -> list[object]:
        while True:
            data = self._socket.recv(256 * 1024)
            if not data:
                raise EOFError(f"the executor left with {self.process.wait()}")
            if frames := self._decoder.feed(data):
                return [decode_upward(body) for body in frames]

    def echo(self, function: str, runs: int, window: int) -> float:
        """Seconds for `runs` runs with `window` under way."""
        payload = msgspec.msgpack.encode({"text": "hello"})
        sent = done = 0
        started = time.perf_counter()
        while done < runs:
            batch = b"".join(
                encode_frame(encode(Run(key, f"run-{key}", function, payload, {}, 0, 0.0, "t", "u", 65536)))
                for key in range(sent, min(runs, done + window))
            )
            sent = min(runs, done + window)
            if batch:
                self._socket.sendall(batch)
            for message in self._receive():
                assert isinstance(message, Result), message
                assert message.failure is None, message.failure
                assert message.output == payload
                done += 1
        return time.perf_counter() - started

    def stop(self) -> None:
        self._socket.sendall(encode_frame(encode(Shutdown())))
        assert self.process.wait(10) == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=64)
    parser.add_argument("--runs", type=int, default=20000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--function", choices=("echo", "echo_async"), default="echo")
    parser.add_argument("--profile", type=Path, help="write the executor's cProfile statistics here")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        executor = Executor(Path(folder), profile=arguments.profile is not None)
        executor.echo(arguments.function, 1000, arguments.window)
        before = psutil.Process(executor.process.pid).cpu_times()
        rounds = [
            executor.echo(arguments.function, arguments.runs, arguments.window) / arguments.runs * 1e6
            for _ in range(arguments.rounds)
        ]
        after = psutil.Process(executor.process.pid).cpu_times()
        threads = psutil.Process(executor.process.pid).num_threads()
        executor.stop()
        if arguments.profile is not None:
            arguments.profile.write_bytes((Path(folder) / "executor.prof").read_bytes())
    cpu = (after.user + after.system - before.user - before.system) / (arguments.runs * arguments.rounds) * 1e6
    print(
        f"{arguments.function}, window {arguments.window}: {min(rounds):.1f} us per run at best, "
        f"{statistics.median(rounds):.1f} us median; {cpu:.1f} us of the executor's CPU time; {threads} threads"
    )


if __name__ == "__main__":
    main()
