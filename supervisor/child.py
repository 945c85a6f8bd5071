"""One child process: its start, its pipe, its output lines, its end.

Owns: the process, the supervisor's end of its pipe, the two arenas (the one to it may be shared with other children)
and the pipes behind its stdout and stderr.

1. `spawn` execs `python -P -m executor` in a session of its own, from the main thread (a thread that exits would fire
   the child's parent-death signal).
2. Frames go out in two writes per turn of the event loop, the first one at once, and come in many per wake-up.
3. The death is noticed by a pidfd at once. What the child had already written to its pipe is read first, so a
   result that was sent is never lost to the death that followed it; then `on_exit` is called, once.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final, cast

from gen_worker.pipe.arena import ArenaReader, ArenaWriter, create_arena
from gen_worker.pipe.frames import FrameDecoder, FrameError, encode_frame
from supervisor.executor_user import ExecutorUser
from supervisor.family import FAMILY, MARK
from supervisor.input_arena import InputArena

log = logging.getLogger(__name__)

READ_BYTES: Final = 64 * 1024
"""At a time, with a turn of the loop between two: so many small events take it 15 ms."""
LINE_BYTES: Final = 8 * 1024
"""A longer line of output is cut into several."""
LAST_LINES: Final = 40
LAST_READS: Final = 64
"""How much is still read of a dead child's output, in reads of 64 KiB, and of its pipe, in reads of READ_BYTES: a
process that it left behind may still write to both."""
PIPE_BUFFER_BYTES: Final = 1024 * 1024
JOINED_BYTES: Final = 64 * 1024
"""So much is held back for a common write at most, so that a child that does not read is noticed in time."""
CLOSED_PIPE_S: Final = 0.5
"""A child that exits closes its pipe a moment before; one that lives on without it this long is killed."""
DYING_S: Final = 5.0
"""More for one whose death is under way, as it takes on a busy host."""


@dataclass(frozen=True, slots=True)
class ExitCause:
    """Why a child is gone: what the system says, and what we knew before (`reason`, "" when nothing)."""

    returncode: int
    reason: str
    out_of_memory: bool = False
    """Whether it was the kernel's OOM killer (oom.py)."""

    def __str__(self) -> str:
        if self.returncode < 0:
            number = -self.returncode
            try:
                words = f"killed by {signal.Signals(number).name}"
            except ValueError:
                words = f"killed by signal {number}"
        else:
            words = f"exited with code {self.returncode}"
        return f"{words} ({self.reason})" if self.reason else words


class Child(asyncio.BufferedProtocol):
    """A running child. `on_frame` gets each whole frame, `on_line` each line of output, `on_exit` the end.

    `on_writable` is called when it reads again after it had not.
    """

    def __init__(
        self,
        *,
        on_frame: Callable[[bytes], None],
        on_line: Callable[[str, str], None],
        on_writable: Callable[[], None],
        on_exit: Callable[[ExitCause], None],
        inputs: InputArena | None = None,
    ) -> None:
        """The arena to it is its own without `inputs`."""
        self._inputs = inputs
        self.hand_over(on_frame=on_frame, on_line=on_line, on_writable=on_writable, on_exit=on_exit)
        self._loop = asyncio.get_running_loop()
        self._decoder = FrameDecoder()
        self._buffer = memoryview(bytearray(READ_BYTES))
        self._early: list[bytes] = []
        """Frames for a pipe that is not connected yet."""
        self._held: list[bytes] = []
        """Frames of this turn of the loop but for the first, which went out at once: each write is a system call, and
        wakes the child."""
        self._held_bytes = 0
        self._holds = False
        self._transport: asyncio.Transport | None = None
        self._reason = ""
        self._closed: asyncio.TimerHandle | None = None
        self._exited = False
        self._writable = True
        self._outputs: list[_OutputLines] = []
        self.pid = 0
        """0 until it is started."""
        self.last_lines: deque[str] = deque(maxlen=LAST_LINES)
        """The end of its stderr (and stdout, in order of arrival)."""

    async def spawn(
        self, module: str, arguments: list[str], env: Mapping[str, str], cwd: str, user: ExecutorUser | None = None
    ) -> None:
        """Start `python -P -m module`, as `user` if there is one. Raises OSError when the process can't be started."""
        mark = FAMILY.new_mark()
        with ExitStack() as ours, ExitStack() as theirs:
            near, far = multiprocessing.Pipe(duplex=True)
            theirs.enter_context(near)  # sockets of its own below stand for it
            theirs.enter_context(far)
            own = _closed_by(ours, create_arena("down")) if self._inputs is None else -1
            down = own if self._inputs is None else self._inputs.read_fd
            up = _closed_by(ours, create_arena("up"))
            stdout, stdout_write = _output_pipe(ours, theirs)
            stderr, stderr_write = _output_pipe(ours, theirs)
            fds = ["--pipe-fd", str(far.fileno()), "--down-fd", str(down), "--up-fd", str(up)]
            connection = ours.enter_context(socket.socket(fileno=os.dup(near.fileno())))
            connection.setblocking(False)
            for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
                connection.setsockopt(socket.SOL_SOCKET, option, PIPE_BUFFER_BYTES)
            # The transport closes its socket when the pipe ends; what the child wrote is still read from this one.
            self._last_words = ours.enter_context(connection.dup())
            if user is not None:
                for fd in (stdout_write, stderr_write):
                    os.fchown(fd, user.uid, user.gid)  # so that it can open /dev/stderr too
            self._process = subprocess.Popen(  # noqa: S603, ASYNC220  (our own module; only this thread may start it)
                [sys.executable, "-P", "-m", module, *fds, "--parent-pid", str(os.getpid()), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=stdout_write,
                stderr=stderr_write,
                pass_fds=(far.fileno(), down, up),
                env={**env, MARK: mark},
                cwd=cwd,
                start_new_session=True,
                user=None if user is None else user.uid,
                group=None if user is None else user.gid,
                extra_groups=None if user is None else user.groups,
            )
            self.pid = self._process.pid
            FAMILY.claim(self.pid, mark)
            ours.callback(self._undo_start)
            self._pidfd = _closed_by(ours, os.pidfd_open(self.pid))
            self._loop.add_reader(self._pidfd, self._on_pidfd)
            ours.pop_all()
        self.arena_down = ArenaWriter(own) if self._inputs is None else self._inputs.writer
        self.arena_up = ArenaReader(up)
        self._outputs = [
            _OutputLines(self._loop, stdout, "stdout", self._take_line),
            _OutputLines(self._loop, stderr, "stderr", self._take_line),
        ]
        await self._connect(connection)

    def hand_over(
        self,
        *,
        on_frame: Callable[[bytes], None],
        on_line: Callable[[str, str], None],
        on_writable: Callable[[], None],
        on_exit: Callable[[ExitCause], None],
    ) -> None:
        """From now on these are told."""
        self._on_frame = on_frame
        self._on_line = on_line
        self._on_writable = on_writable
        self._on_exit = on_exit

    async def _connect(self, connection: socket.socket) -> None:
        try:
            transport, _ = await self._loop.create_unix_connection(lambda: self, sock=connection)
        except OSError as error:
            # The child runs, so this ends as any other death does: with on_exit.
            connection.close()
            self.kill(f"its pipe can't be used: {error}")
            return
        if self._exited:
            # It died meanwhile. Not earlier: until here uvloop's transport and `connection` both own the descriptor,
            # and a transport that closes it leaves the socket to close whatever has its number by then.
            transport.abort()

    def _undo_start(self) -> None:
        self._signal_group(signal.SIGKILL)
        self._process.wait()
        FAMILY.disclaim(self.pid)

    # -- towards the child --------------------------------------------------------------------

    @property
    def writable(self) -> bool:
        """False while the child does not read and a buffer's worth waits for it."""
        return self._writable

    def send(self, body: bytes) -> None:
        """Queue one frame; dropped when the child is gone. Raises FrameError when it is over the cap."""
        if self._exited:
            return
        frame = encode_frame(body)
        if self._transport is None:
            self._early.append(frame)
        elif self._holds:
            self._held.append(frame)
            self._held_bytes += len(frame)
            if self._held_bytes > JOINED_BYTES:
                self._write_held()
        else:
            self._holds = True
            self._loop.call_soon(self._end_turn)
            self._write(frame)

    def _end_turn(self) -> None:
        self._holds = False
        self._write_held()

    def _write_held(self) -> None:
        if self._held:
            self._write(b"".join(self._held))
            self._held.clear()
            self._held_bytes = 0

    def _write(self, frames: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(frames)

    def kill(self, reason: str) -> None:
        """SIGKILL to the child and all that it started in its session. The first reason is kept."""
        if self._exited:
            return
        self._reason = self._reason or reason
        self._signal_group(signal.SIGKILL)

    def _signal_group(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.pid, number)
        except ProcessLookupError:
            log.debug("process group %d is already gone", self.pid)

    # -- asyncio.BufferedProtocol -------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=PIPE_BUFFER_BYTES)
        if self._early:
            self._transport.write(b"".join(self._early))
            self._early.clear()

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        self._feed(self._buffer[:nbytes])
        if nbytes == READ_BYTES and self._transport is not None and not self._transport.is_closing():
            # uvloop would go on at once, 32 times.
            self._transport.pause_reading()
            self._loop.call_soon(self._read_on)

    def _read_on(self) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()

    def eof_received(self) -> bool:
        self._pipe_closed("it closed its pipe")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        if self._exited:
            self._transport = None
        self._pipe_closed(f"its pipe broke: {exc}" if exc else "it closed its pipe")

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._on_writable()

    def _feed(self, data: memoryview) -> None:
        if self._exited:
            return
        try:
            bodies: Sequence[bytes] = self._decoder.feed(data)
        except FrameError as error:
            bodies = error.bodies
            self.kill(f"it sent garbage on its pipe: {error}")
        for body in bodies:
            self._on_frame(body)

    def _pipe_closed(self, reason: str) -> None:
        """A child without its pipe is of no use; its exit is then noticed as any other."""
        if self._closed is None and not self._exited:
            self._closed = self._loop.call_later(CLOSED_PIPE_S, self._kill_closed, reason)

    def _kill_closed(self, reason: str) -> None:
        if self._is_dying:
            self._closed = self._loop.call_later(DYING_S, self.kill, reason)
        else:
            self.kill(reason)

    @property
    def _is_dying(self) -> bool:
        """Whether its memory is gone, which a process gives up before its files, and those before it can be waited for.

        False where that is not to be seen.
        """
        try:
            Path(f"/proc/{self.pid}/exe").readlink()
        except (FileNotFoundError, ProcessLookupError):
            return True
        except OSError as error:
            log.debug("whether process %d is dying is not to be seen: %s", self.pid, error)
        return False

    # -- its end ------------------------------------------------------------------------------

    def _on_pidfd(self) -> None:
        # What it started must not outlive it; before the wait below, while its number can't name another group.
        self._signal_group(signal.SIGKILL)
        returncode = self._process.wait()
        FAMILY.disclaim(self.pid)
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        try:
            self._drain_pipe()
            for output in self._outputs:
                output.close()
        finally:
            self._exited = True
            tell = self._on_exit
            self._release()
            tell(ExitCause(returncode, self._reason))

    def _release(self) -> None:
        # Who is told refers to it, as its transport does: without this all of it waits for the garbage collector,
        # which comes to what has lived for a while once in many minutes.
        self.hand_over(on_frame=_ignore, on_line=_ignore, on_writable=_ignore, on_exit=_ignore)
        self._outputs.clear()
        if self._closed is not None:
            self._closed.cancel()
            self._closed = None
        if self._transport is not None:
            self._transport.abort()  # one that is not connected yet is aborted by _connect
            self._transport = None
        self._last_words.close()
        if self._inputs is None:
            self.arena_down.close()
        self.arena_up.close()

    def _drain_pipe(self) -> None:
        """Read what the child wrote before it died; a process that it forked may keep the pipe open."""
        for _ in range(LAST_READS):
            try:
                received = self._last_words.recv_into(self._buffer)
            except (BlockingIOError, ConnectionError):
                return
            if not received:
                return
            self._feed(self._buffer[:received])

    def _take_line(self, stream: str, line: str) -> None:
        self.last_lines.append(line)
        self._on_line(stream, line)


def _ignore(*_: object) -> None:
    """What a dead child's transport still has to say."""


def _closed_by(stack: ExitStack, fd: int) -> int:
    stack.callback(os.close, fd)
    return fd


def _output_pipe(ours: ExitStack, theirs: ExitStack) -> tuple[int, int]:
    read_end, write_end = os.pipe()
    return _closed_by(ours, read_end), _closed_by(theirs, write_end)


class _OutputLines:
    """One of a child's output pipes, cut into lines."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, fd: int, name: str, on_line: Callable[[str, str], None]
    ) -> None:
        os.set_blocking(fd, False)
        self._loop = loop
        self._fd = fd
        self._name = name
        self._on_line = on_line
        self._rest = b""
        loop.add_reader(fd, self._read)

    def _read(self) -> bool:
        """Take what is here; False at the end of the pipe or when it is empty."""
        try:
            data = os.read(self._fd, 64 * 1024)
        except BlockingIOError:
            return False
        if not data:
            self._loop.remove_reader(self._fd)
            return False
        *lines, self._rest = (self._rest + data).split(b"\n")
        while len(self._rest) > LINE_BYTES:
            lines.append(self._rest[:LINE_BYTES])
            self._rest = self._rest[LINE_BYTES:]
        for line in lines:
            for start in range(0, len(line) or 1, LINE_BYTES):
                self._on_line(self._name, line[start : start + LINE_BYTES].decode(errors="replace").rstrip("\r"))
        return True

    def close(self) -> None:
        """Read what is left and close."""
        for _ in range(LAST_READS):
            if not self._read():
                break
        if self._rest:
            self._on_line(self._name, self._rest.decode(errors="replace").rstrip("\r"))
        self._loop.remove_reader(self._fd)
        os.close(self._fd)
