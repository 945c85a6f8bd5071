"""Talking HTTP: one session, and what an answer or a broken connection means.

Owns: the mapping of statuses and connection errors to what may pass (Transient) and what does not (WorkerError).
"""

from __future__ import annotations

import email.utils
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Final

import aiohttp

from gen_worker._version import __version__
from gen_worker.errors import FatalError
from supervisor.transfers.retries import Transient

CONNECT_S: Final = 15.0
READ_BUFFER_BYTES: Final = 4 * 1024 * 1024
"""Per connection; large enough that the network goes on while a piece is hashed and written."""
LONGEST_WAIT_S: Final = 600.0
"""A Retry-After beyond it is not waited for in full."""
_TRANSIENT: Final = frozenset({HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.TOO_EARLY, HTTPStatus.TOO_MANY_REQUESTS})


def open_session(timeout_s: float) -> aiohttp.ClientSession:
    """A session without any credential; `timeout_s` is how long the other side may be silent."""
    return aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=min(CONNECT_S, timeout_s), sock_read=timeout_s),
        connector=aiohttp.TCPConnector(limit=0),
        headers={"User-Agent": f"gen-worker/{__version__}", "Accept-Encoding": "identity"},
        cookie_jar=aiohttp.DummyCookieJar(),
        read_bufsize=READ_BUFFER_BYTES,
        auto_decompress=False,
        trust_env=True,  # proxies
    )


@contextmanager
def connection_errors(what: str) -> Iterator[None]:
    """Raises Transient for a connection that breaks, FatalError for one that can't be."""
    try:
        yield
    except aiohttp.InvalidURL:
        raise FatalError(f"{what}: its URL can't be used") from None  # and may hold a credential
    except aiohttp.ClientConnectorCertificateError as error:
        raise FatalError(f"{what}: {error}") from error
    except TimeoutError as error:
        raise Transient(f"{what}: no answer in time") from error
    except aiohttp.ClientError as error:
        raise Transient(f"{what}: the connection failed: {str(error) or type(error).__name__}") from error


def is_transient(status: int) -> bool:
    return status in _TRANSIENT or status >= HTTPStatus.INTERNAL_SERVER_ERROR


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that Retry-After asks to wait, as a number or a date; None without a usable one."""
    written = headers.get("Retry-After", "").strip()
    if not written:
        return None
    if written.isascii() and written.isdigit():
        return min(float(written), LONGEST_WAIT_S)
    try:
        moment = email.utils.parsedate_to_datetime(written).timestamp()
    except (TypeError, ValueError):
        return None
    return min(max(moment - time.time(), 0.0), LONGEST_WAIT_S)
