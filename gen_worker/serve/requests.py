"""A call as HTTP brings it: JSON or a form, made into what the wire takes.

Owns: the forms. A part is a field (`a.b` for a field of a field) with text as on a command line, or a file for an Asset
or bytes; the part `payload` is the whole payload as JSON, which the others are added to.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import Request

from gen_worker.errors import ValidationError
from gen_worker.serve.functions import Function
from gen_worker.serve.schema import is_bytes
from gen_worker.serve.uploads import store
from gen_worker.testing.mock_orchestrator import FileStoreServer

WHOLE_PART = "payload"


@dataclass(frozen=True, slots=True)
class Payload:
    """As the wire takes it, and as JSON has it."""

    wire: Any
    plain: dict[str, Any]


async def read_payload(request: Request, function: Function, files: FileStoreServer) -> Payload:
    """The request's payload. Raises HTTPException (400, 415) and ValidationError."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        return await _read_form(request, function, files)
    if kind != "application/json":
        # A browser sends other kinds to other origins without asking first.
        raise HTTPException(415, "the body must be application/json or multipart/form-data")
    plain = _decode(await request.body() or b"{}", "the body")
    return Payload(function.input.fit(plain), plain)


async def _read_form(request: Request, function: Function, files: FileStoreServer) -> Payload:
    try:
        form = await request.form()
    except MultiPartException as error:
        raise HTTPException(400, f"the body is not a form: {error.message}") from error
    async with request.form():  # the same one: closed, with its temporary files, when it has been read
        parts = form.multi_items()
        whole = next((part for name, part in parts if name == WHOLE_PART and isinstance(part, str)), "{}")
        plain = _decode(whole.encode(), "the part `payload`")
        words = [f"{name}={part}" for name, part in parts if name != WHOLE_PART and isinstance(part, str)]
        _merge(plain, function.input.parse(words))
        wire = function.input.fit(plain)
        for name, part in parts:
            if isinstance(part, UploadFile):
                await _add_file(function, name, part, wire, plain, files)
    return Payload(wire, plain)


async def _add_file(
    function: Function, path: str, part: UploadFile, wire: dict[str, Any], plain: dict[str, Any], files: FileStoreServer
) -> None:  # fmt: skip
    node = function.input.find(path)
    branches = function.input.branches(node)
    if any(map(is_bytes, branches)):
        data = await part.read()
        _set(wire, path, data, is_list=False)
        _set(plain, path, f"<{len(data)} bytes>", is_list=False)
        return
    name, mime_type = part.filename or "file", part.content_type or ""
    ref = await asyncio.to_thread(store, files, part.file, name, mime_type)
    is_list = any(branch.get("type") == "array" for branch in branches)
    for payload in (wire, plain):
        _set(payload, path, {"ref": ref}, is_list=is_list)


def _set(payload: dict[str, Any], path: str, value: Any, *, is_list: bool) -> None:
    *parents, last = path.split(".")
    for name in parents:
        payload = payload.setdefault(name, {})
    if is_list:
        payload.setdefault(last, []).append(value)
    else:
        payload[last] = value


def _merge(into: dict[str, Any], other: dict[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value


def _decode(text: bytes, what: str) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise HTTPException(400, f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValidationError(f"{what} must be a JSON object, the payload's fields")
    return value
