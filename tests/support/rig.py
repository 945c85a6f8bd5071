"""The real dispatcher, residency and executor handles, with a child that only records what it is sent."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gen_worker.pipe.arena import ArenaReader, ArenaWriter, create_arena
from gen_worker.pipe.frames import encode_frame
from gen_worker.pipe.messages import (
    PIPE_PROTOCOL,
    Downward,
    FunctionInfo,
    FunctionMode,
    InjectionInfo,
    LoadModel,
    ModelLoaded,
    ModelUnloaded,
    Ready,
    Result,
    UnloadModel,
    Upward,
    decode_downward,
    encode,
)
from gen_worker.pipe.messages import Run as RunMessage
from gen_worker.wire import worker_scheduler_pb2 as pb
from supervisor import executor_handle
from supervisor.child import ExitCause
from supervisor.device_meter import MemoryLimits
from supervisor.devices import Device, DeviceMemory
from supervisor.dispatcher import Dispatcher, FileService, Limits
from supervisor.executor_handle import ExecutorHandle, HandleState
from supervisor.input_arena import InputArena
from supervisor.model_names import ModelNames
from supervisor.model_sizes import ModelSizes
from supervisor.model_source import FetchProgress, LocalModel
from supervisor.observer import Observer
from supervisor.residency import Residency
from supervisor.transfers.messages import ReplyT, RequestBody
from supervisor.transport.messages import apart, count_of, in_one_piece


@dataclass
class Shelf:
    """A ModelSource without a disk: the models and the sizes of their weights that the test gives it."""

    models: dict[str, int]
    cold: set[str] = field(default_factory=set)
    """Of `models`, those that have to be fetched."""
    fetches: list[str] = field(default_factory=list)
    prefetched: list[str] = field(default_factory=list)
    """What the last prefetch named."""
    holds: Counter[str] = field(default_factory=Counter)
    under_way: dict[str, FetchProgress] = field(default_factory=dict)

    def knows(self, model_id: str) -> bool:
        return model_id in self.models

    def local(self, model_id: str) -> LocalModel | None:
        if model_id not in self.models or model_id in self.cold:
            return None
        return LocalModel(f"/models/{model_id}", {}, {}, self.models[model_id])

    def fetch(self, model_id: str) -> None:
        self.fetches.append(model_id)

    def prefetch(self, model_ids: Iterable[str]) -> None:
        self.prefetched = list(model_ids)

    def on_disk(self) -> Collection[str]:
        return self.models.keys() - self.cold

    def fetching(self) -> Mapping[str, FetchProgress]:
        return self.under_way

    def hold(self, model_id: str) -> None:
        self.holds[model_id] += 1

    def release(self, model_id: str) -> None:
        self.holds[model_id] -= 1
        assert self.holds[model_id] >= 0


class Gauge:
    """A DeviceProbe whose figures the test sets: what executors hold, and what others use beside them."""

    driver_version = "gauge"

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.others: Counter[str] = Counter()

    @property
    def devices(self) -> Sequence[Device]:
        return [executor.handle.device for executor in self._rig.executors]

    def utilization(self, device: Device) -> float | None:
        return None

    def memory(self, device: Device) -> DeviceMemory:
        held = sum(each.held for each in self._rig.executors if each.handle.device == device and each.is_alive)
        used = held + self.others[device.uuid]
        return DeviceMemory(used, device.memory_bytes - used)


class RecordingChild:
    """Stands for supervisor.child.Child: keeps what is sent, lives until it is told to die."""

    def __init__(
        self,
        *,
        on_frame: Callable[[bytes], None],
        on_line: Callable[[str, str], None],
        on_writable: Callable[[], None],
        on_exit: Callable[[ExitCause], None],
        inputs: InputArena | None = None,
    ) -> None:
        self.on_frame = on_frame
        self.on_line = on_line
        self.on_writable = on_writable
        self.on_exit = on_exit
        self.writable = True
        self.sent: list[Downward] = []
        self.killed: list[str] = []
        self.last_lines: deque[str] = deque(["line 1", "line 2"])
        self.pid = 4711
        self.arena_down = ArenaWriter(create_arena("down")) if inputs is None else inputs.writer
        self.arena_up = ArenaReader(create_arena("up"))

    def hand_over(
        self,
        *,
        on_frame: Callable[[bytes], None],
        on_line: Callable[[str, str], None],
        on_writable: Callable[[], None],
        on_exit: Callable[[ExitCause], None],
    ) -> None:
        self.on_frame, self.on_line, self.on_writable, self.on_exit = on_frame, on_line, on_writable, on_exit

    async def spawn(self, *command: object) -> None:
        raise AssertionError("no process in these tests")

    def send(self, body: bytes) -> None:
        encode_frame(body)  # refuses what is over the cap
        self.sent.append(decode_downward(body))

    def kill(self, reason: str) -> None:
        self.killed.append(reason)

    def close(self) -> None:
        self.arena_down.close()
        self.arena_up.close()


class Executor:
    """One handle and its child, driven by the test."""

    def __init__(self, rig: Rig, slot: int, threads: int, memory: int = 2**30) -> None:
        device = Device(f"GPU-{slot}", "GPU", memory, "90", "cuda:0", f"GPU-{slot}")
        self._rig = rig
        self.held = 0
        """Bytes that its device shows as used by it."""
        self.handle = ExecutorHandle(slot, 0, device, threads, rig.dispatcher)
        child: Any = self.handle._child
        assert isinstance(child, RecordingChild)
        self.child = child

    def say(self, message: Upward) -> None:
        self.child.on_frame(encode(message))

    def die(self, returncode: int = -9, reason: str = "") -> None:
        self.child.on_exit(ExitCause(returncode, reason))

    def sent(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.child.sent if isinstance(message, kind)]

    @property
    def runs(self) -> list[str]:
        """The run_ids that it was sent, in order."""
        return [message.run_id for message in self.sent(RunMessage)]

    def key_of(self, run_id: str) -> int:
        return next(int(message.key) for message in reversed(self.sent(RunMessage)) if message.run_id == run_id)

    def succeed(self, run_id: str, output: bytes = b"\x80") -> None:
        self.say(Result(self.key_of(run_id), output))

    def load_done(self, model_id: str, type_name: str = "t.T", device_bytes: int = 1000) -> None:
        self.held += device_bytes
        self.say(ModelLoaded(model_id, type_name, device_bytes, 0.1))

    def unload_done(self, model_id: str, device_bytes: int = 1000, *, host_bytes: int = 0) -> None:
        self.held -= device_bytes
        self.say(ModelUnloaded(model_id, device_bytes, None, host_bytes))

    @property
    def loads(self) -> list[str]:
        """The models that it was told to load, in order."""
        return [message.model_id for message in self.sent(LoadModel)]

    @property
    def unloads(self) -> list[str]:
        return [message.model_id for message in self.sent(UnloadModel)]

    @property
    def order(self) -> tuple[str, str] | None:
        """What it does for its models now: (model, type) of a load, (model, "") of an unload."""
        models = self._rig.residency._executors.get(self.handle)
        return None if models is None or models._order is None else models._order.key

    @property
    def is_alive(self) -> bool:
        return self.handle.state is not HandleState.DEAD


class RecordingTransfers:
    """Stands for the transfer process: keeps what is asked, answers when it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[RequestBody, asyncio.Future[Any]]] = []

    async def call(self, request: RequestBody, reply: type[ReplyT]) -> ReplyT:
        answer: asyncio.Future[ReplyT] = asyncio.get_running_loop().create_future()
        self.asked.append((request, answer))
        return await answer


class Rig:
    """A dispatcher with executors that get ready when the test says so."""

    def __init__(
        self,
        functions: Sequence[FunctionInfo],
        *,
        executors: int = 1,
        threads: int = 64,
        limits: Limits | None = None,
        models: Sequence[str] | Mapping[str, int] = (),
        labels: Mapping[str, str] | None = None,
        ready: bool = True,
        observer: Observer | None = None,
        memory: int = 2**30,
        memory_limits: MemoryLimits | None = None,
        sizes: ModelSizes | None = None,
    ) -> None:
        """`models` may say the bytes of each one's weights, `memory` is that of each executor's device."""
        self.functions = tuple(functions)
        self.memory = memory
        self.executors: list[Executor] = []
        self.source = Shelf(dict(models) if isinstance(models, Mapping) else dict.fromkeys(models, 0))
        self.probe = Gauge(self)
        self.residency = Residency(
            ModelNames(labels or {}, self.source),
            self.source,
            limits=memory_limits or MemoryLimits(None, 0.0),
            probe=self.probe,
            sizes=sizes or ModelSizes(None),
        )
        self.changes = 0
        self.transfers = RecordingTransfers()
        self.dispatcher = Dispatcher(
            limits=limits or Limits(0, 1, 5.0, 0),
            residency=self.residency,
            executors=lambda: [each.handle for each in self.executors if each.handle.state is HandleState.READY],
            changed=self._changed,
            observer=observer,
            files=FileService(self.transfers),
        )
        for _ in range(executors):
            self.add_executor(threads=threads, ready=ready)

    def _changed(self) -> None:
        self.changes += 1

    def add_executor(self, *, threads: int = 64, ready: bool = True) -> Executor:
        executor = Executor(self, len(self.executors), threads, self.memory)
        self.executors.append(executor)
        if ready:
            executor.say(Ready(PIPE_PROTOCOL, self.functions, {}))
        return executor

    def submit(self, run_id: str, function: str = "f", payload: bytes = b"\x80", **fields: Any) -> None:
        self.dispatcher.submit(
            pb.TaskExecutionRequest(run_id=run_id, function_name=function, input_payload=payload, **fields)
        )

    def messages(self) -> list[pb.WorkerSchedulerMessage]:
        """All that went to the scheduler since the last call."""
        outbox, found = self.dispatcher.outbox, []
        while outbox.depth:
            step = outbox.take()
            try:
                step.send(None)
            except StopIteration as stop:
                found += [pb.WorkerSchedulerMessage.FromString(in_one_piece(message)) for message in apart(stop.value)]
                outbox.accepted(count_of(stop.value))
            else:
                step.close()
                raise AssertionError("the outbox has messages and gives none")
        return found

    def results(self) -> dict[str, pb.TaskExecutionResult]:
        """Results by run_id since the last call; each run has one."""
        results: dict[str, pb.TaskExecutionResult] = {}
        for message in self.messages():
            if message.WhichOneof("msg") == "run_result":
                assert message.run_result.run_id not in results, "two results for one run"
                results[message.run_result.run_id] = message.run_result
        return results

    def close(self) -> None:
        self.dispatcher.abandon("the test ends")
        for executor in self.executors:
            executor.child.close()


def function(
    name: str = "f", mode: FunctionMode = "sync", *, models: Sequence[str] = (), limit: int = 0, payload_field: str = ""
) -> FunctionInfo:
    """A function that takes the models with these labels, or the one that a payload field names."""
    injections = [InjectionInfo(f"p{index}", "t.T", "deployment", label) for index, label in enumerate(models)]
    if payload_field:
        injections.append(InjectionInfo("chosen", "t.T", "payload", payload_field))
    return FunctionInfo(name, mode, injections=tuple(injections), max_concurrency=limit)


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Wait for what timers or processes bring about."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.001)


def use_recording_children(patch: Callable[[object, str, object], None]) -> None:
    """`patch` is monkeypatch.setattr: handles made from here on start no process."""
    patch(executor_handle, "Child", RecordingChild)
