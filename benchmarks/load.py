"""The load: a scheduler that does nothing but keep a window of runs full, and takes the time.

It parses no more of a message than it must, so that what is measured is the worker. The same code drives the floor and
the worker, over the same loopback, one after the other.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import msgspec

from gen_worker.wire import METHOD, SERVICE, TRANSPORT_LIMIT_BYTES
from gen_worker.wire import worker_scheduler_pb2 as pb

OPTIONS = [
    ("grpc.max_send_message_length", TRANSPORT_LIMIT_BYTES),
    ("grpc.max_receive_message_length", TRANSPORT_LIMIT_BYTES),
    ("grpc.so_reuseport", 0),
]


@dataclass
class Outcome:
    """What one measurement saw. Seconds throughout."""

    runs: int = 0
    elapsed: float = 0.0
    latencies: list[float] = field(default_factory=list)
    events: int = 0
    first_event: float = 0.0

    def percentile(self, share: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


class LoadScheduler:
    """Takes one worker and drives it."""

    def __init__(self) -> None:
        self._server = grpc.aio.server(options=OPTIONS)
        self._context: Any = None
        self._connected = asyncio.Event()
        self._release = asyncio.Event()
        self._numbers = iter(range(1, 1 << 62))
        self.port = 0

    async def start(self) -> None:
        handler = grpc.stream_stream_rpc_method_handler(self._serve)
        service = grpc.method_handlers_generic_handler(SERVICE, {METHOD.rpartition("/")[2]: handler})
        self._server.add_generic_rpc_handlers((service,))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        await self._server.start()

    async def stop(self) -> None:
        self._release.set()
        await self._server.stop(1.0)

    async def connected(self, timeout_s: float) -> None:
        await asyncio.wait_for(self._connected.wait(), timeout_s)

    async def _serve(self, _requests: object, context: Any) -> None:
        message = pb.WorkerSchedulerMessage.FromString(await context.read())
        if not message.worker_registration.resources.available_functions:
            raise RuntimeError("the worker registered without functions")
        self._context = context
        self._connected.set()
        await self._release.wait()

    async def drive(self, function: str, payload: msgspec.Struct, *, runs: int, window: int) -> Outcome:
        """`runs` runs with `window` of them under way; raises when one fails."""
        packed = msgspec.msgpack.encode(payload)
        outcome, begin = Outcome(), time.perf_counter()
        started: dict[str, float] = {}
        for _ in range(min(window, runs)):
            await self._send(function, packed, started)
        sent = min(window, runs)
        while outcome.runs < runs:
            message = pb.WorkerSchedulerMessage.FromString(await self._context.read())
            now = time.perf_counter()
            if message.HasField("worker_event"):
                if message.worker_event.event_type == "output.delta":
                    outcome.events += 1
                    outcome.first_event = outcome.first_event or now - begin
            elif message.HasField("run_result"):
                if not message.run_result.success:
                    raise RuntimeError(f"a run failed: {message.run_result.error_message}")
                outcome.latencies.append(now - started.pop(message.run_result.run_id))
                outcome.runs += 1
                if sent < runs:
                    await self._send(function, packed, started)
                    sent += 1
        outcome.elapsed = time.perf_counter() - begin
        return outcome

    async def _send(self, function: str, packed: bytes, started: dict[str, float]) -> None:
        run_id = f"run-{next(self._numbers)}"
        request = pb.TaskExecutionRequest(run_id=run_id, function_name=function, input_payload=packed)
        started[run_id] = time.perf_counter()
        await self._context.write(pb.WorkerSchedulerMessage(run_request=request).SerializeToString())


@asynccontextmanager
async def subject(command: list[str], env: dict[str, str], cwd: str) -> AsyncIterator[tuple[LoadScheduler, int]]:
    """A worker under load: the scheduler it dialed and its process id. `{address}` in command and env is filled in."""
    scheduler = LoadScheduler()
    await scheduler.start()
    address = f"127.0.0.1:{scheduler.port}"
    process = await asyncio.create_subprocess_exec(
        *(part.format(address=address) for part in command),
        env={name: value.replace("{address}", address) for name, value in env.items()},
        cwd=cwd,
    )
    try:
        await scheduler.connected(30.0)
        yield scheduler, process.pid
    finally:
        process.terminate()
        await process.wait()
        await scheduler.stop()
