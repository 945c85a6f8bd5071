"""The precision of a safetensors file on a server, without downloading it.

Owns: nothing. Two Range requests: the first 8 bytes say how long the header is, the next are the header. A server that
answers with the whole file is read as far as needed and left.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec

from gen_worker.errors import FatalError
from supervisor.transfers.hf_selection import precision_of
from supervisor.transfers.http import connection_errors, is_transient, retry_after
from supervisor.transfers.messages import RetrySettings
from supervisor.transfers.retries import Transient, with_retries

HEADER_BYTES: Final = 100 * 1000 * 1000
"""The format's own limit (safetensors, MAX_HEADER_SIZE)."""
_BROKEN: Final = (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError)
"""What a header that is none may raise."""
_LENGTH: Final = struct.Struct("<Q")


async def probe_dtype(
    session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], retry: RetrySettings
) -> str:
    """The dtype of most of the file's bytes, as safetensors names it.

    Raises FatalError when it is not such a file or is refused, RetryableError.
    """
    (length,) = _LENGTH.unpack(await _range(session, url, headers, retry, 0, _LENGTH.size))
    if not 0 < length <= HEADER_BYTES:
        raise FatalError(f"{url} is no safetensors file: its header would have {length} bytes")
    header = await _range(session, url, headers, retry, _LENGTH.size, length)
    try:
        return _dtype(header)
    except _BROKEN as error:
        raise FatalError(f"{url} is no safetensors file: its header is broken: {error!r}") from error


async def _range(
    session: aiohttp.ClientSession, url: str, headers: Mapping[str, str], retry: RetrySettings, start: int, size: int
) -> bytes:
    async def once() -> bytes:
        with connection_errors(url):
            async with session.get(url, headers={**headers, "Range": f"bytes={start}-{start + size - 1}"}) as response:
                if response.status == HTTPStatus.PARTIAL_CONTENT:
                    return await response.content.readexactly(size)
                if response.status == HTTPStatus.OK:
                    await response.content.readexactly(start)
                    return await response.content.readexactly(size)
                status, answered = response.status, response.headers
        if is_transient(status):
            raise Transient(f"{url}: {status}", retry_after(answered))
        raise FatalError(f"{url}: {status}")

    async def attempt() -> bytes:
        try:
            return await once()
        except EOFError as error:  # asyncio.IncompleteReadError
            raise Transient(f"{url}: it ended early") from error

    return await with_retries(retry, attempt)


def file_dtype(path: Path) -> str:
    """The same of a file on disk; "" for one that is no safetensors file."""
    try:
        with path.open("rb") as file:
            (length,) = _LENGTH.unpack(file.read(_LENGTH.size))
            if not 0 < length <= HEADER_BYTES:
                return ""
            return _dtype(file.read(length))
    except (OSError, struct.error, *_BROKEN):
        return ""


def _dtype(header: bytes) -> str:
    return precision_of(msgspec.json.decode(header, type=dict[str, dict[str, Any]]))
