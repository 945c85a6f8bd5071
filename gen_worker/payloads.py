"""How payloads, outputs and deltas are encoded and decoded: MessagePack maps in and out, JSON for deltas.

Owns: what a value is checked against before it leaves or enters a function, and the errors for that.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import msgspec

from gen_worker.errors import FatalError, ValidationError
from gen_worker.signature import FunctionSpec


def decode_payload(spec: FunctionSpec, data: bytes | memoryview) -> msgspec.Struct:
    """A payload from the wire. Raises ValidationError, which says the field, when it does not fit."""
    try:
        return _decoder(spec.payload_type).decode(data)  # type: ignore[no-any-return]
    except ValueError as error:
        raise _unfit(spec, error) from error


def convert_payload(spec: FunctionSpec, value: Any) -> msgspec.Struct:
    """A payload from plain data such as a dict. Raises ValidationError, which says the field, when it does not fit."""
    try:
        return msgspec.convert(value, spec.payload_type)
    except ValueError as error:
        raise _unfit(spec, error) from error


def encode_output(spec: FunctionSpec, value: object) -> bytes:
    """The output of a function as MessagePack. Raises FatalError when it is not what the annotation says."""
    return _encode(spec, value, msgspec.msgpack.encode, "returned")


def encode_delta(spec: FunctionSpec, value: object) -> bytes:
    """One delta of an incremental function as JSON. Raises FatalError when it is not what the annotation says."""
    return _encode(spec, value, msgspec.json.encode, "yielded")


def _encode(spec: FunctionSpec, value: object, encode: Any, verb: str) -> bytes:
    expected = spec.output_type
    if expected is None or not isinstance(value, expected):
        name = "nothing" if expected is None else expected.__qualname__
        raise FatalError(f"{spec.name} {verb} a {type(value).__name__}, its annotation says {name}")
    try:
        return encode(value)  # type: ignore[no-any-return]
    except (TypeError, ValueError, OverflowError) as error:
        raise FatalError(f"{spec.name} {verb} a {type(value).__name__} that can't be encoded: {error}") from error


def _unfit(spec: FunctionSpec, error: Exception) -> ValidationError:
    return ValidationError(f"payload of {spec.name}: {error}")


@lru_cache(maxsize=1024)
def _decoder(payload_type: Any) -> msgspec.msgpack.Decoder[Any]:
    return msgspec.msgpack.Decoder(payload_type)
