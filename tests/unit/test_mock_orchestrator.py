"""The scheduler end, driven by a raw gRPC client in a worker's place."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, Self

import grpc
import msgspec
import pytest
import trustme

from gen_worker.testing.mock_orchestrator import (
    EndedBy,
    ListenError,
    MockOrchestrator,
    NoResultError,
    NoWorkerError,
    OnConnect,
    RunFailedError,
    StreamEndedError,
    WaitTimeoutError,
    WorkerConnection,
    drop_at_once,
    end_at_once,
    in_turn,
    redirect,
    refuse_auth,
    send_garbage,
    stay_silent,
)
from gen_worker.wire import METHOD
from gen_worker.wire import worker_scheduler_pb2 as pb

MIB = 1024 * 1024


class FakeWorker:
    """A worker's stream and nothing behind it."""

    def __init__(
        self,
        address: str,
        worker_id: str = "w1",
        functions: Sequence[str] = ("greet",),
        *,
        token: str | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.use_local_subchannel_pool", 1),
        ]
        self.channel = (
            grpc.aio.secure_channel(address, credentials, options)
            if credentials
            else grpc.aio.insecure_channel(address, options)
        )
        metadata = (("authorization", f"Bearer {token}"),) if token is not None else ()
        self.call: Any = self.channel.stream_stream(METHOD)(metadata=metadata)
        self.worker_id = worker_id
        self.functions = functions

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.call.cancel()
        await self.channel.close()

    async def send(self, **fields: Any) -> None:
        await self.call.write(pb.WorkerSchedulerMessage(**fields).SerializeToString())

    async def register(self, *, heartbeat: bool = False, **resources: Any) -> None:
        about = pb.WorkerResources(worker_id=self.worker_id, available_functions=self.functions, **resources)
        await self.send(worker_registration=pb.WorkerRegistration(resources=about, is_heartbeat=heartbeat))

    async def receive(self) -> pb.WorkerSchedulerMessage:
        data = await asyncio.wait_for(self.call.read(), 10)
        assert isinstance(data, bytes), f"the stream ended: {await self.call.code()}"
        return pb.WorkerSchedulerMessage.FromString(data)

    async def event(self, run_id: str, kind: str, payload: object) -> None:
        event = pb.WorkerEvent(run_id=run_id, event_type=kind, payload_json=msgspec.json.encode(payload))
        await self.send(worker_event=event)

    async def succeed(self, run_id: str, output: object) -> None:
        data = b"" if output is None else msgspec.msgpack.encode(output)
        await self.send(run_result=pb.TaskExecutionResult(run_id=run_id, success=True, output_payload=data))

    async def fail(self, run_id: str, error_type: str, safe: str, detail: str = "") -> None:
        result = pb.TaskExecutionResult(
            run_id=run_id, error_type=error_type, safe_message=safe, error_message=detail, retryable=True
        )
        await self.send(run_result=result)

    async def status(self) -> tuple[grpc.StatusCode, str]:
        """Reads to the end of the stream."""
        with contextlib.suppress(grpc.aio.AioRpcError):
            while isinstance(await asyncio.wait_for(self.call.read(), 10), bytes):
                pass
        return await self.call.code(), await self.call.details()


@pytest.fixture
async def orchestrator() -> AsyncIterator[MockOrchestrator]:
    async with MockOrchestrator() as orchestrator:
        yield orchestrator


@pytest.fixture
async def worker(orchestrator: MockOrchestrator) -> AsyncIterator[FakeWorker]:
    async with FakeWorker(orchestrator.address) as worker:
        await worker.register()
        await orchestrator.wait_for_worker("w1", timeout=10)
        yield worker


# -- registration -----------------------------------------------------------------------------------


async def test_a_registered_worker_is_found_with_its_metadata_and_times(orchestrator: MockOrchestrator) -> None:
    before = time.monotonic()
    async with FakeWorker(orchestrator.address, "gpu-7", token="abc") as worker:
        await worker.register(gpu_count=2)
        connection = await orchestrator.wait_for_worker(timeout=10)
        assert connection is orchestrator.workers["gpu-7"]
        assert connection.authorization == "Bearer abc"
        assert connection.peer.startswith("ipv4:127.0.0.1:")
        assert connection.resources is not None
        assert connection.resources.gpu_count == 2
        first = connection.registrations[0]
        assert not first.is_heartbeat
        assert before < first.at < time.monotonic()

        await worker.register(heartbeat=True, gpu_count=1)
        latest = await orchestrator.wait_for_registration(lambda r: r.resources.gpu_count == 1, timeout=10)
        assert latest.is_heartbeat
        assert latest.connection is connection
        assert latest.at >= first.at
    end = await connection.wait_ended()
    assert end.by is EndedBy.LOST
    assert orchestrator.workers == {}
    assert orchestrator.connections == set()
    assert orchestrator.violations == []


async def test_waiting_in_vain_says_for_what(orchestrator: MockOrchestrator, worker: FakeWorker) -> None:
    with pytest.raises(NoWorkerError, match="no worker 'nobody' registered within 0 s; registered: w1"):
        await orchestrator.wait_for_worker("nobody", timeout=0)
    with pytest.raises(WaitTimeoutError, match="a registration that fits"):
        await orchestrator.wait_for_registration(lambda r: r.resources.gpu_count == 9, timeout=0)
    with pytest.raises(WaitTimeoutError):
        await orchestrator.wait_for_registration(lambda _: True, timeout=0, since=time.monotonic())
    with pytest.raises(ZeroDivisionError):
        await orchestrator.wait_until(lambda: 1 / 0, timeout=1)


async def test_a_newer_stream_of_a_worker_takes_its_place(orchestrator: MockOrchestrator, worker: FakeWorker) -> None:
    old = orchestrator.workers["w1"]
    async with FakeWorker(orchestrator.address) as again:
        await again.register()
        new = await orchestrator.wait_until(
            lambda: orchestrator.workers["w1"] is not old and orchestrator.workers["w1"]
        )
        worker.call.cancel()
        await old.wait_ended()
        assert orchestrator.workers == {"w1": new}
    assert orchestrator.stream_count == 2


async def test_breaches_of_the_protocol_are_noted(orchestrator: MockOrchestrator) -> None:
    async with FakeWorker(orchestrator.address) as worker:
        await worker.event("r", "job.log", {})
        await worker.call.write(b"\xff\xff\xff")
        await worker.send(run_request=pb.TaskExecutionRequest(run_id="r"))
        await worker.register(heartbeat=True)
        connection = await orchestrator.wait_for_worker(timeout=10)
        assert list(connection.unparseable) == [b"\xff\xff\xff"]
        assert [text.split(" ", 1)[0] for text in connection.violations] == [
            "worker_event", "3", "a", "registration",
        ]  # fmt: skip
        assert len(orchestrator.violations) == 4


# -- runs -------------------------------------------------------------------------------------------


async def test_a_run_carries_every_field_and_gives_its_output(
    orchestrator: MockOrchestrator, worker: FakeWorker
) -> None:
    handle = await orchestrator.run(
        "greet",
        {"name": "Ada"},
        run_id="r1",
        timeout_ms=1500,
        required_models=["hf:a/b"],
        tenant_id="t",
        user_id="u",
        file_base_url="http://files",
        file_token="ft",
    )
    request = (await worker.receive()).run_request
    assert msgspec.msgpack.decode(request.input_payload) == {"name": "Ada"}
    request.ClearField("input_payload")
    assert request == pb.TaskExecutionRequest(
        run_id="r1", function_name="greet", required_models=["hf:a/b"], timeout_ms=1500, tenant_id="t", user_id="u",
        file_base_url="http://files", file_token="ft",
    )  # fmt: skip
    assert not handle.done
    await worker.event("r1", "job.progress", {"progress": 0.5})
    await worker.succeed("r1", {"text": "hi Ada"})
    assert await handle.output(timeout=10) == {"text": "hi Ada"}
    assert [(event.type, event.payload) for event in handle.events] == [("job.progress", {"progress": 0.5})]
    assert handle.events[0].at <= handle.results[0].at


async def test_payloads_may_be_structs_or_bytes(orchestrator: MockOrchestrator, worker: FakeWorker) -> None:
    class Greeting(msgspec.Struct):
        name: str

    await orchestrator.run("greet", Greeting("Eve"))
    assert msgspec.msgpack.decode((await worker.receive()).run_request.input_payload) == {"name": "Eve"}
    await orchestrator.run("greet", b"\xc1 not MessagePack")
    assert (await worker.receive()).run_request.input_payload == b"\xc1 not MessagePack"
    await orchestrator.run("greet")
    assert (await worker.receive()).run_request.input_payload == b"\x80"


async def test_a_failed_run_raises_what_the_worker_said(orchestrator: MockOrchestrator, worker: FakeWorker) -> None:
    handle = await orchestrator.run("greet")
    await worker.fail(handle.run_id, "retryable", "worker busy", "64 of 64 under way")
    assert not (await handle.result(timeout=10)).success
    with pytest.raises(RunFailedError, match="retryable: worker busy\n64 of 64 under way") as caught:
        await handle.output(timeout=10)
    assert (caught.value.error_type, caught.value.retryable) == ("retryable", True)


async def test_deltas_are_iterated_as_they_come(orchestrator: MockOrchestrator, worker: FakeWorker) -> None:
    handle = await orchestrator.run("tokens")
    deltas = aiter(handle)
    for number in range(3):
        await worker.event(handle.run_id, "output.delta", {"n": number})
        assert await asyncio.wait_for(anext(deltas), 10) == {"n": number}
    await worker.event(handle.run_id, "output.completed", {})
    await worker.succeed(handle.run_id, None)
    with pytest.raises(StopAsyncIteration):
        await asyncio.wait_for(anext(deltas), 10)
    assert await handle.output(timeout=10) == {}
    assert [delta async for delta in handle] == handle.deltas == [{"n": 0}, {"n": 1}, {"n": 2}]


async def test_all_events_are_streamed_until_the_result(orchestrator: MockOrchestrator, worker: FakeWorker) -> None:
    handle = await orchestrator.run("greet")
    await worker.event(handle.run_id, "job.progress", {"progress": 0.5})
    await worker.event(handle.run_id, "output.delta", {"text": "a"})
    await worker.succeed(handle.run_id, None)
    assert [(event.type, event.payload) async for event in handle.stream()] == [
        ("job.progress", {"progress": 0.5}),
        ("output.delta", {"text": "a"}),
    ]


async def test_cancel_goes_out_on_the_stream_that_the_worker_has_now(
    orchestrator: MockOrchestrator, worker: FakeWorker
) -> None:
    handle = await orchestrator.run("greet")
    await worker.receive()
    worker.call.cancel()
    await orchestrator.wait_until(lambda: not orchestrator.workers)
    with pytest.raises(NoWorkerError, match="worker 'w1' is not connected"):
        await handle.cancel()
    async with FakeWorker(orchestrator.address) as again:
        await again.register()
        await orchestrator.wait_for_worker("w1", timeout=10)
        await handle.cancel()
        assert (await again.receive()).interrupt_run_cmd.run_id == handle.run_id


async def test_results_are_matched_over_reconnects_and_all_kept(
    orchestrator: MockOrchestrator, worker: FakeWorker
) -> None:
    handle = await orchestrator.run("greet", run_id="r1")
    first = orchestrator.workers["w1"]
    await worker.succeed("r1", {"n": 1})
    await handle.result(timeout=10)
    worker.call.cancel()
    await first.wait_ended()
    async with FakeWorker(orchestrator.address) as again:
        await again.register()
        await again.succeed("r1", {"n": 1})
        await again.succeed("never asked for", {})
        await orchestrator.wait_until(lambda: orchestrator.stray_results)
        second = orchestrator.workers["w1"]
        assert [result.connection for result in handle.results] == [first, second]
        assert [stray.message.run_id for stray in orchestrator.stray_results] == ["never asked for"]
        assert orchestrator.violations == []
        await again.event("r1", "job.log", {})
        await again.succeed("r1", {"n": 1})
        await orchestrator.wait_until(lambda: len(handle.results) == 3)
        assert [text.split(" of ")[0] for text in second.violations] == ["job.log", "a second result"]


async def test_no_result_and_no_worker_are_errors(orchestrator: MockOrchestrator) -> None:
    with pytest.raises(NoWorkerError, match="no worker is connected"):
        await orchestrator.run("greet")
    async with FakeWorker(orchestrator.address) as worker:
        await worker.register()
        connection = await orchestrator.wait_for_worker(timeout=10)
        handle = await orchestrator.run("greet")
        with pytest.raises(NoResultError, match=f"{handle.run_id} greet on w1: 0 events.*within 0 s"):
            await handle.result(timeout=0)
    await connection.wait_ended()
    with pytest.raises(StreamEndedError, match="ended by lost"):
        await orchestrator.run("greet", run_id="late", worker=connection)
    assert "late" not in orchestrator.runs


async def test_runs_go_to_workers_that_have_the_function_and_the_fewest_runs(orchestrator: MockOrchestrator) -> None:
    async with (
        FakeWorker(orchestrator.address, "a", ["x"]) as a,
        FakeWorker(orchestrator.address, "b", ["x"]) as b,
        FakeWorker(orchestrator.address, "c", ["y"]) as c,
    ):
        for worker in (a, b, c):
            await worker.register()
            await orchestrator.wait_for_worker(worker.worker_id, timeout=10)
        handles = [await orchestrator.run("x") for _ in range(4)]
        assert sorted(handle.worker_id for handle in handles) == ["a", "a", "b", "b"]
        assert (await orchestrator.run("y")).worker_id == "c"
        assert (await orchestrator.run("x", worker="c")).worker_id == "c"
        of_b = [handle for handle in handles if handle.worker_id == "b"]
        await b.succeed(of_b[0].run_id, {})
        await of_b[0].result(timeout=10)
        orchestrator.forget(of_b[1])
        assert [(await orchestrator.run("x")).worker_id for _ in range(2)] == ["b", "b"]
        await b.succeed(of_b[1].run_id, {})
        await orchestrator.wait_until(lambda: orchestrator.stray_results)


async def test_a_repeated_run_id_is_sent_again_and_has_one_handle(
    orchestrator: MockOrchestrator, worker: FakeWorker
) -> None:
    first = await orchestrator.run("greet", run_id="same")
    assert await orchestrator.run("greet", run_id="same") is first
    assert [(await worker.receive()).run_request.run_id for _ in range(2)] == ["same", "same"]


async def test_large_payloads_pass_both_ways(orchestrator: MockOrchestrator, worker: FakeWorker) -> None:
    blob = os.urandom(20 * MIB)
    handle, message = await asyncio.gather(orchestrator.run("greet", {"blob": blob}), worker.receive())
    assert msgspec.msgpack.decode(message.run_request.input_payload) == {"blob": blob}
    await worker.succeed(handle.run_id, {"blob": blob})
    assert await handle.output(timeout=10) == {"blob": blob}


# -- models, config, realtime -----------------------------------------------------------------------


async def test_model_commands_get_their_own_answers(orchestrator: MockOrchestrator, worker: FakeWorker) -> None:
    first = asyncio.create_task(orchestrator.load_model("m1"))
    assert (await worker.receive()).load_model_cmd.model_id == "m1"
    second = asyncio.create_task(orchestrator.unload_model("m2"))
    assert (await worker.receive()).unload_model_cmd.model_id == "m2"
    await worker.send(unload_model_result=pb.UnloadModelResult(model_id="m2", success=True))
    await worker.send(load_model_result=pb.LoadModelResult(model_id="m1", error_message="no room"))
    assert (await asyncio.wait_for(second, 10)).success
    assert (await asyncio.wait_for(first, 10)).error_message == "no room"
    with pytest.raises(WaitTimeoutError, match="no answer to load m3 within 0 s"):
        await orchestrator.load_model("m3", timeout=0)


async def test_the_model_config_is_sent_to_new_streams_and_on_demand() -> None:
    config = pb.DeploymentModelConfig(supported_model_ids=["cozy:a/b:latest"], model_id_by_key={"k": "cozy:a/b"})
    async with MockOrchestrator(model_config=config) as orchestrator, FakeWorker(orchestrator.address) as worker:
        await worker.register()
        assert (await worker.receive()).deployment_model_config == config
        await worker.register(heartbeat=True)
        await orchestrator.configure_models(["hf:c/d"], {"x": "hf:c/d"})
        assert (await worker.receive()).deployment_model_config.model_id_by_key == {"x": "hf:c/d"}


async def test_realtime_frames_and_closes_reach_their_session(
    orchestrator: MockOrchestrator, worker: FakeWorker
) -> None:
    session = await orchestrator.open_realtime("echo", session_id="s1", tenant_id="t")
    assert (await worker.receive()).realtime_open_cmd == pb.RealtimeOpenCommand(
        session_id="s1", function_name="echo", tenant_id="t"
    )
    await session.send("text")
    await session.send(b"\x00")
    frames = [(await worker.receive()).realtime_frame for _ in range(2)]
    assert [(frame.data, frame.is_text) for frame in frames] == [(b"text", True), (b"\x00", False)]
    await worker.send(realtime_frame=pb.RealtimeFrame(session_id="s1", data=b"one"))
    await worker.send(realtime_frame=pb.RealtimeFrame(session_id="s1", data=b"two"))
    assert (await session.receive()).data == b"one"
    await session.close()
    assert (await worker.receive()).realtime_close_cmd.reason == "closed"
    await worker.send(realtime_close_cmd=pb.RealtimeCloseCommand(session_id="s1", reason="completed"))
    assert await session.wait_closed() == "completed"
    assert [frame.data async for frame in session] == [b"two"]
    with pytest.raises(StreamEndedError):
        await session.receive()


async def test_spawn_requests_are_kept(orchestrator: MockOrchestrator, worker: FakeWorker) -> None:
    await worker.send(spawn_tasks=pb.SpawnTasksRequest(parent_run_id="p"))
    await orchestrator.wait_until(lambda: orchestrator.spawn_requests)
    assert orchestrator.spawn_requests[0].parent_run_id == "p"


# -- how streams begin and end ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "code", "details"),
    [
        (refuse_auth("expired"), grpc.StatusCode.UNAUTHENTICATED, "expired"),
        (redirect("10.0.0.1:80"), grpc.StatusCode.FAILED_PRECONDITION, "not_leader:10.0.0.1:80"),
        (end_at_once(), grpc.StatusCode.OK, ""),
        (end_at_once(grpc.StatusCode.INTERNAL, "boom"), grpc.StatusCode.INTERNAL, "boom"),
    ],
)
async def test_policies_end_streams_with_their_status_and_no_message(
    orchestrator: MockOrchestrator, policy: OnConnect, code: grpc.StatusCode, details: str
) -> None:
    orchestrator.on_connect = policy
    async with FakeWorker(orchestrator.address) as worker:
        assert await worker.status() == (code, details)
    end = await orchestrator.history[0].wait_ended()
    assert (end.by, end.code) == (EndedBy.SCHEDULER, code)


async def test_a_token_can_be_required(orchestrator: MockOrchestrator) -> None:
    orchestrator.required_token = "right"
    for token in (None, "wrong"):
        async with FakeWorker(orchestrator.address, token=token) as worker:
            assert (await worker.status())[0] is grpc.StatusCode.UNAUTHENTICATED
    async with FakeWorker(orchestrator.address, token="right") as worker:
        await worker.register()
        await orchestrator.wait_for_worker(timeout=10)


async def test_headers_come_at_once_unless_they_are_held(orchestrator: MockOrchestrator) -> None:
    async with FakeWorker(orchestrator.address) as worker:
        await asyncio.wait_for(worker.call.initial_metadata(), 10)

    orchestrator.on_connect = stay_silent
    async with FakeWorker(orchestrator.address, "w2") as worker:
        await worker.register()
        connection = await orchestrator.wait_for_worker("w2", timeout=10)
        headers = asyncio.create_task(worker.call.initial_metadata())
        await worker.register(heartbeat=True)  # it is heard, and still gets nothing
        await orchestrator.wait_until(lambda: len(connection.registrations) == 2)
        assert not headers.done()
        await connection.send_headers()
        await asyncio.wait_for(headers, 10)

    orchestrator.on_connect = None
    orchestrator.send_headers = False
    async with FakeWorker(orchestrator.address, "w3") as worker:
        await worker.register()
        await orchestrator.wait_for_worker("w3", timeout=10)
        headers = asyncio.create_task(worker.call.initial_metadata())
        await orchestrator.run("greet", worker="w3")
        await asyncio.wait_for(headers, 10)


async def test_garbage_can_be_sent(orchestrator: MockOrchestrator) -> None:
    orchestrator.on_connect = send_garbage(b"\xff\xff\xff")
    async with FakeWorker(orchestrator.address) as worker:
        assert await asyncio.wait_for(worker.call.read(), 10) == b"\xff\xff\xff"
        await worker.register()
        await orchestrator.wait_for_worker(timeout=10)


async def test_policies_can_take_turns(orchestrator: MockOrchestrator) -> None:
    async def accept_and_talk(connection: WorkerConnection) -> None:
        await connection.send_raw(b"hello")

    orchestrator.on_connect = in_turn(redirect("x:1"), refuse_auth(), accept_and_talk)
    for expected in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED):
        async with FakeWorker(orchestrator.address) as worker:
            assert (await worker.status())[0] is expected
    for _ in range(2):
        async with FakeWorker(orchestrator.address) as worker:
            assert await asyncio.wait_for(worker.call.read(), 10) == b"hello"
    assert orchestrator.stream_count == 4


async def test_a_policy_that_fails_ends_the_stream(orchestrator: MockOrchestrator) -> None:
    def broken(_: WorkerConnection) -> None:
        raise ValueError("oops")

    orchestrator.on_connect = broken
    async with FakeWorker(orchestrator.address) as worker:
        assert await worker.status() == (grpc.StatusCode.INTERNAL, "the scheduler's policy failed: ValueError")


async def test_a_live_stream_can_be_closed_and_half_closed(orchestrator: MockOrchestrator) -> None:
    async with FakeWorker(orchestrator.address) as worker:
        await worker.register()
        connection = await orchestrator.wait_for_worker(timeout=10)
        connection.close(grpc.StatusCode.FAILED_PRECONDITION, "not_leader:a:1")
        assert not connection.live
        assert await worker.status() == (grpc.StatusCode.FAILED_PRECONDITION, "not_leader:a:1")
        with pytest.raises(StreamEndedError):
            await connection.send(pb.WorkerSchedulerMessage())
    async with FakeWorker(orchestrator.address, "w2") as worker:
        await worker.register()
        connection = await orchestrator.wait_for_worker("w2", timeout=10)
        connection.half_close()
        assert await worker.status() == (grpc.StatusCode.OK, "")


async def test_a_worker_that_half_closes_gets_ok(orchestrator: MockOrchestrator, worker: FakeWorker) -> None:
    connection = orchestrator.workers["w1"]
    await worker.call.done_writing()
    assert await worker.status() == (grpc.StatusCode.OK, "")
    assert (await connection.wait_ended()).by is EndedBy.WORKER


async def test_a_drop_is_a_vanished_connection_and_others_live_on(
    orchestrator: MockOrchestrator, worker: FakeWorker
) -> None:
    async with FakeWorker(orchestrator.address, "w2") as other:
        await other.register()
        await orchestrator.wait_for_worker("w2", timeout=10)
        connection = orchestrator.workers["w1"]
        connection.drop()
        assert (await worker.status())[0] is grpc.StatusCode.UNAVAILABLE
        end = await connection.wait_ended()
        assert (end.by, end.code, end.details) == (EndedBy.SCHEDULER, None, "dropped")
        assert set(orchestrator.workers) == {"w2"}
        await orchestrator.run("greet", worker="w2")
        assert (await other.receive()).run_request.function_name == "greet"


async def test_a_drop_frees_a_writer_that_the_worker_blocked(
    orchestrator: MockOrchestrator, worker: FakeWorker
) -> None:
    connection = orchestrator.workers["w1"]
    sent = 0

    async def flood() -> None:
        nonlocal sent
        while True:
            await connection.send_raw(bytes(MIB))
            sent += 1

    flooding = asyncio.create_task(flood())
    await _until_still(lambda: sent)
    connection.drop()
    with pytest.raises(StreamEndedError):
        await asyncio.wait_for(flooding, 10)


async def test_a_sender_that_gives_up_does_not_spoil_the_stream(
    orchestrator: MockOrchestrator, worker: FakeWorker
) -> None:
    await orchestrator.workers["w1"].send_headers()  # so that nothing but the message itself is under way
    given_up = asyncio.create_task(orchestrator.run("greet", bytes(20 * MIB), run_id="large"))
    await _until_still(lambda: not given_up.done())
    given_up.cancel()
    waiting = asyncio.create_task(orchestrator.run("greet", run_id="never sent"))
    await asyncio.sleep(0.05)
    waiting.cancel()
    next_one = asyncio.create_task(orchestrator.run("greet", run_id="next"))
    assert [(await worker.receive()).run_request.run_id for _ in range(2)] == ["large", "next"]
    assert (await next_one).run_id == "next"


async def test_a_status_follows_what_the_worker_has_not_read_yet(
    orchestrator: MockOrchestrator, worker: FakeWorker
) -> None:
    connection = orchestrator.workers["w1"]
    await connection.send_headers()
    writing = asyncio.create_task(connection.send_raw(bytes(20 * MIB)))
    await _until_still(lambda: not writing.done())
    connection.close(grpc.StatusCode.ABORTED, "enough")
    await connection.wait_ended()
    assert len(await asyncio.wait_for(worker.call.read(), 10)) == 20 * MIB
    assert await worker.status() == (grpc.StatusCode.ABORTED, "enough")
    with contextlib.suppress(StreamEndedError):  # whichever gRPC tells first
        await asyncio.wait_for(writing, 10)


async def test_drop_at_once(orchestrator: MockOrchestrator) -> None:
    orchestrator.on_connect = drop_at_once
    async with FakeWorker(orchestrator.address) as worker:
        assert (await worker.status())[0] is grpc.StatusCode.UNAVAILABLE


async def test_paused_reading_is_backpressure(orchestrator: MockOrchestrator, worker: FakeWorker) -> None:
    connection = orchestrator.workers["w1"]
    handle = await orchestrator.run("greet")
    connection.pause_reading()
    total, sent = 400, 0

    async def flood() -> None:
        nonlocal sent
        for number in range(total):
            await worker.event(handle.run_id, "output.delta", {"n": number, "pad": "x" * 100_000})
            sent += 1
        await worker.succeed(handle.run_id, None)

    flooding = asyncio.create_task(flood())
    stuck_at = await _until_still(lambda: sent)
    assert stuck_at < total
    assert handle.event_count == 0
    connection.resume_reading()
    await handle.result(timeout=20)
    await flooding
    assert [delta["n"] for delta in handle.deltas] == list(range(total))


async def _until_still(count: Any) -> int:
    """Waits until a counter that moves by itself has not moved for a while."""
    async with asyncio.timeout(20):
        while True:
            before = count()
            await asyncio.sleep(0.1)
            if before and count() == before:
                return int(before)


async def test_it_can_stop_and_start_on_its_port(orchestrator: MockOrchestrator, worker: FakeWorker) -> None:
    address, connection = orchestrator.address, orchestrator.workers["w1"]
    handle = await orchestrator.run("greet")
    await orchestrator.stop()
    assert (await worker.status())[0] is grpc.StatusCode.UNAVAILABLE
    assert (connection.ended and connection.ended.details) == "the server stopped"
    await orchestrator.start()
    assert orchestrator.address == address
    async with FakeWorker(address) as again:
        await again.register()
        await again.succeed(handle.run_id, {"kept": True})
        assert await handle.output(timeout=10) == {"kept": True}


async def test_a_taken_port_is_a_clear_error(orchestrator: MockOrchestrator) -> None:
    with pytest.raises(ListenError, match=f"can't listen on {orchestrator.address}: Address already in use"):
        await MockOrchestrator(orchestrator.address).start()
    with pytest.raises(ListenError, match="HOST:PORT"):
        MockOrchestrator("localhost")


async def test_everything_is_logged_on_request() -> None:
    async with MockOrchestrator(record=True) as orchestrator, FakeWorker(orchestrator.address) as worker:
        await worker.register()
        await worker.call.write(b"\xff")
        await worker.event("r", "job.log", {})
        connection = await orchestrator.wait_for_worker(timeout=10)
        await orchestrator.wait_until(lambda: connection.received_count == 3)
        kinds = [entry.message.WhichOneof("msg") if entry.message else entry.data for entry in connection.log]
        assert kinds == ["worker_registration", b"\xff", "worker_event"]


async def test_tls() -> None:
    authority = trustme.CA()
    issued = authority.issue_cert("localhost")
    tls = grpc.ssl_server_credentials(
        [(issued.private_key_pem.bytes(), b"".join(blob.bytes() for blob in issued.cert_chain_pems))]
    )
    credentials = grpc.ssl_channel_credentials(authority.cert_pem.bytes())
    async with MockOrchestrator(tls=tls) as orchestrator:
        address = f"localhost:{orchestrator.address.rpartition(':')[2]}"
        async with FakeWorker(address, credentials=credentials) as worker:
            await worker.register()
            connection = await orchestrator.wait_for_worker(timeout=10)
            connection.drop()
            assert (await worker.status())[0] is grpc.StatusCode.UNAVAILABLE


# -- the command line -------------------------------------------------------------------------------


class Tool:
    """`python -m gen_worker.testing.mock_orchestrator` as a process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.notes: list[str] = []

    @classmethod
    async def start(cls, *arguments: str) -> Self:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gen_worker.testing.mock_orchestrator", "--listen", "127.0.0.1:0", *arguments,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        return cls(process)

    async def note(self, start: str) -> str:
        """The rest of the line on stderr that begins with `start`."""
        assert self.process.stderr is not None
        async with asyncio.timeout(20):
            while line := (await self.process.stderr.readline()).decode():
                self.notes.append(line)
                if line.startswith(start):
                    return line.removeprefix(start).strip()
        raise AssertionError(f"no {start!r} in {self.notes}")

    async def line(self) -> str:
        assert self.process.stdout is not None
        return (await asyncio.wait_for(self.process.stdout.readline(), 20)).decode().rstrip("\n")

    async def finish(self) -> tuple[int, list[str], str]:
        """Exit code, lines of stdout, and stderr."""
        out, err = await asyncio.wait_for(self.process.communicate(), 20)
        assert self.process.returncode is not None
        return self.process.returncode, out.decode().splitlines(), "".join(self.notes) + err.decode()


@contextlib.asynccontextmanager
async def tool(*arguments: str) -> AsyncIterator[Tool]:
    running = await Tool.start(*arguments)
    try:
        yield running
    finally:
        if running.process.returncode is None:
            running.process.kill()
            await running.process.communicate()


async def test_cli_prints_the_output_and_exits_0() -> None:
    options = ("--timeout-ms", "9000", "--tenant-id", "t", "--user-id", "u", "--required-model", "hf:a/b",
               "--required-model", "hf:c/d", "--file-base-url", "http://f", "--file-token", "ft")  # fmt: skip
    async with (
        tool("--run", "greet", "--payload-json", '{"name": "Ada"}', *options) as running,
        FakeWorker(await running.note("listening on ")) as worker,
    ):
        await worker.register()
        request = (await worker.receive()).run_request
        assert msgspec.msgpack.decode(request.input_payload) == {"name": "Ada"}
        assert (request.timeout_ms, request.tenant_id, request.user_id) == (9000, "t", "u")
        assert request.required_models == ["hf:a/b", "hf:c/d"]
        assert (request.file_base_url, request.file_token) == ("http://f", "ft")
        await worker.event(request.run_id, "job.progress", {"progress": 1})
        await worker.succeed(request.run_id, {"text": "hé", "raw": b"\x00\x01"})
        code, lines, errors = await running.finish()
    assert (code, lines) == (0, ['[output] {"text":"hé","raw":"AAE="}'])
    assert "Traceback" not in errors


async def test_cli_prints_deltas_events_and_registrations() -> None:
    async with (
        tool("--run", "tokens", "--print-events", "--print-registrations") as running,
        FakeWorker(await running.note("listening on ")) as worker,
    ):
        await worker.register(gpu_count=1)
        run_id = (await worker.receive()).run_request.run_id
        await worker.event(run_id, "job.log", {"message": "a\nb"})
        await worker.event(run_id, "output.delta", {"n": 1})
        await worker.succeed(run_id, None)
        code, lines, _ = await running.finish()
    assert code == 0
    assert lines[0].startswith("[registration] {")
    resources = msgspec.json.decode(lines[0].removeprefix("[registration] "))["resources"]
    assert resources == {"worker_id": "w1", "gpu_count": 1, "available_functions": ["greet"]}
    assert lines[1:] == [
        '[event] job.log {"message":"a\\nb"}',
        '[event] output.delta {"n":1}',
        '[delta] {"n":1}',
        "[output] {}",
    ]


async def test_cli_prints_the_error_and_exits_1() -> None:
    async with tool("--run", "greet") as running, FakeWorker(await running.note("listening on ")) as worker:
        await worker.register()
        await worker.fail((await worker.receive()).run_request.run_id, "validation", "bad name", "line 3")
        code, lines, errors = await running.finish()
    assert (code, lines) == (1, [])
    assert errors.endswith("validation: bad name\nline 3\n")


async def test_cli_exits_2_when_no_worker_comes() -> None:
    async with tool("--run", "greet", "--wait-s", "0.1") as running:
        code, lines, errors = await running.finish()
    assert (code, lines) == (2, [])
    assert "no worker registered within 0.1" in errors


async def test_cli_exits_3_when_no_result_comes() -> None:
    async with (
        tool("--run", "greet", "--result-timeout-s", "0.1") as running,
        FakeWorker(await running.note("listening on ")) as worker,
    ):
        await worker.register()
        code, lines, errors = await running.finish()
    assert (code, lines) == (3, [])
    assert "no result of greet" in errors
    assert "a worker is connected" in errors


async def test_cli_exits_3_when_the_worker_leaves_for_good() -> None:
    async with tool("--run", "greet", "--wait-s", "1") as running:
        async with FakeWorker(await running.note("listening on ")) as worker:
            await worker.register()
            await worker.receive()
        code, _, errors = await running.finish()
    assert code == 3
    assert "the worker left; waiting 1 s" in errors


async def test_cli_takes_the_result_from_a_worker_that_came_back() -> None:
    async with tool("--run", "greet") as running:
        address = await running.note("listening on ")
        async with FakeWorker(address) as worker:
            await worker.register()
            run_id = (await worker.receive()).run_request.run_id
        await running.note("the worker left")
        async with FakeWorker(address) as worker:
            await worker.register()
            await worker.succeed(run_id, {"ok": True})
            code, lines, _ = await running.finish()
    assert (code, lines) == (0, ['[output] {"ok":true}'])


async def test_cli_waits_for_a_worker_that_still_starts() -> None:
    async with (
        tool("--run", "greet") as running,
        FakeWorker(await running.note("listening on "), functions=()) as worker,
    ):
        await worker.register()
        worker.functions = ("greet",)
        reading = asyncio.create_task(worker.receive())
        await worker.register(heartbeat=True)
        await worker.succeed((await reading).run_request.run_id, {})
        assert (await running.finish())[0] == 0


async def test_cli_interrupted_during_a_run_cancels_it() -> None:
    async with tool("--run", "greet") as running, FakeWorker(await running.note("listening on ")) as worker:
        await worker.register()
        run_id = (await worker.receive()).run_request.run_id
        running.process.send_signal(signal.SIGINT)
        assert (await worker.receive()).interrupt_run_cmd.run_id == run_id
        code, _, errors = await running.finish()
    assert code == 3
    assert "interrupted" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_cli_without_run_prints_what_arrives_until_interrupted(number: signal.Signals) -> None:
    async with tool("--print-events") as running:
        async with FakeWorker(await running.note("listening on ")) as worker:
            await worker.register()
            await worker.event("r9", "job.log", {"message": "m"})
            await worker.fail("r9", "internal", "internal error")
            await worker.call.write(b"\xff")
            assert (await running.line()).startswith('[connected] {"stream":0,"peer":"ipv4:127.0.0.1:')
            assert (await running.line()).startswith('[registration] {"resources":{"worker_id":"w1"')
            assert await running.line() == '[event] r9 job.log {"message":"m"}'
            assert (await running.line()).startswith('[result] {"run_id":"r9","error_type":"internal"')
            await running.note("WARNING gen_worker.testing.mock_orchestrator.connection:")
        assert await running.line() == '[disconnected] {"stream":0,"worker_id":"w1","by":"lost"}'
        running.process.send_signal(number)
        code, lines, errors = await running.finish()
    assert (code, lines) == (0, [])
    assert "Traceback" not in errors


async def test_cli_serves_files(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("hello")
    async with tool("--run", "greet", "--serve-files-dir", str(tmp_path), "--file-token", "tok") as running:
        url = (await running.note("serving ")).rpartition(" ")[2]
        async with FakeWorker(await running.note("listening on ")) as worker:
            await worker.register()
            request = (await worker.receive()).run_request
            assert (request.file_base_url, request.file_token) == (url, "tok")
            host, port = url.removeprefix("http://").split(":")
            reader, writer = await asyncio.open_connection(host, int(port))
            writer.write(b"GET /api/v1/file/in.txt HTTP/1.0\r\nAuthorization: Bearer tok\r\n\r\n")
            assert (await asyncio.wait_for(reader.read(), 10)).endswith(b"\r\n\r\nhello")
            writer.close()
            await worker.succeed(request.run_id, {})
            assert (await running.finish())[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--run", "f", "--payload-json", "{nope"], "--payload-json is not JSON"),
        (["--payload-json", '{"a":1}'], "--payload-json needs --run"),
        (["--wait-s", "soon"], "'soon' is not a number of seconds"),
        (["--timeout-ms", "-5"], "'-5' is not a number of milliseconds"),
        (["--listen", "nowhere"], "'nowhere' is not an address"),
        (["--no-such-option"], "unrecognized arguments: --no-such-option"),
    ],
)
async def test_cli_refuses_bad_options_in_one_line(arguments: list[str], message: str) -> None:
    async with tool(*arguments) as running:
        code, lines, errors = await running.finish()
    assert (code, lines) == (64, [])
    assert message in errors
    assert len(errors.splitlines()) == 1


async def test_cli_says_that_a_port_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with tool("--listen", address) as running:
            code, _, errors = await running.finish()
    assert code == 64
    assert errors.splitlines()[-1] == f"can't listen on {address}: Address already in use"
