"""load_model_cmd and unload_model_cmd: what the scheduler asks for by name, and when it is answered.

Owns: the commands that have no answer yet. Each gets exactly one. Neither takes anything from a run: a load waits for
room, an unload for the runs that use the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from gen_worker.pipe.messages import Failure, FunctionInfo
from supervisor.executor_handle import ExecutorHandle
from supervisor.lanes import load_of
from supervisor.outbox import Outbox
from supervisor.residence import Residence, Room
from supervisor.residency import Residency
from supervisor.runs import Refused
from supervisor.wire_codec import encode_load_result, encode_unload_result


class ModelCommands:
    """See the module. Whenever something moved `settle` is to be called, then runs are placed, then `advance`."""

    def __init__(
        self,
        *,
        residency: Residency,
        outbox: Outbox,
        executors: Callable[[], Sequence[ExecutorHandle]],
        functions: Mapping[str, FunctionInfo],
    ) -> None:
        self._residency = residency
        self._outbox = outbox
        self._executors = executors
        self._functions = functions
        self._loads: dict[str, list[str]] = {}
        """Model id -> the names by which commands asked for it; likewise for unloads."""
        self._unloads: dict[str, list[str]] = {}

    def load(self, name: str) -> None:
        """Answered when an executor has it; its files are fetched when they are not here."""
        try:
            model_id = self._residency.names.model_id(name)
        except Refused as refused:
            self._outbox.put_control(encode_load_result(name, refused.failure.detail))
            return
        if not self._executors() or not self._types(model_id):
            reason = "no function of this worker takes a model" if self._executors() else "no executor is ready"
            self._outbox.put_control(encode_load_result(name, reason))
            return
        self._loads.setdefault(model_id, []).append(name)
        self._advance_load(model_id)

    def unload(self, name: str) -> None:
        """Answered when no executor holds it any more. What is held may leave, whatever the allowlist says by now."""
        model_id = self._residency.names.meant_by(name)
        if not self._residency.holders(model_id) and not self._residency.is_loading(model_id):
            try:
                self._residency.names.model_id(name)
            except Refused as refused:
                self._outbox.put_control(encode_unload_result(name, refused.failure.detail))
                return
        self._unloads.setdefault(model_id, []).append(name)
        self._advance_unload(model_id)

    def settle(self) -> None:
        """Answer the unloads that are done, before a run that waits has the model loaded again."""
        for model_id in list(self._unloads):
            if not self._residency.holders(model_id) and not self._residency.is_loading(model_id):
                self._unload_ended(model_id, None)

    def advance(self) -> None:
        """Go on with what waits for room, for a load or for a run."""
        for model_id in list(self._loads):
            self._advance_load(model_id)
        for model_id in list(self._unloads):
            self._advance_unload(model_id)

    def load_ended(self, model_id: str, failure: Failure | None) -> None:
        """The model is loaded, or it is known that it will not be."""
        for name in self._loads.pop(model_id, ()):
            self._outbox.put_control(encode_load_result(name, _reason(failure)))

    def unload_failed(self, model_id: str, failure: Failure) -> None:
        self._unload_ended(model_id, failure)

    def unloads(self, model_id: str) -> bool:
        """Whether a command has it unloaded."""
        return model_id in self._unloads

    # -- inside -------------------------------------------------------------------------------

    def _advance_load(self, model_id: str) -> None:
        handles = self._executors()
        keys = [(model_id, type_name) for type_name in sorted(self._types(model_id))]
        states = {handle: self._residency.state(handle, keys) for handle in handles}
        if Residence.HOT in states.values():
            self.load_ended(model_id, None)
            return
        if Residence.LOADING in states.values() or not self._residency.fetch(model_id):
            return
        rooms = {handle: self._residency.room(handle, keys) for handle in handles if states[handle] is None}
        fit = [handle for handle in rooms if rooms[handle] <= Room.EVICT]
        if fit:
            self._residency.load(min(fit, key=lambda handle: (rooms[handle], load_of(handle))), keys)
        elif (failure := self._residency.refusal(keys)) is not None:
            self.load_ended(model_id, failure)

    def _advance_unload(self, model_id: str) -> None:
        for handle in self._residency.holders(model_id):
            self._residency.unload(handle, model_id)
        self.settle()

    def _unload_ended(self, model_id: str, failure: Failure | None) -> None:
        for name in self._unloads.pop(model_id, ()):
            self._outbox.put_control(encode_unload_result(name, _reason(failure)))

    def _types(self, model_id: str) -> set[str]:
        return self._residency.names.types_of(model_id, self._functions)


def _reason(failure: Failure | None) -> str:
    """For a command's answer, where "" says that it succeeded."""
    return "" if failure is None else failure.detail or failure.safe_message or failure.error_type
