"""`gen-worker run`: a call through a real supervisor and executor, what is shown of it, and its exit codes."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import psutil

from tests.support.dev_server import PROGRAM, wait_for
from tests.support.worker_process import TENANTS, is_alive

PROJECT = TENANTS / "serve"
TIMEOUT_S = 60


def run(*arguments: str, project: Path = PROJECT, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [str(PROGRAM), "run", *arguments, "--project", str(project)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False, **options)


def test_fields_and_a_file_go_in_and_the_output_alone_is_stdout(tmp_path: Path) -> None:
    (tmp_path / "cat.txt").write_text("a cat")
    kept = tmp_path / "kept"
    done = run("mirror", f"file=@{tmp_path}/cat.txt", "note=5", "data=QUI=", "--files-dir", str(kept))
    assert done.returncode == 0, done.stderr
    output = json.loads(done.stdout)
    assert (output["note"], output["data_size"]) == ("5", 2)
    assert (kept / output["file"]["ref"]).read_text() == "a cat"


def test_a_stream_as_json_lines() -> None:
    done = run("tell", "--payload-json", "-", "--json", input='{"words": 2}')
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["event"] for line in lines] == [
        "job.progress", "output.delta", "job.progress", "output.delta", "output.completed", "result",
    ]  # fmt: skip
    assert lines[1]["payload"] == {"text": "Once "}
    assert lines[-1]["run_id"]


def test_a_failed_run_is_one_line_and_1() -> None:
    done = run("fail", "how=memory")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(r"error: resource: out of memory( \(.*\))?\n", done.stderr)


def test_what_does_not_fit_is_2() -> None:
    done = run("paint", "stepz=3")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: there is no field 'stepz'; did you mean 'steps'?\n"


def test_a_worker_that_does_not_start_is_3() -> None:
    done = run("tell", env={**os.environ, "WORKER_EXECUTOR_THREADS": "many"})
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("error: the worker did not start: gen-worker-supervisor: WORKER_EXECUTOR_THREADS")


def test_a_reader_that_leaves_ends_the_run() -> None:
    command = f"{PROGRAM} run tell words=400 --project {PROJECT} | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.stdout.splitlines() == ['{"text":"Once "}', "141"]
    assert "Traceback" not in done.stderr


def test_ctrl_c_cancels_the_run_and_leaves_nothing_behind() -> None:
    command = [str(PROGRAM), "run", "wait", "--project", str(PROJECT)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "progress 25% waiting\n"
        family = psutil.Process(process.pid).children(recursive=True)
        assert len(family) >= 2, "a supervisor and an executor"
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT_S) == 130
        assert process.stderr.read().startswith("error: canceled: ")
    wait_for(lambda: not [child for child in family if is_alive(child.pid)])


def test_on_a_terminal_it_is_live() -> None:
    near, far = pty.openpty()
    command = [str(PROGRAM), "run", "tell", "words=3", "--project", str(PROJECT)]
    environ = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.Popen(command, stdin=far, stdout=far, stderr=far, env=environ)
    os.close(far)
    shown = b""
    try:
        while True:
            shown += os.read(near, 65536)
    except OSError:  # how a terminal says that nobody writes any more
        pass
    finally:
        os.close(near)
    assert process.wait(TIMEOUT_S) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "starting the worker" in text
    assert "Once there was" in text, "a stream of texts is one text"
