"""Whether a run or a session is taken at all, asked before anything is done for it.

Owns: whether this worker still takes any, and the bounds on what a run brings and on how many are active at once.
What its models or its past speak against is asked elsewhere (model_names.py, quarantine.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from gen_worker.pipe.messages import Failure, FunctionInfo
from supervisor.backlog import Backlog
from supervisor.input_arena import Input, Payload
from supervisor.runs import Refused, busy, invalid, no_memory

if TYPE_CHECKING:
    from gen_worker.wire import worker_scheduler_pb2 as pb


class Admission:
    """See the module. `active` counts runs and sessions together; a bound of 0 is none."""

    def __init__(
        self,
        *,
        functions: Mapping[str, FunctionInfo],
        backlog: Backlog,
        active: Callable[[], int],
        max_concurrency: int,
        max_input_bytes: int,
    ) -> None:
        self._functions = functions
        self._backlog = backlog
        self._active = active
        self._max_concurrency = max_concurrency
        self._max_input_bytes = max_input_bytes
        self.closed = False
        """Set for good when the worker is to stop."""

    def function_of(self, request: pb.TaskExecutionRequest, payload: Payload) -> FunctionInfo:
        """The function of a run that may be taken. Raises Refused."""
        if not request.run_id:
            raise Refused(invalid("run_id is empty"))
        if self.closed:
            raise Refused(busy("the worker is shutting down"))
        info = self._functions.get(request.function_name)
        if info is None:
            known = ", ".join(sorted(self._functions)) or "none"
            detail = f"unknown function {request.function_name!r}; it serves: {known}"
            raise Refused(invalid("unknown function", detail))
        if info.mode == "websocket":
            detail = f"{info.name} is a websocket handler: it is opened as a realtime session, not run"
            raise Refused(invalid("unknown function", detail))
        failure = self._refusal_of(payload) or self._overload()
        if failure is not None:
            raise Refused(failure)
        return info

    def refusal(self) -> Failure | None:
        """Why nothing is taken now, whatever it is."""
        return busy("the worker is shutting down") if self.closed else self._overload()

    def _refusal_of(self, payload: Payload) -> Failure | None:
        limit = self._max_input_bytes
        if limit and len(payload) > limit:
            size = len(payload)
            return invalid("input too large", f"input of {size} bytes is over WORKER_MAX_INPUT_BYTES={limit}")
        if isinstance(payload, Input) and payload.error is not None:
            return no_memory(len(payload), payload.error)
        return None

    def _overload(self) -> Failure | None:
        if self._max_concurrency and (active := self._active()) >= self._max_concurrency:
            return busy(f"{active} runs are active, WORKER_MAX_CONCURRENCY allows no more")
        if self._backlog.refuses:
            return busy("too much waits already, and none of it gets on")
        return None
