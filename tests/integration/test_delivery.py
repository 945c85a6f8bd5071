"""What a worker's scheduler gets when streams break, schedulers move, misbehave or are not there: everything, in order.

Each test has a real worker process and real schedulers on the loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from gen_worker.testing.mock_orchestrator import (
    MockOrchestrator,
    OnConnect,
    RunHandle,
    WorkerConnection,
    drop_at_once,
    end_at_once,
    in_turn,
    redirect,
    send_garbage,
    stay_silent,
)
from supervisor.backlog import ANSWERS_BYTES
from supervisor.backoff import BRIEF_STREAMS
from supervisor.oversize import STRIKES
from supervisor.transport.grpcio import CONNECT_TIMEOUT_S
from supervisor.transport.unread import UNREAD_S
from tests.support.stream_server import settled
from tests.support.worker_process import PROGRAM, Chain, WorkerProcess, chain, eventually

TENANT: dict[str, Any] = {"tenant": "delivery", "modules": "delivery_functions"}
REAL_BACKOFF = {"RECONNECT_DELAY": "5", "RECONNECT_MAX_DELAY": "60", "RECONNECT_JITTER_SECONDS": "1"}


def worker_at(*addresses: str, **env: str) -> WorkerProcess:
    return WorkerProcess(addresses[0], **TENANT, env={"SCHEDULER_ADDRS": ",".join(addresses[1:]), **env})


async def results(handles: Sequence[RunHandle], timeout: float = 30.0) -> list[Any]:
    return await asyncio.gather(*(handle.output(timeout) for handle in handles))


def count_files(directory: Path) -> int:
    return len(list(directory.iterdir()))


def indexes(handle: RunHandle) -> list[int]:
    return [delta["index"] for delta in handle.deltas]


# -- cuts ---------------------------------------------------------------------------------------


async def test_200_runs_across_a_cut_and_three_seconds_without_a_scheduler(tmp_path: Path) -> None:
    go = tmp_path / "go"
    async with chain(**TENANT) as c:
        waiting = [await c.run("wait", {"seconds": 0.3 + number * 0.025}) for number in range(140)]
        behind = [
            await c.run(f, {"count": 100, "start_file": str(go)}) for f in ("stream", "astream") for _ in range(20)
        ]
        across = [await c.run(f, {"count": 120, "pause_s": 0.02}) for f in ("stream", "astream") for _ in range(10)]
        await c.orchestrator.wait_until(lambda: all(handle.event_count > 3 for handle in across))
        await c.orchestrator.stop()
        stopped = time.monotonic()
        go.touch()
        await asyncio.sleep(3)
        await c.orchestrator.start()
        await results([*waiting, *behind, *across])
        assert c.orchestrator.stream_count >= 2
        during = [handle for handle in waiting if handle.results[0].at > stopped + 3]
        assert len(during) > 50, "hardly any run ended while there was no scheduler"
        for handle in behind:  # all of it was produced without a scheduler
            assert indexes(handle) == list(range(100))
        for handle in across:
            # What can't have been read comes again; only what this scheduler was behind when it was stopped is gone.
            seen = indexes(handle)
            first_times = list(dict.fromkeys(seen))
            assert first_times == sorted(first_times)
            assert seen[-1] == 119
            assert sum(b <= a for a, b in itertools.pairwise(seen)) <= 1, "a run goes back once"
            assert len(first_times) >= 115
        assert [handle for handle in [*waiting, *behind, *across] if not handle.results[0].message.success] == []


@pytest.mark.both_transports
async def test_results_that_a_stream_swallowed_come_again(tmp_path: Path) -> None:
    async with chain(**TENANT) as c:
        (await c.run("echo")).results.clear()
        first = c.connection
        first.pause_reading()
        handles = [await c.run("wait", {"done_file": str(tmp_path / str(number))}) for number in range(20)]
        await eventually(lambda: count_files(tmp_path) == 20)
        await asyncio.sleep(0.3)  # they are in buffers between the two by now
        assert not any(handle.done for handle in handles)
        first.drop()
        await results(handles)
        assert {result.connection for handle in handles for result in handle.results} == {c.connection}


@pytest.mark.both_transports
async def test_deltas_of_a_stream_that_was_not_read_come_again() -> None:
    """Its windows were full when it broke: what lay in them is sent again, in order and before what follows."""
    async with chain(**TENANT) as c:
        handles = [await c.run(function, {"count": 8000, "size": 4096}) for function in ("stream", "astream")]
        await c.orchestrator.wait_until(lambda: all(handle.event_count > 20 for handle in handles))
        first = c.connection
        first.pause_reading()
        await settled(c.worker.executors()[0].cpu_times, quiet_s=2 * UNREAD_S)  # each waits for its window
        first.drop()
        await results(handles, 60)
        for handle in handles:
            seen = indexes(handle)
            assert list(dict.fromkeys(seen)) == list(range(8000)), "none is lost, none overtakes another"
            assert sum(b <= a for a, b in itertools.pairwise(seen)) <= 1, "the second stream begins where it may"
        assert c.worker.lines("are sent again")


def went_on(handles: Sequence[RunHandle], counts: Sequence[int]) -> bool:
    return all(len(handle.deltas) > count for handle, count in zip(handles, counts, strict=True))


@pytest.mark.both_transports
async def test_what_a_worker_sends_that_finds_its_connection_gone_late_comes_again() -> None:
    """It stood still meanwhile, and goes on with all that came from its executors."""
    async with chain(**TENANT) as c:
        handles = [await c.run(function, {"count": 300, "pause_s": 0.01}) for function in ("stream", "astream") * 4]
        for _ in range(3):
            connection = c.connection
            await c.orchestrator.wait_until(partial(went_on, handles, [len(handle.deltas) + 3 for handle in handles]))
            c.worker.signal(signal.SIGSTOP)
            await asyncio.sleep(0.1)  # what it sent is read
            connection.drop()
            await asyncio.sleep(0.2)
            c.worker.signal(signal.SIGCONT)
            await c.orchestrator.wait_until(partial(another, c.orchestrator, connection))
        await results(handles)
        for handle in handles:
            assert list(dict.fromkeys(indexes(handle))) == list(range(300))


async def test_a_result_that_the_scheduler_takes_on_no_stream_ends_as_a_failure() -> None:
    async with chain(**TENANT, message_limit=4 * 1024 * 1024) as c:
        others = [await c.run("wait", {"seconds": 1 + number / 10}) for number in range(5)]
        result = await c.result("big", {"count": 0, "size": 6_000_000})
        assert (result.error_type, result.safe_message) == ("validation", "output too large")
        assert "6000" in result.error_message
        assert "larger than max" in result.error_message
        assert c.orchestrator.stream_count <= 1 + STRIKES
        await results(others)


def another(orchestrator: MockOrchestrator, than: WorkerConnection) -> WorkerConnection | None:
    return next((connection for connection in orchestrator.workers.values() if connection is not than), None)


@pytest.mark.both_transports
async def test_a_run_is_answered_on_the_stream_after_the_one_that_brought_it(tmp_path: Path) -> None:
    async with chain(**TENANT) as c:
        for end in (WorkerConnection.half_close, WorkerConnection.drop, WorkerConnection.close) * 2:
            handle = await c.started("wait", {"file": str(tmp_path / "go")})
            before = c.connection
            end(before)
            after = await c.orchestrator.wait_until(partial(another, c.orchestrator, before))
            (tmp_path / "go").touch()
            await handle.output()
            assert handle.results[0].connection is after
            (tmp_path / "go").unlink()


@pytest.mark.both_transports
async def test_garbage_does_not_end_a_stream() -> None:
    async with chain(**TENANT, on_connect=send_garbage(), model_config=None) as c:
        first = c.connection
        await first.send_raw(b"")
        await first.send_raw(os.urandom(100_000))
        await first.send_raw(bytes.fromhex("52ff"))  # a run_request that ends in its length
        assert await c.call("echo", {"data": b"x"}) == {"data": b"x"}
        assert c.connection is first
        await eventually(lambda: len(c.worker.lines("a message of the scheduler is dropped")) == 4)


# -- where the scheduler is -----------------------------------------------------------------------


@contextlib.asynccontextmanager
async def schedulers(*policies: OnConnect | None) -> AsyncIterator[list[MockOrchestrator]]:
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(MockOrchestrator(on_connect=policy)) for policy in policies]


async def test_a_chain_of_redirects_ends_at_the_leader() -> None:
    async with schedulers(None, None, None, None) as all_:
        *followers, leader = all_
        for follower, next_one in zip(followers, all_[1:], strict=True):
            follower.on_connect = redirect(next_one.address)
        async with worker_at(followers[0].address, **REAL_BACKOFF):
            started = time.monotonic()
            await leader.wait_for_worker()
            assert [scheduler.stream_count for scheduler in all_] == [1, 1, 1, 1]
            assert (await (await leader.run("echo", {"data": b"x"})).output()) == {"data": b"x"}
            assert leader.history[0].opened_at - followers[0].history[0].opened_at < 2
            assert time.monotonic() - started < 20


async def test_two_schedulers_that_redirect_to_each_other_are_not_stormed() -> None:
    async with schedulers(None, None) as (first, second):
        first.on_connect, second.on_connect = redirect(second.address), redirect(first.address)
        async with worker_at(
            first.address, RECONNECT_DELAY="1", RECONNECT_MAX_DELAY="1", RECONNECT_JITTER_SECONDS="0"
        ) as worker:
            await first.wait_until(lambda: first.stream_count + second.stream_count >= 6, 30)
            await asyncio.sleep(1.5)
            assert first.stream_count + second.stream_count <= 6 + 2
            second.on_connect = None
            await second.wait_for_worker(timeout=10)
            assert worker.lines("is not the leader")


async def test_seeds_are_tried_when_the_leader_is_gone(unused_tcp_port_factory: Callable[[], int]) -> None:
    nobody = [f"127.0.0.1:{unused_tcp_port_factory()}" for _ in range(2)]
    async with (
        schedulers(None, None) as (first, second),
        worker_at(*nobody, first.address, second.address, **REAL_BACKOFF),
    ):
        await first.wait_for_worker()
        handle = await first.run("wait", {"seconds": 0.5})
        await first.wait_until(lambda: handle.event_count)
        first.on_connect = redirect(second.address)
        second.runs[handle.run_id] = handle
        first.find().drop()
        await second.wait_for_worker(timeout=30)
        await handle.output()


# -- schedulers that do not behave ----------------------------------------------------------------


@contextlib.asynccontextmanager
async def tcp_server(answer: bytes | None) -> AsyncIterator[tuple[str, list[float]]]:
    """Accepts, says `answer` if there is one, and holds the connection. Gives the times of the connections."""
    accepted: list[float] = []
    writers: list[asyncio.StreamWriter] = []

    async def serve(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        accepted.append(time.monotonic())
        writers.append(writer)
        if answer:
            writer.write(answer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    host, port = server.sockets[0].getsockname()
    try:
        yield f"{host}:{port}", accepted
    finally:
        server.close()
        for writer in writers:
            writer.close()


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\n\r\n", id="HTTP/1.1"),
        pytest.param(b"\x00\x00\x00\x07" + b"\x00" * 12, id="garbage"),
        pytest.param(None, id="nothing", marks=pytest.mark.soak),
    ],
)
async def test_what_is_no_scheduler_is_left_for_the_next_seed(answer: bytes | None) -> None:
    async with (
        tcp_server(answer) as (address, accepted),
        MockOrchestrator() as orchestrator,
        worker_at(address, orchestrator.address, **REAL_BACKOFF),
    ):
        await orchestrator.wait_for_worker(timeout=30)
        # To say nothing at all takes the connect timeout to find out.
        limit_s = CONNECT_TIMEOUT_S + 2 if answer is None else 2
        assert 0 <= orchestrator.history[0].opened_at - accepted[0] < limit_s
        assert len(accepted) == 1


@pytest.mark.parametrize("silent", [True, False])
async def test_a_scheduler_with_nothing_to_say_is_kept(silent: bool) -> None:
    """It answers with headers, or not even with these, and never with a message."""
    async with (
        MockOrchestrator(on_connect=stay_silent if silent else None) as orchestrator,
        worker_at(orchestrator.address, HEARTBEAT_INTERVAL_SECONDS="0.1"),
    ):
        connection = await orchestrator.wait_for_worker()
        await orchestrator.wait_until(lambda: len(connection.registrations) > 10)
        assert orchestrator.stream_count == 1
        assert await (await orchestrator.run("echo", {"data": b"x"})).output() == {"data": b"x"}


async def say_something_and_end(connection: WorkerConnection) -> None:
    await connection.send_raw(b"")
    connection.close(grpc.StatusCode.UNAVAILABLE, "no")


async def headers_and_end(connection: WorkerConnection) -> None:
    await connection.send_headers()
    connection.close(grpc.StatusCode.INTERNAL, "no")


async def test_schedulers_that_end_each_stream_at_once_are_dialed_once_a_second_at_most() -> None:
    policies = [
        end_at_once(),
        drop_at_once,
        say_something_and_end,
        headers_and_end,
        in_turn(drop_at_once, end_at_once(), say_something_and_end),
    ]
    async with schedulers(*policies) as all_, contextlib.AsyncExitStack() as stack:
        # The shortest waits that keep the promise: the defaults are longer.
        backoff = {"RECONNECT_DELAY": "1", "RECONNECT_MAX_DELAY": "1", "RECONNECT_JITTER_SECONDS": "0"}
        for scheduler in all_:
            await stack.enter_async_context(worker_at(scheduler.address, **backoff))
        for scheduler in all_:
            await scheduler.wait_until(partial(getattr, scheduler, "stream_count"), 30)
        await asyncio.sleep(4)
        for scheduler in all_:
            dials = [connection.opened_at for connection in scheduler.history]
            assert len(dials) >= 4, "it stopped to dial"
            quick = [b - a for a, b in itertools.pairwise(dials) if b - a < 0.9]
            assert len(quick) <= BRIEF_STREAMS, dials


# -- results on disk ------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    return tmp_path / "outbox"


async def finish_without_scheduler(c: Chain, tmp_path: Path, count: int) -> list[RunHandle]:
    """Runs that end while there is no scheduler."""
    done = tmp_path / "done"
    done.mkdir()
    go = str(tmp_path / "go")
    handles = [
        await c.run("wait", {"file": go, "done_file": str(done / str(number))}, run_id=f"kept-{number}")
        for number in range(count)
    ]
    await c.orchestrator.wait_until(lambda: all(handle.event_count for handle in handles))
    await c.orchestrator.stop()
    Path(go).touch()
    await eventually(lambda: count_files(done) == count)
    await asyncio.sleep(0.3)  # the last of them is on its way through the supervisor
    return handles


async def test_results_survive_the_supervisor_and_are_delivered_once(tmp_path: Path, kept: Path) -> None:
    env = {"WORKER_OUTBOX_DIR": str(kept)}
    async with MockOrchestrator() as orchestrator:
        async with WorkerProcess(orchestrator.address, **TENANT, env=env) as first:
            await orchestrator.wait_for_worker()
            c = Chain(orchestrator, first)
            assert await c.call("echo", {"data": b"before"}) == {"data": b"before"}
            handles = await finish_without_scheduler(c, tmp_path, 50)
            first.signal(signal.SIGKILL)
            await first.exit_code()
        await orchestrator.start()
        async with WorkerProcess(orchestrator.address, **TENANT, env={**env, "WORKER_ID": "another"}) as second:
            await results(handles)
            await Chain(orchestrator, second).call("echo")
            assert {result.connection.worker_id for handle in handles for result in handle.results} == {"another"}
            assert [len(handle.results) for handle in handles] == [1] * 50
            second.signal(signal.SIGTERM)
            assert await second.exit_code() == 0
        assert list(kept.iterdir()) == [], "what has arrived is not kept"
        async with WorkerProcess(orchestrator.address, **TENANT, env=env) as third:
            await orchestrator.wait_for_worker()
            await Chain(orchestrator, third).call("echo")
            assert [len(handle.results) for handle in handles] == [1] * 50
        assert [(stray.message.run_id) for stray in orchestrator.stray_results] == []


async def test_a_worker_that_stops_without_a_scheduler_leaves_its_results_behind(tmp_path: Path, kept: Path) -> None:
    env = {"WORKER_OUTBOX_DIR": str(kept)}
    async with MockOrchestrator() as orchestrator:
        async with WorkerProcess(orchestrator.address, **TENANT, env=env) as first:
            await orchestrator.wait_for_worker()
            handles = await finish_without_scheduler(Chain(orchestrator, first), tmp_path, 5)
            first.signal(signal.SIGTERM)
            await first.wait_for_log("stopping")
            first.signal(signal.SIGTERM)
            await first.exit_code()
        await orchestrator.start()
        async with WorkerProcess(orchestrator.address, **TENANT, env=env):
            await results(handles)


async def test_large_results_and_many_dead_supervisors(tmp_path: Path, kept: Path) -> None:
    """Fewer bytes than make the last of them hold runs back: nobody reads, and what went out before is chance."""
    env = {"WORKER_OUTBOX_DIR": str(kept)}
    size, count, lives = 2_000_000, 3, 3
    assert (count * lives - 1) * size < ANSWERS_BYTES
    handles = []
    async with MockOrchestrator() as orchestrator:
        for life in range(lives):
            async with WorkerProcess(orchestrator.address, **TENANT, env=env) as worker:
                await orchestrator.wait_for_worker()
                c = Chain(orchestrator, worker)
                connection = c.connection
                connection.pause_reading()
                handles += [await c.run("big", {"count": 0, "size": size}) for _ in range(count)]
                await eventually(partial(holds, kept, (life + 1) * count * size))
                await worker.kill()
                await connection.wait_ended()  # else it is the next life's worker to the scheduler
        async with WorkerProcess(orchestrator.address, **TENANT, env=env):
            outputs = await results(handles)
            assert [len(output["data"]) for output in outputs] == [size] * count * lives


def holds(directory: Path, size: int) -> bool:
    return sum(path.stat().st_size for path in directory.rglob("*.log")) >= size


async def test_workers_that_live_share_the_directory(kept: Path) -> None:
    async with MockOrchestrator() as orchestrator, contextlib.AsyncExitStack() as stack:
        for number in range(3):
            env = {"WORKER_OUTBOX_DIR": str(kept), "WORKER_ID": f"worker/{number}"}
            await stack.enter_async_context(WorkerProcess(orchestrator.address, **TENANT, env=env))
        await orchestrator.wait_until(lambda: len(orchestrator.workers) == 3, 30)
        handles = [await orchestrator.run("echo", {"data": b"x"}, worker=f"worker/{n % 3}") for n in range(30)]
        await results(handles)
        assert len(list(kept.iterdir())) == 3
        assert [len(handle.results) for handle in handles] == [1] * 30


@pytest.mark.parametrize("what", ["a file", "not writable"])
async def test_a_directory_that_can_not_be_used_is_said_and_nothing_else_changes(tmp_path: Path, what: str) -> None:
    place = tmp_path / "file"
    place.write_text("in the way")
    directory = str(place) if what == "a file" else "/proc/self/outbox"
    async with chain(**TENANT, env={"WORKER_OUTBOX_DIR": directory}) as c:
        assert await c.call("echo", {"data": b"x"}) == {"data": b"x"}
        assert c.worker.lines("ERROR", "WORKER_OUTBOX_DIR can't be used, results are not kept on disk", directory)


async def test_a_full_disk_is_said_once_and_nothing_else_changes(kept: Path) -> None:
    """RLIMIT_FSIZE stands for the disk: no file of the worker may grow over 64 KiB."""
    limited = ("sh", "-c", "trap '' XFSZ; ulimit -f 64; exec \"$0\"")
    async with MockOrchestrator() as orchestrator:
        env = {"WORKER_OUTBOX_DIR": str(kept)}
        async with WorkerProcess(orchestrator.address, **TENANT, env=env, command=(*limited, PROGRAM)) as worker:
            await orchestrator.wait_for_worker()
            c = Chain(orchestrator, worker)
            for size in (1000, 60_000, 60_000, 60_000, 100):
                assert len((await c.call("big", {"count": 0, "size": size}))["data"]) == size
            await worker.wait_for_log("results are kept on disk again")
            assert len(worker.lines("ERROR", "results are not kept on disk for now")) == 1
