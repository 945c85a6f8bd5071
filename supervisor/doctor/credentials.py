"""The token: where it comes from, what it claims, how long it lasts. The token itself is never shown."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Final

from supervisor.auth import Auth, AuthError, KeysUnreachable, unverified_claims
from supervisor.doctor.findings import Finding, Host
from supervisor.wiring import auth_settings

SOON_S: Final = 3600.0
_CHECK: Final = "token"
_SHOWN: Final = ("iss", "aud", "sub")
_CLAIM_CHARS: Final = 100


def check_token(host: Host) -> list[Finding]:
    """As the worker would before it dials, with the JWKS when there is one."""
    settings = host.settings
    auth = Auth(auth_settings(settings))

    async def read() -> list[tuple[str, str]]:
        try:
            return await auth.metadata()
        finally:
            auth.close()

    try:
        metadata = asyncio.run(read())
    except KeysUnreachable as error:
        return [Finding("broken", _CHECK, str(error), "nothing is dialed without the keys: check SCHEDULER_JWKS_URL")]
    except AuthError as error:
        return [Finding("broken", _CHECK, str(error), "replace AUTH_TOKEN, WORKER_JWT or the file's token")]
    if not metadata:
        return [Finding("note", _CHECK, "none is set: the scheduler must take anybody", "else set AUTH_TOKEN_FILE")]
    claims = unverified_claims(metadata[0][1].removeprefix("Bearer "))
    findings = [_expiry(claims, time.time(), rotates=settings.auth_token_file is not None)]
    if claims:
        verified = "verified" if settings.scheduler_jwks_url else "not verified: SCHEDULER_JWKS_URL is not set"
        shown = ", ".join(f"{name} {str(claims[name])[:_CLAIM_CHARS]!r}" for name in _SHOWN if name in claims)
        findings.append(Finding("ok", _CHECK, f"{shown or 'no iss, aud or sub'} ({verified})"))
    if not settings.use_tls:
        todo = "set USE_TLS=true unless the network is private"
        findings.append(Finding("warning", _CHECK, "it travels in clear: USE_TLS is false", todo))
    return findings


def _expiry(claims: Mapping[str, object], now: float, *, rotates: bool) -> Finding:
    if not claims:
        return Finding("ok", _CHECK, "opaque: what it claims and how long it lasts only its issuer knows")
    expires = claims.get("exp")
    if isinstance(expires, bool) or not isinstance(expires, (int, float)):
        return Finding("note", _CHECK, "it does not expire", "tokens that expire are safer")
    try:
        when = f"{datetime.fromtimestamp(expires, UTC):%Y-%m-%d %H:%M:%S}Z"
    except (ValueError, OverflowError, OSError):
        return Finding("warning", _CHECK, f"its exp is {str(expires)[:30]}, which is no date", "have it issued anew")
    left = expires - now
    todo = "replace the file's token" if rotates else "replace it and restart the worker"
    if left <= 0:
        return Finding("broken", _CHECK, f"it expired at {when}, {-left:.0f} s ago", todo)
    words = f"it expires at {when}, in {left / 3600:.1f} h"
    return Finding("warning", _CHECK, words, todo) if left < SOON_S and not rotates else Finding("ok", _CHECK, words)
