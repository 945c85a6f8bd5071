"""load_model_cmd and unload_model_cmd: what the scheduler asks for by name, and when it is answered.

Owns: the commands that have no answer yet. Each gets exactly one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gen_worker.pipe.messages import Failure, FunctionInfo
from supervisor.executor_handle import ExecutorHandle
from supervisor.lanes import load_of
from supervisor.outbox import Outbox
from supervisor.residency import ModelRefused, Residence, Residency
from supervisor.wire_codec import encode_load_result, encode_unload_result


class ModelCommands:
    """See the module. `users` says how many active runs use a model."""

    def __init__(
        self,
        *,
        residency: Residency,
        outbox: Outbox,
        executors: Callable[[], Sequence[ExecutorHandle]],
        functions: Mapping[str, FunctionInfo],
        users: Callable[[str], int],
    ) -> None:
        self._residency = residency
        self._outbox = outbox
        self._executors = executors
        self._functions = functions
        self._users = users
        self._loads: dict[str, list[str]] = {}
        """Model id -> the names by which commands asked for it; likewise for unloads."""
        self._unloads: dict[str, list[str]] = {}

    def load(self, name: str) -> None:
        """Answered when an executor has it: the least loaded one, unless one has it already."""
        handles = self._executors()
        try:
            model_id = self._residency.model_id(name)
        except ModelRefused as refused:
            self._outbox.put_control(encode_load_result(name, refused.failure.detail))
            return
        types = self._residency.types_of(model_id, self._functions)
        if not handles or not types:
            reason = "no function of this worker takes a model" if handles else "no executor is ready"
            self._outbox.put_control(encode_load_result(name, reason))
            return
        keys = [(model_id, type_name) for type_name in sorted(types)]
        states = {self._residency.state(handle, keys) for handle in handles}
        if Residence.HOT in states:
            self._outbox.put_control(encode_load_result(name, ""))
            return
        self._loads.setdefault(model_id, []).append(name)
        if Residence.LOADING not in states:
            self._residency.load(min(handles, key=load_of), keys)

    def unload(self, name: str) -> None:
        """Answered when no executor holds it any more; refused while a run uses it."""
        try:
            model_id = self._residency.model_id(name)
        except ModelRefused as refused:
            self._outbox.put_control(encode_unload_result(name, refused.failure.detail))
            return
        users, holders = self._users(model_id), self._residency.holders(model_id)
        if users:
            self._outbox.put_control(encode_unload_result(name, f"in use by {users} runs"))
        elif self._residency.is_loading(model_id):
            self._outbox.put_control(encode_unload_result(name, "it is being loaded"))
        elif not holders:
            self._outbox.put_control(encode_unload_result(name, ""))
        else:
            self._unloads.setdefault(model_id, []).append(name)
            for handle in holders:
                self._residency.unload(handle, model_id)

    # -- what became of them ------------------------------------------------------------------

    def loaded(self, handle: ExecutorHandle, model_id: str, failure: Failure | None) -> None:
        """One type of the model is loaded, or is not; the model is when no other type of it is still on its way."""
        still_loading = any(loading_id == model_id for loading_id, _ in self._residency.loading(handle))
        if failure is not None or not still_loading:
            self.load_ended(model_id, failure)

    def load_ended(self, model_id: str, failure: Failure | None) -> None:
        for name in self._loads.pop(model_id, ()):
            self._outbox.put_control(encode_load_result(name, _reason(failure)))

    def unloaded(self, model_id: str, failure: Failure | None) -> None:
        self._unload_ended(model_id, failure)
        for name in self._loads.pop(model_id, ()):
            self.load(name)  # it had to wait for this

    def executor_gone(self) -> None:
        """What it held is unloaded with it."""
        for model_id in list(self._unloads):
            self._unload_ended(model_id, None)

    def _unload_ended(self, model_id: str, failure: Failure | None) -> None:
        if failure is None and self._residency.holders(model_id):
            return  # another executor still has it
        for name in self._unloads.pop(model_id, ()):
            self._outbox.put_control(encode_unload_result(name, _reason(failure)))


def _reason(failure: Failure | None) -> str:
    """For a command's answer, where "" says that it succeeded."""
    return "" if failure is None else failure.detail or failure.safe_message or failure.error_type
