"""Testing tenant functions: run one here, with no scheduler and no processes.

`run_function` and its relatives live in harness.py; mock_orchestrator is the scheduler's end of the protocol, and is
not imported here.
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

__all__ = [
    "Outcome",
    "RecordedEvent",
    "RunFailedError",
    "SocketOutcome",
    "run_function",
    "run_function_async",
    "run_websocket",
]
