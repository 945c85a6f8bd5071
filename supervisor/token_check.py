"""Verifying a token against a JWKS in a process of its own, which is gone when it has answered.

Owns: the published keys between two verifications, and what is said to that process. cryptography takes 10 MiB for
as long as its process lives, which is much for a supervisor that verifies a token once per dial.

1. `python -P -m supervisor.jwks` gets one Question as JSON on its stdin, and writes one Answer to its stdout.
2. It looks for its parent LOOK_S apart while it works, so that it does not outlive a supervisor that is killed. The
   kernel's parent-death signal would not do: it comes when the thread ends that started the process.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, Final

import msgspec

log = logging.getLogger(__name__)

VERIFY_TIMEOUT_S: Final = 10.0
"""Then the process is killed; the fetch alone gives up sooner."""
LOOK_S: Final = 0.25


class BadToken(Exception):
    """The token does not hold; the message completes `the token can't be used: `."""


class KeysUnavailable(Exception):
    """The JWKS can't be fetched, or nothing can verify the token here."""


class Keys(msgspec.Struct, frozen=True):
    """What was published, and when it was fetched: in seconds of the host's monotonic clock; None: not yet."""

    entries: list[dict[str, Any]] = []
    fetched_at: float | None = None


class Question(msgspec.Struct, frozen=True):
    """`now` is the epoch second that `token` is to be good at."""

    url: str
    ttl_s: float
    issuer: str | None
    audience: str | None
    token: str
    now: float
    keys: Keys


class Answer(msgspec.Struct, frozen=True):
    """The claims, or what is wrong, with the token or with the keys; and the keys for the next time."""

    keys: Keys
    claims: dict[str, Any] = {}
    bad_token: str = ""
    no_keys: str = ""
    warnings: list[str] = []


class TokenCheck:
    """See the module. One call at a time."""

    def __init__(self, url: str, ttl_s: float, issuer: str | None, audience: str | None) -> None:
        self._url = url
        self._ttl_s = ttl_s
        self._issuer = issuer
        self._audience = audience
        self._keys = Keys()

    def verify(self, token: str, now: float) -> Mapping[str, object]:
        """The claims of `token`, which is good at the epoch second `now`. Raises BadToken, KeysUnavailable. Blocks."""
        question = Question(self._url, self._ttl_s, self._issuer, self._audience, token, now, self._keys)
        answer = _ask(question)
        self._keys = answer.keys
        for warning in answer.warnings:
            log.warning("%s", warning)
        if answer.bad_token:
            raise BadToken(answer.bad_token)
        if answer.no_keys:
            raise KeysUnavailable(answer.no_keys)
        return answer.claims


def _ask(question: Question) -> Answer:
    """Raises KeysUnavailable when no process can answer."""
    try:
        done = subprocess.run(  # noqa: S603  (our own module, which looks whether this process lives)
            [sys.executable, "-P", "-m", "supervisor.jwks", str(os.getpid())],
            input=msgspec.json.encode(question),
            capture_output=True,
            timeout=VERIFY_TIMEOUT_S,
            check=True,
        )
        return msgspec.json.decode(done.stdout, type=Answer)
    except subprocess.TimeoutExpired:
        raise KeysUnavailable(f"the JWKS took more than {VERIFY_TIMEOUT_S:.0f} s to come") from None
    except subprocess.CalledProcessError as error:
        last = error.stderr[-2000:].decode("utf-8", "replace").strip().rpartition("\n")[2]
        raise KeysUnavailable(f"the process that verifies tokens failed ({error.returncode}): {last}") from None
    except (OSError, ValueError) as error:  # ValueError: msgspec's
        raise KeysUnavailable(f"no process verifies the token: {error}") from None
