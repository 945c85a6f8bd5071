"""Open files from executors.

Owns: the socket that they come over, and those that nobody has asked for yet.

An executor opens what it wants stored by itself, with its own rights, and hands over the descriptor: this process,
which may have other rights and has secrets, opens no path that tenant code names. A file comes with a ticket, 16 random
bytes that the executor also names in its request (StoreFile), and waits for that here.

The socket is an abstract one: it lies in no directory and vanishes with the process. Only the executors' user may
connect.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import struct
from typing import Final

from gen_worker.errors import RetryableError

log = logging.getLogger(__name__)

TICKET_BYTES: Final = 16
MAX_WAITING: Final = 1024
"""Connections, each with one file at most; more are closed at once. Far more than uploads can be under way."""
ARRIVAL_S: Final = 10.0
"""An executor sends the file before it sends the request, so it is here already or does not come."""
_CREDENTIALS: Final = struct.Struct("3i")
"""Of SO_PEERCRED: pid, uid, gid."""


class Descriptors:
    """See the module. `name` is the socket's, `uid` whose connections are taken."""

    def __init__(self, name: str, uid: int) -> None:
        self._uid = uid
        self._loop = asyncio.get_running_loop()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        self._socket.bind(f"\0{name}")
        self._socket.listen(128)
        self._waiting: dict[socket.socket, tuple[bytes, int] | None] = {}
        """Connection -> ticket and file; None until they come."""
        self._asked: dict[bytes, asyncio.Future[int]] = {}
        self._loop.add_reader(self._socket, self._accept)

    def close(self) -> None:
        self._loop.remove_reader(self._socket)
        self._socket.close()
        for connection in list(self._waiting):
            self._drop(connection)

    async def take(self, ticket: bytes, timeout_s: float = ARRIVAL_S) -> int:
        """The open file with this ticket; the caller closes it. Raises RetryableError when it does not come."""
        for connection, held in self._waiting.items():
            if held is not None and held[0] == ticket:
                self._waiting[connection] = None
                self._drop(connection)
                return held[1]
        asked = self._loop.create_future()
        self._asked[ticket] = asked
        try:
            return await asyncio.wait_for(asked, timeout_s)
        except TimeoutError:
            raise RetryableError("the file to store did not reach the transfer process") from None
        finally:
            del self._asked[ticket]

    # -- inside -------------------------------------------------------------------------------

    def _accept(self) -> None:
        try:
            connection, _ = self._socket.accept()
        except OSError as error:
            log.debug("a connection was gone again: %s", error)
            return
        connection.setblocking(False)
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(credentials)
        if uid != self._uid or len(self._waiting) >= MAX_WAITING:
            log.warning("a file of uid %d is refused; %d wait", uid, len(self._waiting))
            connection.close()
            return
        self._waiting[connection] = None
        self._loop.add_reader(connection, self._receive, connection)

    def _receive(self, connection: socket.socket) -> None:
        """The file comes in one message; what follows it, the end most of all, makes the executor's interest over."""
        try:
            ticket, files, flags, _ = socket.recv_fds(connection, TICKET_BYTES + 1, 1, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return
        except OSError:
            ticket, files, flags = b"", [], 0
        whole = len(ticket) == TICKET_BYTES and len(files) == 1 and not flags & socket.MSG_CTRUNC
        if not whole or self._waiting[connection] is not None:
            for fd in files:
                os.close(fd)
            self._drop(connection)
            return
        asked = self._asked.get(ticket)
        if asked is not None and not asked.done():
            asked.set_result(files[0])
            self._drop(connection)
        else:
            self._waiting[connection] = (ticket, files[0])

    def _drop(self, connection: socket.socket) -> None:
        held = self._waiting.pop(connection)
        if held is not None:
            os.close(held[1])
        self._loop.remove_reader(connection)
        connection.close()
