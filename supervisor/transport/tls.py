"""The TLS files as an ssl context.

Owns: the check that the files are what they should be, with words for the operator. A transport that hands files to a
library of its own makes the context too, since such a library would only fail to connect.
"""

from __future__ import annotations

import ssl

from supervisor.transport import StatusCode, StreamClosed, StreamStatus, TlsFiles


def ca_file(tls: TlsFiles) -> str | None:
    """The file with the CAs to trust; None: the system has them in another form."""
    return tls.ca_file or ssl.get_default_verify_paths().cafile


def tls_context(tls: TlsFiles) -> ssl.SSLContext:
    """Raises StreamClosed when a file is missing or not what it should be. Reads files: call it in a thread."""
    trusted = ca_file(tls)
    try:
        context = ssl.create_default_context(cafile=trusted)
        if tls.client_cert_file is not None:
            context.load_cert_chain(tls.client_cert_file, tls.client_key_file)
    except (OSError, ssl.SSLError) as error:
        files = ", ".join(name for name in (trusted, tls.client_cert_file, tls.client_key_file) if name)
        reason = f"the TLS files can't be used ({files}): {error}"
        raise StreamClosed(StreamStatus(StatusCode.UNAVAILABLE, reason)) from None
    return context
