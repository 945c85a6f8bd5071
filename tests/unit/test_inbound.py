"""No message of the scheduler ends the stream or the worker, and each goes where it belongs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gen_worker.pipe.messages import Cancel, LoadModel, UnloadModel
from gen_worker.wire import worker_scheduler_pb2 as pb
from supervisor.inbound import Inbound
from tests.support.rig import Rig, function, use_recording_children

A = "cozy:org/a:latest"


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Rig]:
    use_recording_children(monkeypatch.setattr)
    rig = Rig([function("f"), function("g", models=["a"]), function("chat", "websocket")], models=[A], labels={"a": A})
    yield rig
    rig.close()


@pytest.fixture
def inbound(rig: Rig) -> Inbound:
    return Inbound(rig.dispatcher, rig.residency)


def message(**fields: Any) -> bytes:
    return pb.WorkerSchedulerMessage(**fields).SerializeToString()


def request(run_id: str, name: str = "f", **fields: Any) -> bytes:
    return message(run_request=pb.TaskExecutionRequest(run_id=run_id, function_name=name, **fields))


async def test_runs_and_cancels(rig: Rig, inbound: Inbound) -> None:
    inbound.handle(request("r1"))
    inbound.handle(message(interrupt_run_cmd=pb.InterruptTaskCommand(run_id="r1")))
    (executor,) = rig.executors
    assert executor.runs == ["r1"]
    assert executor.sent(Cancel) == [Cancel(executor.key_of("r1"), "canceled")]


async def test_model_commands(rig: Rig, inbound: Inbound) -> None:
    inbound.handle(message(load_model_cmd=pb.LoadModelCommand(model_id="a")))
    (executor,) = rig.executors
    assert [load.model_id for load in executor.sent(LoadModel)] == [A]
    executor.load_done(A)
    inbound.handle(message(unload_model_cmd=pb.UnloadModelCommand(model_id=A)))
    assert executor.sent(UnloadModel) == [UnloadModel(A)]


async def test_deployment_model_config(rig: Rig, inbound: Inbound) -> None:
    config = pb.DeploymentModelConfig(supported_model_ids=["cozy:org/b"], model_id_by_key={"a": "org/b"})
    inbound.handle(message(deployment_model_config=config))
    inbound.handle(request("r1", "g"))
    assert rig.results()["r1"].error_message == (
        "model cozy:org/b:latest is not on this host, nor can it be fetched, "
        "and WORKER_MODEL_ARTIFACTS_JSON does not name it"
    )
    inbound.handle(request("r2", "g", required_models=[A]))
    assert rig.results()["r2"].safe_message == "model not allowed"


async def test_what_is_allowed_is_fetched_before_it_is_asked_for(rig: Rig, inbound: Inbound) -> None:
    rig.source.models.update({"hf:org/c@main": 0, "cozy:org/d:latest": 0})
    rig.source.cold = {"hf:org/c@main", "cozy:org/d:latest"}
    config = pb.DeploymentModelConfig(supported_model_ids=["hf:org/c@main", A, "cozy:org/unheard-of"])
    inbound.handle(message(deployment_model_config=config))
    assert rig.source.prefetched == [A, "hf:org/c@main"], "d is not allowed, the last can't be had"


async def test_realtime_sessions(rig: Rig, inbound: Inbound) -> None:
    inbound.handle(message(realtime_open_cmd=pb.RealtimeOpenCommand(session_id="s1", function_name="talk")))
    (answer,) = rig.messages()
    assert answer.realtime_close_cmd == pb.RealtimeCloseCommand(session_id="s1", reason="unknown_function")
    inbound.handle(message(realtime_open_cmd=pb.RealtimeOpenCommand(session_id="s2", function_name="chat")))
    inbound.handle(message(realtime_frame=pb.RealtimeFrame(session_id="s2", data=b"hi")))
    inbound.handle(message(realtime_close_cmd=pb.RealtimeCloseCommand(session_id="s2")))
    sent = rig.executors[0].child.sent
    assert [type(each).__name__ for each in sent] == ["SocketOpen", "SocketFrame", "SocketClose"]
    inbound.stream_closed()
    assert [answer.realtime_close_cmd.reason for answer in rig.messages()] == ["closed"]


async def test_a_flood_of_frames_stops_the_reading(rig: Rig, inbound: Inbound) -> None:
    inbound.handle(message(realtime_open_cmd=pb.RealtimeOpenCommand(session_id="s", function_name="chat")))
    frame = message(realtime_frame=pb.RealtimeFrame(session_id="s", data=b"x" * 500_000))
    for _ in range(40):
        inbound.handle(frame)
    assert inbound.full
    waiting = asyncio.create_task(inbound.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    inbound.handle(message(realtime_close_cmd=pb.RealtimeCloseCommand(session_id="s")))
    await asyncio.wait_for(waiting, 5)
    assert not inbound.full


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff\xff\xff", "3 bytes are not a WorkerSchedulerMessage"),
        (b"", "it is empty"),
        (b"\xf8\x07\x01", "it is empty"),
        (message(run_result=pb.TaskExecutionResult(run_id="r1")), "unexpected run_result"),
        (message(worker_registration=pb.WorkerRegistration()), "unexpected worker_registration"),
        (message(realtime_frame=pb.RealtimeFrame(session_id="s1")), "frames of session s1 are dropped"),
        (message(realtime_close_cmd=pb.RealtimeCloseCommand(session_id="s1")), "a close of session s1 is dropped"),
    ],
    ids=["garbage", "empty", "unknown field", "result", "registration", "frame", "close"],
)
async def test_what_is_dropped(
    rig: Rig, inbound: Inbound, caplog: pytest.LogCaptureFixture, data: bytes, words: str
) -> None:
    inbound.handle(data)
    assert words in caplog.text
    assert rig.messages() == []
    inbound.handle(request("r1"))
    assert rig.executors[0].runs == ["r1"]


async def test_empty_messages_of_every_kind(rig: Rig, inbound: Inbound) -> None:
    for field in pb.WorkerSchedulerMessage.DESCRIPTOR.fields:
        empty = pb.WorkerSchedulerMessage()
        getattr(empty, field.name).SetInParent()
        inbound.handle(empty.SerializeToString())
    kinds = [message.WhichOneof("msg") for message in rig.messages()]
    assert sorted(map(str, kinds)) == ["load_model_result", "realtime_close_cmd", "run_result", "unload_model_result"]


async def test_a_defect_in_one_message_costs_no_other(
    rig: Rig, inbound: Inbound, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(rig.residency.names, "resolve", None)
        inbound.handle(request("r1", "g"))
    assert "handling a run_request of the scheduler failed" in caplog.text
    inbound.handle(request("r2"))
    assert rig.executors[0].runs == ["r2"]


wire_fields = st.sampled_from([field.number for field in pb.WorkerSchedulerMessage.DESCRIPTOR.fields])


def submessage(field: int, body: bytes) -> bytes:
    tag = field << 3 | 2
    head = bytes([tag]) if tag < 128 else bytes([tag & 127 | 128, tag >> 7])
    return head + bytes([len(body)]) + body


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
@given(data=st.binary(max_size=100) | st.builds(submessage, wire_fields, st.binary(max_size=60)))
async def test_random_bytes_never_raise(inbound: Inbound, caplog: pytest.LogCaptureFixture, data: bytes) -> None:
    inbound.handle(data)
    assert "Traceback" not in caplog.text, "what the scheduler sends is no defect of ours"
