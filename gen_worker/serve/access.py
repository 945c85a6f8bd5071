"""Who may talk to the development server.

Owns: the rules. The server runs whatever it is asked to, so a web page that the developer has open elsewhere must not
reach it, and neither may the network.

1. An address that is not loopback needs a token.
2. With a token every request brings it: as a bearer, or in a cookie that `/?token=...` sets for the page.
3. Without one, the Host header must name this machine: a foreign name that resolves to 127.0.0.1 is turned away.
4. A request that a browser made for another page (Origin, Sec-Fetch-Site) is refused, with or without a token.
"""

from __future__ import annotations

import hmac
import ipaddress
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qs, urlencode

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

COOKIE: Final = "gen-worker-token"
_POLICY_VIOLATION: Final = 1008
"""The WebSocket close code for it (RFC 6455)."""
_HEADERS: Final = {
    "content-security-policy": (
        "default-src 'self'; img-src * data: blob:; media-src * data: blob:; "
        "frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


@dataclass(frozen=True, slots=True)
class Refusal:
    status: int
    message: str


class Access:
    """ASGI middleware; see the module. `token` is "" when none is asked for."""

    def __init__(self, app: ASGIApp, *, token: str) -> None:
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        if (welcome := self._welcome(scope)) is not None:
            await welcome(scope, receive, send)
            return
        refusal = self._refusal(HTTPConnection(scope))
        if refusal is None:
            await self._app(scope, receive, _with_headers(send))
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": _POLICY_VIOLATION, "reason": refusal.message})
        else:
            body = {"error": {"type": "auth", "message": refusal.message, "retryable": False}}
            await JSONResponse(body, refusal.status, dict(_HEADERS))(scope, receive, send)

    def _welcome(self, scope: Scope) -> Response | None:
        """What `/?token=...` is answered: the cookie, and the page without the token in its address."""
        if scope["type"] != "http" or scope["path"] != "/" or not self._token:
            return None
        query = parse_qs(scope["query_string"].decode("latin-1"))
        given = query.pop("token", [""])[0]
        if not given or not _equal(given, self._token):
            return None
        response = RedirectResponse("/" + (f"?{urlencode(query, doseq=True)}" if query else ""), 303, dict(_HEADERS))
        response.set_cookie(COOKIE, self._token, httponly=True, samesite="strict")
        return response

    def _refusal(self, connection: HTTPConnection) -> Refusal | None:
        host = connection.headers.get("host", "")
        if _is_foreign(connection.headers, host):
            return Refusal(403, "a page of another origin may not use this server")
        if not self._token:
            if is_loopback(_name(host)):
                return None
            return Refusal(403, f"the host {host!r} is not this machine: use http://127.0.0.1, or start with --token")
        kind, _, bearer = connection.headers.get("authorization", "").partition(" ")
        given = bearer if kind.lower() == "bearer" else connection.cookies.get(COOKIE, "")
        if _equal(given, self._token):
            return None
        return Refusal(401, "the token is missing or wrong: send it as a bearer, or open /?token=... in a browser")


def _is_foreign(headers: Headers, host: str) -> bool:
    if headers.get("sec-fetch-site") == "cross-site" and headers.get("sec-fetch-mode") != "navigate":
        return True
    origin = headers.get("origin")
    return origin is not None and origin.partition("://")[2] != host


def _name(host: str) -> str:
    """The host without its port."""
    return host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]


def _equal(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _with_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return send_with_headers
