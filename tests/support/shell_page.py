"""The shell blocks of one page, run one after the other as a reader would in one terminal.

Owns: the sandbox (a home directory, a copy of the repository, ports of its own), the servers that were started, and
their end. What a block exports and where it went is there for the next one.

Fixed ports of the page (127.0.0.1:8080) are replaced by free ones, so that pages can run beside each other.
"""

from __future__ import annotations

import http.client
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Self

from PIL import Image

from tests.support.dev_server import PROGRAM, wait_for
from tests.support.doc_blocks import ROOT, Block

COMMAND_S: Final = 120.0
_STOPPING: Final = ((signal.SIGTERM, 1.0), (signal.SIGTERM, 40.0), (signal.SIGKILL, 40.0))
"""A worker whose scheduler has left would wait for another to take the result; a second signal says not to."""
_LEFT_OUT: Final = shutil.ignore_patterns(
    ".*cache", ".git", ".hypothesis", ".venv", "__pycache__", "build", "dist", "out", "shared"
)
_ADDRESS: Final = re.compile(r"127\.0\.0\.1:(\d+)")
_LISTENS: Final = re.compile(r"listen 127\.0\.0\.1:(\d+)")
_SHOWN: Final = 4000


class ShellPage:
    """Used by `with`; at its end the servers are stopped, and those that had ended before fail the test."""

    def __init__(self, directory: Path) -> None:
        self.home = directory / "home"
        self.repository = directory / "repository"
        self._here = self.home
        self._ports: dict[str, int] = {}
        self._servers: list[_Server] = []
        self._state = directory / "state"
        self._programs = directory / "bin"
        self._env = {
            "PATH": f"{self._programs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "HOME": str(self.home),
            "LANG": "C.UTF-8",
            "TMPDIR": str(directory),
            "PYTHONUNBUFFERED": "1",
            "PIP_NO_INDEX": "1",  # what a page asks pip for is installed already, and stays as it is
            "UV_OFFLINE": "1",
            "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            "WORKER_HTTP_ADDR": f"127.0.0.1:{self._port('9090')}",
            "WORKER_MODEL_CACHE_DIR": str(directory / "models"),
            "GEN_WORKER_SERVE_PORT": str(self._port("8000")),
        }

    def __enter__(self) -> Self:
        self.home.mkdir()
        self._programs.mkdir()
        pip = self._programs / "pip"  # the one of this Python; an environment that uv made has none
        module = "pip" if find_spec("pip") else "uv pip"
        pip.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m {module} "$@"\n')
        pip.chmod(0o755)
        (self.home / ".curlrc").write_text("fail-with-body\n")  # an answer of 4xx or 5xx is a failure of the block
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        ends = [server.stop() for server in reversed(self._servers)]
        if kind is None:
            assert not (early := [end for end in ends if end]), f"servers that did not stay up: {early}"

    def run(self, block: Block) -> None:
        """Raises AssertionError when a command of it fails."""
        self._prepare(block)
        if terminals := block.terminals():
            self._run_terminals(block, terminals)
            return
        text = self._with_own_ports(block.commands())
        if block.mark.serves:
            *before, last = [line for line in text.splitlines() if line.strip()]
            if before:
                self._run_commands(block, "\n".join(before))
            server = self._start(block, last)
            server.wait_for_port(self._own_port(block.mark.serves))
        else:
            self._run_commands(block, text)

    # -- the sandbox --------------------------------------------------------------------------------

    def _prepare(self, block: Block) -> None:
        mark = block.mark
        if mark.where == "a new project":
            self._here = self.home / "project"
            subprocess.run([PROGRAM, "init", self._here], env=self._env, capture_output=True, check=True)
        elif mark.where:
            self._here = self._copy_of_the_repository() / mark.where
        if mark.picture:
            picture = self.home / mark.picture
            picture.parent.mkdir(parents=True)
            Image.new("RGB", (640, 480), "teal").save(picture)
        if mark.project:
            shutil.copytree(ROOT / "examples/hello", self._here / mark.project)
            (self._here / "payloads.jsonl").write_text('{"function": "greet", "payload": {"name": "Ada"}}\n')

    def _copy_of_the_repository(self) -> Path:
        """With a .venv that is the test's own, which make finds as complete as it is."""
        if not self.repository.exists():
            shutil.copytree(ROOT, self.repository, ignore=_LEFT_OUT)
            venv = self.repository / ".venv"
            venv.mkdir()
            for each in Path(sys.prefix).iterdir():
                if each.name not in (".torch", ".installed"):
                    (venv / each.name).symlink_to(each)
            for name in (".torch", ".installed"):
                (venv / name).touch()
        return self.repository

    def _port(self, written: str) -> int:
        if written not in self._ports:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._ports[written] = probe.getsockname()[1]
        return self._ports[written]

    def _own_port(self, address: str) -> int:
        return self._port(address.rpartition(":")[2])

    def _with_own_ports(self, text: str) -> str:
        return _ADDRESS.sub(lambda found: f"127.0.0.1:{self._port(found[1])}", text)

    # -- commands -----------------------------------------------------------------------------------

    def _run_commands(self, block: Block, text: str) -> None:
        """In this process's own shell, with what the shells before it left."""
        keep = f"trap 'export -p > {self._state}; pwd > {self._state}.cwd' EXIT\n"
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", self._before() + keep + text],
            cwd=self._here, env=self._env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True, timeout=COMMAND_S * (5 if block.mark.soak else 1), check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{block} left with {done.returncode}: {done.stdout[-_SHOWN:]}"
        self._here = Path(Path(f"{self._state}.cwd").read_text("utf-8").rstrip("\n"))

    def _before(self) -> str:
        """What is assigned is kept, exported or not: the next block is typed into the same terminal."""
        return "set -a\n" + (f". {shlex.quote(str(self._state))}\n" if self._state.exists() else "")

    def _start(self, block: Block, text: str) -> _Server:
        server = _Server(block, self._before() + text, self._here, self._env, self._state.parent)
        self._servers.append(server)
        return server

    def _run_terminals(self, block: Block, terminals: dict[str, str]) -> None:
        started: dict[str, _Server] = {}
        for number, part in terminals.items():
            text = self._with_own_ports(part)
            server = started[number] = self._start(block, text)
            if number == block.mark.until:
                continue  # its servers are looked for below, and it ends by itself
            for port in _LISTENS.findall(text):
                server.wait_for_port(int(port))
            if "gen-worker-supervisor" in text:
                server.wait_for_readiness(self._ports["9090"], unless=started.get(block.mark.until))
        last = started[block.mark.until]
        if block.mark.types:
            last.converse(block.mark.types, block.mark.sees)
        last.wait_for_success()
        self._servers.remove(last)


class _Server:
    """A shell of its own, in a session of its own."""

    def __init__(self, block: Block, text: str, cwd: Path, env: dict[str, str], logs: Path) -> None:
        self._block = block
        self._log = logs / f"output-{block.line}-{len(list(logs.glob('output-*')))}"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                ["bash", "-euo", "pipefail", "-c", text], cwd=cwd, env=env,
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def __str__(self) -> str:
        return f"{self._block}: {self._output()[-_SHOWN:]}"

    def _output(self) -> str:
        return self._log.read_text("utf-8", "replace")

    def _has_ended(self) -> bool:
        return self._process.poll() is not None

    def wait_for_port(self, port: int) -> None:
        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_for(lambda: listens() or self._has_ended(), self.__str__)
        assert not self._has_ended(), str(self)

    def wait_for_readiness(self, port: int, unless: _Server | None) -> None:
        """Of a worker, unless the scheduler's one run has ended and it with it."""

        def is_ready() -> bool:
            probe = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            try:
                probe.request("GET", "/readyz")
                return probe.getresponse().status == http.HTTPStatus.OK
            except (OSError, http.client.HTTPException):
                return False
            finally:
                probe.close()

        over = lambda: self._has_ended() or (unless is not None and unless._has_ended())  # noqa: E731
        wait_for(lambda: over() or is_ready(), self.__str__, COMMAND_S)
        assert not self._has_ended(), str(self)

    def converse(self, types: str, sees: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{types}\n".encode())
        self._process.stdin.flush()
        wait_for(lambda: sees in self._output() or self._has_ended(), self.__str__)
        assert sees in self._output(), str(self)
        self._process.stdin.close()

    def wait_for_success(self) -> None:
        try:
            assert self._process.wait(COMMAND_S) == 0, str(self)
        finally:
            self.stop()

    def stop(self) -> str:
        """What it said, if it had ended before it was told to."""
        early = str(self) if self._has_ended() else ""
        for number, wait_s in _STOPPING:
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(wait_s)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        assert self._process.stdin is not None
        self._process.stdin.close()
        return early
