"""The files of one run as its executor asks for them, with the supervisor's and the transfer process's ends in hand."""

from __future__ import annotations

import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from executor import files as module
from executor.files import RunFiles, StoreSettings
from gen_worker.errors import (
    AuthError,
    FatalError,
    ResourceError,
    RetryableError,
    RunCanceled,
    ValidationError,
    WorkerError,
)
from gen_worker.pipe.messages import Failure, FetchFile, FileReply, LocalFile, StoreFile
from gen_worker.types import Asset

WAIT_S = 20
REF = "runs/r1/outputs/a.png"


class Other:
    """Both other ends: what was asked, and the socket that open files come to."""

    def __init__(self) -> None:
        self.name = f"test-{secrets.token_hex(8)}"
        self.sent: list[Any] = []
        self.answer: Callable[[StoreFile, bytes], FileReply | None] = lambda _, __: None
        self.contents: list[bytes] = []
        self.files = RunFiles(7, StoreSettings(self.name, 100), self._send)
        self._socket: socket.socket | None = None

    def listen(self) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.bind(f"\0{self.name}")
        self._socket.listen()

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()

    def _send(self, message: Any) -> None:
        self.sent.append(message)
        if isinstance(message, StoreFile):
            threading.Thread(target=self._take, args=(message,), daemon=True).start()

    def _take(self, message: StoreFile) -> None:
        if self._socket is None:
            return
        connection, _ = self._socket.accept()
        with connection:
            ticket, (fd,), _, _ = socket.recv_fds(connection, 100, 1)
            content = os.pread(fd, 1000, 0)
            os.close(fd)
            self.contents.append(content)
            assert ticket == message.ticket
            reply = self.answer(message, content)
            if reply is not None:
                self.files.replied(reply)


@pytest.fixture
def other() -> Iterator[Other]:
    other = Other()
    other.listen()
    yield other
    other.close()


def stored(message: StoreFile, content: bytes) -> FileReply:
    return FileReply(7, message.number, (LocalFile("", len(content), "ab", "image/png"),))


def test_bytes_and_files_are_handed_over_as_open_files(other: Other, tmp_path: Path) -> None:
    other.answer = stored
    path = tmp_path / "f"
    path.write_bytes(b"from disk")
    (tmp_path / "link").symlink_to(path)
    expected = Asset(REF, mime_type="image/png", size_bytes=9, sha256="ab")
    assert other.files.store(REF, b"in memory", create=True) == expected
    assert other.files.store(REF, path, create=False) == expected
    assert other.files.store(REF, tmp_path / "link", create=False) == expected
    assert other.contents == [b"in memory", b"from disk", b"from disk"]
    assert [(each.key, each.number, each.ref, each.create) for each in other.sent] == [
        (7, 1, REF, True), (7, 2, REF, False), (7, 3, REF, False),
    ]  # fmt: skip
    assert len({each.ticket for each in other.sent}) == 3


@pytest.mark.parametrize(
    ("kind", "error"),
    [("validation", ValidationError), ("auth", AuthError), ("retryable", RetryableError), ("fatal", FatalError),
     ("resource", ResourceError), ("internal", WorkerError)],
)  # fmt: skip
def test_failures_name_the_file(other: Other, kind: Any, error: type[WorkerError]) -> None:
    failure = Failure(kind, "it is so", "told by http://store/x")
    other.answer = lambda message, _: FileReply(7, message.number, failure=failure)
    with pytest.raises(error) as caught:
        other.files.store(REF, b"x", create=False)
    assert str(caught.value) == "output 'a.png': it is so"
    assert caught.value.__notes__ == ["told by http://store/x"]
    assert caught.value.error_type == kind


def test_what_is_not_even_asked(other: Other, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "big").write_bytes(bytes(101))
    cases: list[tuple[bytes | Path, str]] = [
        (bytes(101), "output 'a.png' has 101 bytes, over the limit WORKER_MAX_UPLOAD_BYTES=100"),
        (tmp_path / "big", "output 'a.png' has 101 bytes, over the limit WORKER_MAX_UPLOAD_BYTES=100"),
        (tmp_path / "fifo", "output 'a.png' can't be stored: "),
        (tmp_path, "output 'a.png' can't be stored: "),
    ]
    for source, words in cases:
        with pytest.raises(ValidationError) as caught:
            other.files.store(REF, source, create=False)
        assert str(caught.value).startswith(words)
    with pytest.raises(FileNotFoundError):
        other.files.store(REF, tmp_path / "none", create=False)
    with pytest.raises(WorkerError, match="this worker has no file store"):
        RunFiles(7, StoreSettings(), other.sent.append).store(REF, b"x", create=False)
    assert not other.sent


def test_a_transfer_process_that_is_still_starting(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is started by the first request: its socket is there a while later."""
    other = Other()
    asked = threading.Event()

    def send(message: Any) -> None:
        other.sent.append(message)
        asked.set()

    monkeypatch.setattr(other.files, "_send", send)
    other.answer = stored
    result: list[Asset] = []
    thread = threading.Thread(target=lambda: result.append(other.files.store(REF, b"x", create=False)), daemon=True)
    thread.start()
    assert asked.wait(WAIT_S)
    other.listen()
    other._take(other.sent[0])
    thread.join(WAIT_S)
    assert [asset.size_bytes for asset in result] == [1]
    other.close()


@pytest.mark.parametrize("listening", [True, False])
def test_a_cancel_ends_the_wait(listening: bool) -> None:
    other = Other()
    if listening:
        other.listen()
    raised: list[BaseException] = []

    def store() -> None:
        try:
            other.files.store(REF, b"x", create=False)
        except BaseException as error:  # noqa: BLE001  (which one it is is the question)
            raised.append(error)

    thread = threading.Thread(target=store, daemon=True)
    thread.start()
    while not other.sent or (listening and not other.contents):
        pass
    other.files.cancel()
    thread.join(WAIT_S)
    assert [type(error) for error in raised] == [RunCanceled]
    with pytest.raises(RunCanceled):
        other.files.store(REF, b"x", create=False)
    with pytest.raises(RunCanceled):
        other.files.inputs([("a", Asset("a"))], lambda: None)
    other.files.replied(FileReply(7, 1))  # crossed the cancel
    other.close()


def test_a_failure_that_comes_before_the_file_could_be_handed_over() -> None:
    other = Other()
    send = other._send

    def fail_at_once(message: StoreFile) -> None:
        send(message)
        other.files.replied(FileReply(7, message.number, failure=Failure("retryable", "the transfer process died")))

    other.files._send = fail_at_once  # type: ignore[assignment]
    with pytest.raises(RetryableError, match="the transfer process died"):
        other.files.store(REF, b"x", create=False)


# -- inputs ---------------------------------------------------------------------------------------


class Frozen(Asset, frozen=True):  # type: ignore[misc]  # msgspec allows it
    pass


def test_inputs_are_asked_for_once_and_set_everywhere() -> None:
    sent: list[Any] = []
    replied: list[int] = []
    files = RunFiles(7, StoreSettings(), sent.append)
    assets = [("x", Asset("a", local_path="/etc/passwd")), ("y", Frozen("b")), ("z", Asset("a"))]
    inputs = files.inputs(assets, lambda: replied.append(1))
    assert not sent
    inputs.ask()
    assert sent == [FetchFile(7, 1, ("a", "b"))]
    files.replied(FileReply(7, 1, (LocalFile("/run/a", 1, "aa", "t/a"), LocalFile("/run/b", 2, "bb", "t/b"))))
    files.replied(FileReply(7, 1))  # a second one is for nobody
    assert replied == [1]
    inputs.apply()
    assert [msgspec.structs.astuple(asset) for _, asset in assets] == [
        ("a", None, "/run/a", "t/a", 1, "aa"),
        ("b", None, "/run/b", "t/b", 2, "bb"),
        ("a", None, "/run/a", "t/a", 1, "aa"),
    ]


@pytest.mark.parametrize(
    ("ref", "shown"), [("b", "'b'"), ("https://host/b?token=secret", "a URL"), ("HTTP://u:p@host/", "a URL")]
)
def test_a_missing_input_is_named_by_its_place(ref: str, shown: str) -> None:
    files = RunFiles(7, StoreSettings(), lambda _: None)
    inputs = files.inputs([("x", Asset("a")), ("y[2].z", Asset(ref))], lambda: None)
    inputs.ask()
    files.replied(FileReply(7, 1, failure=Failure("auth", "no access"), failed=1))
    with pytest.raises(AuthError) as caught:
        inputs.apply()
    assert str(caught.value) == f"input y[2].z ({shown}): no access"


def test_a_canceled_run_has_no_inputs() -> None:
    files = RunFiles(7, StoreSettings(), lambda _: None)
    inputs = files.inputs([("x", Asset("a"))], lambda: None)
    files.cancel()
    with pytest.raises(RunCanceled):
        inputs.apply()


def test_too_many_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    files = RunFiles(7, StoreSettings(), lambda _: None)
    assets = [(f"[{number}]", Asset(f"a{number}")) for number in range(module.MAX_INPUTS + 1)]
    with pytest.raises(ValidationError, match="the payload has 1001 files, at most 1000 are fetched"):
        files.inputs(assets, lambda: None)
    monkeypatch.setattr(module, "MAX_REFS_BYTES", 5)
    with pytest.raises(ValidationError, match="have more than 5 bytes"):
        files.inputs([("x", Asset("äää"))], lambda: None)
