"""Files from URLs that anybody may name, fetched from public addresses only.

Owns: the way from a URL to a response. 1. parse it (addresses.py); 2. look its host up once, and refuse it when any of
the addresses is not public; 3. connect to an address that was looked at, with the host's name in the Host header and in
TLS, so that a name that changes its mind in between gains nothing; 4. a redirect goes back to 1.

The environment's proxies are not used: they would do the look-up again, somewhere else.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import httpx

from gen_worker.errors import ValidationError
from supervisor.transfers.addresses import Address, is_public, literal, parse_url
from supervisor.transfers.clients import open_client
from supervisor.transfers.retrying import TryAgain, check_again

MAX_REDIRECTS: Final = 5
_MAX_TRIED: Final = 4
"""Addresses of one host."""

Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]
"""All addresses of a host. Raises OSError when there is none."""


async def system_resolve(host: str, port: int) -> Sequence[Address]:
    """By the system's resolver."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = (literal(str(entry[4][0])) for entry in found)
    return list(dict.fromkeys(address for address in addresses if address is not None))


class PublicWeb:
    """See the module. `allowed` says which addresses may be connected to."""

    def __init__(
        self,
        *,
        timeout_s: float,
        resolve: Resolve = system_resolve,
        allowed: Callable[[Address], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._resolve = resolve
        self._allowed = allowed
        # No connection is kept: one is verified for the host that it was opened for, and httpx would know it by the
        # address, which another host may share.
        self._client = open_client(timeout_s, keep=0, tls=tls)

    async def close(self) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def open(self, text: str) -> AsyncIterator[httpx.Response]:
        """The response of a GET, its body not read yet. Raises ValidationError, TryAgain."""
        url = parse_url(text)
        async with AsyncExitStack() as stack:
            for _ in range(MAX_REDIRECTS + 1):
                addresses = await self._addresses(url)
                response = await self._get(url, addresses[:_MAX_TRIED])
                if not response.has_redirect_location:
                    stack.push_async_callback(response.aclose)
                    check_again(response, "its server")
                    if response.status_code != httpx.codes.OK:
                        raise ValidationError(f"its server answered {response.status_code}")
                    try:
                        yield response
                    except httpx.TransportError as error:
                        raise TryAgain(f"the connection to its server broke ({type(error).__name__})") from error
                    return
                await response.aclose()
                url = parse_url(_joined(url, response.headers["Location"]))
        raise ValidationError(f"its URL redirects more than {MAX_REDIRECTS} times")

    async def _addresses(self, url: httpx.URL) -> Sequence[Address]:
        host, port = url.raw_host.decode("ascii"), url.port or _PORTS[url.scheme]
        named = literal(host)
        try:
            addresses = [named] if named is not None else await self._resolve(host, port)
        except (OSError, UnicodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else str(error)
            if isinstance(error, socket.gaierror) and error.errno == socket.EAI_AGAIN:
                raise TryAgain(f"its host {host} can't be looked up: {reason}") from None
            raise ValidationError(f"its host {host} can't be found: {reason}") from None
        if not addresses or not all(map(self._allowed, addresses)):
            raise ValidationError(f"its host {host} is not on the public internet")
        return addresses

    async def _get(self, url: httpx.URL, addresses: Sequence[Address]) -> httpx.Response:
        host = url.raw_host.decode("ascii")
        extensions = {"sni_hostname": host} if url.scheme == "https" and literal(host) is None else {}
        headers = {"Host": url.netloc.decode("ascii"), "Accept-Encoding": "identity"}
        for address in addresses:
            there = url.copy_with(host=str(address))
            request = self._client.build_request("GET", there, headers=headers, extensions=extensions)
            try:
                return await self._client.send(request, stream=True, follow_redirects=False)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                failed: httpx.TransportError = error
            except httpx.TransportError as error:
                failed = error
                break
        reason = f"{type(failed).__name__}: {failed}".rstrip(": ")
        raise TryAgain(f"its server on {host} does not answer ({reason})") from failed


def _joined(url: httpx.URL, location: str) -> str:
    try:
        return str(url.join(location))
    except (httpx.InvalidURL, ValueError) as error:
        raise ValidationError(f"its URL redirects to what can't be read: {error}") from None


_PORTS: Final = {"http": 80, "https": 443}
