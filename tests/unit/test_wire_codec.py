"""Protobuf at the edge: what goes out is what the protocol says, what comes in never surprises."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_worker.pipe.messages import Failure
from gen_worker.wire import worker_scheduler_pb2 as pb
from supervisor.wire_codec import (
    SAFE_MESSAGE_MAX_CHARS,
    SIZES_KEPT,
    DeltaWriter,
    WireError,
    decode,
    encode_event,
    encode_load_result,
    encode_realtime_close,
    encode_registration,
    encode_result,
    encode_unload_result,
)


def test_success() -> None:
    assert decode(encode_result("r1", b"\x81\xa1a\x01", None)) == pb.WorkerSchedulerMessage(
        run_result=pb.TaskExecutionResult(run_id="r1", success=True, output_payload=b"\x81\xa1a\x01")
    )


def test_failure() -> None:
    failure = Failure("retryable", "try later", "503 from the store", retryable=True)
    assert decode(encode_result("r1", b"dropped", failure)) == pb.WorkerSchedulerMessage(
        run_result=pb.TaskExecutionResult(
            run_id="r1",
            error_type="retryable",
            safe_message="try later",
            error_message="503 from the store",
            retryable=True,
        )
    )


def test_a_failure_without_detail_tells_operators_what_users_see() -> None:
    assert decode(encode_result("r1", b"", Failure("internal", "internal error"))).run_result.error_message == (
        "internal error"
    )


def test_safe_messages_are_bounded_in_characters() -> None:
    result = decode(encode_result("r1", b"", Failure("internal", "ü" * 501))).run_result
    assert result.safe_message == "ü" * SAFE_MESSAGE_MAX_CHARS


def test_event() -> None:
    assert decode(encode_event("r1", "output.delta", b'{"a":1}')) == pb.WorkerSchedulerMessage(
        worker_event=pb.WorkerEvent(run_id="r1", event_type="output.delta", payload_json=b'{"a":1}')
    )


SIZES = st.one_of(st.integers(0, 300), st.integers(16_000, 16_500), st.sampled_from([2**14 - 1, 2**14, 2**21]))


@given(st.text(max_size=300), st.lists(SIZES.map(bytes) | st.binary(max_size=200), min_size=1, max_size=8))
def test_joined_deltas_are_what_protobuf_makes_of_each(run_id: str, payloads: list[bytes]) -> None:
    writer = DeltaWriter(run_id)
    for _ in range(2):  # the second time what is kept is used
        joined = writer.join(payloads)
        assert list(joined) == [encode_event(run_id, "output.delta", payload) for payload in payloads]
        assert joined.count == len(payloads)


def test_what_is_kept_of_deltas_is_bounded() -> None:
    writer = DeltaWriter("r1")
    for size in range(2 * SIZES_KEPT):
        assert list(writer.join([bytes(size)])) == [encode_event("r1", "output.delta", bytes(size))]
    assert len(writer) == SIZES_KEPT


@pytest.mark.parametrize("error", ["", "no such model"])
def test_answers_of_model_commands(error: str) -> None:
    loaded = decode(encode_load_result("m", error)).load_model_result
    unloaded = decode(encode_unload_result("m", error)).unload_model_result
    for answer in (loaded, unloaded):
        assert (answer.model_id, answer.success, answer.error_message) == ("m", not error, error)


def test_registration_and_realtime_close() -> None:
    resources = pb.WorkerResources(worker_id="w")
    for heartbeat in (False, True):
        registration = decode(encode_registration(resources, is_heartbeat=heartbeat)).worker_registration
        assert registration == pb.WorkerRegistration(resources=resources, is_heartbeat=heartbeat)
    close = decode(encode_realtime_close("s", "unknown_function")).realtime_close_cmd
    assert (close.session_id, close.reason) == ("s", "unknown_function")


@pytest.mark.parametrize(
    "data",
    [b"\xff", b"\x0a\xff", b"\x52\x05\x0a\x03\xff\xfe\xfd", b"\x08", b"\x53" * 500],
    ids=lambda data: data[:6].hex(),
)
def test_bytes_that_are_no_message(data: bytes) -> None:
    with pytest.raises(WireError, match=f"^{len(data)} bytes are not a WorkerSchedulerMessage"):
        decode(data)


@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_wire_errors(data: bytes) -> None:
    try:
        decode(data)
    except WireError:
        return
