"""A tenant that looks around: who it is, what it can read of the supervisor, what it can leave behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

import msgspec

from gen_worker import ActionContext, worker_function

IMPORTED_AS = os.getuid()
_LOOKED_AT = ("environ", "mem", "maps", "fd", "auxv", "cmdline")


def until_written() -> None:
    """Until no thread writes to the pipe: one that does takes along what this one said, and needs the interpreter."""
    while any(writes(frame) for frame in sys._current_frames().values()):
        time.sleep(0.001)


def writes(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename.endswith("link.py") and frame.f_code.co_name in ("send", "_write_all"):
            return True
        frame = frame.f_back
    return False


class Nothing(msgspec.Struct):
    pass


class How(msgspec.Struct):
    how: str


class Process(msgspec.Struct):
    pid: int
    parent: int = 0


class Circumstances(msgspec.Struct):
    pid: int
    parent: int
    imported_as: int
    uids: list[int]
    gids: list[int]
    groups: list[int]
    environment: dict[str, str]
    status: dict[str, str]
    """Of /proc/self/status."""
    supervisor: dict[str, str]
    """What /proc/<supervisor>/<entry> gives: its content, or the name of the error."""
    fds: list[str]
    """What its descriptors are."""
    home_is_writable: bool
    stderr_can_be_opened: bool


def _shown(path: Path) -> str:
    try:
        if path.is_dir():
            return " ".join(str(entry.readlink()) for entry in path.iterdir())
        with path.open("rb") as file:
            return file.read(65536).decode(errors="replace")
    except OSError as error:
        return type(error).__name__


def _works(path: Path) -> bool:
    try:
        with path.open("a"):
            return True
    except OSError:
        return False


@worker_function()
def look_around(ctx: ActionContext, payload: Nothing) -> Circumstances:
    parent = os.getppid()
    status = Path("/proc/self/status").read_text().splitlines()
    return Circumstances(
        pid=os.getpid(),
        parent=parent,
        imported_as=IMPORTED_AS,
        uids=list(os.getresuid()),
        gids=list(os.getresgid()),
        groups=sorted(os.getgroups()),
        environment=dict(os.environ),
        status={key: value.strip() for key, _, value in (line.partition(":") for line in status)},
        supervisor={entry: _shown(Path(f"/proc/{parent}/{entry}")) for entry in _LOOKED_AT},
        fds=[str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()],
        home_is_writable=_works(Path.home() / "written-by-a-test"),
        stderr_can_be_opened=_works(Path("/dev/stderr")),
    )


@worker_function()
def hold_gil(ctx: ActionContext, payload: Nothing) -> Process:
    ctx.emit("started", {"pid": os.getpid()})
    until_written()
    ctypes.PyDLL(None).usleep(ctypes.c_uint(30_000_000))
    return Process(os.getpid())


@worker_function()
def wait(ctx: ActionContext, payload: Nothing) -> Process:
    ctx.emit("started", {"pid": os.getpid()})
    ctx.done().wait(30)
    return Process(os.getpid())


@worker_function()
def die(ctx: ActionContext, payload: How) -> Process:
    ctx.emit("started", {"pid": os.getpid()})
    os.kill(os.getpid(), signal.Signals[payload.how])
    time.sleep(30)
    return Process(os.getpid())


@worker_function()
def start(ctx: ActionContext, payload: Nothing) -> Process:
    """Start a process in the executor's own group."""
    return Process(subprocess.Popen(["sleep", "60"]).pid)


@worker_function()
def daemonize(ctx: ActionContext, payload: How) -> Process:
    """Start a process that leaves group, session and parent behind; `how` is a shell command."""
    script = f"echo $$; exec </dev/null >/dev/null 2>&1; {payload.how}"
    outer = ["sh", "-c", 'setsid sh -c "$1" &', "sh", script]
    process = subprocess.run(outer, stdout=subprocess.PIPE, check=True)
    return Process(int(process.stdout), os.getpid())
