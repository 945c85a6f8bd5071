"""HTTP clients for files.

Owns: what they all have in common. They read nothing of the environment (no proxies, no netrc), keep no cookies, since
they serve several tenants, and follow no redirects by themselves.
"""

from __future__ import annotations

import functools
import ssl
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Final

import httpx

MAX_CONNECTIONS: Final = 64


def open_client(timeout_s: float, *, keep: int, tls: ssl.SSLContext | None = None) -> httpx.AsyncClient:
    """A client; `timeout_s` without a byte ends a request, `keep` idle connections are kept."""
    return httpx.AsyncClient(
        timeout=httpx.Timeout(timeout_s, pool=None),
        limits=httpx.Limits(max_connections=MAX_CONNECTIONS, max_keepalive_connections=keep),
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        trust_env=False,
        verify=tls or _default_trust(),
    )


@functools.cache
def _default_trust() -> ssl.SSLContext:
    """The system's authorities; reading them takes a tenth of a second."""
    return ssl.create_default_context()
