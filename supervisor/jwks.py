"""`python -P -m supervisor.jwks`: verifies one token against a JWKS, the issuer's published keys.

Owns: nothing beyond the one verification; token_check.py keeps the keys, and says what goes in and out. Imports PyJWT
and cryptography, so the supervisor never imports this module.

1. Keys are used for their TTL. A token whose `kid` is not among them has them fetched again at once.
2. When they can't be fetched, older ones that have the token's `kid` serve on: the issuer may be down together with
   the scheduler.
3. Only asymmetric algorithms are taken: with HS256 anyone who has the published key could sign, and `none` is no
   signature.
"""

from __future__ import annotations

import base64
import json
import math
import os
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import unquote, urlsplit

import jwt
import msgspec
from jwt.exceptions import PyJWKClientError

from supervisor.prctl import forbid_inspection
from supervisor.token_check import LOOK_S, Answer, BadToken, Keys, KeysUnavailable, Question

ALGORITHMS: Final = frozenset(
    {"RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"}
)
LEEWAY_S: Final = 30.0
"""How far the clocks of issuer and worker may be apart."""
FETCH_TIMEOUT_S: Final = 5.0

_KEY_TYPES: Final = {"RS": "RSA", "PS": "RSA", "ES": "EC", "Ed": "OKP"}
"""The `kty` (RFC 7518, 6.1) that goes with an algorithm's first two letters."""

_REASONS: Final[tuple[tuple[type[jwt.PyJWTError], str], ...]] = (
    (jwt.ExpiredSignatureError, "it has expired"),
    (jwt.ImmatureSignatureError, "it is not valid yet; check this host's clock"),
    (jwt.InvalidIssuerError, "its issuer is not SCHEDULER_JWT_ISSUER"),
    (jwt.InvalidAudienceError, "its audience is not SCHEDULER_JWT_AUDIENCE"),
    (jwt.InvalidSignatureError, "its signature is wrong"),
)


class TokenVerifier:
    """See the module. `warnings` is what an operator should hear."""

    def __init__(self, question: Question) -> None:
        # PyJWT's cache keeps no keys past their time, nor fetches at once for a new `kid`.
        plain_url, headers = _without_userinfo(question.url)
        self._client = jwt.PyJWKClient(plain_url, cache_jwk_set=False, headers=headers, timeout=FETCH_TIMEOUT_S)
        self._shown_url = plain_url.partition("?")[0]
        self._ttl_s = question.ttl_s
        self._issuer = question.issuer
        self._audience = question.audience
        self.keys = question.keys
        self.warnings: list[str] = []

    def verify(self, token: str, now: float) -> Mapping[str, object]:
        """The claims of `token`, which is good at the epoch second `now`. Raises BadToken, KeysUnavailable."""
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError:
            raise BadToken("it is not a JWT, which SCHEDULER_JWKS_URL asks for") from None
        algorithm = header.get("alg")
        if not isinstance(algorithm, str) or algorithm not in ALGORITHMS:
            named = ascii(algorithm)[:40]
            raise BadToken(f"its algorithm {named} is not one of {', '.join(sorted(ALGORITHMS))}")
        keys = self._keys_for(header.get("kid"), algorithm)
        if not keys:
            raise BadToken(f"none of the keys at {self._shown_url} has its kid and fits {algorithm}")
        failure = BadToken("its signature is wrong")
        for key in keys:
            try:
                return self._claims(token, algorithm, key, now)
            except jwt.InvalidSignatureError:
                continue  # without a kid, another key may be the one
            except jwt.PyJWTError as error:
                failure = BadToken(_reason(error))
                break
        raise failure

    def _claims(self, token: str, algorithm: str, key: jwt.PyJWK, now: float) -> Mapping[str, object]:
        claims: dict[str, Any] = jwt.decode(
            token,
            key,
            algorithms=[algorithm],
            issuer=self._issuer,
            audience=self._audience,
            options={
                "verify_aud": self._audience is not None,
                # Times are compared below, with the clock that was handed in.
                "verify_exp": False,
                "verify_nbf": False,
                "verify_iat": False,
            },
        )
        _check_times(claims, now)
        return claims

    def _keys_for(self, kid: object, algorithm: str) -> list[jwt.PyJWK]:
        """The keys that may have signed. Raises KeysUnavailable when that takes a fetch, and the fetch fails."""
        matching = self._matching(kid, algorithm)
        fetched_at = -math.inf if self.keys.fetched_at is None else self.keys.fetched_at
        if matching and time.monotonic() - fetched_at < self._ttl_s:
            return matching
        try:
            entries = self._fetch()
        except KeysUnavailable as error:
            if not matching:
                raise
            age = time.monotonic() - fetched_at
            self.warnings.append(f"{error}; the keys fetched {age:.0f} s ago serve on")
            return matching
        self.keys = Keys(entries, time.monotonic())
        return self._matching(kid, algorithm)

    def _matching(self, kid: object, algorithm: str) -> list[jwt.PyJWK]:
        keys: list[jwt.PyJWK] = []
        for entry in self.keys.entries:
            if (kid is None or entry.get("kid") == kid) and _fits(entry, algorithm):
                try:
                    keys.append(jwt.PyJWK(entry, algorithm))
                except (jwt.PyJWTError, ValueError, TypeError) as error:
                    self.warnings.append(f"a key at {self._shown_url} is unusable: {type(error).__name__}")
        return keys

    def _fetch(self) -> list[dict[str, Any]]:
        try:
            key_set = self._client.fetch_data()
        except (PyJWKClientError, json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            raise KeysUnavailable(f"no keys at {self._shown_url}: {_one_line(error)}") from None
        entries = key_set.get("keys") if isinstance(key_set, dict) else None
        if not isinstance(entries, list):
            raise KeysUnavailable(f"no keys at {self._shown_url}: not a JWKS, which is an object with a list `keys`")
        return [entry for entry in entries if isinstance(entry, dict)]


def _fits(entry: Mapping[str, Any], algorithm: str) -> bool:
    return (
        entry.get("use") in (None, "sig")
        and entry.get("kty") == _KEY_TYPES[algorithm[:2]]
        and entry.get("alg") in (None, algorithm)
    )


def _check_times(claims: Mapping[str, Any], now: float) -> None:
    """Raises jwt.PyJWTError."""
    for name in ("exp", "nbf", "iat"):
        value = claims.get(name, 0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise jwt.DecodeError(f"{name} is not a number")
    if claims.get("exp", now) + LEEWAY_S < now:
        raise jwt.ExpiredSignatureError
    if max(claims.get("nbf", now), claims.get("iat", now)) - LEEWAY_S > now:
        raise jwt.ImmatureSignatureError


def _reason(error: jwt.PyJWTError) -> str:
    if isinstance(error, jwt.MissingRequiredClaimError):
        return f"it has no {error.claim} claim"
    return next((text for kind, text in _REASONS if isinstance(error, kind)), "it is malformed")


def _without_userinfo(url: str) -> tuple[str, dict[str, str]]:
    """The URL without `user:password@`, and the header that says the same; urllib takes no userinfo."""
    parts = urlsplit(url)
    userinfo, _, host = parts.netloc.rpartition("@")
    if not userinfo:
        return url, {}
    basic = base64.b64encode(unquote(userinfo).encode()).decode()
    return parts._replace(netloc=host).geturl(), {"Authorization": f"Basic {basic}"}


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def answer(question: Question) -> Answer:
    """Verify, and say what came of it."""
    verifier = TokenVerifier(question)
    claims: Mapping[str, object] = {}
    bad_token = no_keys = ""
    try:
        claims = verifier.verify(question.token, question.now)
    except BadToken as error:
        bad_token = str(error)
    except KeysUnavailable as error:
        no_keys = str(error)
    return Answer(verifier.keys, dict(claims), bad_token, no_keys, verifier.warnings)


def _leave_with_parent(parent_pid: int) -> None:
    while os.getppid() == parent_pid:
        time.sleep(LOOK_S)
    os._exit(1)


def main() -> None:
    """One question, one answer. The argument is the pid of who asks."""
    forbid_inspection()
    threading.Thread(target=_leave_with_parent, args=(int(sys.argv[1]),), daemon=True).start()
    question = msgspec.json.decode(sys.stdin.buffer.read(), type=Question)
    sys.stdout.buffer.write(msgspec.json.encode(answer(question)))


if __name__ == "__main__":
    main()
