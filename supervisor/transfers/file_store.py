"""The file store's HTTP API, for one run: its base URL, its token, its tenant.

Owns: which answer means what. 401 and 403 are an AuthError, 409 of a create and 404 a ValidationError; 408, 425, 429,
5xx and connections that break are tried again, and are a RetryableError when that does not help. A redirect is not
followed: it would carry the token elsewhere.

A create whose answer was lost may have worked. So before it is tried again, and when the next try says that the ref
exists, what is there is looked at: bytes of the same size and SHA-256 are taken for what this create has stored.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol
from urllib.parse import quote

import httpx
import msgspec

from gen_worker.errors import AuthError, ValidationError, WorkerError
from supervisor.transfers.messages import FileAccess, RetrySettings
from supervisor.transfers.retrying import TryAgain, attempts, check_again

API_PREFIX: Final = "/api/v1/file/"
MAX_REF_BYTES: Final = 4096
ANSWER_S: Final = 120.0
"""A store that has a large upload may take this long to say so: it hashes, and moves it to where it stays."""
_MAX_ANSWER_BYTES: Final = 64 * 1024
_DIGEST_CHARS: Final = 64
_NO_METHOD: Final = frozenset({405, 501})
_HEADER_SAFE: Final = " !\"#$&'()*+,/:;<=>?@[\\]^`{|}"


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """What the store tells of a file; None and "" where it does not."""

    size_bytes: int | None = None
    sha256: str = ""
    mime_type: str = ""


class Source(Protocol):
    """The bytes of an upload, which may have to be read more than once."""

    size_bytes: int

    def blocks(self) -> AsyncIterator[bytes]:
        """All bytes, from the first."""

    async def digest(self) -> str:
        """SHA-256 of all bytes, in hex."""


class _Answer(msgspec.Struct):
    """Of PUT and POST."""

    ref: str = ""
    size_bytes: int | None = None
    sha256: str = ""
    mime_type: str | None = None


class FileStore:
    """See the module."""

    def __init__(self, client: httpx.AsyncClient, access: FileAccess, retry: RetrySettings) -> None:
        self._client = client
        self._access = access
        self._retry = retry
        self._headers = {"Accept-Encoding": "identity"}
        if access.token:
            self._headers["Authorization"] = f"Bearer {access.token}"
        if access.tenant_id:
            # A header is Latin-1 at most, and a tenant's name need not be.
            self._headers["X-Cozy-Tenant-Id"] = quote(access.tenant_id, safe=_HEADER_SAFE)

    @property
    def base_url(self) -> str:
        """Empty: there is none."""
        return self._access.base_url

    # -- reading ------------------------------------------------------------------------------

    async def head(self, ref: str) -> RemoteFile:
        """What the store tells of a file; nothing when it has no HEAD. Raises a WorkerError."""
        async for attempt in attempts(self._retry):
            with attempt:
                async with self._request("HEAD", ref) as response:
                    if response.status_code in _NO_METHOD:
                        return RemoteFile()
                    self._check(response)
                    return told_by(response)
        raise AssertionError("unreachable: the last attempt raises")

    @asynccontextmanager
    async def open(self, ref: str) -> AsyncIterator[httpx.Response]:
        """The response of a GET, its body not read yet. Raises a WorkerError; TryAgain is the caller's to follow."""
        async with self._request("GET", ref) as response:
            self._check(response)
            yield response

    # -- writing ------------------------------------------------------------------------------

    async def store(self, ref: str, source: Source, mime_type: str, *, create: bool) -> RemoteFile:
        """Upload; what the store then has. Raises a WorkerError."""
        unsure = False
        async for attempt in attempts(self._retry):
            with attempt:
                if unsure and (stored := await self._what_is_there(ref, source)) is not None:
                    return stored
                try:
                    return await self._upload("POST" if create else "PUT", ref, source, mime_type)
                except NotSent:
                    raise
                except TryAgain:
                    unsure = create
                    raise
                except Exists:
                    if unsure and (stored := await self._what_is_there(ref, source)) is not None:
                        return stored
                    raise
        raise AssertionError("unreachable: the last attempt raises")

    async def _upload(self, method: str, ref: str, source: Source, mime_type: str) -> RemoteFile:
        headers = {"Content-Length": str(source.size_bytes), "Content-Type": mime_type}
        async with self._request(method, ref, headers, source.blocks) as response:
            if response.status_code == httpx.codes.CONFLICT and method == "POST":
                raise Exists("it exists already")
            self._check(response)
            answer = await _read_answer(response)
        digest = await source.digest()
        told = (answer.size_bytes or source.size_bytes, answer.sha256.lower() or digest)
        if told != (source.size_bytes, digest):
            stored = f"{told[0]} bytes with SHA-256 {told[1][:_DIGEST_CHARS]}"
            raise TryAgain(f"the file store has {stored}, {source.size_bytes} bytes with {digest} were sent")
        return RemoteFile(source.size_bytes, digest, answer.mime_type or "")

    async def _what_is_there(self, ref: str, source: Source) -> RemoteFile | None:
        """After a create of unknown end: what the store has, when that is ours; None when it has nothing."""
        try:
            found = await self.head(ref)
        except NotFound:
            return None
        if found.size_bytes is None and not found.sha256:
            return None  # a store without HEAD: the next try tells
        if found.size_bytes == source.size_bytes and found.sha256 == await source.digest():
            return found
        raise Exists("it exists already")

    # -- both ---------------------------------------------------------------------------------

    @asynccontextmanager
    async def _request(
        self,
        method: str,
        ref: str,
        headers: dict[str, str] | None = None,
        body: Callable[[], AsyncIterator[bytes]] | None = None,
    ) -> AsyncIterator[httpx.Response]:
        url = f"{self._access.base_url.rstrip('/')}{API_PREFIX}{quoted(ref)}"
        content = None if body is None else body()
        timeout = self._client.timeout
        if content is not None:
            read_s = max(ANSWER_S, timeout.read or 0)
            timeout = httpx.Timeout(connect=timeout.connect, read=read_s, write=timeout.write, pool=timeout.pool)
        try:
            request = self._client.build_request(
                method, url, headers={**self._headers, **(headers or {})}, content=content, timeout=timeout
            )
            response = await self._client.send(request, stream=True, follow_redirects=False)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise WorkerError(f"the file store's address can't be used: {error}") from error
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            raise NotSent(f"the file store can't be reached ({_named(error)})") from error
        except httpx.TransportError as error:
            raise TryAgain(f"the file store does not answer ({_named(error)})") from error
        try:
            yield response
        except httpx.TransportError as error:
            raise TryAgain(f"the connection to the file store broke ({_named(error)})") from error
        finally:
            await response.aclose()

    def _check(self, response: httpx.Response) -> None:
        status = response.status_code
        if httpx.codes.is_success(status):
            return
        if status in {httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN}:
            raise AuthError(f"the file store refused access ({status})")
        if status == httpx.codes.NOT_FOUND:
            raise NotFound("the file store has no such file")
        check_again(response, "the file store")
        if status == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
            raise ValidationError("it is too large for the file store (413)")
        raise ValidationError(f"the file store answered {status}")


class NotFound(ValidationError):
    """404."""


class Exists(ValidationError):
    """409 of a create."""


class NotSent(TryAgain):
    """There was no connection: whatever the request asked for did not happen."""


def told_by(response: httpx.Response) -> RemoteFile:
    """The store's headers; a size or a digest that is none counts as not told."""
    size = response.headers.get("X-Cozy-Size-Bytes", "").strip()
    digest = response.headers.get("X-Cozy-SHA256", "").strip().lower()
    whole = len(digest) == _DIGEST_CHARS and not digest.strip("0123456789abcdef")
    return RemoteFile(
        int(size) if size.isascii() and size.isdecimal() else None,
        digest if whole else "",
        response.headers.get("X-Cozy-Mime-Type", "").strip(),
    )


def quoted(ref: str) -> str:
    """A ref as a URL's path. Raises ValidationError for what is no relative path."""
    segments = ref.split("/")
    if any(segment in {"", ".", ".."} for segment in segments):
        raise ValidationError("its ref is empty, absolute or has an empty, '.' or '..' segment")
    if "\\" in ref or not ref.isprintable():
        raise ValidationError("its ref has a backslash or an unprintable character")
    if len(ref.encode()) > MAX_REF_BYTES:
        raise ValidationError(f"its ref is longer than {MAX_REF_BYTES} bytes")
    return "/".join(quote(segment, safe="") for segment in segments)


async def _read_answer(response: httpx.Response) -> _Answer:
    body = bytearray()
    async for block in response.aiter_raw():
        body += block
        if len(body) > _MAX_ANSWER_BYTES:
            raise TryAgain("the file store's answer is too long to be one")
    try:
        return msgspec.json.decode(bytes(body), type=_Answer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise TryAgain(f"the file store's answer can't be read: {error}") from error


def _named(error: httpx.TransportError) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
