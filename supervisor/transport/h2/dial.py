"""Opens streams over the `h2` library.

Owns: nothing between two streams. It resolves and connects, in words for the operator when that fails.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from typing import Any, Final

from gen_worker._version import __version__
from gen_worker.wire import METHOD
from supervisor.input_arena import InputArena
from supervisor.transport import StatusCode, StreamClosed, StreamStatus, TlsFiles
from supervisor.transport.h2.keepalive import KEEPALIVE_S, KEEPALIVE_TIMEOUT_S
from supervisor.transport.h2.stream import H2Stream
from supervisor.transport.tls import tls_context

CONNECT_TIMEOUT_S: Final = 10.0
_USER_AGENT: Final = f"gen-worker/{__version__} grpc-python-h2"


class H2Transport:
    """See Transport. `tls` None: plain text. Large payloads go to `arena`, if there is one."""

    def __init__(
        self,
        tls: TlsFiles | None = None,
        connect_timeout_s: float = CONNECT_TIMEOUT_S,
        *,
        keepalive_s: float = KEEPALIVE_S,
        keepalive_timeout_s: float = KEEPALIVE_TIMEOUT_S,
        arena: InputArena | None = None,
        busy_poll_s: float = 0.0,
    ) -> None:
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._keepalive_s = keepalive_s
        self._keepalive_timeout_s = keepalive_timeout_s
        self._arena = arena
        self._busy_poll_s = busy_poll_s

    async def open(self, target: str, metadata: Sequence[tuple[str, str]]) -> H2Stream:
        """See Transport.open. Certificates are read anew each time, since they get rotated."""
        context = None
        if self._tls is not None:
            context = await asyncio.to_thread(tls_context, self._tls)
            context.set_alpn_protocols(["h2"])
        stream = H2Stream(
            target,
            _headers(target, metadata, encrypted=context is not None),
            keepalive_s=self._keepalive_s,
            keepalive_timeout_s=self._keepalive_timeout_s,
            arena=self._arena,
            busy_poll_s=self._busy_poll_s,
        )
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await self._connect(stream, target, context)
                await stream.ready()
        except TimeoutError:
            await stream.close()
            reason = f"{target} did not answer, or spoke no HTTP/2, within {self._connect_timeout_s:g} s"
            raise StreamClosed(StreamStatus(StatusCode.UNAVAILABLE, reason)) from None
        except OSError as error:  # ssl's errors are of this kind too
            await stream.close()
            raise StreamClosed(StreamStatus(StatusCode.UNAVAILABLE, _reason(target, error))) from None
        except BaseException:
            await stream.close()
            raise
        return stream

    async def _connect(self, stream: H2Stream, target: str, context: ssl.SSLContext | None) -> None:
        """Raises OSError, with the last address's reason when there are several."""
        loop = asyncio.get_running_loop()
        host, _, port = target.rpartition(":")
        host = host.strip("[]")
        addresses = await loop.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
        for number, (family, _, _, _, address) in enumerate(addresses, 1):
            try:
                # An address that is silent must not use up the time of those after it.
                async with asyncio.timeout(self._connect_timeout_s / len(addresses)):
                    connection = await _connected(loop, family, address)
            except OSError:
                if number == len(addresses):
                    raise
                continue
            try:
                await loop.create_connection(
                    lambda: stream, sock=connection, ssl=context, server_hostname=host if context else None
                )
            except BaseException:
                connection.close()
                raise
            return


async def _connected(loop: asyncio.AbstractEventLoop, family: int, address: tuple[Any, ...]) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.sock_connect(connection, address)
    except BaseException:
        connection.close()
        raise
    return connection


def _headers(target: str, metadata: Sequence[tuple[str, str]], *, encrypted: bool) -> list[tuple[str, str]]:
    return [
        (":method", "POST"),
        (":scheme", "https" if encrypted else "http"),
        (":path", METHOD),
        (":authority", target),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("user-agent", _USER_AGENT),
        ("grpc-accept-encoding", "identity"),
        *((name.lower(), value) for name, value in metadata),
    ]


def _reason(target: str, error: OSError) -> str:
    if isinstance(error, socket.gaierror):
        return f"the name in {target} can't be resolved: {error.strerror}"
    if isinstance(error, ConnectionRefusedError):
        return f"{target} refused the connection: nothing listens there"
    if isinstance(error, ssl.SSLError | ssl.CertificateError):
        return f"no TLS with {target}: {error}"
    return f"no connection to {target}: {error}"
