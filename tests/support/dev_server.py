"""A real `gen-worker serve` process for the tests.

Owns: the process, its log and its end. Made for plain (not async) tests, which a browser's driver needs.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Self

import psutil

from tests.support.worker_process import TENANTS

PROGRAM: Final = Path(sys.executable).parent / "gen-worker"
WAIT_S: Final = 40.0


class DevServer:
    """Started by `with`; stopped, or killed, at its end."""

    def __init__(self, project: Path, *options: str, env: Mapping[str, str] | None = None) -> None:
        self._env = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}
        self._command = [str(PROGRAM), "serve", str(project), "--port", "0", *options]
        self.log: list[str] = []

    def __enter__(self) -> Self:
        self.process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env=self._env,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        line = self.wait_for_log("serving ")
        self.url = line.rpartition(" on ")[2].partition("/?")[0]
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.stop()
        self._reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.log.append(line.rstrip())

    def lines(self, text: str) -> list[str]:
        return [line for line in self.log if re.search(text, line)]

    def wait_for_log(self, text: str, count: int = 1) -> str:
        """The latest line that matches, once there are `count` of them."""
        wait_for(lambda: len(self.lines(text)) >= count or self.process.poll() is not None, lambda: str(self.log))
        assert len(self.lines(text)) >= count, self.log
        return self.lines(text)[-1]

    def wait_ready(self) -> Self:
        self.wait_for_log("^ready: ")
        return self

    def family(self) -> list[psutil.Process]:
        """All that it started, at any depth."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        self.process.send_signal(number)
        try:
            code = self.process.wait(WAIT_S)
        finally:
            self.process.kill()
        return code


def copy_of(tenant: str, where: Path) -> Path:
    """A copy of a tenant's project, to be changed."""
    return Path(shutil.copytree(TENANTS / tenant, where / tenant, ignore=shutil.ignore_patterns("__pycache__")))


def wait_for(check: Callable[[], Any], what: Callable[[], str] = str, timeout: float = WAIT_S) -> Any:
    """What `check` gives, once that is true."""
    end = time.monotonic() + timeout
    while not (found := check()):
        assert time.monotonic() < end, f"not within {timeout:g} s: {what()}"
        time.sleep(0.02)
    return found
