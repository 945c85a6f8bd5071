"""Real child processes: frames, output, every kind of end, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import os
import signal
import subprocess
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

import supervisor.child as module
from gen_worker.pipe.frames import FRAME_CAP_BYTES, FrameError
from supervisor.child import LAST_LINES, LINE_BYTES, Child, ExitCause

SUPPORT = Path(__file__).parent.parent / "support"
WAIT_S = 20.0

Scenario = Callable[[], Awaitable[None]]


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Callable[[Scenario], None]:
    """Runs a scenario on each of the two loops; a callback that raises fails the test."""

    def run_scenario(scenario: Scenario) -> None:
        trouble: list[dict[str, Any]] = []

        async def main() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: trouble.append(context))
            async with asyncio.timeout(WAIT_S):
                await scenario()

        factory = uvloop.new_event_loop if request.param == "uvloop" else None
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main())
        assert trouble == []

    return run_scenario


@pytest.fixture(scope="module", autouse=True)
def loops_before() -> None:
    """What the first loop of a process opens for good (libuv's signal pipe) is no leak."""
    for factory in (None, uvloop.new_event_loop):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(asyncio.sleep(0))


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No descriptor and no zombie stays behind."""
    before = open_fds()
    yield
    assert open_fds() - before == set(), "what others had and have closed meanwhile does not matter"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def open_fds() -> set[str]:
    """Number and target of each, but for the one that reads the directory."""
    found = set()
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  (no Path keeps its descriptor for less long)
        with contextlib.suppress(FileNotFoundError):
            found.add(f"{name}={Path(f'/proc/self/fd/{name}').readlink()}")
    return found


class Recorder:
    """A Child and all that it reported."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.lines: list[tuple[str, str]] = []
        self.writable = 0
        self.exits: list[ExitCause] = []
        self.order: list[str] = []
        self.news = asyncio.Event()
        self.child = Child(
            on_frame=self._on_frame, on_line=self._on_line, on_writable=self._on_writable, on_exit=self._on_exit
        )

    def _on_frame(self, body: bytes) -> None:
        self.frames.append(body)
        self.order.append("frame")
        self.news.set()

    def _on_line(self, stream: str, line: str) -> None:
        self.lines.append((stream, line))
        self.order.append("line")
        self.news.set()

    def _on_writable(self) -> None:
        self.writable += 1
        self.news.set()

    def _on_exit(self, cause: ExitCause) -> None:
        self.exits.append(cause)
        self.order.append("exit")
        self.news.set()

    async def start(self, *orders: str) -> None:
        await self.child.spawn("pipe_child", list(orders), {"PYTHONPATH": str(SUPPORT)}, "/")

    async def until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            self.news.clear()
            await self.news.wait()

    async def end(self) -> ExitCause:
        await self.until(lambda: bool(self.exits))
        # What a second callback or a late frame would break shows in the next turns of the loop.
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(self.exits) == 1
        assert self.order[-1] == "exit"
        return self.exits[0]


@asynccontextmanager
async def started(*orders: str) -> AsyncIterator[Recorder]:
    recorder = Recorder()
    await recorder.start(*orders)
    try:
        yield recorder
    finally:
        recorder.child.kill("the test ends")
        await recorder.end()


Run = Callable[[Scenario], None]


def wait_dead(pid: int) -> None:
    """Hold the loop up until the child is dead, so that it notices nothing before."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


# -- frames -------------------------------------------------------------------------------------


def test_frames_go_both_ways(run: Run) -> None:
    async def scenario() -> None:
        async with started() as recorder:
            sizes = [0, 1, 16383, 16384, 16385, 300_000, 1_000_000]
            for size in sizes:
                recorder.child.send(b"echo " + b"y" * size)
            await recorder.until(lambda: len(recorder.frames) == 1 + len(sizes))
            assert recorder.frames[0] == b"hello"
            assert [len(frame) for frame in recorder.frames[1:]] == sizes

    run(scenario)


def test_frames_sent_before_the_child_reads_arrive_in_order(run: Run) -> None:
    async def scenario() -> None:
        async with started() as recorder:
            recorder.child.send(b"sleep 0.05")
            for number in range(3000):
                recorder.child.send(b"length " + b"z" * number)
            await recorder.until(lambda: len(recorder.frames) == 3001)
            assert recorder.frames[1:] == [b"%d" % number for number in range(3000)]

    run(scenario)


def test_a_flood_from_the_child(run: Run) -> None:
    async def scenario() -> None:
        async with started() as recorder:
            recorder.child.send(b"flood 400 50000")
            await recorder.until(lambda: len(recorder.frames) == 401)
            assert [int(frame.split()[0]) for frame in recorder.frames[1:]] == list(range(400))

    run(scenario)


def test_a_child_that_does_not_read_is_not_writable(run: Run) -> None:
    async def scenario() -> None:
        async with started() as recorder:
            await recorder.until(lambda: bool(recorder.frames))
            assert recorder.child.writable
            recorder.child.send(b"sleep 0.1")
            for _ in range(8):
                recorder.child.send(b"length " + b"x" * 1_000_000)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert not recorder.child.writable
            await recorder.until(lambda: len(recorder.frames) == 9)
            await recorder.until(lambda: recorder.writable == 1)
            assert recorder.child.writable

    run(scenario)


def test_sending_from_on_writable_loses_nothing(run: Run) -> None:
    async def scenario() -> None:
        recorder = Recorder()
        on_writable = recorder.child._on_writable

        def send_more() -> None:
            recorder.child.send(b"echo more")
            on_writable()

        recorder.child._on_writable = send_more
        await recorder.start()
        for _ in range(4):
            recorder.child.send(b"length " + b"x" * 1_000_000)
        await recorder.until(lambda: b"more" in recorder.frames)
        recorder.child.kill("the test ends")
        await recorder.end()

    run(scenario)


def test_a_frame_over_the_cap_is_refused_and_harms_no_other(run: Run) -> None:
    async def scenario() -> None:
        async with started() as recorder:
            with pytest.raises(FrameError):
                recorder.child.send(b"x" * (FRAME_CAP_BYTES + 1))
            recorder.child.send(b"echo still")
            await recorder.until(lambda: b"still" in recorder.frames)

    run(scenario)


def test_shared_memory_of_the_child(run: Run) -> None:
    from gen_worker.pipe.arena import ArenaError
    from gen_worker.pipe.messages import Blob

    async def scenario() -> None:
        async with started() as recorder:
            recorder.child.send(b"blob across")
            await recorder.until(lambda: b"written" in recorder.frames)
            assert recorder.child.arena_up.read(Blob(0, 6)) == b"across"
            with pytest.raises(ArenaError):
                recorder.child.arena_up.read(Blob(0, 7))

    run(scenario)


# -- the end ------------------------------------------------------------------------------------


def test_a_dead_child_does_not_wait_for_the_garbage_collector(run: Run) -> None:
    """Which comes to what has lived for a while once in many minutes, and crashes may come every few seconds."""

    async def dead() -> list[weakref.ref[Any]]:
        async with started() as recorder:
            await recorder.until(lambda: bool(recorder.frames))
        return [weakref.ref(recorder), weakref.ref(recorder.child)]

    async def scenario() -> None:
        gc.disable()
        try:
            left = await dead()
            for _ in range(5):  # its transport's last word comes in the loop's next turn
                await asyncio.sleep(0)
            assert [reference() for reference in left] == [None, None]
        finally:
            gc.enable()

    run(scenario)


@pytest.mark.parametrize(
    ("order", "cause"),
    [
        ("exit 0", "exited with code 0"),
        ("exit 3", "exited with code 3"),
        ("kill_self 9", "killed by SIGKILL"),
        ("kill_self 11", "killed by SIGSEGV"),
        ("kill_self 40", "killed by signal 40"),
    ],
)
def test_ends(run: Run, order: str, cause: str) -> None:
    async def scenario() -> None:
        recorder = Recorder()
        await recorder.start(order)
        assert str(await recorder.end()) == cause
        recorder.child.send(b"nobody hears this")
        recorder.child.kill("too late")

    run(scenario)


@pytest.mark.parametrize("attempt", range(5))
def test_what_was_written_right_before_a_kill_is_delivered_before_the_exit(run: Run, attempt: int) -> None:
    async def scenario() -> None:
        recorder = Recorder()
        await recorder.start("write_and_die 2000")
        assert str(await recorder.end()) == "killed by SIGKILL"
        assert recorder.frames == [b"hello", *(b"%d" % number for number in range(2000))]
        assert recorder.lines == [("stderr", "last words")]

    run(scenario)


def test_results_survive_writes_to_the_dead(run: Run) -> None:
    """The pipe breaks under a write while the child's last frames are still unread."""

    async def scenario() -> None:
        recorder = Recorder()
        await recorder.start("write_and_die 200")
        wait_dead(recorder.child.pid)
        recorder.child.send(b"x" * 1_000_000)
        await recorder.end()
        assert recorder.frames[1:] == [b"%d" % number for number in range(200)]

    run(scenario)


def test_a_child_that_dies_before_its_pipe_is_connected(run: Run) -> None:
    async def scenario() -> None:
        recorder = Recorder()
        connect = recorder.child._connect

        async def connect_late(connection: Any) -> None:
            wait_dead(recorder.child.pid)
            recorder.child._on_pidfd()
            await connect(connection)

        recorder.child._connect = connect_late  # type: ignore[method-assign]
        await recorder.start("write_and_die 10")
        await recorder.end()
        assert len(recorder.frames) == 11

    run(scenario)


def test_frames_sent_before_the_pipe_is_connected_are_kept(run: Run) -> None:
    async def scenario() -> None:
        recorder = Recorder()
        starting = asyncio.ensure_future(recorder.start())
        while not hasattr(recorder.child, "_process"):
            await asyncio.sleep(0)
        recorder.child.send(b"echo early")
        await starting
        await recorder.until(lambda: b"early" in recorder.frames)
        recorder.child.kill("the test ends")
        await recorder.end()

    run(scenario)


def test_kill_keeps_the_first_reason(run: Run) -> None:
    async def scenario() -> None:
        recorder = Recorder()
        await recorder.start("sleep 60")
        recorder.child.kill("it is in the way")
        recorder.child.kill("another reason")
        assert str(await recorder.end()) == "killed by SIGKILL (it is in the way)"

    run(scenario)


def test_garbage_kills_after_what_came_before_it(run: Run) -> None:
    async def scenario() -> None:
        recorder = Recorder()
        await recorder.start("garbage")
        cause = await recorder.end()
        assert recorder.frames == [b"hello", b"whole"]
        assert cause.returncode == -signal.SIGKILL
        assert cause.reason == "it sent garbage on its pipe: a frame says it has -7 bytes; the cap is 8388608"

    run(scenario)


def test_a_frame_over_the_cap_kills(run: Run) -> None:
    async def scenario() -> None:
        async with started() as recorder:
            recorder.child.send(b"raw " + (FRAME_CAP_BYTES + 1).to_bytes(4, "big"))
            cause = await recorder.end()
            assert "8388609 bytes" in cause.reason

    run(scenario)


def test_a_child_that_closes_its_pipe_and_lives_on_is_killed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSED_PIPE_S", 0.02)

    async def scenario() -> None:
        recorder = Recorder()
        await recorder.start("close_pipe")
        assert str(await recorder.end()) == "killed by SIGKILL (it closed its pipe)"

    run(scenario)


def test_a_child_that_seems_to_die_and_does_not_is_killed_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CLOSED_PIPE_S", 0.02)
    monkeypatch.setattr(module, "DYING_S", 0.02)

    async def scenario() -> None:
        recorder = Recorder()
        await recorder.start("leave_a_thread")
        assert str(await recorder.end()) == "killed by SIGKILL (it closed its pipe)"

    run(scenario)


def test_one_that_is_dying_is_not_killed_for_its_closed_pipe(run: Run) -> None:
    """Its pipe closes before its death can be seen, on a busy host long before."""

    def die(pid: int) -> None:
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)

    async def scenario() -> None:
        async with started() as recorder:
            die(recorder.child.pid)
            recorder.child._kill_closed("it closed its pipe")
            assert str(await recorder.end()) == "killed by SIGKILL"

    run(scenario)


def test_an_unfinished_frame_at_the_end_is_nothing(run: Run) -> None:
    async def scenario() -> None:
        async with started() as recorder:
            recorder.child.send(b"raw " + (100).to_bytes(4, "big") + b"only some")
            recorder.child.send(b"exit 0")
            assert str(await recorder.end()) == "exited with code 0"
            assert recorder.frames == [b"hello"]

    run(scenario)


# -- what it started ----------------------------------------------------------------------------


def lives(pid: int) -> bool:
    """Whether there is such a process that is no zombie (of whoever took it over)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


async def gone(pid: int) -> None:
    while lives(pid):
        await asyncio.sleep(0.005)


@pytest.mark.parametrize("end", ["exit 0", "kill_self 9", ""])
def test_grandchildren_end_with_it(run: Run, end: str) -> None:
    async def scenario() -> None:
        async with started() as recorder:
            recorder.child.send(b"grandchild")
            await recorder.until(lambda: len(recorder.frames) == 2)
            if end:
                recorder.child.send(end.encode())
            else:
                recorder.child.kill("the test wants it")
            await recorder.end()
            await gone(int(recorder.frames[1]))

    run(scenario)


def test_a_process_that_left_the_session_and_holds_the_pipe_delays_nothing(run: Run) -> None:
    async def scenario() -> None:
        async with started() as recorder:
            recorder.child.send(b"daemon")
            await recorder.until(lambda: len(recorder.frames) > 1)
            pid = next(int(frame) for frame in recorder.frames if frame.isdigit())
            recorder.child.send(b"exit 5")
            assert (await recorder.end()).returncode == 5
            await gone(pid)  # its pipes broke

    run(scenario)


# -- output -------------------------------------------------------------------------------------


def test_lines_of_output(run: Run) -> None:
    async def scenario() -> None:
        async with started() as recorder:
            for part in (b"print one\ntw", b"print o\r\n\nthree\n", b"print \xff\xfe bytes\n", b"print unfinished\r"):
                recorder.child.send(part)
                recorder.child.send(b"echo next")
            recorder.child.send(b"exit 0")
            await recorder.end()
            assert [line for stream, line in recorder.lines if stream == "stdout"] == [
                "one", "two", "", "three", "\ufffd\ufffd bytes", "unfinished",
            ]  # fmt: skip

    run(scenario)


def test_long_lines_are_cut(run: Run) -> None:
    async def scenario() -> None:
        async with started() as recorder:
            recorder.child.send(b"print " + b"a" * (3 * LINE_BYTES + 5) + b"\nshort\n" + b"b" * LINE_BYTES + b"\nend")
            recorder.child.send(b"exit 0")
            await recorder.end()
            lines = [line for _, line in recorder.lines]
            assert max(map(len, lines)) <= LINE_BYTES
            assert "".join(lines) == "a" * (3 * LINE_BYTES + 5) + "short" + "b" * LINE_BYTES + "end"
            assert lines[-3:] == ["short", "b" * LINE_BYTES, "end"]

    run(scenario)


def test_much_output_right_before_the_end(run: Run) -> None:
    async def scenario() -> None:
        async with started() as recorder:
            text = b"".join(b"line %d\n" % number for number in range(20_000))
            recorder.child.send(b"print " + text[: 60 * 1024].rpartition(b"\n")[0] + b"\n")
            recorder.child.send(b"kill_self 9")
            await recorder.end()
            lines = [line for _, line in recorder.lines]
            assert lines == [f"line {number}" for number in range(len(lines))]
            assert len(lines) > 5000
            assert list(recorder.child.last_lines) == lines[-LAST_LINES:]

    run(scenario)


# -- what goes wrong in between -----------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["cwd", "environment"])
def test_a_start_that_fails_leaves_nothing(run: Run, wrong: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        recorder = Recorder()
        env = {"BAD": "nul\0byte"} if wrong == "environment" else {}
        with pytest.raises(ValueError if wrong == "environment" else FileNotFoundError):
            await recorder.child.spawn("pipe_child", [], env, str(tmp_path / "absent"))
        assert recorder.exits == []

    run(scenario)


@pytest.mark.parametrize("step", ["pidfd_open", "memfd_create", "pipe", "dup"])
def test_a_start_without_descriptors_leaves_nothing(run: Run, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = getattr(os, step)

    def fail_late(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == (2 if step in ("memfd_create", "pipe") else 1):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(*args)

    async def scenario() -> None:
        recorder = Recorder()
        monkeypatch.setattr(os, step, fail_late)
        with pytest.raises(OSError, match="Too many open files"):
            await recorder.start("sleep 60")
        monkeypatch.undo()
        assert recorder.exits == []

    run(scenario)


def test_a_pipe_that_can_not_be_used_ends_the_child_as_any_death_does(run: Run) -> None:
    async def scenario() -> None:
        recorder = Recorder()

        async def refuse(*args: Any, **kwargs: Any) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        class Loop:
            create_unix_connection = staticmethod(refuse)

            def __getattr__(self, name: str) -> Any:
                return getattr(asyncio.get_running_loop(), name)

        child: Any = recorder.child
        child._loop = Loop()
        await recorder.start("sleep 60")
        cause = await recorder.end()
        assert "its pipe can't be used: [Errno 24] Too many open files" in str(cause)

    run(scenario)


def test_on_exit_comes_even_when_a_frame_can_not_be_handled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A defect in the handling of one message must not hide the death of its executor."""

    async def scenario() -> None:
        loop = asyncio.get_running_loop()
        trouble: list[Any] = []
        loop.set_exception_handler(lambda _, context: trouble.append(context["exception"]))
        recorder = Recorder()

        def broken(body: bytes) -> None:
            raise RuntimeError("a defect")

        recorder.child._on_frame = broken
        await recorder.start("sleep 60")
        async with asyncio.timeout(WAIT_S):
            cause = await recorder.end()
        assert cause.returncode == -signal.SIGKILL
        assert "its pipe broke: a defect" in cause.reason
        assert [str(each) for each in trouble] == ["a defect"]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(scenario())


def test_many_children_leak_nothing(run: Run) -> None:
    async def scenario() -> None:
        before = 0
        for batch in range(10):
            recorders = [Recorder() for _ in range(5)]
            for number, recorder in enumerate(recorders):
                await recorder.start(["exit 0", "kill_self 9", "write_and_die 3", "sleep 60", "exit 1"][number])
            recorders[3].child.kill(f"batch {batch}")
            for recorder in recorders:
                await recorder.end()
            before = before or len(open_fds())  # uvloop opens one more for the first child of a loop
            assert len(open_fds()) == before
        assert subprocess._active == []  # type: ignore[attr-defined]

    run(scenario)
