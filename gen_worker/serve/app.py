"""The HTTP API of the development server.

    GET       /                       the page (gen_worker/serve/page)
    GET       /openapi.json
    GET       /v1/state               what the page shows; every change of it with Accept: text/event-stream
    GET       /v1/functions           the functions and their schemas
    POST      /v1/functions/<name>    a run: JSON or a form in, JSON out; events with Accept: text/event-stream
    WebSocket /v1/functions/<name>    a realtime session: text frames are text, binary frames bytes
    GET       /v1/runs/<run_id>       one of the recent runs, with its payload and output
    DELETE    /v1/runs/<run_id>       cancel a run
    GET       /v1/files/<ref>         a file of the development store

Owns: the routes, and how errors are answered: {"error": {"type", "message", "retryable", ...}}.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, Response
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from gen_worker.errors import ValidationError
from gen_worker.serve.access import Access
from gen_worker.serve.functions import Function
from gen_worker.serve.openapi import STATUS_OF, document
from gen_worker.serve.realtime import realtime_route
from gen_worker.serve.requests import read_payload
from gen_worker.serve.runs import Call, WorkerGoneError, error_body
from gen_worker.serve.state import DevState
from gen_worker.serve.streams import ClientGone, EventStream, sse, unless_gone
from gen_worker.testing.mock_orchestrator import MockOrchestratorError, RunFailedError
from gen_worker.testing.mock_orchestrator.directory import RefusedError

PAGE: Final = Path(__file__).parent / "page"
SETTLE_S: Final = 30.0
"""How long a call waits for a worker that starts or reloads."""
_TIMEOUT_DIGITS: Final = 12
"""Thirty years, which the wire's int64 holds."""
_CLIENT_GONE: Final = 499
"""Nobody reads it; it is what access logs know."""


def build_app(state: DevState, *, token: str = "") -> ASGIApp:
    """The ASGI application. `token` is "" when none is asked for."""
    api = _Api(state)
    return Starlette(
        routes=[
            Route("/", api.page),
            Route("/openapi.json", api.openapi),
            Route("/v1/state", api.state),
            Route("/v1/functions", api.functions),
            Route("/v1/functions/{name}", api.call, methods=["POST"]),
            WebSocketRoute("/v1/functions/{name}", realtime_route(state)),
            Route("/v1/runs/{run_id}", api.run),
            Route("/v1/runs/{run_id}", api.cancel, methods=["DELETE"]),
            Route("/v1/files/{ref:path}", api.file),
            Mount("/page", StaticFiles(directory=PAGE)),
        ],
        middleware=[Middleware(Access, token=token)],
        exception_handlers={HTTPException: _http_error, ValidationError: _validation_error, ClientGone: _client_gone},
    )


class _Api:
    def __init__(self, state: DevState) -> None:
        self._state = state

    async def page(self, _request: Request) -> Response:
        return FileResponse(PAGE / "index.html")

    async def openapi(self, _request: Request) -> Response:
        return to_json(document(self._state.title, self._state.functions().values()))

    async def functions(self, _request: Request) -> Response:
        return to_json([_described(function) for function in self._state.functions().values()])

    async def state(self, request: Request) -> Response | EventStream:
        if _wants_events(request):
            return EventStream(self._state.watch())
        return to_json(self._state.snapshot())

    async def call(self, request: Request) -> Response | EventStream:
        await self._state.settled(SETTLE_S)
        function = self._find(request.path_params["name"])
        timeout_ms = _timeout(request)
        payload = await read_payload(request, function, self._state.worker.files)
        try:
            call = await self._state.runs.start(function, payload.wire, payload.plain, timeout_ms)
        except MockOrchestratorError as error:
            raise HTTPException(503, f"the worker is not there: {self._state.problem or error}") from error
        headers = {"x-run-id": call.record.run_id}
        if _wants_events(request):
            return EventStream(_run_events(call), headers, call.close)
        try:
            return await unless_gone(request.receive, _answer(call, headers))
        finally:
            call.close()

    async def run(self, request: Request) -> Response:
        run_id = request.path_params["run_id"]
        record = next((each for each in self._state.runs.recent if each.run_id == run_id), None)
        if record is None:
            raise HTTPException(404, "there is no such run among the recent ones")
        return to_json(record)

    async def cancel(self, request: Request) -> Response:
        if not self._state.runs.cancel(request.path_params["run_id"]):
            raise HTTPException(404, "there is no such run under way")
        return Response(status_code=HTTPStatus.ACCEPTED)

    async def file(self, request: Request) -> Response:
        directory = self._state.worker.files.directory
        try:
            opened, info = await asyncio.to_thread(
                directory.open, request.path_params["ref"]
            )  # it reads the whole file
        except RefusedError as refusal:
            raise HTTPException(int(refusal.status), str(refusal)) from refusal
        opened.close()
        # What a function saved is shown, never run: not as a page of this origin.
        safe = {"content-security-policy": "sandbox; default-src 'none'; style-src 'unsafe-inline'"}
        return FileResponse(directory.locate(info.ref), media_type=info.mime_type, headers=safe)

    def _find(self, name: str) -> Function:
        functions = self._state.functions()
        if not functions:
            raise HTTPException(503, self._state.problem or "the worker is starting")
        if name not in functions:
            raise HTTPException(404, f"there is no function {name!r}; there are: {', '.join(functions)}")
        if functions[name].is_realtime:
            raise HTTPException(405, f"{name} is a websocket handler: open a WebSocket here")
        return functions[name]


async def _answer(call: Call, headers: dict[str, str]) -> Response:
    """Wait for the run's end."""
    try:
        async with aclosing(call.events()) as events:
            async for _ in events:
                pass
        return to_json(call.output(), headers=headers)
    except RunFailedError as error:
        return _error(error_body(error), STATUS_OF.get(error.error_type, 500), headers)
    except WorkerGoneError as error:
        return _error({"type": "unavailable", "message": str(error), "retryable": True}, 503, headers)


async def _run_events(call: Call) -> AsyncGenerator[bytes, None]:
    """A run as events: what it emits under its own types, and last `result` or `error`."""
    yield sse("run", {"run_id": call.record.run_id})
    try:
        async with aclosing(call.events()) as events:
            async for event in events:
                yield sse(event.type, event.payload)
        call.close()  # first: who has read the end finds the run among those that have ended
        output = call.output()
        output = None if call.function.incremental else output  # its deltas were sent
        yield sse("result", {"run_id": call.record.run_id, "output": output, "seconds": call.record.seconds})
    except RunFailedError as error:
        yield sse("error", error_body(error))
    except WorkerGoneError as error:
        call.close()
        yield sse("error", {"type": "unavailable", "message": str(error), "retryable": True})


def to_json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer; bytes are base64."""
    return Response(msgspec.json.encode(value, enc_hook=repr), status, headers, media_type="application/json")


def _described(function: Function) -> dict[str, Any]:
    return {
        "name": function.name,
        "incremental": function.incremental,
        "realtime": function.is_realtime,
        "input_schema": function.input.document,
        "output_schema": function.output.document,
    }


def _wants_events(request: Request) -> bool:
    return "text/event-stream" in request.headers.get("accept", "")


def _timeout(request: Request) -> int:
    text = request.query_params.get("timeout_ms", "0")
    if not (text.isascii() and text.isdecimal() and len(text) <= _TIMEOUT_DIGITS):
        raise ValidationError(f"timeout_ms={text}: expected milliseconds")
    return int(text)


def _error(body: dict[str, Any], status: int, headers: dict[str, str] | None = None) -> Response:
    extra = {"retry-after": "1"} if status == HTTPStatus.SERVICE_UNAVAILABLE else {}
    return to_json({"error": body}, status, {**extra, **(headers or {})})


async def _http_error(_request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    kinds = {404: "not_found", 503: "unavailable"}
    kind = kinds.get(error.status_code, "validation")
    retryable = error.status_code == HTTPStatus.SERVICE_UNAVAILABLE
    return _error({"type": kind, "message": error.detail, "retryable": retryable}, error.status_code)


async def _validation_error(_request: Request, error: Exception) -> Response:
    return _error({"type": "validation", "message": str(error), "retryable": False}, STATUS_OF["validation"])


async def _client_gone(_request: Request, _error: Exception) -> Response:
    return Response(status_code=_CLIENT_GONE)
