"""A pool of real executors, without a dispatcher."""

from __future__ import annotations

import os
import signal
from typing import Any

from gen_worker.pipe.messages import (
    PIPE_PROTOCOL,
    Deltas,
    Event,
    FetchFile,
    Init,
    ModelLoaded,
    ModelUnloaded,
    Result,
    SocketClose,
    SocketCredit,
    SocketFrame,
    StoreFile,
)
from supervisor.child import ExitCause
from supervisor.devices import Device
from supervisor.executor_handle import ExecutorHandle
from supervisor.held_output import HeldOutput
from supervisor.pool import Pool
from tests.support.worker_process import TENANTS


class Listener:
    """Kills each executor as soon as it is ready, while `killing`."""

    def __init__(self) -> None:
        self.causes: list[str] = []
        self.killing = False

    def executor_ready(self, handle: ExecutorHandle) -> None:
        if self.killing:
            os.kill(handle.pid, signal.SIGKILL)

    def executor_died(self, handle: ExecutorHandle, cause: ExitCause) -> None:
        self.causes.append(str(cause))

    def executor_writable(self, handle: ExecutorHandle) -> None: ...
    def executor_draining(self, handle: ExecutorHandle) -> None: ...
    def run_event(self, handle: ExecutorHandle, event: Event | Deltas) -> None: ...
    def run_file(self, handle: ExecutorHandle, request: FetchFile | StoreFile) -> None: ...
    def run_result(self, handle: ExecutorHandle, result: Result, output: bytes | HeldOutput) -> None: ...
    def socket_frame(self, handle: ExecutorHandle, frame: SocketFrame, data: bytes) -> None: ...
    def socket_close(self, handle: ExecutorHandle, close: SocketClose) -> None: ...
    def socket_credit(self, handle: ExecutorHandle, credit: SocketCredit) -> None: ...
    def model_loaded(self, handle: ExecutorHandle, loaded: ModelLoaded) -> None: ...
    def model_unloaded(self, handle: ExecutorHandle, unloaded: ModelUnloaded) -> None: ...


def executor_pool(listener: Listener, slots: int, **options: Any) -> Pool:
    """`options` are the Pool's."""

    def on_all_closed() -> None:
        raise AssertionError("a slot was closed though its executors were ready")

    modules, root = ("isolation_functions",), str(TENANTS / "isolation")
    return Pool(
        [Device("", "", 0, "", "cpu", "")] * slots,
        init=lambda slot, _: Init(PIPE_PROTOCOL, slot, "cpu", modules, root, "/tmp", 1, 1.0, 0, 0, 0, {}),
        env=lambda _: {"PATH": os.environ["PATH"]},
        threads=1,
        events=listener,
        on_all_closed=on_all_closed,
        **options,
    )
