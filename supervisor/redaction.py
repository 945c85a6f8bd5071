"""Takes secrets out of text before it is logged.

Owns: what counts as a secret in free text: the configured values, and what looks like a credential wherever it came
from (a scheduler's URL, a library's error message). The patterns are linear in the length of the text.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

MASK: Final = "***"
MIN_SECRET_LENGTH: Final = 4
"""Shorter values are too likely to be part of ordinary words; masking those would garble the log."""

_LOOKS_SECRET: Final = re.compile(
    r"""
    (?P<scheme>bearer\s{1,4}) [\w.~+/=-]{16,}                # authorization headers
    | (?<![\w-]) eyJ[\w-]{6,}\.[\w-]{6,}(?:\.[\w-]*)?          # JWTs: base64url of '{"'
    | (?<![\w-]) hf_[A-Za-z0-9]{20,}                           # Hugging Face tokens
    | (?P<userinfo>://) [^\s/@:?\#]{1,256}:[^\s/@?\#]{1,4096}@  # user:password in a URL
    | (?P<query>(?:(?:token|signature|credential|secret|passwd|password|api[-_]?key|access[-_]?key(?:[-_]?id)?)=
               |[?&](?:sig|auth|key|code)=)) [^\s&\#"'<>,;]+    # token=...; presigned URLs
    | (?P<json>"(?:[\w-]{0,32}(?:token|secret|password|api[-_]?key)|authorization)"\s{0,4}:\s{0,4}") [^"]+
    """,
    re.IGNORECASE | re.VERBOSE | re.ASCII,
)


class Redactor:
    """Replaces secrets by `***`. Thread-safe: the pattern of known values is swapped whole."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        self._secrets: frozenset[str] = frozenset()
        self._known: re.Pattern[str] | None = None
        self.add(secrets)

    def add(self, secrets: Iterable[str]) -> None:
        """Mask these values too, such as a token that was read from a file."""
        self._secrets |= {secret for secret in secrets if len(secret) >= MIN_SECRET_LENGTH}
        if self._secrets:
            # Longest first: a secret that contains another one is masked whole.
            longest_first = sorted(self._secrets, key=lambda secret: (-len(secret), secret))
            self._known = re.compile("|".join(map(re.escape, longest_first)))

    def redact(self, text: str) -> str:
        """`text` with every secret masked."""
        if self._known is not None:
            text = self._known.sub(MASK, text)
        return _LOOKS_SECRET.sub(_masked, text)


def _masked(match: re.Match[str]) -> str:
    kept = match["scheme"] or match["query"] or match["json"] or match["userinfo"] or ""
    return f"{kept}{MASK}@" if match["userinfo"] else f"{kept}{MASK}"
