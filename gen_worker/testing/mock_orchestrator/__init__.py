"""A real scheduler end of the protocol for development, tests and load.

    async with MockOrchestrator() as orchestrator:
        ...  # start a worker that dials orchestrator.address
        await orchestrator.wait_for_worker()
        handle = await orchestrator.run("greet", {"name": "Ada"})
        print(await handle.output())

As a program: `python -m gen_worker.testing.mock_orchestrator --help`. `FileStoreServer` is the file store that goes
with it. Importing this package imports grpc, which nothing that tenants import does.
"""

from __future__ import annotations

from .bridge import RealtimeBridge
from .connection import EndedBy, Received, Registration, StreamEnd, WorkerConnection
from .errors import (
    ListenError,
    MockOrchestratorError,
    NoResultError,
    NoWorkerError,
    RunFailedError,
    StreamEndedError,
    UsageError,
    WaitTimeoutError,
)
from .files import FileRequest, FileStoreServer
from .policies import (
    OnConnect,
    accept,
    drop_at_once,
    end_at_once,
    in_turn,
    redirect,
    refuse_auth,
    send_garbage,
    stay_silent,
)
from .realtime import RealtimeSession
from .runs import RunEvent, RunHandle, RunResult, decode_output
from .server import MockOrchestrator

__all__ = [
    "EndedBy",
    "FileRequest",
    "FileStoreServer",
    "ListenError",
    "MockOrchestrator",
    "MockOrchestratorError",
    "NoResultError",
    "NoWorkerError",
    "OnConnect",
    "RealtimeBridge",
    "RealtimeSession",
    "Received",
    "Registration",
    "RunEvent",
    "RunFailedError",
    "RunHandle",
    "RunResult",
    "StreamEnd",
    "StreamEndedError",
    "UsageError",
    "WaitTimeoutError",
    "WorkerConnection",
    "accept",
    "decode_output",
    "drop_at_once",
    "end_at_once",
    "in_turn",
    "redirect",
    "refuse_auth",
    "send_garbage",
    "stay_silent",
]
