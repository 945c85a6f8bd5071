"""The functions as an OpenAPI 3.1 document, whose schemas are JSON Schema as the functions have them.

Owns: how a function's errors are HTTP statuses, since the document and the answers must agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from gen_worker._version import __version__
from gen_worker.serve.functions import Function

STATUS_OF: Final[Mapping[str, int]] = {
    "validation": 422,
    "auth": 403,
    "canceled": 409,
    "timeout": 504,
    "resource": 507,
    "retryable": 503,
    "fatal": 500,
    "internal": 500,
}
"""error_type -> HTTP status."""

_ERRORS: Final[Mapping[int, str]] = {
    400: "The body is not JSON or not a form.",
    403: "The function refused the caller (auth).",
    404: "There is no such function.",
    409: "The run was canceled.",
    422: "The payload does not fit (validation).",
    500: "The function failed (internal, fatal).",
    503: "Try again: the worker is starting, busy, or lost the run (retryable).",
    504: "The run's deadline passed (timeout).",
    507: "Out of memory (resource).",
}
_ERROR_SCHEMA: Final = {
    "title": "Error",
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["type", "message", "retryable"],
            "properties": {
                "type": {"type": "string", "enum": [*STATUS_OF, "not_found", "unavailable"]},
                "message": {"type": "string", "description": "For end users."},
                "retryable": {"type": "boolean"},
                "detail": {"type": "string", "description": "For developers and operators."},
                "run_id": {"type": "string"},
            },
        }
    },
}
_TIMEOUT: Final = {
    "name": "timeout_ms",
    "in": "query",
    "description": "The run's deadline, counted from now; 0: none.",
    "schema": {"type": "integer", "minimum": 0, "default": 0},
}


def document(title: str, functions: Iterable[Function]) -> dict[str, Any]:
    """The whole document. Websocket handlers are not in it: OpenAPI has no words for them."""
    schemas: dict[str, Any] = {"Error": _ERROR_SCHEMA}
    paths = {
        f"/v1/functions/{function.name}": {"post": _operation(function, schemas)}
        for function in functions
        if not function.is_realtime
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"token": []}],
    }


def _operation(function: Function, schemas: dict[str, Any]) -> dict[str, Any]:
    payload = _moved(function.name, "input", function.input.document, schemas)
    output = _moved(function.name, "output", function.output.document, schemas)
    answer = {"type": "array", "items": output} if function.incremental else output
    streams = "Its deltas, each as it comes" if function.incremental else "Progress and logs, then the output"
    form = {
        "type": "object",
        "description": "A field of the payload each, a.b for a field of a field, files for Assets and bytes; "
        "or the whole payload as JSON in `payload`, and files beside it.",
        "properties": {"payload": payload},
        "additionalProperties": True,
    }
    return {
        "operationId": function.name,
        "summary": function.name,
        "description": _description(function),
        "parameters": [_TIMEOUT],
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": payload}, "multipart/form-data": {"schema": form}},
        },
        "responses": {
            "200": {
                "description": f"The output. {streams}, with `Accept: text/event-stream`.",
                "headers": {"X-Run-Id": {"schema": {"type": "string"}}},
                "content": {
                    "application/json": {"schema": answer},
                    "text/event-stream": {"schema": {"type": "string"}},
                },
            },
            **{
                str(status): {
                    "description": words,
                    "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
                }
                for status, words in _ERRORS.items()
            },
        },
    }


def _description(function: Function) -> str:
    branches = function.input.branches(function.input.document)
    return str(branches[0].get("description", "")) if branches else ""


def _moved(function: str, role: str, schema: Mapping[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    """The schema with its definitions among the document's: functions may use one name for different structs."""
    prefix = f"{function}.{role}."

    def is_reference(key: str, value: Any) -> bool:
        return (key == "$ref" and isinstance(value, str)) or (key == "discriminator" and "propertyName" in value)

    def renamed(value: Any) -> Any:
        if isinstance(value, Mapping):  # a discriminator, whose mapping has references
            return {key: renamed(item) for key, item in value.items()}
        return str(value).replace("#/$defs/", f"#/components/schemas/{prefix}")

    def move(node: Any) -> Any:
        if isinstance(node, Mapping):
            return {key: renamed(value) if is_reference(key, value) else move(value) for key, value in node.items()}
        return [move(item) for item in node] if isinstance(node, list) else node

    for name, definition in schema.get("$defs", {}).items():
        schemas[prefix + name] = move(definition)
    moved: dict[str, Any] = move({key: value for key, value in schema.items() if key != "$defs"})
    return moved
