"""What an operator can do about a dial that failed, where the transport's words don't say it.

Owns: the table of such words. They are those of gRPC's C core and BoringSSL, and of Python's ssl and the h2 transport,
and pinned by tests with real handshakes.
"""

from __future__ import annotations

from typing import Final

_OTHER_NAME: Final = "the scheduler's certificate is not for the host in SCHEDULER_ADDR"
_OTHER_TERMS: Final = "the scheduler may want TLS (USE_TLS) or another client certificate (SCHEDULER_CLIENT_CERT_FILE)"
_HINTS: Final = (
    ("Hostname mismatch", _OTHER_NAME),
    ("IP address mismatch", _OTHER_NAME),
    (
        "CERTIFICATE_VERIFY_FAILED",
        "the scheduler's certificate is not from a CA in SCHEDULER_CA_FILE (without it: the system's), or has expired",
    ),
    ("Hostname Verification Check failed", _OTHER_NAME),
    ("WRONG_VERSION_NUMBER", "the scheduler does not speak TLS, and USE_TLS is true"),
    ("Socket closed", _OTHER_TERMS),
    ("closed the connection", _OTHER_TERMS),
    ("CERTIFICATE_REQUIRED", _OTHER_TERMS),
    ("speaks no HTTP/2", "what is at SCHEDULER_ADDR is no gRPC server, or wants TLS (USE_TLS)"),
)


def hint(details: str) -> str:
    """A text to append to the line about the failed dial; empty when there is nothing to add."""
    return next((f" ({words})" for sign, words in _HINTS if sign in details), "")
