"""Protobuf at the edge: bytes of the scheduler's stream to messages and back.

Owns: nothing. The rest of the supervisor sees generated messages only as what `decode` returns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from google.protobuf.message import DecodeError

from gen_worker.pipe.messages import Failure
from gen_worker.wire import worker_scheduler_pb2 as pb
from supervisor.transport.messages import PREFIX, Joined

SAFE_MESSAGE_MAX_CHARS = 500
"""The protocol's limit for what end users may see."""
SIZES_KEPT: Final = 256
"""Different sizes of deltas in one run whose surroundings are kept; some 100 bytes each."""

_RUN_RESULT = b"\x12"
_OUTPUT_PAYLOAD = b"\x1a"
"""Tags: WorkerSchedulerMessage.run_result (2) and TaskExecutionResult.output_payload (3), both length-delimited."""


class WireError(Exception):
    """Bytes that are not a message of the protocol."""


def decode(data: bytes) -> pb.WorkerSchedulerMessage:
    """One message. Raises WireError when the bytes don't parse."""
    try:
        return pb.WorkerSchedulerMessage.FromString(data)
    except DecodeError as error:
        raise WireError(f"{len(data)} bytes are not a WorkerSchedulerMessage: {error}") from error


def encode_result(run_id: str, output: bytes, failure: Failure | None) -> bytes:
    if failure is None:
        result = pb.TaskExecutionResult(run_id=run_id, success=True, output_payload=output)
    else:
        result = pb.TaskExecutionResult(
            run_id=run_id,
            success=False,
            error_message=failure.detail or failure.safe_message,
            error_type=failure.error_type,
            retryable=failure.retryable,
            safe_message=failure.safe_message[:SAFE_MESSAGE_MAX_CHARS],
        )
    return pb.WorkerSchedulerMessage(run_result=result).SerializeToString()


def encode_result_head(run_id: str, output_bytes: int) -> bytes:
    """What goes before an output of so many bytes: both together are the message of `encode_result`."""
    fields = pb.TaskExecutionResult(run_id=run_id, success=True).SerializeToString()
    fields += _OUTPUT_PAYLOAD + varint(output_bytes)
    return _RUN_RESULT + varint(len(fields) + output_bytes) + fields


def varint(value: int) -> bytes:
    """A length as protobuf has it."""
    size = max(1, (value.bit_length() + 6) // 7)
    septets = [(value >> 7 * index) & 0x7F for index in range(size)]
    return bytes((*(septet | 0x80 for septet in septets[:-1]), septets[-1]))


def encode_event(run_id: str, event_type: str, payload_json: bytes) -> bytes:
    event = pb.WorkerEvent(run_id=run_id, event_type=event_type, payload_json=payload_json)
    return pb.WorkerSchedulerMessage(worker_event=event).SerializeToString()


class DeltaWriter(dict[int, bytes]):
    """Writes deltas of one run as they lie on the stream: a prefix, and what `encode_event` makes of it, byte for byte.

    What goes before a payload depends on its size alone. It is kept by size, since protobuf's objects take longer than
    everything else that is done for a delta here.
    """

    def __init__(self, run_id: str) -> None:
        super().__init__()
        self._names = pb.WorkerEvent(run_id=run_id, event_type="output.delta").SerializeToString()

    def join(self, payloads: Sequence[bytes]) -> Joined:
        return Joined(b"".join([part for data in payloads for part in (self[len(data)], data)]), len(payloads))

    def __missing__(self, size: int) -> bytes:
        event = self._names + (_PAYLOAD_TAG + _varint(size) if size else b"")
        message = _EVENT_TAG + _varint(len(event) + size) + event
        head = PREFIX.pack(0, len(message) + size) + message
        if len(self) < SIZES_KEPT:
            self[size] = head
        return head


def _tag(field: int) -> bytes:
    """What protobuf writes before the length of a field that has one."""
    return _varint(field << 3 | 2)


def _varint(value: int) -> bytes:
    """Seven bits to a byte, the lowest first; the eighth says that more follow."""
    data = bytearray()
    while rest := value >> 7:
        data.append(value & 0x7F | 0x80)
        value = rest
    data.append(value)
    return bytes(data)


_EVENT_TAG: Final = _tag(pb.WorkerSchedulerMessage.WORKER_EVENT_FIELD_NUMBER)
_PAYLOAD_TAG: Final = _tag(pb.WorkerEvent.PAYLOAD_JSON_FIELD_NUMBER)


def encode_load_result(model_id: str, error: str) -> bytes:
    result = pb.LoadModelResult(model_id=model_id, success=not error, error_message=error)
    return pb.WorkerSchedulerMessage(load_model_result=result).SerializeToString()


def encode_unload_result(model_id: str, error: str) -> bytes:
    result = pb.UnloadModelResult(model_id=model_id, success=not error, error_message=error)
    return pb.WorkerSchedulerMessage(unload_model_result=result).SerializeToString()


def encode_realtime_close(session_id: str, reason: str) -> bytes:
    close = pb.RealtimeCloseCommand(session_id=session_id, reason=reason)
    return pb.WorkerSchedulerMessage(realtime_close_cmd=close).SerializeToString()


def encode_realtime_frame(session_id: str, data: bytes, *, is_text: bool) -> bytes:
    frame = pb.RealtimeFrame(session_id=session_id, data=data, is_text=is_text)
    return pb.WorkerSchedulerMessage(realtime_frame=frame).SerializeToString()


def encode_registration(resources: pb.WorkerResources, *, is_heartbeat: bool) -> bytes:
    registration = pb.WorkerRegistration(resources=resources, is_heartbeat=is_heartbeat)
    return pb.WorkerSchedulerMessage(worker_registration=registration).SerializeToString()
