"""`gen-worker top` against a real HTTP server: what it draws, prints, and says when nothing answers."""

from __future__ import annotations

import http.server
import io
import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec
import pytest
from rich.console import Console
from typer.testing import CliRunner

from gen_worker.cli import app
from gen_worker.cli.top import watch
from gen_worker.cli.top_view import view
from supervisor.status import Status

STATUS: dict[str, Any] = {
    "version": 1, "at": 1.5e9,
    "worker": {
        "id": "w1", "deployment_id": "d", "version": "0.1.0", "pid": 7, "started_at": 1.5e9, "uptime_s": 3725.0,
        "resident_bytes": 50 * 2**20, "ready": False, "unready_because": ["no executor is ready"], "draining": False,
        "loop_lag_s": 0.012,
    },
    "scheduler": {"address": "sched:8080", "registered": True, "streams_opened": 2, "failed_dials": 0},
    "executors": [
        {"name": "0.1", "slot": 0, "state": "ready", "pid": 9, "gpu": "GPU-1", "runs": 1, "starts": 2},
        {"name": "1", "slot": 1, "state": "given_up", "pid": 0, "gpu": "", "runs": 0, "starts": 3},
    ],
    "gpus": [
        {"index": 0, "uuid": "GPU-1", "name": "NVIDIA H100", "total_bytes": 80 * 2**30, "used_bytes": 20 * 2**30,
         "free_bytes": 60 * 2**30, "models_bytes": 18 * 2**30, "reserved_bytes": 2**30, "utilization": 0.73},
        {"index": 1, "uuid": "GPU-2", "name": "MIG", "total_bytes": 2**30, "used_bytes": None, "free_bytes": None,
         "models_bytes": 0, "reserved_bytes": 0, "utilization": None},
    ],
    "models": [
        {"id": "hf:org/m", "state": "hot", "executors": ["0.1"], "device_bytes": 18 * 2**30},
        {"id": "hf:org/n", "state": "downloading", "executors": [], "device_bytes": 0, "done_bytes": 5 * 2**29,
         "total_bytes": 7 * 2**30},
        {"id": "hf:org/o", "state": "downloading", "executors": [], "device_bytes": 0},
    ],
    "runs": [
        {"id": f"run-{number}", "function": "paint", "state": "running", "executor": "0.1", "waited_s": 0.2,
         "running_s": 65.0, "progress": 0.5, "stage": "denoise\x1b[31m [bold]"}
        for number in range(30)
    ],
    "queue": {"runs": {"running": 30}, "outbox_messages": 4, "run_bytes": 0, "answer_bytes": 0, "reading": False},
    "rates": {"window_s": 60.0, "runs_per_s": 1.5, "failures_per_s": 0.25, "deltas_per_s": 40.0},
    "outcomes": {"success": 90, "crashed": 2},
    "faults": [{"at": 1.5e9, "kind": "executor", "subject": "0", "message": "killed by SIGSEGV"}],
}  # fmt: skip


class Handler(http.server.BaseHTTPRequestHandler):
    body: ClassVar[bytes] = b""
    code: ClassVar[int] = 200

    def do_GET(self) -> None:
        assert self.path == "/status"
        self.send_response(self.code)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def address() -> Iterator[str]:
    Handler.body, Handler.code = json.dumps(STATUS).encode(), 200
    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def drawn(status: dict[str, Any], problem: str = "", width: int = 160) -> str:
    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None)
    console.print(view(msgspec.convert(status, Status), problem))
    return text.getvalue()


def test_the_view() -> None:
    text = drawn(STATUS)
    for words in (
        "w1  gen-worker 0.1.0  pid 7  up 1:02:05", "not ready  no executor is ready", "sched:8080  registered",
        "1.50 runs/s  0.25 failures/s  40.0 deltas/s", "crashed 2  success 90", "the scheduler is made to wait",
        "given_up", "73%", "20.0 GiB of 80.0 GiB", "18.0 GiB", "unknown of 1.0 GiB", "hf:org/m", "run-19",
        "... and 10 more", "0:01:05", "killed by SIGSEGV", "loop lag 12 ms",
        "2.5 GiB of 7.0 GiB", "0 MiB of ?",
    ):  # fmt: skip
        assert words in text, words
    assert "run-20" not in text
    assert "denoise�[31m [bold]" in text
    assert "\x1b" not in text


def test_the_spare_is_a_line_of_its_own() -> None:
    assert "spare" not in drawn(STATUS)
    spare = {"pid": 4242, "state": "parked", "resident_bytes": 300 * 2**20}
    (line,) = [line for line in drawn({**STATUS, "spare": spare}).splitlines() if "spare" in line]
    for words in ("4242", "parked", "300 MiB"):
        assert words in line


def test_an_empty_worker_and_a_view_that_is_old() -> None:
    empty = {**STATUS, "gpus": [], "models": [], "runs": [], "faults": [], "outcomes": {}}
    empty["queue"] = {**STATUS["queue"], "runs": {}, "reading": True}
    text = drawn(empty, "no worker answers")
    assert "not up to date" in text
    assert "no worker answers" in text
    assert "runs: none" in text
    assert "nothing yet" in text
    assert "GPUs" not in text


def test_a_fault_is_told_in_full_on_a_narrow_terminal() -> None:
    fault = {"at": 1.5e9, "kind": "stream", "subject": "127.0.0.1:8080", "message": "no answer " * 20 + "at all"}
    text = drawn({**STATUS, "faults": [fault]}, width=80)
    assert "stream" in text
    assert "127.0.0.1:8080" in text
    assert text.count("no") >= 20
    assert "at all" in text


def test_once_and_json(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    result = CliRunner().invoke(app, ["top", "--once", "--address", address])
    assert (result.exit_code, "sched:8080" in result.output) == (0, True)
    monkeypatch.setenv("WORKER_HTTP_ADDR", address.replace("127.0.0.1", "0.0.0.0"))
    result = CliRunner().invoke(app, ["top", "--json"])
    assert json.loads(result.output) == STATUS


def test_nothing_answers() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    result = CliRunner().invoke(app, ["top", "--address", f"127.0.0.1:{port}"])
    assert result.exit_code == 1
    assert f"no worker answers at 127.0.0.1:{port}" in result.output
    assert "--address names another" in result.output


@pytest.mark.parametrize(
    ("code", "body", "words"),
    [
        (404, b"", "has no /status (404"),
        (200, b"<html>", "is no gen-worker, or of another version"),
        (200, json.dumps({**STATUS, "version": 2}).encode(), "speaks status version 2, this command 1"),
    ],
)
def test_something_else_answers(address: str, code: int, body: bytes, words: str) -> None:
    Handler.code, Handler.body = code, body
    result = CliRunner().invoke(app, ["top", "--once", "--address", address])
    assert result.exit_code == 1
    assert words in result.output


@pytest.mark.parametrize(
    ("env", "arguments", "words"),
    [
        ({"WORKER_HTTP_ADDR": ""}, [], "names no port here"),
        ({"WORKER_HTTP_ADDR": "127.0.0.1:0"}, [], "names no port here"),
        ({"WORKER_HTTP_ADDR": "nonsense"}, [], "WORKER_HTTP_ADDR is 'nonsense'"),
        ({}, ["--address", "nonsense"], "'nonsense' is no address; expected host:port"),
    ],
)
def test_no_address(env: dict[str, str], arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["top", *arguments], env=env)
    assert result.exit_code == 1
    assert words in result.output


def test_the_help_loads_nothing_heavy() -> None:
    code = "import sys, gen_worker.cli; print([m for m in ('rich.live', 'supervisor', 'grpc') if m in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert loaded.stdout.strip() == "[]"


def test_it_looks_again_until_it_is_interrupted(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []

    def look(seconds: float) -> None:
        looks.append(seconds)
        if len(looks) == 2:
            Handler.code = 500  # the view stays, and says that it is old
        if len(looks) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("gen_worker.cli.top.time.sleep", look)
    terminal = io.StringIO()
    watch(address, msgspec.convert(STATUS, Status), 0.5, Console(file=terminal, force_terminal=True, width=160))
    assert looks == [0.5] * 4
    assert "sched:8080" in terminal.getvalue()
    assert "not up to date" in terminal.getvalue()
