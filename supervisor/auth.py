"""The credential for the scheduler.

Owns: where the token comes from, and the timer that warns before it expires.

1. AUTH_TOKEN_FILE is read at every dial and goes before the other two, since a file is what gets rotated;
   else AUTH_TOKEN; else WORKER_JWT. Without any of them there is no metadata.
2. With a JWKS URL the token is verified before it is shown to anyone: signature, expiry, issuer and audience
   (token_check.py). Without one a token may be anything that fits into a header.
3. The token's `exp` is read, and a warning is due before it is reached.

    AuthError                   base; `final` says that no later dial can do better
    |-- TokenRefused            the token can't be used; final unless it comes from a file
    |-- TokenFileUnreadable     the file is missing, empty or not a token
    `-- KeysUnreachable         the JWKS can't be fetched and none is cached

No message of these errors and no line of the log has the token in it.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import json
import logging
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from supervisor.token_check import BadToken, KeysUnavailable, TokenCheck

log = logging.getLogger(__name__)

WARN_S: Final = 300.0
"""Expiry is announced this long before, or when WARN_SHARE of the token's life is left, if that is earlier."""
WARN_SHARE: Final = 0.1
MAX_TOKEN_BYTES: Final = 16 * 1024
"""gRPC servers take 8 KiB of headers by default, some are set to more; a larger file is surely something else."""

_LAST_SECOND: Final = datetime.max.replace(tzinfo=UTC).timestamp()
_HEADER_SAFE: Final = re.compile(r"[\x21-\x7e]+")


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthSettings:
    """AUTH_TOKEN, WORKER_JWT, AUTH_TOKEN_FILE and SCHEDULER_JWKS_URL with what belongs to it; empty: not set."""

    auth_token: str = field(default="", repr=False)
    worker_jwt: str = field(default="", repr=False)
    token_file: Path | None = None
    jwks_url: str = ""
    jwks_ttl_s: float = 300.0
    issuer: str = ""
    audience: str = ""


class AuthError(Exception):
    """There is no credential to dial with. The message is one line for the operator."""

    final: bool = False


class TokenRefused(AuthError):
    """The token was looked at and is no good."""

    def __init__(self, message: str, *, final: bool = True) -> None:
        super().__init__(message)
        self.final = final


class TokenFileUnreadable(AuthError):
    """AUTH_TOKEN_FILE can't be read, or has no token in it (yet)."""


class KeysUnreachable(AuthError):
    """The JWKS can't be had; whether the token is good is not known."""


class Auth:
    """Gives the metadata for each dial.

    `now` gives epoch seconds; `conceal` is told each token, so that the log can mask it.
    """

    def __init__(
        self,
        settings: AuthSettings,
        now: Callable[[], float] = time.time,
        conceal: Callable[[Iterable[str]], None] | None = None,
    ) -> None:
        self._settings = settings
        self._now = now
        self._conceal = conceal
        self._verifier: TokenCheck | None = None
        self._warning: asyncio.TimerHandle | None = None

    async def metadata(self) -> list[tuple[str, str]]:
        """What goes with the dial. Raises AuthError."""
        token, source = await self._read()
        self.close()
        if not token:
            return []
        if self._conceal is not None:
            self._conceal((token,))
        if self._settings.jwks_url:
            claims = await self._verify(token, source)
        else:
            claims = unverified_claims(token)
        self._watch_expiry(claims, source)
        return [("authorization", f"Bearer {token}")]

    def close(self) -> None:
        """Forget the timer that warns of expiry."""
        if self._warning is not None:
            self._warning.cancel()
            self._warning = None

    async def _read(self) -> tuple[str, str]:
        """The token and the name of where it came from. Raises TokenFileUnreadable, TokenRefused."""
        settings = self._settings
        if settings.token_file is not None:
            source = f"AUTH_TOKEN_FILE {settings.token_file}"
            token = await asyncio.to_thread(_read_file, settings.token_file, source)
            if not token:
                raise TokenFileUnreadable(f"{source} is empty; expected a token in it")
        else:
            source = "AUTH_TOKEN" if settings.auth_token else "WORKER_JWT"
            token = (settings.auth_token or settings.worker_jwt).strip()
        if token and not _HEADER_SAFE.fullmatch(token):
            raise self._refused(source, "it has characters that can't stand in a header")
        return token, source

    async def _verify(self, token: str, source: str) -> Mapping[str, object]:
        """The verified claims. Raises TokenRefused, KeysUnreachable."""
        settings = self._settings
        if self._verifier is None:
            self._verifier = TokenCheck(
                settings.jwks_url, settings.jwks_ttl_s, settings.issuer or None, settings.audience or None
            )
        try:
            return await asyncio.to_thread(self._verifier.verify, token, self._now())
        except BadToken as error:
            raise self._refused(source, str(error)) from None
        except KeysUnavailable as error:
            raise KeysUnreachable(f"{error}; the token from {source} is not verified, so nothing is dialed") from None

    def _refused(self, source: str, reason: str) -> TokenRefused:
        return TokenRefused(f"the token from {source} can't be used: {reason}", final=self._settings.token_file is None)

    def _watch_expiry(self, claims: Mapping[str, object], source: str) -> None:
        """Warn now or later, WARN_S or WARN_SHARE before the end, but never in the first half of the token's life."""
        expires = _number(claims.get("exp"))
        if expires is None:
            return
        left = expires - self._now()
        issued = _number(claims.get("iat"))
        life = left if issued is None else max(expires - issued, left)
        ahead = min(max(WARN_S, life * WARN_SHARE), life / 2)
        if left <= ahead:
            self._warn_of_expiry(expires, source)
        else:
            loop = asyncio.get_running_loop()
            self._warning = loop.call_later(left - ahead, self._warn_of_expiry, expires, source)

    def _warn_of_expiry(self, expires: float, source: str) -> None:
        left = expires - self._now()
        when = f"expires at {datetime.fromtimestamp(expires, UTC):%Y-%m-%d %H:%M:%S}Z, in {left:.0f} s"
        if left <= 0:
            when = f"expired {-left:.0f} s ago"
        if self._settings.token_file is None:
            log.warning("the token from %s %s; replace it and restart the worker before then", source, when)
        else:
            log.warning("the token from %s %s; the file is read again at the next dial", source, when)


def unverified_claims(token: str) -> Mapping[str, object]:
    """The claims of a JWT, believed as they are; empty when the token is none."""
    try:
        body = token.split(".")[1]
        claims = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    except (IndexError, ValueError, binascii.Error, RecursionError):
        return {}  # an opaque token is fine: only its issuer need understand it
    return claims if isinstance(claims, dict) else {}


def _read_file(path: Path, source: str) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_TOKEN_BYTES + 1)
    except OSError as error:
        raise TokenFileUnreadable(f"{source} can't be read: {error.strerror or type(error).__name__}") from None
    if len(data) > MAX_TOKEN_BYTES:
        raise TokenFileUnreadable(f"{source} has more than {MAX_TOKEN_BYTES} bytes; expected one token")
    return data.decode("utf-8", "replace").strip()


def _number(value: object) -> float | None:
    """An epoch second that a date can be made of; anything else is no expiry."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 <= value <= _LAST_SECOND else None
