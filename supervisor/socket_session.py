"""One realtime session, from its open command to its one close.

Owns: its states and the reason of its end. It takes its place on an executor as a run does, so it is a Run for the
lanes, the executor's handle and the limits; its states are

    OPENING -> OPEN -> CLOSING -> CLOSED        (any state -> CLOSED, once)

which are a run's QUEUED or WAITING_MODEL, RUNNING, CANCELING, and its two ends.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, NamedTuple

from gen_worker.pipe.messages import EVENT_OVERHEAD_BYTES, ErrorType, Failure
from supervisor.model_names import Models
from supervisor.runs import SAFE_CRASHED, Run, RunState

if TYPE_CHECKING:
    from gen_worker.wire import worker_scheduler_pb2 as pb

COMPLETED: Final = "completed"
CLOSED: Final = "closed"
UNKNOWN_FUNCTION: Final = "unknown_function"
FRAME_TOO_LARGE: Final = "frame_too_large"
WORKER_CRASHED: Final = "worker_crashed"
TIMEOUT: Final = "timeout"
SLOW_CONSUMER: Final = "slow_consumer"

_ERRORS: Final[dict[ErrorType, str]] = {
    "validation": "ValidationError",
    "retryable": "RetryableError",
    "resource": "ResourceError",
    "canceled": "CanceledError",
    "fatal": "FatalError",
    "auth": "AuthError",
    "internal": "WorkerError",
}


class WaitingFrame(NamedTuple):
    """One frame on its way to a handler."""

    data: bytes
    is_text: bool

    @property
    def weight(self) -> int:
        """What it counts in queues and windows."""
        return len(self.data) + EVENT_OVERHEAD_BYTES


class SocketSession(Run):
    """See the module. Its `run_id` is the session_id, by which its handler's context and events are named too."""

    __slots__ = ("reason", "told", "took_at", "under_way", "waiting", "waiting_bytes", "window")

    def __init__(
        self, key: int, command: pb.RealtimeOpenCommand, function: str, models: Models, arrived: float
    ) -> None:
        timeout_ms = max(0, command.timeout_ms)
        super().__init__(
            key, command.session_id, function, b"", models, timeout_ms, command.tenant_id, command.user_id, arrived
        )
        self.file_base_url, self.file_token = command.file_base_url, command.file_token
        self.reason = ""
        """Why it ends; empty while it does not."""
        self.told = False
        """Whether the scheduler's close is on its way: nothing of the session may follow it."""
        self.waiting: deque[WaitingFrame] = deque()
        """For its executor to have room for them; this and the four below are moved by socket_room.py."""
        self.waiting_bytes = 0
        self.under_way = 0
        """Bytes that its executor has and its handler has not taken."""
        self.took_at = 0.0
        """When its handler took something last, in monotonic seconds."""
        self.window = 0
        """Its executor gets frames while less than this is under way."""

    @property
    def is_opening(self) -> bool:
        return self.state in (RunState.QUEUED, RunState.WAITING_MODEL)

    def begin_close(self, reason: str) -> bool:
        """OPEN -> CLOSING. The first reason stays."""
        if not self.begin_cancel("canceled"):
            return False
        self.reason = reason
        return True


def reason_of(failure: Failure) -> str:
    """What a session closes with that can't be opened: the name of the error in gen_worker.errors of that kind."""
    if failure.safe_message == SAFE_CRASHED:
        return WORKER_CRASHED
    return TIMEOUT if failure.error_type == "timeout" else f"error:{_ERRORS[failure.error_type]}"
