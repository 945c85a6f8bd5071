"""Payloads of many MiB both ways: they come whole, whatever ends in the midst of one."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import msgspec
import psutil
import pytest
import pytest_asyncio

from gen_worker.wire import worker_scheduler_pb2 as pb
from supervisor.executor_handle import UNREAD_BYTES
from supervisor.wire_codec import varint
from tests.support.worker_process import Chain, all_of, chain, eventually, freeze

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.both_transports]

MIB = 2**20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(worker_transport: str) -> AsyncIterator[Chain]:
    async with chain(executors=2, env={"WORKER_MAX_INPUT_BYTES": "80 MiB", "RECONNECT_DELAY": "0.1"}) as found:
        yield found


@pytest.mark.parametrize("size", [MIB, 5 * MIB, 16 * MIB, 64 * MIB])
async def test_it_comes_whole_both_ways(worker: Chain, size: int) -> None:
    data = os.urandom(MIB) * (size // MIB) + b"the end"
    assert (await worker.call("echo", {"data": data}))["data"] == data


async def test_many_at_once_over_two_executors(worker: Chain) -> None:
    payloads = [os.urandom(MIB) * 3 + bytes([number]) for number in range(8)]
    outputs = await all_of(*(worker.call("echo", {"data": data}) for data in payloads))
    assert [output["data"] == data for output, data in zip(outputs, payloads, strict=True)] == [True] * 8


async def test_an_executor_that_reads_nothing_is_given_little(worker: Chain) -> None:
    """What it has not read would only wait in it; the other one serves that."""
    stuck = worker.worker.executors()[0].pid
    await freeze(stuck)
    try:
        handles = [await worker.run("echo", {"data": bytes(MIB)}) for _ in range(40)]
        await eventually(lambda: sum(handle.done for handle in handles) >= 40 - UNREAD_BYTES // MIB)
        assert not all(handle.done for handle in handles)
    finally:
        os.kill(stuck, signal.SIGCONT)
    assert {len((await handle.output())["data"]) for handle in handles} == {MIB}


async def test_one_over_the_limit_is_refused(worker: Chain) -> None:
    result = await worker.result("digest", {"data": bytes(80 * MIB)})
    assert (result.error_type, result.safe_message) == ("validation", "input too large")
    assert f"WORKER_MAX_INPUT_BYTES={80 * MIB}" in result.error_message


async def test_fields_around_the_payload_in_any_order(worker: Chain) -> None:
    """As no serializer writes it: the payload before the fields, and twice; the last one counts."""
    payload = msgspec.msgpack.encode({"data": bytes(3 * MIB)})
    first = pb.TaskExecutionRequest(input_payload=bytes(2 * MIB)).SerializeToString()
    fields = pb.TaskExecutionRequest(run_id="in-order", function_name="digest", timeout_ms=60_000).SerializeToString()
    last = pb.TaskExecutionRequest(input_payload=payload).SerializeToString()
    for body in (last + fields, first + last + fields, first + fields + last):
        await worker.send_bytes(b"\x52" + varint(len(body)) + body)
        result = await worker.stray_result("in-order")
        assert msgspec.msgpack.decode(result.output_payload)["number"] == 3 * MIB


async def test_a_stream_that_breaks_amid_requests_costs_nothing(worker: Chain) -> None:
    executors = [child.pid for child in worker.worker.executors()]
    for _ in range(3):
        sending = asyncio.gather(
            *(worker.run("echo", {"data": bytes(32 * MIB)}) for _ in range(2)), return_exceptions=True
        )
        await asyncio.sleep(0.02)  # somewhere amid them
        streams = worker.orchestrator.stream_count
        worker.connection.drop()
        await sending
        await eventually(lambda before=streams: worker.orchestrator.stream_count > before)  # type: ignore[misc]
        await worker.orchestrator.wait_for_worker()
        data = os.urandom(MIB) * 5
        assert (await worker.call("echo", {"data": data}))["data"] == data
    assert [child.pid for child in worker.worker.executors()] == executors


async def test_a_result_that_was_lost_comes_again_though_its_executor_is_dead(worker: Chain) -> None:
    data = os.urandom(MIB) * 5
    first = worker.connection
    first.pause_reading()
    handle = await worker.run("echo", {"data": data})
    await eventually(lambda: sum(child.cpu_times().user for child in worker.worker.executors()) > 0)
    await asyncio.sleep(0.5)  # it lies between the two by now, as far as the windows let it
    assert not handle.done
    for child in worker.worker.executors():
        child.kill()
    first.drop()
    result = await handle.result(30)
    assert result.success
    assert msgspec.msgpack.decode(result.output_payload)["data"] == data


async def test_the_supervisor_does_not_keep_what_passed_through(worker: Chain, worker_transport: str) -> None:
    """What grpc keeps of a message is its affair."""
    for _ in range(3):
        await worker.call("digest", {"data": bytes(64 * MIB)})
    resident = psutil.Process(worker.worker.pid).memory_info().rss
    assert resident < (80 if worker_transport == "h2" else 300) * MIB
