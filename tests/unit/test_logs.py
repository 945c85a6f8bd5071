"""The log's formats, its redaction, and that a stalled reader never holds up the threads that log."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import subprocess
import sys
import threading
import time
import warnings
from typing import TYPE_CHECKING

import pytest

from supervisor.logs import LogHandle, start_logging
from supervisor.redaction import Redactor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJ3b3JrZXItMSJ9.c2lnbmF0dXJl-_x"
log = logging.getLogger("supervisor.session")


class LogFile:
    """A started log that writes to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self.handle: LogHandle | None = None

    def start(self, **options: object) -> LogHandle:
        self.handle = start_logging(fd=self.fd, **options)  # type: ignore[arg-type]
        return self.handle

    def lines(self) -> list[str]:
        assert self.handle is not None
        self.handle.stop()
        return self.path.read_text().splitlines()


@pytest.fixture
def logged(tmp_path: Path) -> Iterator[LogFile]:
    file = LogFile(tmp_path / "log")
    yield file
    if file.handle:
        file.handle.stop()
    os.close(file.fd)


@pytest.fixture
def stalled() -> Iterator[tuple[int, int]]:
    """A pipe of 4 KiB that nobody reads yet: (read end, write end)."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    yield read_end, write_end
    os.close(write_end)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_text(logged: LogFile) -> None:
    logged.start()
    log.info("connected to %s", "a:1", extra={"executor": 0, "run_id": "r-7"})
    log.debug("not at this level")
    (line,) = logged.lines()
    stamp, _, rest = line.partition("Z ")
    assert time.strptime(stamp.partition(".")[0], "%Y-%m-%d %H:%M:%S")
    assert rest.split() == ["INFO", "session", "[executor", "0,", "run", "r-7]", "connected", "to", "a:1"]


def test_json(logged: LogFile) -> None:
    logged.start(log_format="json", level="debug")
    log.debug('say "%s"', "hi", extra={"run_id": "r-7", "executor": 3})
    log.warning("plain")
    first, second = map(json.loads, logged.lines())
    stamp = first.pop("ts")
    assert stamp.endswith("Z")
    assert "T" in stamp
    expected = {"level": "debug", "logger": "supervisor.session", "message": 'say "hi"', "run_id": "r-7"}
    assert first == expected | {"executor": "3"}
    assert second.keys() == {"ts", "level", "logger", "message"}


def fail(secret: str) -> None:
    raise ValueError(f"got token={secret}")


def test_tracebacks_are_rendered_and_redacted(logged: LogFile) -> None:
    logged.start(log_format="json")
    try:
        fail("abcdef")
    except ValueError:
        log.exception("failed")
    (line,) = map(json.loads, logged.lines())
    assert line["exc"].startswith("Traceback")
    assert line["exc"].endswith("ValueError: got token=***")


def test_tracebacks_in_text_are_indented(logged: LogFile) -> None:
    logged.start()
    try:
        fail("abcdef")
    except ValueError:
        log.exception("failed")
    first, *rest = logged.lines()
    assert first.endswith("failed")
    assert rest[0] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in rest)


def test_a_message_can_neither_pose_as_a_record_nor_steer_the_terminal(logged: LogFile) -> None:
    logged.start()
    log.info("first\n2026-01-01 00:00:00.000Z ERROR forged \x1b[31mred\r", extra={"run_id": "a\nb"})
    first, second, third = logged.lines()
    assert first.endswith("[run a")
    assert second == "    b] first"
    assert third == r"    2026-01-01 00:00:00.000Z ERROR forged \x1b[31mred\x0d"


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_odd_records_are_still_logged(logged: LogFile, log_format: str) -> None:
    logged.start(log_format=log_format)
    log.info("no argument for %s and %d", "x")  # noqa: PLE1206 - the mistake is the test
    log.info("surrogate \udcff", extra={"run_id": "\ud800"})
    log.info("x" * 100_000)
    one, two, three = logged.lines()
    assert "do not fit" in one
    assert r"\udcff" in two.replace("\\\\", "\\")
    assert "more characters" in three
    assert len(three) < 40_000


@pytest.mark.parametrize(
    ("text", "redacted"),
    [
        ("the value hunter22 itself", "the value *** itself"),
        ("longer hunter22-and-more too", "longer *** too"),
        (f"Authorization: Bearer {JWT}", "Authorization: Bearer ***"),
        ("bearer 0123456789abcdef0", "bearer ***"),
        (f"token {JWT} refused", "token *** refused"),
        ("GET https://s/f?X-Amz-Signature=ab12&X-Amz-Date=7", "GET https://s/f?X-Amz-Signature=***&X-Amz-Date=7"),
        ("https://s/f?sig=a%2Fb&se=1", "https://s/f?sig=***&se=1"),
        ("https://s/f?token=a#part", "https://s/f?token=***#part"),
        ("AUTH_TOKEN=abc next", "AUTH_TOKEN=*** next"),
        ('{"file_token": "abc", "n": 1}', '{"file_token": "***", "n": 1}'),
        ("http://user:pass@host/x", "http://***@host/x"),
        ("with hf_ABCDEFGHIJKLMNOPQRSTUV done", "with hf_*** done".replace("hf_", "")),
        ("max_tokens=12 keyword=x bearer token missing", "max_tokens=12 keyword=x bearer token missing"),
        ("https://s/f?page=2&monkey=3", "https://s/f?page=2&monkey=3"),
        ("the token: it expired; 10:30@noon http://a:80/b@c", "the token: it expired; 10:30@noon http://a:80/b@c"),
    ],
)
def test_redaction(text: str, redacted: str) -> None:
    assert Redactor({"hunter22", "hunter22-and-more", "abc"}).redact(text) == redacted


def test_very_short_secrets_do_not_garble_the_log() -> None:
    assert Redactor({"a"}).redact("a cat") == "a cat"


@pytest.mark.parametrize(
    "piece", ["eyJ", "a-", "token", "://a", "bearer ", '"token', "hf_a", "?sig", "://a:", '"token":"']
)
def test_redaction_takes_linear_time(piece: str) -> None:
    redactor, text = Redactor({"secret"}), piece * 50_000
    started = time.process_time()
    redactor.redact(text)
    assert time.process_time() - started < 2


def test_secrets_learned_later_are_masked(logged: LogFile) -> None:
    handle = logged.start(secrets={"first-one"})
    handle.add_secrets({"second-one"})
    log.info("first-one second-one")
    assert logged.lines()[0].endswith("*** ***")


def test_a_stalled_reader_never_holds_up_a_thread_that_logs(stalled: tuple[int, int]) -> None:
    read_end, write_end = stalled
    handle = start_logging(fd=write_end, capacity=8)
    try:
        finished = threading.Event()

        def log_much() -> None:
            for index in range(500):
                log.info("%d %s", index, "x" * 1000)
            finished.set()

        threading.Thread(target=log_much, daemon=True).start()
        assert finished.wait(10)
        dropped = handle.dropped
        assert 400 < dropped < 500

        chunks: list[bytes] = []
        reader = threading.Thread(target=_read_all, args=(read_end, chunks), daemon=True)
        reader.start()
        until(lambda: _reported_drops(chunks) == dropped)
        log.info("after recovery")
        until(lambda: b"after recovery" in b"".join(chunks))
    finally:
        handle.stop()
    text = b"".join(chunks).decode()
    assert _reported_drops(chunks) == handle.dropped == dropped
    assert text.count("x" * 1000) + dropped == 500
    assert text.splitlines()[-1].endswith("after recovery")


def _reported_drops(chunks: list[bytes]) -> int:
    return sum(int(count) for count in re.findall(rb"WARNING  logs +(\d+) log records were dropped", b"".join(chunks)))


def _read_all(fd: int, chunks: list[bytes]) -> None:
    with os.fdopen(fd, "rb", buffering=0) as pipe:
        while chunk := pipe.read(65536):
            chunks.append(chunk)


def test_stop_gives_up_on_a_stalled_reader(stalled: tuple[int, int]) -> None:
    read_end, write_end = stalled
    handle = start_logging(fd=write_end, capacity=4)
    for _ in range(50):
        log.info("x" * 1000)
    started = time.monotonic()
    handle.stop(timeout_s=0.05)
    assert time.monotonic() - started < 5
    os.close(read_end)  # the writer sees a broken pipe and ends


def test_a_non_blocking_descriptor_loses_nothing(stalled: tuple[int, int]) -> None:
    read_end, write_end = stalled
    os.set_blocking(write_end, False)
    handle = start_logging(fd=write_end)
    chunks: list[bytes] = []
    for _ in range(50):
        log.info("x" * 1000)
    threading.Thread(target=_read_all, args=(read_end, chunks), daemon=True).start()
    handle.stop(timeout_s=10)
    until(lambda: b"".join(chunks).count(b"x" * 1000) == 50)
    assert handle.dropped == 0


def test_a_reader_that_is_gone_is_counted_and_harmless() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    handle = start_logging(fd=write_end)
    log.info("nobody reads this")
    handle.stop()
    assert handle.dropped == 1
    os.close(write_end)


def test_stop_puts_the_root_logger_back(logged: LogFile) -> None:
    root = logging.getLogger()
    before = (root.level, root.handlers[:], logging.getLogger("httpx").level)
    handle = logged.start(level="error")
    assert root.level == logging.ERROR
    handle.stop()
    handle.stop()
    assert (root.level, root.handlers[:], logging.getLogger("httpx").level) == before


def test_libraries_that_log_each_request_are_quieter(logged: LogFile) -> None:
    logged.start()
    logging.getLogger("httpx").info("GET https://store/presigned")
    logging.getLogger("httpx").warning("retrying")
    (line,) = logged.lines()
    assert line.endswith("retrying")


def test_warnings_are_logged(logged: LogFile) -> None:
    logged.start()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn("old thing", stacklevel=1)
    assert "old thing" in logged.lines()[0]


def test_the_last_lines_of_a_process_that_forgets_to_stop_are_written() -> None:
    code = """
import logging
from supervisor.logs import start_logging
start_logging()
logging.getLogger("x").error("the very last line")
raise SystemExit(7)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 7
    assert done.stderr.endswith("the very last line\n")


def test_a_process_whose_stderr_is_stalled_still_exits(stalled: tuple[int, int]) -> None:
    code = """
import logging
from supervisor.logs import start_logging
handle = start_logging(capacity=4)
for _ in range(100):
    logging.getLogger("x").error("x" * 1000)
handle.stop(timeout_s=0.05)
"""
    read_end, write_end = stalled
    done = subprocess.run([sys.executable, "-c", code], stderr=write_end, timeout=30, check=False)
    assert done.returncode == 0
    os.close(read_end)
