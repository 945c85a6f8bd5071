"""Which gRPC status an answer, a reset or a GOAWAY means.

Owns: the tables of the gRPC-over-HTTP/2 protocol description ("HTTP2 Transport Mapping", "HTTP to gRPC Status Code
Mapping"). Pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final
from urllib.parse import unquote_to_bytes

from h2.errors import ErrorCodes

from supervisor.transport import StatusCode, StreamStatus

Headers = Mapping[bytes, bytes]

_OF_HTTP: Final = {
    b"400": StatusCode.INTERNAL,
    b"401": StatusCode.UNAUTHENTICATED,
    b"403": StatusCode.PERMISSION_DENIED,
    b"404": StatusCode.UNIMPLEMENTED,
    b"429": StatusCode.UNAVAILABLE,
    b"502": StatusCode.UNAVAILABLE,
    b"503": StatusCode.UNAVAILABLE,
    b"504": StatusCode.UNAVAILABLE,
}
_OF_RESET: Final[Mapping[int, StatusCode]] = {
    ErrorCodes.REFUSED_STREAM: StatusCode.UNAVAILABLE,
    ErrorCodes.CANCEL: StatusCode.CANCELLED,
    ErrorCodes.ENHANCE_YOUR_CALM: StatusCode.RESOURCE_EXHAUSTED,
    ErrorCodes.INADEQUATE_SECURITY: StatusCode.PERMISSION_DENIED,
    ErrorCodes.HTTP_1_1_REQUIRED: StatusCode.UNKNOWN,
}
"""All others are INTERNAL."""
_SHOWN_BYTES: Final = 200


def headers_of(fields: Iterable[tuple[bytes, bytes]]) -> dict[bytes, bytes]:
    """As a mapping; the last of several with one name counts."""
    return {bytes(name): bytes(value) for name, value in fields}


def status_of_trailers(headers: Headers) -> StreamStatus | None:
    """The status that the scheduler sent; None when there is none."""
    value = headers.get(b"grpc-status")
    if value is None:
        return None
    details = unquote_to_bytes(headers.get(b"grpc-message", b"")).decode(errors="replace")
    try:
        return StreamStatus(StatusCode(int(value)), details)
    except ValueError:
        return StreamStatus(StatusCode.UNKNOWN, f"grpc-status {_shown(value)} is none of gRPC's; {details}")


def status_of_answer(headers: Headers, target: str) -> StreamStatus | None:
    """Of an answer's first headers: why it can't be one of gRPC; None when it can."""
    http = headers.get(b":status", b"")
    if http != b"200":
        reason = (
            f"{target} answered with HTTP status {_shown(http)}, not as a gRPC server; is it one, or behind a proxy?"
        )
        return StreamStatus(_OF_HTTP.get(http, StatusCode.UNKNOWN), reason)
    content = headers.get(b"content-type", b"")
    if not content.startswith(b"application/grpc"):
        reason = f"{target} answered with content-type {_shown(content)}, which is not gRPC's; is it a gRPC server?"
        return StreamStatus(StatusCode.UNKNOWN, reason)
    return None


def status_of_reset(code: int, target: str) -> StreamStatus:
    """Of a RST_STREAM of the scheduler."""
    return StreamStatus(_OF_RESET.get(code, StatusCode.INTERNAL), f"{target} reset the stream: {name_of(code)}")


def name_of(code: int) -> str:
    """An error code of HTTP/2 in words."""
    try:
        return ErrorCodes(code).name
    except ValueError:
        return f"error code {code}"


def _shown(value: bytes) -> str:
    return value[:_SHOWN_BYTES].decode(errors="replace")
