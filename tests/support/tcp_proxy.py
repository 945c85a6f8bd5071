"""A TCP proxy that cuts connections where a test says.

Owns: the rule for each connection, in order of arrival; those after the last rule pass untouched.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import Self
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Cut:
    """After so many bytes in a direction the connection is reset; None: never."""

    up: int | None = None
    down: int | None = None


PASS = Cut()


class TcpProxy:
    """In front of `url` (http://host:port); `async with` serves it."""

    def __init__(self, url: str, *rules: Cut) -> None:
        parts = urlsplit(url)
        self._target = parts.hostname or "", parts.port or 0
        self._rules = list(rules)
        self.connections = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *exc: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    @property
    def url(self) -> str:
        host, port = self._server.sockets[0].getsockname()
        return f"http://{host}:{port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        rule = self._rules[self.connections] if self.connections < len(self._rules) else PASS
        self.connections += 1
        try:
            there_reader, there_writer = await asyncio.open_connection(*self._target)
        except BaseException:
            writer.transport.abort()
            raise
        ways = [
            asyncio.create_task(_copy(reader, there_writer, rule.up)),
            asyncio.create_task(_copy(there_reader, writer, rule.down)),
        ]
        try:
            done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            if not any(way.result() for way in done):  # one side ended by itself: the other may still have to say
                await asyncio.wait(ways)
        finally:
            # Before anything that the end of the proxy may cancel.
            for way, each in zip(ways, (there_writer, writer), strict=True):
                way.cancel()
                each.transport.abort()
            await asyncio.wait(ways)
            for each in (writer, there_writer):
                with contextlib.suppress(ConnectionError):
                    await each.wait_closed()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limit: int | None) -> bool:
    """Copy until the end, or until `limit` bytes have passed; True then."""
    passed = 0
    with contextlib.suppress(ConnectionError):
        while block := await reader.read(65536):
            writer.write(block if limit is None else block[: limit - passed])
            await writer.drain()
            passed += len(block)
            if limit is not None and passed >= limit:
                return True
        writer.write_eof()
    return False
