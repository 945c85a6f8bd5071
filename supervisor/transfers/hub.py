"""The model hub: from a cozy ref to a snapshot, a list of files with presigned URLs.

Owns: the hub's HTTP API, both of its ages.

    tag      POST resolve_artifact; on 404, and only then, GET resolve?tag= and on as for a digest
    digest   GET snapshots/<digest>/manifest; on 404 GET objects/<digest>/manifest
             a manifest of an older hub has `root_files`, and `objects`: a directory's name -> its object, whose
             manifest lists the files in it

The bearer token goes to the hub and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any, Final, TypeVar
from urllib.parse import quote, urljoin

import aiohttp
import msgspec

from gen_worker.errors import AuthError, FatalError, ResourceError, ValidationError
from gen_worker.model_refs import ParsedModelRef
from supervisor.transfers.capabilities import capabilities, preferences
from supervisor.transfers.http import connection_errors, is_transient, retry_after
from supervisor.transfers.messages import TransferSettings
from supervisor.transfers.retries import Transient, with_retries
from supervisor.transfers.snapshots import RemoteFile, Snapshot, check_digest, check_files

log = logging.getLogger(__name__)
T = TypeVar("T")

BODY_BYTES: Final = 64 * 1024 * 1024
"""A manifest is far smaller, even of ten thousand files with long presigned URLs."""
SHOWN_CHARS: Final = 300
"""Of what a hub says in an error."""


class _File(msgspec.Struct):
    path: str
    size_bytes: int
    blake3: str
    url: str = ""


class _Manifest(msgspec.Struct):
    files: list[_File] | None = None
    root_files: list[_File] = []
    objects: dict[str, str] = {}


class _Artifact(msgspec.Struct):
    label: str | None = None
    file_layout: str | None = None
    file_type: str | None = None
    quantization: str | None = None


class _Resolved(msgspec.Struct):
    repo_revision_seq: int
    snapshot_digest: str
    artifact: _Artifact
    snapshot_manifest: _Manifest


class _OldResolved(msgspec.Struct):
    digest: str


class Hub:
    """See the module. Errors name the ref.

    AuthError; ValidationError: not there; ResourceError: nothing fits this worker; FatalError: the hub's answer is
    broken; RetryableError: it can't be reached, or says so.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        settings: TransferSettings,
        describe_host: Callable[[int], dict[str, Any]] = capabilities,
    ) -> None:
        self._session = session
        self._settings = settings
        self._describe_host = describe_host

    async def snapshot(self, ref: ParsedModelRef) -> Snapshot:
        """What a cozy ref stands for now."""
        if not self._settings.hub_url:
            raise FatalError(f"{ref.canonical} can't be fetched: COZY_HUB_URL is not set")
        if ref.digest is not None:
            return await self.pinned(ref, ref.digest)
        host = await asyncio.to_thread(self._describe_host, self._settings.gpu_sm)
        body = {"tag": ref.tag, "include_urls": True, "preferences": preferences(host), "capabilities": host}
        answer = await self._ask(ref, "POST", "resolve_artifact", body)
        if answer is None:
            log.info("the hub has no resolve_artifact for %s: asking as older hubs are asked", ref.canonical)
            return await self._by_old_tag(ref)
        resolved = _decoded(answer, _Resolved, ref)
        if resolved.repo_revision_seq <= 0:
            raise FatalError(f"the hub's answer for {ref.canonical} is wrong: its repo_revision_seq is not above 0")
        digest = check_digest(resolved.snapshot_digest, ref.canonical)
        artifact = msgspec.structs.asdict(resolved.artifact)
        metadata = {name: value for name, value in artifact.items() if value}
        return Snapshot(digest, await self._files(ref, resolved.snapshot_manifest), metadata)

    async def _by_old_tag(self, ref: ParsedModelRef) -> Snapshot:
        answer = await self._ask(ref, "GET", f"resolve?tag={quote(ref.tag or '', safe='')}")
        if answer is None:
            raise ValidationError(f"the hub has no {ref.canonical} (404), or not for this worker's COZY_HUB_TOKEN")
        digest = check_digest(_decoded(answer, _OldResolved, ref).digest, ref.canonical)
        return await self.pinned(ref, digest)

    async def pinned(self, ref: ParsedModelRef, digest: str) -> Snapshot:
        """One snapshot of the ref's repo."""
        answer = await self._ask(ref, "GET", f"snapshots/{digest}/manifest")
        if answer is None:
            answer = await self._object(ref, digest)
        if answer is None:
            raise ValidationError(f"the hub has no snapshot {digest} of {ref.canonical} (404)")
        return Snapshot(digest, await self._files(ref, _decoded(answer, _Manifest, ref)), {})

    async def _files(self, ref: ParsedModelRef, manifest: _Manifest) -> tuple[RemoteFile, ...]:
        if manifest.files is not None:
            found = list(manifest.files)
        else:
            found = list(manifest.root_files)
            objects = await asyncio.gather(*(self._object_files(ref, *each) for each in manifest.objects.items()))
            found += [file for files in objects for file in files]
        base = self._settings.hub_url + "/"
        return check_files(
            [
                RemoteFile(
                    path=file.path,
                    size_bytes=file.size_bytes,
                    blake3=file.blake3.lower().removeprefix("blake3:"),
                    url=urljoin(base, file.url) if file.url else "",
                )
                for file in found
            ],
            ref.canonical,
        )

    async def _object_files(self, ref: ParsedModelRef, name: str, digest: str) -> list[_File]:
        """The files of one object, under its name."""
        answer = await self._object(ref, check_digest(digest, ref.canonical))
        if answer is None:
            raise FatalError(f"the manifest of {ref.canonical} names object {digest}, which the hub does not have")
        files = _decoded(answer, _Manifest, ref).files or []
        if not all(file.path.startswith(f"{name}/") for file in files):
            files = [msgspec.structs.replace(file, path=f"{name}/{file.path}") for file in files]
        return files

    async def _object(self, ref: ParsedModelRef, digest: str) -> bytes | None:
        return await self._ask(ref, "GET", f"/api/v1/objects/{digest}/manifest")

    # -- one request --------------------------------------------------------------------------

    async def _ask(
        self, ref: ParsedModelRef, method: str, path: str, body: Mapping[str, Any] | None = None
    ) -> bytes | None:
        """The answer's body, None on 404; what may pass is tried again."""
        place = path if path.startswith("/") else f"/api/v1/repos/{ref.org}/{ref.repo}/{path}"
        return await with_retries(self._settings.retry, lambda: self._ask_once(ref, method, place, body))

    async def _ask_once(
        self, ref: ParsedModelRef, method: str, place: str, body: Mapping[str, Any] | None
    ) -> bytes | None:
        token = self._settings.hub_token
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        what = f"{method} {self._settings.hub_url}{place} for {ref.canonical}"
        with connection_errors(what):
            async with self._session.request(
                method, self._settings.hub_url + place, json=body, headers=headers, allow_redirects=False
            ) as response:
                said = await _read(response, what)
                status, answered = response.status, response.headers
        if status == HTTPStatus.OK:
            return said
        if status == HTTPStatus.NOT_FOUND:
            return None
        if is_transient(status):
            raise Transient(f"{what}: {_words(status)}", retry_after(answered))
        raise _refusal(ref, what, status, said)


def _refusal(ref: ParsedModelRef, what: str, status: int, said: bytes) -> Exception:
    if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return AuthError(f"the hub refuses {ref.canonical} ({_words(status)}): check COZY_HUB_TOKEN")
    shown = said[:SHOWN_CHARS].decode(errors="replace")
    if status == HTTPStatus.CONFLICT:
        return ResourceError(f"no artifact of {ref.canonical} fits this worker: {_debug(said) or shown}")
    return FatalError(f"{what}: {_words(status)}: {shown}")


def _debug(said: bytes) -> str:
    """The `debug` of a 409's body, as one line."""
    try:
        debug = msgspec.json.decode(said, type=dict[str, Any]).get("debug", "")
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
    return debug if isinstance(debug, str) else msgspec.json.encode(debug).decode()


def _words(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


async def _read(response: aiohttp.ClientResponse, what: str) -> bytes:
    body = bytearray()
    async for piece in response.content.iter_any():
        body += piece
        if len(body) > BODY_BYTES:
            raise FatalError(f"{what}: the answer is over {BODY_BYTES} bytes")
    return bytes(body)


def _decoded(body: bytes, kind: type[T], ref: ParsedModelRef) -> T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FatalError(f"the hub's answer for {ref.canonical} is broken: {error}") from error
