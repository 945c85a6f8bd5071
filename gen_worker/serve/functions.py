"""A function as its worker registered it: name, schemas, whether it streams.

Owns: nothing; read from the registration each time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, Self

import msgspec

from gen_worker.serve.schema import Schema


class RegisteredSchema(Protocol):
    """A FunctionSchema of the wire."""

    input_schema_json: bytes
    output_schema_json: bytes
    delta_schema_json: bytes
    incremental_output: bool


@dataclass(frozen=True, slots=True)
class Function:
    """One function. A websocket handler has no schemas."""

    name: str
    input: Schema
    output: Schema
    """Of the output, or of one delta when `incremental`."""
    incremental: bool
    is_realtime: bool

    @classmethod
    def of(cls, name: str, schema: RegisteredSchema | None) -> Self:
        """From what the worker said; None: it said nothing of its schemas, so anything is sent as it is."""
        if schema is None:
            return cls(name, Schema({}), Schema({}), incremental=False, is_realtime=False)
        output = schema.delta_schema_json if schema.incremental_output else schema.output_schema_json
        return cls(
            name,
            Schema(_decode(schema.input_schema_json)),
            Schema(_decode(output)),
            incremental=schema.incremental_output,
            is_realtime=not schema.input_schema_json,
        )


def _decode(text: bytes) -> dict[str, Any]:
    return msgspec.json.decode(text, type=dict[str, Any]) if text else {}
