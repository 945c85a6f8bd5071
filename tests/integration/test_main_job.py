"""A request's whole way, scheduler -> supervisor -> executor -> function and back: what comes, and in which order."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest
import pytest_asyncio

from gen_worker.testing.mock_orchestrator import RunHandle
from gen_worker.wire import worker_scheduler_pb2 as pb
from tests.support.worker_process import WAIT_S, Chain, all_of, chain, eventually

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 2**20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(worker_transport: str) -> AsyncIterator[Chain]:
    async with chain() as found:
        yield found


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def limited(worker_transport: str) -> AsyncIterator[Chain]:
    limits = {
        "WORKER_MAX_INPUT_BYTES": "1 MiB",
        "WORKER_MAX_OUTPUT_BYTES": "64 KiB",
        "WORKER_MAX_OUTPUT_DELTA_BYTES": "1000",
        "WORKER_MAX_OUTPUT_DELTA_EVENTS": "10",
        "WORKER_ID": "limited-worker",
    }
    async with chain(env=limits) as found:
        yield found


@pytest.fixture(autouse=True)
def _unhurt(worker: Chain) -> Any:
    """Nothing in this file may cost the executor or the stream."""
    executors, streams = [child.pid for child in worker.worker.executors()], worker.orchestrator.stream_count
    yield
    assert [child.pid for child in worker.worker.executors()] == executors
    assert worker.orchestrator.stream_count == streams


def kinds(handle: RunHandle) -> list[str]:
    return [event.type for event in handle.events]


def error(result: pb.TaskExecutionResult) -> tuple[str, bool, str]:
    assert not result.success
    assert not result.output_payload
    return result.error_type, result.retryable, result.safe_message


# -- what comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["echo", "aecho"])
async def test_an_output_comes_back(worker: Chain, function: str) -> None:
    handle = await worker.run(function, {"text": "grüße 👋", "data": b"\x00\xff"})
    result = await handle.result()
    assert result.success
    assert (result.error_type, result.error_message, result.safe_message, result.retryable) == ("", "", "", False)
    assert msgspec.msgpack.decode(result.output_payload) == {"text": "grüße 👋", "data": b"\x00\xff"}
    assert handle.events == []


async def test_fields_that_are_not_given_have_their_defaults(worker: Chain) -> None:
    assert await worker.call("echo", {}) == {"text": "", "data": b""}


@pytest.mark.parametrize("function", ["count", "acount"])
async def test_deltas_come_in_order_then_completed_then_an_empty_result(worker: Chain, function: str) -> None:
    handle = await worker.run(function, {"count": 1000, "size": 3})
    result = await handle.result()
    assert result.success
    assert result.output_payload == b""
    assert kinds(handle) == ["output.delta"] * 1000 + ["output.completed"]
    assert handle.deltas == [{"index": index, "text": "xxx"} for index in range(1000)]
    assert handle.events[-1].payload == {}
    assert handle.events[-1].at <= handle.results[0].at


@pytest.mark.parametrize("function", ["count", "acount"])
async def test_no_deltas_are_an_output_too(worker: Chain, function: str) -> None:
    handle = await worker.run(function, {"count": 0})
    assert (await handle.result()).success
    assert kinds(handle) == ["output.completed"]


async def test_many_streams_at_once_keep_their_order_each(worker: Chain) -> None:
    handles = [await worker.run("count" if n % 2 else "acount", {"count": 300, "size": 200}) for n in range(8)]
    await all_of(*(handle.result(WAIT_S) for handle in handles))
    for handle in handles:
        assert [delta["index"] for delta in handle.deltas] == list(range(300))
        assert kinds(handle)[-1] == "output.completed"


async def test_progress_logs_and_own_events_precede_the_result(worker: Chain) -> None:
    before = time.time()
    handle = await worker.run("talk", {"count": 3})
    assert (await handle.output())["number"] == 3
    assert kinds(handle) == ["job.progress"] * 3 + ["job.log", "tenant.own"]
    progress = [event.payload for event in handle.events[:3]]
    assert [payload["progress"] for payload in progress] == [1 / 3, 2 / 3, 1.0]
    assert all(set(payload) == {"progress", "stage", "timestamp"} for payload in progress)
    log = handle.events[3].payload
    assert (log["message"], log["level"]) == ("said enough", "warning")
    assert before <= progress[0]["timestamp"] <= log["timestamp"] <= time.time()
    assert handle.events[4].payload == {"count": 3}


async def test_the_context_knows_its_run(worker: Chain) -> None:
    handle = await worker.run("circumstances", {}, tenant_id="acme", user_id="ada", timeout_ms=20_000)
    known = await handle.output()
    remaining, until_deadline = known.pop("remaining_s"), known.pop("until_deadline_s")
    assert known == {
        "run_id": handle.run_id, "tenant_id": "acme", "user_id": "ada", "timeout_ms": 20_000, "device": "cpu",
    }  # fmt: skip
    assert 10 < remaining <= 20
    assert 10 < until_deadline <= 20


async def test_a_run_without_a_timeout_has_no_deadline(worker: Chain) -> None:
    known = await worker.call("circumstances", {})
    assert (known["timeout_ms"], known["remaining_s"], known["until_deadline_s"]) == (None, None, None)


# -- payloads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size_mib", [1, 5, 16, 64])
async def test_large_payloads_echo_intact(worker: Chain, size_mib: int) -> None:
    data = os.urandom(MIB) * size_mib
    digest = hashlib.sha256(data).hexdigest()
    output = await worker.call("echo", {"data": data})
    assert len(output["data"]) == len(data)
    assert hashlib.sha256(output["data"]).hexdigest() == digest


async def test_large_payloads_are_intact_on_their_way_in_and_through_async_functions(worker: Chain) -> None:
    data = os.urandom(5 * MIB)
    digest = hashlib.sha256(data).hexdigest()
    assert await worker.call("digest", {"data": data}) == {"text": digest, "pid": 0, "number": len(data)}
    output = await worker.call("aecho", {"data": data})
    assert hashlib.sha256(output["data"]).hexdigest() == digest


async def test_large_payloads_at_once_do_not_mix(worker: Chain) -> None:
    payloads = [os.urandom(64 * 1024) * 24 + bytes([number]) for number in range(12)]
    outputs = await all_of(*(worker.call("echo", {"data": data}) for data in payloads))
    assert [output["data"] == data for output, data in zip(outputs, payloads, strict=True)] == [True] * 12


async def test_sizes_around_the_ways_of_transport(worker: Chain) -> None:
    """A MiB and more goes by shared memory, less through the pipe."""
    for size in (MIB - 64, MIB - 8, MIB - 1, MIB, MIB + 1):
        assert len((await worker.call("echo", {"data": bytes(size)}))["data"]) == size


# -- limits ---------------------------------------------------------------------------------------


async def test_an_input_over_the_limit_is_invalid(limited: Chain) -> None:
    result = await limited.result("digest", {"data": bytes(MIB)})
    assert error(result) == ("validation", False, "input too large")
    assert "WORKER_MAX_INPUT_BYTES=1048576" in result.error_message
    assert (await limited.call("digest", {"data": bytes(MIB - 100)}))["number"] == MIB - 100


async def test_an_output_over_the_limit_is_invalid(limited: Chain) -> None:
    result = await limited.result("make", {"count": 0, "size": 64 * 1024})
    assert error(result)[:2] == ("validation", False)
    assert "WORKER_MAX_OUTPUT_BYTES=65536" in result.error_message
    assert len((await limited.call("make", {"count": 0, "size": 65_000}))["data"]) == 65_000


@pytest.mark.parametrize("function", ["count", "acount"])
async def test_a_delta_over_the_limit_ends_the_stream_invalid(limited: Chain, function: str) -> None:
    handle = await limited.run(function, {"count": 3, "size": 1000})
    result = await handle.result()
    assert error(result)[:2] == ("validation", False)
    assert "WORKER_MAX_OUTPUT_DELTA_BYTES=1000" in result.error_message
    assert kinds(handle) == ["output.error"]


@pytest.mark.parametrize("function", ["count", "acount"])
async def test_too_many_deltas_end_the_stream_invalid(limited: Chain, function: str) -> None:
    handle = await limited.run(function, {"count": 11})
    result = await handle.result()
    assert error(result)[:2] == ("validation", False)
    assert "WORKER_MAX_OUTPUT_DELTA_EVENTS=10" in result.error_message
    assert kinds(handle) == ["output.delta"] * 10 + ["output.error"]
    assert (await limited.result(function, {"count": 10})).success


# -- errors ---------------------------------------------------------------------------------------

ERRORS: dict[str, tuple[str, bool, str]] = {
    "value": ("validation", False, "the value is bad"),
    "validation": ("validation", False, "the width must be even"),
    "retryable": ("retryable", True, "try again"),
    "own_retryable": ("retryable", True, "try mine again"),
    "resource": ("resource", False, "no room"),
    "canceled": ("canceled", False, "canceled"),
    "fatal": ("fatal", False, "never again"),
    "auth": ("auth", False, "not you"),
    "worker_error": ("internal", False, "plainly wrong"),
    "interrupted": ("canceled", False, "canceled"),
    "memory": ("resource", False, "out of memory"),
    "cuda_memory": ("resource", False, "out of memory"),
    "torch_memory": ("resource", False, "out of memory"),
    "timeout": ("internal", False, "internal error"),
    "key": ("internal", False, "internal error"),
    "runtime": ("internal", False, "internal error"),
    "group": ("internal", False, "internal error"),
    "group_of_one": ("validation", False, "the only one"),
    "keyboard": ("internal", False, "internal error"),
    "base": ("internal", False, "internal error"),
    "generator_exit": ("internal", False, "internal error"),
    "stop_iteration": ("internal", False, "internal error"),
    "unspeakable": ("internal", False, "internal error"),
}
"""What each exception of the tenant (tests/tenants/basic) is answered with."""


@pytest.mark.parametrize("how", ERRORS)
@pytest.mark.parametrize("function", ["fail", "afail", "fail_after_deltas", "afail_after_deltas"])
async def test_each_exception_has_its_answer(worker: Chain, function: str, how: str) -> None:
    handle = await worker.run(function, {"how": how})
    result = await handle.result()
    assert error(result) == ERRORS[how]
    assert "basic_functions.py" in result.error_message  # operators see where
    if function.endswith("deltas"):
        assert kinds(handle) == ["output.delta"] * 3 + ["output.error"]
        assert handle.events[-1].payload == {"error_type": ERRORS[how][0], "message": ERRORS[how][2]}
    else:
        assert kinds(handle) == []


async def test_a_safe_message_has_no_secrets_urls_or_paths(worker: Chain) -> None:
    result = await worker.result("fail", {"how": "secrets"})
    assert result.error_type == "validation"
    for part in ("hunter2", "store.internal", "://", "supersecretvalue", "/srv/", "hf_abc"):
        assert part not in result.safe_message
    assert result.safe_message.startswith("GET <url> failed")
    assert "/srv/tenant/models/x.bin" in result.error_message


async def test_a_safe_message_has_500_characters_at_most(worker: Chain) -> None:
    result = await worker.result("fail", {"how": "long"})
    assert 400 < len(result.safe_message) <= 500
    assert result.safe_message.startswith("very very")


async def test_a_safe_message_is_never_empty(worker: Chain) -> None:
    assert (await worker.result("fail", {"how": "empty"})).safe_message == "invalid request"
    assert (await worker.result("fail", {"how": "unicode"})).error_type == "validation"


@pytest.mark.parametrize(("how", "named"), [("dict", "dict"), ("none", "NoneType"), ("other", "Echo")])
async def test_an_output_of_the_wrong_type_names_both(worker: Chain, how: str, named: str) -> None:
    result = await worker.result("wrong_output", {"how": how})
    assert (result.error_type, result.retryable) == ("fatal", False)
    assert f"wrong_output returned a {named}, its annotation says Answer" in result.error_message


async def test_an_output_that_can_not_be_encoded_fails_its_run_alone(worker: Chain) -> None:
    result = await worker.result("wrong_output", {"how": "surrogate"})
    assert (result.error_type, result.retryable) == ("fatal", False)
    assert "wrong_output returned a Answer that can't be encoded" in result.error_message


async def test_a_delta_of_the_wrong_type_ends_the_stream(worker: Chain) -> None:
    handle = await worker.run("wrong_delta", {})
    result = await handle.result()
    assert result.error_type == "fatal"
    assert "wrong_delta yielded a dict, its annotation says Delta" in result.error_message
    assert kinds(handle) == ["output.delta", "output.error"]


async def test_what_is_no_iterator_fails(worker: Chain) -> None:
    assert (await worker.result("not_an_iterator", {})).error_type in ("fatal", "internal")


# -- requests that can't be served ----------------------------------------------------------------


async def test_an_unknown_function_is_invalid(worker: Chain) -> None:
    result = await worker.result("no_such_function", {})
    assert error(result) == ("validation", False, "unknown function")
    assert "no_such_function" in result.error_message
    assert "aecho" in result.error_message  # what there is


@pytest.mark.parametrize(
    ("function", "payload", "words"),
    [
        ("echo", b"\xc1", "echo"),  # a byte that MessagePack never uses
        ("echo", b"", "echo"),
        ("echo", b"\x80\x80", "echo"),  # something after the map
        ("echo", b"\x81\xa4text", "echo"),  # cut off
        ("echo", msgspec.msgpack.encode([1, 2]), "Expected `object`, got `array`"),
        ("count", {}, "`count`"),
        ("count", {"count": "three"}, "`$.count`"),
        ("echo", {"text": 3}, "`$.text`"),
        ("echo", {"text": None}, "`$.text`"),
        ("aecho", {"data": 1}, "`$.data`"),
        ("acount", b"\x81\xa5count\xc0", "`$.count`"),
    ],
)
async def test_a_payload_that_does_not_fit_is_invalid_and_says_where(
    worker: Chain, function: str, payload: Any, words: str
) -> None:
    handle = await worker.run(function, payload)
    result = await handle.result()
    assert (result.error_type, result.retryable) == ("validation", False)
    assert words in result.safe_message
    if function in {"count", "acount"}:
        (event,) = handle.events
        assert (event.type, event.payload["error_type"]) == ("output.error", "validation")


async def test_an_empty_run_id_is_invalid(worker: Chain) -> None:
    request = pb.TaskExecutionRequest(run_id="", function_name="echo", input_payload=b"\x80")
    await worker.orchestrator.send(None, pb.WorkerSchedulerMessage(run_request=request))
    result = await worker.stray_result("")
    assert error(result) == ("validation", False, "run_id is empty")


async def test_a_second_run_of_an_active_run_id_is_ignored_and_logged(worker: Chain) -> None:
    first = await worker.started("wait", {}, run_id="twice")
    second = await worker.run("echo", {"text": "never"}, run_id="twice")
    assert second is first
    await worker.worker.wait_for_log("twice", "active already", "ignored")
    await worker.call("echo")
    assert first.results == []
    await first.cancel()
    assert (await first.result()).error_type == "canceled"
    await worker.call("echo")
    assert len(first.results) == 1
    assert kinds(first) == ["started"]


async def test_a_run_id_can_be_used_again_after_the_end(worker: Chain) -> None:
    first = await worker.run("echo", {"text": "one"}, run_id="again")
    assert (await first.output())["text"] == "one"
    worker.orchestrator.forget(first)
    second = await worker.run("echo", {"text": "two"}, run_id="again")
    assert (await second.output())["text"] == "two"


async def test_odd_run_ids_are_only_names(worker: Chain) -> None:
    for run_id in ("../../etc/passwd", "ünïcödé 👋", "x" * 5000, "new\nline"):
        assert (await worker.call("circumstances", {}, run_id=run_id))["run_id"] == run_id


# -- messages that make no sense ------------------------------------------------------------------

UNKNOWN_ONEOF = b"\xa2\x06\x02\x0a\x00"
"""Field 100 of WorkerSchedulerMessage, which there is none."""


@pytest.mark.parametrize(
    "data",
    [
        b"",
        UNKNOWN_ONEOF,
        b"\xff" * 16,
        b"\x52\xff\xff\xff\xff\x0f",  # a run_request that says it is 4 GiB
        b"\x52\x05\x0a\x03\xff\xfe\xfd",  # a run_id that is not UTF-8
        pb.WorkerSchedulerMessage(run_result=pb.TaskExecutionResult(run_id="echo")).SerializeToString(),
        pb.WorkerSchedulerMessage(worker_registration=pb.WorkerRegistration()).SerializeToString(),
        os.urandom(4096),
    ],
    ids=[
        "empty", "unknown oneof", "garbage", "a length beyond the end", "not UTF-8", "a result", "a registration",
        "noise",
    ],
)  # fmt: skip
async def test_a_message_without_sense_is_logged_and_harms_nothing(worker: Chain, data: bytes) -> None:
    running = await worker.started("wait", {})
    before = len(worker.worker.lines("WARNING", "inbound"))
    await worker.send_bytes(data)
    assert await worker.call("echo", {"text": "after"}) == {"text": "after", "data": b""}
    await eventually(lambda: len(worker.worker.lines("WARNING", "inbound")) == before + 1)
    assert running.results == []
    await running.cancel()
    assert (await running.result()).error_type == "canceled"


async def test_a_known_message_with_unknown_fields_is_understood(worker: Chain) -> None:
    request = pb.TaskExecutionRequest(run_id="newer", function_name="echo", input_payload=b"\x80")
    body = request.SerializeToString() + UNKNOWN_ONEOF
    await worker.send_bytes(b"\x52" + bytes([len(body)]) + body)
    assert (await worker.stray_result("newer")).success


async def test_a_cancel_of_an_unknown_run_is_ignored_and_logged(worker: Chain) -> None:
    command = pb.InterruptTaskCommand(run_id="nobody")
    await worker.orchestrator.send(None, pb.WorkerSchedulerMessage(interrupt_run_cmd=command))
    await worker.worker.wait_for_log("nobody", "not active")
    assert (await worker.call("echo", {"text": "after"}))["text"] == "after"
    assert not worker.orchestrator.stray_results


async def test_a_realtime_session_of_no_such_handler_is_closed(worker: Chain) -> None:
    session = await worker.orchestrator.open_realtime("no_such_handler")
    assert await session.wait_closed() == "unknown_function"
