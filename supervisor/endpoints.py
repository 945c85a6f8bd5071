"""What the worker answers over HTTP: /livez, /readyz, /metrics, /status.

Owns: the routes. It reads and changes nothing: there is no method but GET and HEAD.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Final

import msgspec

from supervisor.status import Status

PLAIN: Final = "text/plain; charset=utf-8"
JSON: Final = "application/json"
INDEX: Final = """gen-worker
/livez    200 while the event loop turns
/readyz   200 when runs can be sent here, else 503 and why not
/metrics  for Prometheus
/status   what `gen-worker top` shows, as JSON
"""


@dataclass(frozen=True, slots=True)
class Answer:
    status: HTTPStatus
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


class Endpoints:
    """See the module. `metrics` takes an Accept header and gives content type and text."""

    def __init__(
        self,
        *,
        unready: Callable[[], Sequence[str]],
        status: Callable[[], Status],
        metrics: Callable[[str], tuple[str, bytes]],
    ) -> None:
        self._unready = unready
        self._status = status
        self._metrics = metrics
        self._routes: dict[str, Callable[[str], Answer]] = {
            "/": lambda _: plain(HTTPStatus.OK, INDEX),
            "/livez": lambda _: plain(HTTPStatus.OK, "ok\n"),
            "/readyz": lambda _: self._readyz(),
            "/metrics": self._exposition,
            "/status": lambda _: Answer(HTTPStatus.OK, JSON, msgspec.json.encode(self._status())),
        }

    def answer(self, method: str, path: str, accept: str = "") -> Answer:
        """`path` without a query; `accept` is the header of this name."""
        route = self._routes.get(path)
        if route is None:
            return plain(HTTPStatus.NOT_FOUND, f"nothing is here; there is\n{INDEX}")
        if method not in ("GET", "HEAD"):
            return plain(
                HTTPStatus.METHOD_NOT_ALLOWED, "GET only: nothing can be changed here\n", {"Allow": "GET, HEAD"}
            )
        return route(accept)

    def _readyz(self) -> Answer:
        reasons = self._unready()
        if reasons:
            return plain(HTTPStatus.SERVICE_UNAVAILABLE, "".join(f"{reason}\n" for reason in reasons))
        return plain(HTTPStatus.OK, "ready\n")

    def _exposition(self, accept: str) -> Answer:
        content_type, text = self._metrics(accept)
        return Answer(HTTPStatus.OK, content_type, text)


def plain(status: HTTPStatus, text: str, headers: Mapping[str, str] | None = None) -> Answer:
    return Answer(status, PLAIN, text.encode(), headers or {})
