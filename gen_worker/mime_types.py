"""What kind of file some bytes are.

Owns: the order of the evidence: the first bytes, then what the store says, then the name.
"""

from __future__ import annotations

import mimetypes
from typing import Final

HEAD_BYTES: Final = 64 * 1024
"""How much of a file's start is enough to tell: some formats have their mark far in (ISO 9660, at 32 KiB)."""
UNKNOWN: Final = "application/octet-stream"

_ZIP: Final = b"PK\x03\x04"
_CERTAIN: Final = 0.3
"""Of puremagic's confidence, which is a tenth per matching byte: three bytes are no accident."""


def mime_type_of(head: bytes, name: str = "", told: str = "") -> str:
    """The mime type of a file that begins with `head`; `told` is what its store says. Never empty."""
    by_name = mimetypes.guess_type(name)[0] or ""
    return _by_bytes(head, by_name) or (told if told != UNKNOWN else "") or by_name or UNKNOWN


def _by_bytes(head: bytes, by_name: str) -> str:
    """By magic bytes; "" when they say nothing. Where several formats share them the name decides."""
    import puremagic  # noqa: PLC0415  (a table of a thousand formats, for those who store files)

    if not head:
        return ""
    try:
        matches = puremagic.magic_string(head)
    except puremagic.PureError:
        return ""
    found = [match.mime_type for match in matches if match.mime_type and match.confidence >= _CERTAIN]
    if not found or by_name in found:
        return by_name if found else ""
    # A zip file may be a document, an archive of code or just that: without a name that says so, just that.
    return "application/zip" if head.startswith(_ZIP) else str(found[0])
