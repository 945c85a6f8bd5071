"""The executor as a process: its tie to the supervisor, its output, and the ways in which it ends.

Owns: the exit codes, and that nothing already answered is lost by an end. Every end but a kill goes by `Departure`.

| code | end |
|---|---|
| 0 | asked to leave by Shutdown |
| 3 | could not start; a Fatal said why |
| 4 | the pipe closed: the supervisor is gone |
| 5 | the supervisor sent garbage |
| 6 | the CUDA context is lost; a Fatal said so |
| 70 | a defect of the executor itself; a Fatal has the traceback |
| any | sys.exit() of the tenant's code, in a run or a task of its own: the process ends with its code |
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import os
import sys
import threading
from enum import IntEnum
from typing import Final, NoReturn

from executor.link import Link
from gen_worker.failures import describe
from gen_worker.pipe.messages import Failure, Fatal

FLUSH_S: Final = 1.0
"""For the supervisor to take what is written at the end; it reads all the time."""
ATEXIT_S: Final = 1.0
"""For the tenant's atexit handlers, and for the event loop to stop before them."""

# linux/prctl.h
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_SIGKILL: Final = 9


class ExitCode(IntEnum):
    OK = 0
    NOT_STARTED = 3
    PIPE_CLOSED = 4
    PROTOCOL = 5
    POISONED = 6
    INTERNAL = 70


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent dies. Raises OSError; leaves when that has happened already."""
    _prctl(_PR_SET_PDEATHSIG, _SIGKILL)  # after any change of the user, which would clear it
    if os.getppid() != parent_pid:
        os._exit(ExitCode.PIPE_CLOSED)


def forbid_new_privileges() -> None:
    """No program that tenant code starts gains rights by its setuid bit. Raises OSError."""
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def buffer_by_line() -> None:
    """Lines reach the supervisor's log when they are printed: with pipes Python would keep 8 KiB of stdout."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # a TextIOWrapper at start


def say(line: str) -> None:
    """One line on stderr, for the supervisor's log; the tenant may have closed or replaced the stream."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.write(f"executor: {line}\n")


class Departure:
    """The ends of the process. Every method but `on_shutdown` does not return."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def fatal(self, fatal: Fatal, code: ExitCode) -> NoReturn:
        """Say why, then leave."""
        self._link.send(fatal)
        self._leave(code)

    def internal(self, error: BaseException) -> NoReturn:
        """A defect of ours: nothing that follows could be trusted."""
        detail = describe(error)
        self.fatal(Fatal("internal", f"defect in the executor: {detail.splitlines()[0]}", detail), ExitCode.INTERNAL)

    def poisoned(self, function: str, failure: Failure) -> NoReturn:
        """The CUDA context is lost: no other run may start in it."""
        message = f"the CUDA context is lost since {function}: {failure.detail.splitlines()[0]}"
        self.fatal(Fatal("poisoned", message, failure.detail), ExitCode.POISONED)

    def exit_by_tenant(self, function: str, request: SystemExit) -> NoReturn:
        """sys.exit() in tenant code means the process; the run that called it is answered as lost with it."""
        code = request.code
        say(f"{function} called sys.exit({code!r})")
        if code is None:
            code = 0
        self._leave(code & 0xFF if isinstance(code, int) else 1)

    def pipe_closed(self, error: OSError | None = None) -> NoReturn:
        """Nobody is left to answer to; or code in this process has closed the way to them, which `error` tells."""
        if error is not None and error.errno in {errno.EBADF, errno.ENOTSOCK}:
            say(f"its pipe to the supervisor is gone ({error.strerror}): was it closed by code in this process?")
        os._exit(ExitCode.PIPE_CLOSED)

    def stop(self) -> NoReturn:
        """The end of an asked-for stop: the tenant's atexit handlers run, for ATEXIT_S at most."""
        atexit._run_exitfuncs()  # noqa: SLF001  # finalizing the interpreter would also wait for the tenant's threads
        self._leave(ExitCode.OK)

    def stop_by(self, seconds: float = ATEXIT_S) -> None:
        """Leave in any case after that time: the event loop or a handler may be stuck."""
        timer = threading.Timer(seconds, os._exit, (ExitCode.OK,))
        timer.daemon = True
        timer.start()

    def _leave(self, code: int) -> NoReturn:
        self._link.flush(FLUSH_S)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)
