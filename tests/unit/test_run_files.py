"""Files of runs in the supervisor: places, order, cancel, tokens, directories."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from gen_worker.pipe.messages import Cancel, Failure, FetchFile, FileReply, LocalFile, StoreFile
from supervisor import executor_handle
from supervisor.dispatcher import FileService
from supervisor.run_files import MAX_REQUESTS, RunFiles, Store
from supervisor.runs import Run
from supervisor.transfer_process import TransferError
from supervisor.transfers.messages import (
    FetchInputs,
    FileAccess,
    InputsFetched,
    InputsRemoved,
    OutputStored,
    RemoveInputs,
    StoreOutput,
)
from tests.support.rig import Executor, RecordingTransfers, Rig, function, until, use_recording_children

STORE: Any = {"file_base_url": "http://store", "file_token": "t1", "tenant_id": "tenant"}
FILE = LocalFile("/run/a", 3, "ab", "image/png")
MakeRig = Callable[..., Rig]


@pytest.fixture
async def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    use_recording_children(monkeypatch.setattr)
    rigs: list[Rig] = []

    def make_rig(**kwargs: Any) -> Rig:
        functions = [function("f"), function("one", limit=1), function("a", "async")]
        rigs.append(Rig(functions, **kwargs))
        return rigs[-1]

    yield make_rig
    for rig in rigs:
        rig.close()


async def fetches(rig: Rig, executor: Executor, run_id: str, *refs: str) -> None:
    """The executor says that the run needs these inputs; returns when the transfer process was asked."""
    count = len(rig.transfers.asked)
    executor.say(FetchFile(executor.key_of(run_id), 1, refs or ("a.png",)))
    await until(lambda: len(rig.transfers.asked) > count)


def answer(rig: Rig, number: int, reply: Any) -> None:
    future = rig.transfers.asked[number][1]
    if isinstance(reply, Failure):
        future.set_exception(TransferError(reply))
    else:
        future.set_result(reply)


async def test_inputs(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    rig.submit("r1", **STORE)
    await fetches(rig, executor, "r1", "a.png", "b.png")
    assert rig.transfers.asked[0][0] == FetchInputs(
        "r1", 1, ("a.png", "b.png"), FileAccess("http://store", "t1", "tenant")
    )
    answer(rig, 0, InputsFetched((FILE, FILE)))
    await until(lambda: executor.sent(FileReply))
    assert executor.sent(FileReply) == [FileReply(executor.key_of("r1"), 1, (FILE, FILE))]
    executor.succeed("r1")
    await until(lambda: len(rig.transfers.asked) == 2)
    assert rig.transfers.asked[1][0] == RemoveInputs("r1")
    answer(rig, 1, InputsRemoved())
    await rig.dispatcher.files.wait_removed(5)


async def test_a_failure_names_the_file(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    for run_id in ("r1", "r2"):
        rig.submit(run_id)
        await fetches(rig, executor, run_id, "a", "b")
    failure = Failure("auth", "no")
    answer(rig, 0, InputsFetched((), failure, 1))
    answer(rig, 1, failure)
    await until(lambda: len(executor.sent(FileReply)) == 2)
    assert executor.sent(FileReply) == [
        FileReply(executor.key_of("r1"), 1, (), failure, 1),
        FileReply(executor.key_of("r2"), 1, (), failure, 0),
    ]


async def test_a_run_that_waits_for_inputs_takes_no_place(make: MakeRig) -> None:
    """One thread: while r1 waits r2 runs; r1 goes on when r2 has ended, before r3."""
    rig = make(threads=1)
    (executor,) = rig.executors
    for run_id in ("r1", "r2", "r3"):
        rig.submit(run_id)
    assert executor.runs == ["r1"]
    await fetches(rig, executor, "r1")
    assert executor.runs == ["r1", "r2"]
    answer(rig, 0, InputsFetched((FILE,)))
    await until(lambda: rig.dispatcher.lanes._returning)
    assert not executor.sent(FileReply)
    executor.succeed("r2")
    assert [reply.key for reply in executor.sent(FileReply)] == [executor.key_of("r1")]
    assert executor.runs == ["r1", "r2"]
    executor.succeed("r1")
    assert executor.runs == ["r1", "r2", "r3"]
    executor.succeed("r3")
    assert set(rig.results()) == {"r1", "r2", "r3"}


async def test_a_functions_limit_holds_for_runs_that_come_back(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    for run_id in ("r1", "r2"):
        rig.submit(run_id, "one")
        await fetches(rig, executor, run_id)
    answer(rig, 1, InputsFetched((FILE,)))
    await until(lambda: executor.sent(FileReply))
    answer(rig, 0, InputsFetched((FILE,)))
    await until(lambda: rig.dispatcher.lanes._returning)
    assert [reply.key for reply in executor.sent(FileReply)] == [executor.key_of("r2")]
    rig.submit("r3", "one")
    assert executor.runs == ["r1", "r2"]
    executor.succeed("r2")
    assert [reply.key for reply in executor.sent(FileReply)] == [executor.key_of("r2"), executor.key_of("r1")]
    assert executor.runs == ["r1", "r2"]


async def test_not_too_many_wait_in_one_executor(make: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_handle, "PAUSED_RUNS", 2)
    rig = make(threads=1)
    (executor,) = rig.executors
    for run_id in ("r1", "r2", "r3"):
        rig.submit(run_id)
    for run_id in ("r1", "r2"):
        await fetches(rig, executor, run_id)
    assert executor.runs == ["r1", "r2"]
    answer(rig, 0, InputsFetched((FILE,)))
    await until(lambda: executor.sent(FileReply))
    executor.succeed("r1")
    assert executor.runs == ["r1", "r2", "r3"]


@pytest.mark.parametrize("timeout", [False, True])
async def test_a_cancel_reaches_a_transfer_at_once(make: MakeRig, timeout: bool) -> None:
    rig = make()
    (executor,) = rig.executors
    rig.submit("r1", timeout_ms=20 if timeout else 0)
    await fetches(rig, executor, "r1")
    executor.say(StoreFile(executor.key_of("r1"), 2, "runs/r1/outputs/a", False, b"t"))
    await until(lambda: len(rig.transfers.asked) == 2)
    if not timeout:
        rig.dispatcher.cancel("r1")
    await until(lambda: all(future.cancelled() for _, future in rig.transfers.asked))
    assert executor.sent(Cancel) == [Cancel(executor.key_of("r1"), "timeout" if timeout else "canceled")]
    executor.say(FetchFile(executor.key_of("r1"), 3, ("late",)))
    executor.die()
    await until(lambda: len(rig.transfers.asked) == 3)
    assert rig.transfers.asked[2][0] == RemoveInputs("r1")
    assert rig.results()["r1"].error_type == ("timeout" if timeout else "canceled")


async def test_a_dead_executor_ends_the_transfers_of_its_runs(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    rig.submit("r1")
    await fetches(rig, executor, "r1")
    executor.die()
    await until(rig.transfers.asked[0][1].cancelled)
    assert rig.results()["r1"].error_type == "retryable"


async def test_outputs(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    rig.submit("r1", **STORE)
    key = executor.key_of("r1")
    for number in (1, 2):
        executor.say(StoreFile(key, number, f"runs/r1/outputs/{number}", number == 2, b"ticket"))
    await until(lambda: len(rig.transfers.asked) == 2)
    access = FileAccess("http://store", "t1", "tenant")
    assert [request for request, _ in rig.transfers.asked] == [
        StoreOutput("runs/r1/outputs/1", b"ticket", False, access),
        StoreOutput("runs/r1/outputs/2", b"ticket", True, access),
    ]
    failure = Failure("validation", "it exists already")
    answer(rig, 1, failure)
    await until(lambda: executor.sent(FileReply))
    answer(rig, 0, OutputStored(FILE))
    await until(lambda: len(executor.sent(FileReply)) == 2)
    assert executor.sent(FileReply) == [FileReply(key, 2, (), failure), FileReply(key, 1, (FILE,))]
    executor.succeed("r1")
    assert len(rig.transfers.asked) == 2  # it had no inputs that would have to be removed


async def test_a_flood_of_requests_is_bounded(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    rig.submit("r1")
    key = executor.key_of("r1")
    for number in range(MAX_REQUESTS + 1):
        executor.say(StoreFile(key, number, "runs/r1/outputs/x", False, b"t"))
    (reply,) = executor.sent(FileReply)
    assert (reply.number, reply.failure.safe_message) == (MAX_REQUESTS, "more than 256 files at once")


def access(run: Any, *stores: tuple[str, str]) -> tuple[str, str]:
    files = RunFiles(RecordingTransfers(), tuple(Store(*store) for store in stores), lambda _, start: start())
    found = files.access(make_run("r1", **run))
    return found.base_url, found.token


def make_run(run_id: str, file_base_url: str = "", file_token: str = "", key: int = 1) -> Run:
    run = Run(key, run_id, "f", b"", (), 0, "tenant", "", 0.0)
    run.file_base_url, run.file_token = file_base_url, file_token
    return run


API, HUB = ("http://api", "api-token"), ("http://hub", "hub-token")


@pytest.mark.parametrize(
    ("run", "stores", "expected"),
    [
        ({"file_base_url": "http://run", "file_token": "run-token"}, (API, HUB), ("http://run", "run-token")),
        ({}, (API, HUB), API),
        ({}, (("", "api-token"), HUB), HUB),
        ({}, (("", ""), ("", "")), ("", "")),
        ({"file_token": "run-token"}, (API, HUB), ("http://api", "run-token")),
        # A token of the worker's never goes to a store that the request names, unless it is that very store.
        ({"file_base_url": "http://run"}, (API, HUB), ("http://run", "")),
        ({"file_base_url": "http://hub/"}, (API, HUB), ("http://hub/", "hub-token")),
    ],
)
def test_which_store_and_which_token(run: Any, stores: Any, expected: tuple[str, str]) -> None:
    assert access(run, *stores) == expected


@pytest.mark.parametrize(
    ("run_id", "plain"),
    [("run-1", True), ("6f9619ff-8b86-d011-b42d-00c04fc964ff", True), ("a.b_c", True), ("cache", False),
     ("../x", False), ("..", False), (".", False), ("a/b", False), ("uid-0", False), (".ended-1", False),
     ("ä", False), ("x" * 200, False), ("a\x00", False)],
)  # fmt: skip
async def test_names_of_directories(run_id: str, plain: bool) -> None:
    transfers = RecordingTransfers()
    service = FileService(transfers, (), frozenset({"cache"}))
    files = RunFiles(service.transfers, service.stores, lambda _, start: start(), service.reserved)
    name = files._directory_of(run_id)
    assert (name == run_id) == plain
    assert "/" not in name
    assert not name.startswith((".", "uid-"))
