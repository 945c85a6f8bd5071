"""Realtime sessions from a scheduler's client to a handler and back, through real processes."""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import AsyncIterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import pytest_asyncio
from websockets.asyncio.client import connect

from gen_worker.testing.mock_orchestrator import RealtimeBridge, RealtimeSession, StreamEndedError
from gen_worker.wire import worker_scheduler_pb2 as pb
from tests.support.worker_process import WAIT_S, Chain, all_of, chain, eventually, wait_for_executors

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 2**20
TENANT: dict[str, Any] = {"tenant": "realtime", "modules": "realtime_functions"}
BOUND = 150 * MIB
"""For supervisor and executor in a flood: idle they hold 50, and a handler's queue may hold 16."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker() -> AsyncIterator[Chain]:
    """Nothing in these tests may cost its executors."""
    model = {"cozy:org/m:latest": {"root_dir": str(Path(__file__).parent)}}
    env = {"WORKER_MODEL_ARTIFACTS_JSON": json.dumps(model), "WORKER_LOG_LEVEL": "info"}
    async with chain(**TENANT, executors=2, env=env) as found:
        executors = [child.pid for child in found.worker.executors()]
        yield found
        assert [child.pid for child in found.worker.executors()] == executors
        assert found.orchestrator.stream_count == 1


@pytest_asyncio.fixture(loop_scope="module")
async def fragile() -> AsyncIterator[Chain]:
    """One executor, and a short grace; new for each test."""
    async with chain(**TENANT, env={"WORKER_CANCEL_GRACE_SECONDS": "0.3"}) as found:
        yield found


async def opened(c: Chain, function: str, **fields: Any) -> RealtimeSession:
    return await c.orchestrator.open_realtime(function, **fields)


async def talking(c: Chain, function: str, **fields: Any) -> RealtimeSession:
    """A session whose handler has said its first word."""
    session = await opened(c, function, **fields)
    assert (await session.receive(WAIT_S)).is_text
    return session


async def collect(session: RealtimeSession, count: int) -> list[bytes]:
    return [(await session.receive(WAIT_S)).data for _ in range(count)]


class Memory:
    """The largest resident sets of supervisor and executors that were seen."""

    def __init__(self, c: Chain) -> None:
        self._processes = [psutil.Process(c.worker.pid), *c.worker.executors()]
        self._task = asyncio.create_task(self._watch())
        self.peak = 0

    async def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, *(process.memory_info().rss for process in self._processes))
            await asyncio.sleep(0.02)

    async def stop(self) -> int:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        return self.peak


# -- frames ---------------------------------------------------------------------------------------


async def test_text_and_binary_frames(worker: Chain) -> None:
    session = await opened(worker, "echo")
    for data in ("grüße 👋", b"\x00\xff", "", b"", "x" * 100_000):
        await session.send(data)
        frame = await session.receive(WAIT_S)
        assert (frame.data.decode() if frame.is_text else frame.data) == data
    await session.close()
    assert await session.wait_closed(WAIT_S) == "closed"
    with pytest.raises(StreamEndedError):
        await session.receive(WAIT_S)


async def test_10_000_frames_each_way_in_order(worker: Chain) -> None:
    session = await opened(worker, "echo")
    sent = [b"%d" % number for number in range(10_000)]

    async def send() -> None:
        for data in sent:
            await session.send(data)

    _, received = await all_of(send(), collect(session, len(sent)))
    assert received == sent
    await session.close()
    assert await session.wait_closed(WAIT_S) == "closed"


async def test_a_burst_makes_the_sender_wait(worker: Chain) -> None:
    session = await opened(worker, "echo")
    sent = [b"%08d" % number + b"." * 100_000 for number in range(500)]  # three times what may wait

    async def send() -> None:
        for data in sent:
            await session.send(data)

    _, received = await all_of(send(), collect(session, len(sent)))
    assert received == sent
    await session.close()
    assert await session.wait_closed(WAIT_S) == "closed"


@pytest.mark.parametrize("count", [20, pytest.param(2000, marks=[pytest.mark.soak, pytest.mark.timeout(600)])])
async def test_100_sessions_at_once(worker: Chain, count: int) -> None:
    memory = Memory(worker)
    sessions = await all_of(*(opened(worker, "echo") for _ in range(100)))

    async def send(session: RealtimeSession) -> None:
        for number in range(count):
            await session.send(f"{session.session_id} {number}".encode())

    async def talk(session: RealtimeSession) -> list[bytes]:
        _, received = await all_of(send(session), collect(session, count))
        return list(received)

    answers = await all_of(*(talk(session) for session in sessions))
    for session, received in zip(sessions, answers, strict=True):
        assert received == [f"{session.session_id} {number}".encode() for number in range(count)]
    await all_of(*(session.close() for session in sessions))
    assert set(await all_of(*(session.wait_closed(WAIT_S) for session in sessions))) == {"closed"}
    assert await memory.stop() < BOUND


async def test_frames_that_are_sent_before_it_is_open_wait_in_order(worker: Chain) -> None:
    first = await talking(worker, "alone")
    also = await talking(worker, "alone")  # the other executor's
    waits = await opened(worker, "alone")
    for number in range(100):
        await waits.send(b"%d" % number)
    assert (await worker.call("say", {"text": "others pass"}))["text"] == "others pass"
    await first.close()
    assert (await waits.receive(WAIT_S)).data == b"alone"
    await waits.close()
    await also.close()
    assert await all_of(waits.wait_closed(WAIT_S), also.wait_closed(WAIT_S)) == ["closed", "closed"]


async def test_large_frames_both_ways(worker: Chain) -> None:
    session = await opened(worker, "echo")
    data = bytes(range(256)) * 4 * 4096 * 6  # 24 MiB
    await session.send(data)
    assert (await session.receive(WAIT_S)).data == data
    await session.close()
    assert await session.wait_closed(WAIT_S) == "closed"


async def test_what_a_handler_knows(worker: Chain) -> None:
    events: list[tuple[str, str]] = []

    def note(_connection: object, kind: str, message: pb.WorkerSchedulerMessage) -> None:
        if kind == "worker_event":
            events.append((message.worker_event.run_id, message.worker_event.event_type))

    worker.orchestrator.on_message = note
    session = await opened(worker, "describe", session_id="mine", tenant_id="t", user_id="u", timeout_ms=60_000)
    about = json.loads((await session.receive(WAIT_S)).data)
    del about["pid"]
    assert about == {"run_id": "mine", "tenant": "t", "user": "u", "timeout_ms": 60_000}
    assert await session.wait_closed(WAIT_S) == "completed"
    worker.orchestrator.on_message = None
    assert events == [("mine", "job.progress"), ("mine", "described")]


async def test_an_injected_model(worker: Chain) -> None:
    session = await talking(worker, "with_model", required_models=["cozy:org/m"])
    await session.close()
    assert await session.wait_closed(WAIT_S) == "closed"
    refused = await opened(worker, "with_model", required_models=["cozy:org/none"])
    assert await refused.wait_closed(WAIT_S) == "error:ValidationError"


async def test_handlers_are_offered(worker: Chain) -> None:
    resources = worker.resources
    assert {"echo", "say"} <= set(resources.available_functions)
    (schema,) = [schema for schema in resources.function_schemas if schema.name == "echo"]
    assert (schema.input_schema_json, schema.output_schema_json, schema.incremental_output) == (b"", b"", False)
    assert resources.function_concurrency["alone"] == 2
    result = await worker.result("echo", {})
    assert (result.error_type, result.safe_message) == ("validation", "unknown function")


# -- reasons --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "frame", "reason"),
    [
        ("describe", None, "completed"),
        ("closes", None, "closed"),
        ("nobody", None, "unknown_function"),
        ("say", None, "unknown_function"),
        ("fails", b"own", "error:TenantsOwnError"),
        ("fails", b"bad", "error:ValidationError"),
    ],
)
async def test_reasons(worker: Chain, function: str, frame: bytes | None, reason: str) -> None:
    session = await opened(worker, function)
    if frame is not None:
        await session.send(frame)
    assert await session.wait_closed(WAIT_S) == reason


async def test_a_timeout(worker: Chain) -> None:
    session = await talking(worker, "deaf", timeout_ms=200)
    assert await session.wait_closed(WAIT_S) == "timeout"
    await worker.worker.wait_for_log("deaf was canceled")


async def test_a_handler_that_does_not_end_by_a_close_is_canceled(worker: Chain) -> None:
    session = await talking(worker, "deaf")
    await session.close()
    assert await session.wait_closed(WAIT_S) == "closed"


@pytest.mark.parametrize("frame", [b"exit", b"crash"])
async def test_a_crash(fragile: Chain, frame: bytes) -> None:
    beside = await talking(fragile, "deaf")
    session = await opened(fragile, "fails")
    crashed_at = time.monotonic()
    await session.send(frame)
    assert await all_of(session.wait_closed(WAIT_S), beside.wait_closed(WAIT_S)) == ["worker_crashed", "worker_crashed"]
    await wait_for_executors(fragile.orchestrator, 1, since=crashed_at)
    again = await talking(fragile, "deaf")
    await again.close()
    assert await again.wait_closed(WAIT_S) == "closed"


@pytest.mark.parametrize("handler", ["stubborn", "holds_gil"])
async def test_a_handler_that_nothing_ends_is_killed(fragile: Chain, handler: str) -> None:
    session = await talking(fragile, handler, timeout_ms=500)
    assert await session.wait_closed(WAIT_S) == "timeout"
    await fragile.worker.wait_for_log("killing executor", handler)


async def test_limits() -> None:
    env = {"WORKER_MAX_WS_FRAME_BYTES": "1000", "WORKER_MAX_CONCURRENCY": "2"}
    async with chain(**TENANT, env=env) as c:
        incoming, outgoing = await opened(c, "echo"), await opened(c, "sends")
        busy = await opened(c, "echo")
        assert await busy.wait_closed(WAIT_S) == "error:RetryableError"
        await incoming.send(b"x" * 1000)
        assert len((await incoming.receive(WAIT_S)).data) == 1000
        await incoming.send(b"x" * 1001)
        await outgoing.send(b"1000")
        assert len((await outgoing.receive(WAIT_S)).data) == 1000
        await outgoing.send(b"1001")
        reasons = await all_of(incoming.wait_closed(WAIT_S), outgoing.wait_closed(WAIT_S))
        assert reasons == ["frame_too_large", "frame_too_large"]


# -- slow ends ------------------------------------------------------------------------------------


async def test_a_slow_handler_is_closed_and_holds_little(worker: Chain) -> None:
    memory = Memory(worker)
    session, beside = await talking(worker, "deaf"), await opened(worker, "echo")
    sent = 0
    while session.close_reason is None and sent < 400 * MIB:
        await session.send(b"x" * 64 * 1024)
        sent += 64 * 1024
    assert await session.wait_closed(WAIT_S) == "slow_consumer"
    assert sent < 400 * MIB
    await beside.send("still here")
    assert (await beside.receive(WAIT_S)).data == b"still here"
    await beside.close()
    assert await beside.wait_closed(WAIT_S) == "closed"
    assert await memory.stop() < BOUND


async def test_a_peer_that_stops_for_a_moment_is_waited_for(worker: Chain) -> None:
    memory = Memory(worker)
    session = await opened(worker, "floods")
    before = await collect(session, 100)
    worker.connection.pause_reading()
    await asyncio.sleep(1.0)
    worker.connection.resume_reading()
    after = await collect(session, 2000)
    numbers = [int.from_bytes(data[:8], "big") for data in [*before, *after]]
    assert numbers == list(range(2100))
    await session.close()
    assert await session.wait_closed(WAIT_S) == "closed"
    assert await memory.stop() < BOUND


async def test_a_slow_peer_is_closed_and_holds_little(worker: Chain) -> None:
    memory = Memory(worker)
    sessions = [await opened(worker, "floods") for _ in range(4)]
    quiet = await opened(worker, "echo")
    for session in sessions:
        await session.receive(WAIT_S)
    worker.connection.pause_reading()
    executors = [child.pid for child in worker.worker.executors()]
    await eventually(lambda: len(worker.worker.lines("session of floods ended slow_consumer")) == len(sessions))
    worker.connection.resume_reading()
    assert set(await all_of(*(session.wait_closed(WAIT_S) for session in sessions))) == {"slow_consumer"}
    assert [child.pid for child in worker.worker.executors()] == executors
    await quiet.send("one that was not slow stays")
    assert (await quiet.receive(WAIT_S)).is_text
    await quiet.close()
    await quiet.wait_closed(WAIT_S)
    assert await memory.stop() < BOUND


# -- the stream and the end -----------------------------------------------------------------------


async def test_sessions_end_with_their_stream(fragile: Chain, tmp_path: Path) -> None:
    note = tmp_path / "note"
    session, deaf = await talking(fragile, "cleans_up"), await talking(fragile, "deaf")
    for data in (str(note), b"2"):
        await session.send(data)
        assert (await session.receive(WAIT_S)).data == b"got it"
    fragile.connection.close(grpc.StatusCode.UNAVAILABLE, "restart")
    assert await all_of(session.wait_closed(WAIT_S), deaf.wait_closed(WAIT_S)) == ["closed", "closed"]
    await eventually(lambda: note.exists() and note.read_text())
    assert note.read_text() == "2 False"
    assert fragile.orchestrator.stream_count == 2
    again = await talking(fragile, "deaf", session_id=deaf.session_id)
    await again.close()
    assert await again.wait_closed(WAIT_S) == "closed"


async def test_drain_waits_for_sessions_then_closes_them(tmp_path: Path) -> None:
    env = {"WORKER_DRAIN_TIMEOUT_SECONDS": "2"}
    async with chain(**TENANT, env=env) as c:
        note = tmp_path / "note"
        ends, stays = await talking(c, "alone"), await talking(c, "cleans_up")
        await stays.send(str(note))
        assert (await stays.receive(WAIT_S)).data == b"got it"
        c.worker.signal(signal.SIGTERM)
        await c.worker.wait_for_log("stopping")
        refused = await opened(c, "echo")
        assert await refused.wait_closed(WAIT_S) == "error:RetryableError"
        await ends.close()
        assert await ends.wait_closed(WAIT_S) == "closed"
        assert stays.close_reason is None
        assert await stays.wait_closed(WAIT_S) == "closed"
        assert await c.worker.exit_code() == 0
        assert note.read_text() == "1 False"


# -- through a WebSocket --------------------------------------------------------------------------


@pytest_asyncio.fixture(loop_scope="module")
async def bridge(worker: Chain) -> AsyncIterator[RealtimeBridge]:
    async with RealtimeBridge(worker.orchestrator, tenant_id="t") as found:
        yield found


async def test_a_websocket_client_talks_to_a_handler(bridge: RealtimeBridge) -> None:
    async with connect(f"{bridge.url}/echo", max_size=None) as client:
        for data in ("text", b"bytes", "x" * 2 * MIB):
            await client.send(data)
            assert await client.recv() == data


@pytest.mark.parametrize(
    ("path", "frame", "code", "reason"),
    [
        ("describe", None, 1000, "completed"),
        ("nobody", None, 1008, "unknown_function"),
        ("fails", b"bad", 1011, "error:ValidationError"),
    ],
)
async def test_a_websocket_client_is_told_why(
    bridge: RealtimeBridge, path: str, frame: bytes | None, code: int, reason: str
) -> None:
    async with connect(f"{bridge.url}/{path}?from=browser") as client:
        if frame is not None:
            await client.send(frame)
        async with asyncio.timeout(WAIT_S):
            await client.wait_closed()
        assert (client.close_code, client.close_reason) == (code, reason)


async def test_a_websocket_client_that_leaves_ends_the_session(worker: Chain, bridge: RealtimeBridge) -> None:
    before = set(worker.orchestrator.sessions)  # of earlier tests: some end a little later than their clients
    client = await connect(f"{bridge.url}/echo")
    await client.send("hello")
    assert await client.recv() == "hello"
    session = _opened(worker, before)
    client.transport.abort()
    assert await session.wait_closed(WAIT_S) == "closed"


async def test_a_websocket_client_that_reads_nothing_is_closed(worker: Chain, bridge: RealtimeBridge) -> None:
    before = set(worker.orchestrator.sessions)
    client = await connect(f"{bridge.url}/floods", max_queue=1)
    session = _opened(worker, before)
    assert await session.wait_closed(WAIT_S) == "closed"
    assert session.overflowed
    client.transport.abort()


def _opened(worker: Chain, before: AbstractSet[str]) -> RealtimeSession:
    """The one session that was opened since."""
    (session_id,) = worker.orchestrator.sessions.keys() - before
    return worker.orchestrator.sessions[session_id]
