"""Files in and out, end to end: scheduler, worker, transfer process, executors, a file store over HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio

from gen_worker.testing.mock_orchestrator import FileRequest, FileStoreServer, MockOrchestrator
from tests.support.other_user import UID, worker_command
from tests.support.worker_process import WAIT_S, Chain, WorkerProcess, chain, eventually, wait_for_executors

pytestmark = pytest.mark.asyncio(loop_scope="module")

TENANT: dict[str, Any] = {"tenant": "files", "modules": "files_functions"}
TOKEN = "run-token-0123456789"
PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
MIB = 1024 * 1024


@dataclass
class Rig:
    chain: Chain
    store: FileStoreServer
    directory: Path

    @property
    def access(self) -> dict[str, Any]:
        """What a run request says of its files."""
        return {"file_base_url": self.store.url, "file_token": TOKEN, "tenant_id": "tenant"}

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @property
    def stored(self) -> Path:
        return self.directory / "store"

    def transfer_process(self) -> psutil.Process:
        children = psutil.Process(self.chain.worker.pid).children()
        return next(child for child in children if "supervisor.transfers" in child.cmdline())


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """One that every user can reach; those of pytest can't be."""
    with tempfile.TemporaryDirectory(prefix="gen-worker-files-") as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared(directory: Path) -> AsyncIterator[Rig]:
    env = {
        "WORKER_RUN_DIR": str(directory / "run"),
        "WORKER_EXECUTOR_THREADS": "2",
        "WORKER_CANCEL_GRACE_SECONDS": "10",
        "WORKER_MAX_UPLOAD_BYTES": str(2 * MIB),
        "WORKER_MAX_INPUT_FILE_BYTES": str(2 * MIB),
        "FILE_API_TOKEN": "fallback-token-0123456789",
    }
    with (
        FileStoreServer(directory / "store", token=TOKEN) as store,
        FileStoreServer(directory / "fallback", token=env["FILE_API_TOKEN"]) as fallback,
    ):
        (directory / "store" / "in.png").write_bytes(PNG)
        (directory / "store" / "in.txt").write_bytes(b"text")
        (directory / "fallback" / "in.txt").write_bytes(b"fallback")
        env["FILE_API_BASE_URL"] = fallback.url
        async with chain(env=env, **TENANT) as found:
            yield Rig(found, store, directory)


@pytest.fixture
def rig(shared: Rig) -> Iterator[Rig]:
    shared.store.requests.clear()
    yield shared
    shared.store.intercept = None


def refs(*names: str) -> list[dict[str, str]]:
    return [{"ref": name} for name in names]


async def gone(rig: Rig, run_id: str) -> None:
    await eventually(lambda: not (rig.run_dir / run_id).exists(), what=f"the inputs of {run_id} are removed")


# -- inputs ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["look", "alook"])
async def test_inputs_are_there_before_the_function_runs(rig: Rig, function: str) -> None:
    (first,) = refs("in.png")
    payload = {"first": first, "more": refs("in.txt", "in.png"), "by_name": {"x": refs("in.txt")[0]}}
    handle = await rig.chain.run(function, payload, run_id=f"run-{function}", **rig.access)
    files = (await handle.output(WAIT_S))["files"]
    assert [file["ref"] for file in files] == ["in.png", "in.txt", "in.png", "in.txt"]
    assert [file["sha256"] for file in files[:2]] == [hashlib.sha256(data).hexdigest() for data in (PNG, b"text")]
    assert [file["mime_type"] for file in files[:2]] == ["image/png", "text/plain"]
    inputs = rig.run_dir / f"run-{function}" / "inputs"
    assert {Path(file["path"]).parent for file in files} == {inputs}
    assert all((file["links"], file["mode"]) == (2, 0o444) for file in files)
    assert {request.tenant_id for request in rig.store.requests} <= {"tenant"}
    await gone(rig, f"run-{function}")


async def test_a_run_whose_input_fails_says_which_and_why(rig: Rig) -> None:
    payload = {"first": refs("in.png")[0], "more": refs("in.txt", "not/there.png")}
    result = await rig.chain.result("look", payload, **rig.access)
    assert (result.error_type, result.retryable) == ("validation", False)
    assert result.safe_message == "input more[1] ('not/there.png'): the file store has no such file"
    await gone(rig, result.run_id)


async def test_an_input_over_the_limit(rig: Rig) -> None:
    with (rig.stored / "big.bin").open("wb") as file:
        file.truncate(2 * MIB + 1)
    result = await rig.chain.result("look", {"more": refs("big.bin")}, **rig.access)
    assert result.error_type == "validation"
    assert "input more[0] ('big.bin'): it has 2097153 bytes or more, over the limit" in result.safe_message
    assert [request.method for request in rig.store.requests] == ["HEAD"]


@pytest.mark.parametrize(
    "url", ["{store}/api/v1/file/in.png", "http://localhost:{port}/x", "http://2130706433:{port}/x?token=abc"]
)
async def test_a_url_of_this_machine_is_refused(rig: Rig, url: str) -> None:
    port = rig.store.url.rpartition(":")[2]
    url = url.format(store=rig.store.url, port=port)
    result = await rig.chain.result("look", {"first": {"ref": url}}, **rig.access)
    assert result.error_type == "validation"
    assert result.safe_message.startswith("input first (a URL): its ")
    assert "://" not in result.safe_message
    assert not rig.store.requests


async def test_a_wrong_token(rig: Rig) -> None:
    result = await rig.chain.result("look", {"more": refs("in.png")}, **{**rig.access, "file_token": "wrong"})
    assert (result.error_type, result.retryable) == ("auth", False)
    assert result.safe_message == "input more[0] ('in.png'): the file store refused access (401)"
    result = await rig.chain.result("look", {"more": refs("in.png")}, file_base_url=rig.store.url)
    assert result.error_type == "auth"  # the worker's own token is not sent to a store that the request names
    assert {request.authorization for request in rig.store.requests} == {"Bearer wrong", ""}


async def test_runs_that_name_no_store_use_the_workers_own(rig: Rig) -> None:
    output = await rig.chain.call("look", {"more": refs("in.txt")})
    assert output["files"][0]["sha256"] == hashlib.sha256(b"fallback").hexdigest()
    saved = await rig.chain.call("save", {"ref": "out.txt", "data": b"to the fallback"})
    assert (rig.directory / "fallback" / saved["asset"]["ref"]).read_bytes() == b"to the fallback"
    assert not rig.store.requests


async def test_runs_that_wait_for_inputs_keep_no_thread_from_others(rig: Rig) -> None:
    """Two threads, four runs whose input does not come: a fifth runs at once."""
    release = threading.Event()

    def intercept(request: FileRequest) -> None:
        if request.method == "HEAD" and request.ref == "in.png":
            release.wait(WAIT_S)

    rig.store.intercept = intercept
    functions = ("look", "one_at_a_time", "look", "one_at_a_time")
    waiting = [await rig.chain.run(function, {"more": refs("in.png")}, **rig.access) for function in functions]
    await eventually(lambda: len(rig.store.requests) >= 4)
    assert (await rig.chain.call("nap", {}))["text"] == "slept"
    assert (await rig.chain.call("one_at_a_time", {"more": refs("in.txt")}, **rig.access))["text"]
    assert not any(handle.done for handle in waiting)
    release.set()
    for handle in waiting:
        assert await handle.output(WAIT_S)


@pytest.mark.parametrize("function", ["look", "alook"])
@pytest.mark.parametrize("timeout_ms", [0, 400])
async def test_a_cancel_or_deadline_ends_a_wait_for_inputs(rig: Rig, function: str, timeout_ms: int) -> None:
    pid = (await rig.chain.call("nap", {}))["pid"]
    release = threading.Event()

    def intercept(request: FileRequest) -> None:
        release.wait(WAIT_S)

    rig.store.intercept = intercept
    handle = await rig.chain.run(function, {"more": refs("in.png")}, timeout_ms=timeout_ms, **rig.access)
    await eventually(lambda: len(rig.store.requests))
    began = time.monotonic()
    if not timeout_ms:
        await handle.cancel()
    result = await handle.result(WAIT_S)
    assert result.error_type == ("timeout" if timeout_ms else "canceled")
    assert time.monotonic() - began < 5  # the grace time is 10 s, and the store says nothing for 30 s
    release.set()
    await gone(rig, result.run_id)
    assert (await rig.chain.call("nap", {}))["pid"] == pid


# -- outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["save", "asave"])
@pytest.mark.parametrize("how", ["save_bytes", "save_file"])
async def test_outputs(rig: Rig, function: str, how: str) -> None:
    path = rig.directory / "out.png"
    path.write_bytes(PNG)
    payload = {"how": how, "ref": "a/out.png", **({"data": PNG} if how == "save_bytes" else {"path": str(path)})}
    handle = await rig.chain.run(function, payload, **rig.access)
    asset = (await handle.output(WAIT_S))["asset"]
    ref = f"runs/{handle.run_id}/outputs/a/out.png"
    assert asset == {
        "ref": ref, "tenant_id": "tenant", "local_path": None, "mime_type": "image/png", "size_bytes": len(PNG),
        "sha256": hashlib.sha256(PNG).hexdigest(),
    }  # fmt: skip
    assert (rig.stored / ref).read_bytes() == PNG
    assert [(request.method, request.tenant_id) for request in rig.store.requests] == [("PUT", "tenant")]


async def test_create_fails_when_it_exists_and_overwrite_does_not(rig: Rig) -> None:
    for how, text in [
        ("save_bytes_create", "ValidationError: output 'x': it exists already"),
        ("save_bytes_overwrite", "saved"),
        ("save_bytes", "saved"),
    ]:
        there = rig.stored / "runs" / how / "outputs" / "x"
        there.parent.mkdir(parents=True)
        there.write_bytes(b"old")
        output = await rig.chain.call(
            "save_and_catch", {"how": how, "ref": "x", "data": b"new"}, run_id=how, **rig.access
        )
        assert output["text"] == text
        assert there.read_bytes() == (b"new" if text == "saved" else b"old")
    asset = (await rig.chain.call("save", {"how": "save_bytes_create", "data": b"new"}, **rig.access))["asset"]
    assert (rig.stored / asset["ref"]).read_bytes() == b"new"


@pytest.mark.parametrize("ref", ["../x", "/x", "runs/other/outputs/x", "a/../../x", ""])
async def test_refs_that_escape(rig: Rig, ref: str) -> None:
    result = await rig.chain.result("save", {"ref": ref, "data": b"x"}, **rig.access)
    assert result.error_type == "validation"
    assert not rig.store.requests


async def test_an_output_over_the_limit_is_not_begun(rig: Rig) -> None:
    for function, payload in (("save", {"data": bytes(2 * MIB + 1)}), ("save_temporary", {"size": 2 * MIB + 1})):
        result = await rig.chain.result(function, payload, **rig.access)
        assert result.error_type == "validation"
        assert "2097153 bytes, over the limit WORKER_MAX_UPLOAD_BYTES=2097152" in result.safe_message
    assert not rig.store.requests


async def test_a_refused_token_can_be_caught(rig: Rig) -> None:
    payload = {"ref": "x", "data": b"x"}
    output = await rig.chain.call("save_and_catch", payload, **{**rig.access, "file_token": "wrong"})
    assert output["text"] == "AuthError: output 'x': the file store refused access (401)"
    rig.store.intercept = lambda _: 403
    result = await rig.chain.result("save", payload, **rig.access)
    assert (result.error_type, result.safe_message) == ("auth", "output 'x': the file store refused access (403)")


async def test_what_can_not_be_saved(rig: Rig) -> None:
    """Nothing of it makes the worker wait or shows it what only the supervisor may read."""
    os.mkfifo(rig.directory / "fifo")
    (rig.directory / "dangling").symlink_to(rig.directory / "nowhere")
    (rig.directory / "link").symlink_to(rig.directory / "fifo")
    for name, words in [
        ("fifo", ", only something of that name that is no regular file"),
        ("link", ", only something of that name that is no regular file"),
        ("dangling", ""),
        ("run", ", only something of that name that is no regular file"),
    ]:
        path = rig.directory / name
        payload = {"how": "save_file", "ref": "x", "path": str(path)}
        output = await rig.chain.call("save_and_catch", payload, **rig.access)
        assert output["text"] == f"FileNotFoundError: can't save 'x': there is no file {path}{words}"
    payload = {"how": "save_file", "ref": "x", "path": "/proc/self/environ"}
    output = await rig.chain.call("save_and_catch", payload, **rig.access)
    assert output["text"] == "ValidationError: output 'x': it has more than the 0 bytes that it says"


@pytest.mark.parametrize("function", ["save", "asave"])
async def test_a_deadline_ends_an_upload(rig: Rig, function: str) -> None:
    pid = (await rig.chain.call("nap", {}))["pid"]
    release = threading.Event()
    rig.store.intercept = lambda _: release.wait(WAIT_S) and None
    began = time.monotonic()
    result = await rig.chain.result(function, {"data": b"x"}, timeout_ms=400, **rig.access)
    assert result.error_type == "timeout"
    assert time.monotonic() - began < 5
    release.set()
    assert (await rig.chain.call("nap", {}))["pid"] == pid


async def test_a_transfer_process_that_dies_costs_its_uploads_only(rig: Rig) -> None:
    release, reached = threading.Event(), threading.Event()

    def intercept(request: FileRequest) -> None:
        reached.set()
        release.wait(WAIT_S)

    rig.store.intercept = intercept
    upload = await rig.chain.run("save", {"data": b"x"}, **rig.access)
    fetch = await rig.chain.run("look", {"more": refs("in.txt")}, **rig.access)
    assert await asyncio.to_thread(reached.wait, WAIT_S)
    await eventually(lambda: len(rig.store.requests) == 2)
    rig.store.intercept = None
    rig.transfer_process().send_signal(signal.SIGKILL)
    result = await upload.result(WAIT_S)
    assert (result.error_type, result.retryable) == ("retryable", True)
    assert result.safe_message.startswith("output 'out.bin': the transfer process died")
    assert len((await fetch.output(WAIT_S))["files"]) == 1
    assert (await rig.chain.call("save", {"data": b"x"}, **rig.access))["asset"]["size_bytes"] == 1
    release.set()


async def test_the_end_of_a_worker_leaves_no_inputs(directory: Path) -> None:
    """The run's directory goes even when the executor dies under it, and when the worker stops."""
    run_dir = directory / "other-run"
    with FileStoreServer(directory / "store") as store:
        async with chain(env={"WORKER_RUN_DIR": str(run_dir)}, **TENANT) as found:
            await found.call("look", {"more": refs("in.png")}, run_id="last", file_base_url=store.url)
            found.worker.signal(signal.SIGTERM)
            assert await found.worker.exit_code() == 0
    assert sorted(path.name for path in run_dir.iterdir()) == ["cache", f"uid-{os.geteuid()}"]


# -- realtime sessions ----------------------------------------------------------------------------


async def test_a_session_stores_files_with_its_own_token(rig: Rig) -> None:
    """Also after the other end has closed: its handler may have something to keep."""
    session = await rig.chain.orchestrator.open_realtime("keep", **rig.access)
    outputs = f"runs/{session.session_id}/outputs"
    for number, data in enumerate((b"one", b"two"), 1):
        await session.send(data)
        said = json.loads((await session.receive(WAIT_S)).data)
        assert said == {"ref": f"{outputs}/{number}.bin", "tenant": "tenant"}
        assert (rig.stored / said["ref"]).read_bytes() == data
    await session.close()
    await eventually((rig.stored / outputs / "count.txt").exists)
    assert (rig.stored / outputs / "count.txt").read_bytes() == b"2"


async def test_a_session_whose_deadline_comes_in_an_upload(rig: Rig) -> None:
    pid = (await rig.chain.call("nap", {}))["pid"]
    release = threading.Event()
    rig.store.intercept = lambda _: release.wait(WAIT_S) and None
    session = await rig.chain.orchestrator.open_realtime("keep", timeout_ms=500, **rig.access)
    await session.send(b"one")
    assert await session.wait_closed(WAIT_S) == "timeout"
    release.set()
    assert (await rig.chain.call("nap", {}))["pid"] == pid


# -- another user ---------------------------------------------------------------------------------


async def test_files_of_executors_that_are_another_user(directory: Path) -> None:
    """They read their inputs and change nothing; and get nothing stored that they can't read themselves."""
    closed = directory / "closed"
    closed.write_bytes(b"the supervisor's")
    closed.chmod(0o600)
    env = {"WORKER_EXECUTOR_UID": str(UID), "WORKER_RUN_DIR": str(directory / "their-run")}
    with FileStoreServer(directory / "their-store") as store:
        (directory / "their-store" / "in.png").write_bytes(PNG)
        access = {"file_base_url": store.url, "tenant_id": "tenant"}
        async with (
            MockOrchestrator() as orchestrator,
            WorkerProcess(orchestrator.address, env=env, command=worker_command(directory), **TENANT) as worker,
        ):
            await worker.while_it_runs(wait_for_executors(orchestrator, 1))
            found = Chain(orchestrator, worker)
            files = (await found.call("look", {"more": refs("in.png")}, **access))["files"]
            assert [(file["links"], file["uid"], file["mode"]) for file in files] == [(2, 0, 0o444)]
            output = await found.call("write_to_input", {"more": refs("in.png")}, **access)
            assert output["pid"] == UID
            refused = ("write", "chmod", "replace", "cache", "runs")
            assert output["text"] == ", ".join(f"{name}: PermissionError" for name in refused)
            assert (await found.call("save", {"data": PNG}, **access))["asset"]["mime_type"] == "image/png"
            payload = {"how": "save_file", "ref": "x", "path": str(closed)}
            output = await found.call("save_and_catch", payload, **access)
            assert output["text"].startswith("PermissionError: ")
    assert not list((directory / "their-store").rglob("x"))


# -- large files ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [64 * MIB, pytest.param(1024 * MIB, marks=[pytest.mark.soak, pytest.mark.timeout(300)])]
)
async def test_a_large_upload_takes_no_memory_and_holds_nobody_up(directory: Path, size: int) -> None:
    env = {
        "WORKER_RUN_DIR": str(directory / f"run-{size}"),
        "WORKER_MAX_UPLOAD_BYTES": "0",
        "HEARTBEAT_INTERVAL_SECONDS": "0.1",
    }
    with FileStoreServer(directory / f"store-{size}") as store:
        async with chain(env=env, **TENANT) as found:
            rig = Rig(found, store, directory)
            await found.call("save", {"data": b"x"}, **rig.access)
            began = time.monotonic()
            handle = await found.run("save_temporary", {"size": size}, **rig.access)
            waits = []
            while not handle.done:
                before = time.monotonic()
                await found.call("nap", {})
                waits.append(time.monotonic() - before)
            asset = (await handle.output(WAIT_S))["asset"]
            seconds = time.monotonic() - began
            times = [each.at for each in found.connection.registrations if each.at >= began]
            everyone = {
                "supervisor": found.worker.pid,
                "transfers": rig.transfer_process().pid,
                "executor": found.worker.executors()[0].pid,
            }
            peaks = {name: peak_mib(pid) for name, pid in everyone.items()}
    gaps = [later - earlier for earlier, later in zip([began, *times], times, strict=False)]
    shown = ", ".join(f"{name} {peak:.0f} MiB" for name, peak in peaks.items())
    print(
        f"{size / MIB:.0f} MiB in {seconds:.1f} s; peaks: {shown}; "
        f"the longest gap between heartbeats (0.1 s): {max(gaps):.2f} s, "
        f"the longest wait of another run: {max(waits):.2f} s"
    )
    assert asset["size_bytes"] == size
    assert max(peaks.values()) < 200
    assert max(gaps) < 2
    assert max(waits) < 2


def peak_mib(pid: int) -> float:
    """Of memory that was resident at once."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
