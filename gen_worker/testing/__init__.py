"""Testing tenant functions: run one here, with no scheduler and no processes.

`run_function` and its relatives live in harness.py, `open_socket` in socket_harness.py; mock_orchestrator is the
scheduler's end of the protocol, and is not imported here.
"""

from gen_worker.testing.harness import (
    Outcome,
    RecordedEvent,
    RunFailedError,
    SocketOutcome,
    run_function,
    run_function_async,
    run_websocket,
)
from gen_worker.testing.socket_harness import SocketClient, SocketClosedError, open_socket

__all__ = [
    "Outcome",
    "RecordedEvent",
    "RunFailedError",
    "SocketClient",
    "SocketClosedError",
    "SocketOutcome",
    "open_socket",
    "run_function",
    "run_function_async",
    "run_websocket",
]
