"""The load: a scheduler that does nothing but keep a window of runs full, and takes the time.

It speaks the same wire through `h2` and uvloop, many messages in one write, since a server on grpcio takes fewer
messages a second than what is measured here can send. It parses no more of a message than it must. The same code drives
the floor and every worker, over the same loopback, one after the other.
"""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Final, Protocol, cast

import msgspec
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, RequestReceived, StreamEnded, StreamReset
from h2.settings import SettingCodes, Settings

from gen_worker.wire import TRANSPORT_LIMIT_BYTES
from gen_worker.wire import worker_scheduler_pb2 as pb
from supervisor.transport.h2.inbox import Inbox
from supervisor.transport.messages import prefix

WINDOW_BYTES: Final = 8 * 1024 * 1024
FRAME_BYTES: Final = 1024 * 1024
START_S: Final = 30.0


@dataclass
class Outcome:
    """What one measurement saw. Seconds throughout."""

    runs: int = 0
    elapsed: float = 0.0
    latencies: list[float] = field(default_factory=list)
    events: int = 0
    first_events: list[float] = field(default_factory=list)
    """From a run's request to its first delta."""

    def percentile(self, share: float) -> float:
        return percentile(self.latencies, share)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def keep_memory() -> None:
    """Have glibc keep what it was given: page faults of fresh 64 MiB would be half of what such a run takes here."""
    libc, trim_threshold, mmap_max = ctypes.CDLL(None), -1, -4  # mallopt(3)
    libc.mallopt(mmap_max, 0)
    libc.mallopt(trim_threshold, 2**30)


class RunFailed(Exception):
    """A worker answered a run with a failure."""


class Channel(Protocol):
    """One worker's stream, as the load sees it."""

    def send(self, message: bytes) -> None:
        """Queue one; `flush` sends what is queued."""

    def flush(self) -> None: ...
    def close(self) -> None: ...


class Wire(asyncio.Protocol):
    """The server's side of one worker's connection."""

    def __init__(self, scheduler: LoadScheduler) -> None:
        self._scheduler = scheduler
        self._http = H2Connection(
            H2Configuration(client_side=False, header_encoding=None, validate_inbound_headers=False)
        )
        self._http.local_settings = Settings(
            client=False,
            initial_values={SettingCodes.INITIAL_WINDOW_SIZE: WINDOW_BYTES, SettingCodes.MAX_FRAME_SIZE: FRAME_BYTES},
        )
        self._http.max_inbound_frame_size = FRAME_BYTES
        self._inbox = Inbox(TRANSPORT_LIMIT_BYTES * 2)
        self._stream = 0
        self._waiting: deque[memoryview] = deque()
        self._writable = True

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._http.initiate_connection()
        self._http.increment_flow_control_window(WINDOW_BYTES)
        self._transport.write(self._http.data_to_send())

    def data_received(self, data: bytes) -> None:
        for event in self._http.receive_data(data):
            if isinstance(event, DataReceived):
                self._inbox.feed(bytes(event.data))
                self._http.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                while messages := self._inbox.take():
                    self._scheduler.on_messages(self, cast("list[bytes]", messages))  # it has no arena
            elif isinstance(event, RequestReceived):
                self._stream = event.stream_id
                answer = [(":status", "200"), ("content-type", "application/grpc")]
                self._http.send_headers(self._stream, answer)
            elif isinstance(event, StreamEnded | StreamReset):
                self._stream = 0
        self.flush()

    def send(self, message: bytes) -> None:
        """Queue one; `flush` sends what is queued."""
        self._waiting += (memoryview(prefix(message)), memoryview(message))

    def flush(self) -> None:
        waiting = self._waiting
        if len(waiting) > 1 and sum(map(len, waiting)) < FRAME_BYTES:
            small = b"".join(waiting)
            waiting.clear()
            waiting.append(memoryview(small))
        while waiting and self._writable and self._stream:
            room = min(self._http.local_flow_control_window(self._stream), self._http.max_outbound_frame_size)
            if room <= 0:
                break
            part, rest = waiting[0][:room], waiting[0][room:]
            self._http.send_data(self._stream, part)
            if rest:
                waiting[0] = rest
            else:
                waiting.popleft()
            if len(part) > 8192:
                self._transport.write(self._http.data_to_send())
        if data := self._http.data_to_send():
            self._transport.write(data)

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self.flush()

    def connection_lost(self, exc: Exception | None) -> None:
        self._scheduler.on_lost(self, exc)

    def close(self) -> None:
        self._transport.close()


class LoadScheduler:
    """Takes one worker and drives it."""

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None
        self._wire: Channel | None = None
        self._registered = asyncio.Event()
        self._numbers = iter(range(1, 1 << 62))
        self._outcome = Outcome()
        self._started: dict[str, float] = {}
        self._unheard: set[str] = set()
        self._left = 0
        self._function, self._payload = "", b""
        self._done: asyncio.Future[None] | None = None
        self.resources = pb.WorkerResources()
        self.executors = 0
        self.registered_at = 0.0
        self.port = 0

    async def start(self) -> None:
        self._server = await asyncio.get_running_loop().create_server(lambda: Wire(self), "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._wire is not None:
            self._wire.close()
        if self._server is not None:
            self._server.close()

    async def registered(self, timeout_s: float = START_S) -> None:
        """Wait until a worker has registered on a stream."""
        async with asyncio.timeout(timeout_s):
            await self._registered.wait()

    def on_lost(self, wire: Channel, exc: Exception | None) -> None:
        if self._wire is wire:
            self._wire = None
            self._registered.clear()
            if self._done is not None and not self._done.done():
                self._done.set_exception(RuntimeError(f"the worker left in the midst of a measurement: {exc}"))

    def on_messages(self, wire: Channel, messages: Sequence[bytes]) -> None:
        now = time.perf_counter()
        for data in messages:
            message = pb.WorkerSchedulerMessage.FromString(data)
            kind = message.WhichOneof("msg")
            if kind == "run_result":
                self._on_result(message.run_result, now)
            elif kind == "worker_event":
                self._on_event(message.worker_event, now)
            elif kind == "worker_registration":
                self._wire = wire
                self.resources = message.worker_registration.resources
                if not self._registered.is_set():
                    self.registered_at = time.monotonic()
                    self._registered.set()

    def _on_event(self, event: pb.WorkerEvent, now: float) -> None:
        if event.event_type == "output.delta":
            self._outcome.events += 1
            if event.run_id in self._unheard:
                self._unheard.discard(event.run_id)
                self._outcome.first_events.append(now - self._started[event.run_id])

    def _on_result(self, result: pb.TaskExecutionResult, now: float) -> None:
        if self._done is None or self._done.done():
            return
        if not result.success:
            self._done.set_exception(RunFailed(result.error_message))
            return
        self._outcome.latencies.append(now - self._started.pop(result.run_id))
        self._outcome.runs += 1
        if self._left:
            self._send_one(now)
        elif not self._started:
            self._done.set_result(None)

    def _send_one(self, now: float) -> None:
        assert self._wire is not None
        self._left -= 1
        run_id = f"run-{next(self._numbers)}"
        request = pb.TaskExecutionRequest(run_id=run_id, function_name=self._function, input_payload=self._payload)
        self._started[run_id] = now
        self._unheard.add(run_id)
        self._wire.send(pb.WorkerSchedulerMessage(run_request=request).SerializeToString())

    async def drive(self, function: str, payload: msgspec.Struct, *, runs: int, window: int) -> Outcome:
        """`runs` runs with `window` of them under way; raises when one fails."""
        assert self._wire is not None
        self._function, self._payload = function, msgspec.msgpack.encode(payload)
        self._outcome, self._left = Outcome(), runs
        self._started.clear()
        self._unheard.clear()
        self._done = asyncio.get_running_loop().create_future()
        begin = time.perf_counter()
        for _ in range(min(window, runs)):
            self._send_one(time.perf_counter())
        self._wire.flush()
        await self._done
        self._outcome.elapsed = time.perf_counter() - begin
        return self._outcome


@dataclass(frozen=True)
class Subject:
    """What is driven: its scheduler and its top process."""

    name: str
    scheduler: LoadScheduler
    process: asyncio.subprocess.Process


@asynccontextmanager
async def subject(
    name: str, command: Sequence[str], env: dict[str, str], cwd: str, scheduler: LoadScheduler | None = None
) -> AsyncIterator[Subject]:
    """A floor or a worker under load, registered. `{address}` in command and env is filled in."""
    scheduler = scheduler or LoadScheduler()
    await scheduler.start()
    address = f"127.0.0.1:{scheduler.port}"
    process = await asyncio.create_subprocess_exec(
        *(part.replace("{address}", address) for part in command),
        env={key: value.replace("{address}", address) for key, value in env.items()},
        cwd=cwd,
    )
    try:
        await scheduler.registered()
        yield Subject(name, scheduler, process)
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        await process.wait()
        await scheduler.stop()
