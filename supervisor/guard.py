"""A process that ends what the supervisor leaves behind when it is killed itself.

Owns: nothing but the reading end of a pipe. Executors die with the supervisor by themselves; what tenant code started
does not, and nobody else is left to end it. (As PID 1 of a container the supervisor needs no guard: the kernel ends
all of the container with it.)

1. `Guard.start` runs this file as a program, alone and without site-packages: some MiB, and no secret in its memory.
2. The pipe closes when the supervisor ends, however it ends.
3. Every process with a mark of that supervisor in its environment (family.py) is killed, until there is none.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Final, Self

SEARCH_S: Final = 1.0
"""What is killed may have started something in its last moment: how long is looked for more."""
PAUSE_S: Final = 0.01
CLEAN_ROUNDS: Final = 3
"""A process shows no environment in the midst of an exec: so often in a row none must be found."""
DISMISS_S: Final = 2.0


class Guard:
    """The supervisor's side. `dismiss` is what happens at its death too, and waits for it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    @classmethod
    def start(cls, mark: str) -> Self:
        """Guard the processes that have an environment entry which begins with `mark`. Raises OSError."""
        return cls(
            subprocess.Popen(  # noqa: S603  (this very file)
                [sys.executable, "-I", "-S", __file__, mark],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={},
                start_new_session=True,
            )
        )

    @property
    def pid(self) -> int:
        return self._process.pid

    def dismiss(self) -> None:
        """End what is left and the guard with it."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(DISMISS_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _watch(mark: bytes) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # they end the supervisor first, and this process with it
    while os.read(0, 1):
        pass
    end = time.monotonic() + SEARCH_S
    clean = 0
    while clean < CLEAN_ROUNDS and time.monotonic() < end:
        clean = 0 if _kill_marked(mark) else clean + 1
        time.sleep(PAUSE_S)


def _kill_marked(mark: bytes) -> bool:
    """Whether there was any."""
    found = False
    for name in os.listdir("/proc"):  # noqa: PTH208  (pathlib would be most of this program's start)
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as file:  # noqa: PTH123  (as above)
                if not any(entry.startswith(mark) for entry in file.read().split(b"\0")):
                    continue
            os.kill(int(name), signal.SIGKILL)
        except OSError:
            continue  # gone meanwhile, or another user's
        found = True
    return found


if __name__ == "__main__":
    _watch(os.fsencode(sys.argv[1]))
