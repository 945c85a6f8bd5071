"""The executor's end of the pipe.

Owns: the socket and what waits to be written to it.

1. One thread, the reader, takes whole frames with `receive`. Tenant code may close the socket under it; the kernel does
   not wake it up for that, so it looks every LOOK_S.
2. Any thread hands a message over with `send`, which never waits for the supervisor: it appends the frame, and the
   thread that gets the turn writes what all of them appended, whole frames in order, in as few writes as it takes.
3. When the socket is full the turn goes to a writer thread, which may wait. So neither the tenant's event loop nor the
   reader ever stands still because the supervisor is slow; what bounds the memory is the runs' windows.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import Final

from gen_worker.pipe.frames import FrameDecoder, encode_frame
from gen_worker.pipe.messages import Upward, encode

READ_BYTES: Final = 64 * 1024
"""Under malloc's mmap threshold, so that a read costs no page faults; a window of small runs fits."""
WRITE_BYTES: Final = 256 * 1024
"""At most this much is joined for one write."""
LOOK_S: Final = 0.25
SEND_BUFFER_BYTES: Final = 1024 * 1024
"""As the supervisor asks for its direction; the kernel caps it at net.core.wmem_max."""


class Link:
    """See the module. `on_broken` is called, once at least, when the other end does not take what is written."""

    def __init__(self, fd: int, on_broken: Callable[[OSError], None]) -> None:
        self._socket = socket.socket(fileno=fd)
        self._socket.setblocking(True)
        self._readable = select.poll()
        self._readable.register(fd, select.POLLIN)
        self._inode = os.fstat(fd).st_ino
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER_BYTES)
        self._on_broken = on_broken
        self._decoder = FrameDecoder()
        self._outgoing: deque[bytes] = deque()
        self._turn = threading.Lock()
        self._rest = memoryview(b"")
        self._full = threading.Semaphore(0)
        self._writer: threading.Thread | None = None

    # -- reading ------------------------------------------------------------------------------

    def receive(self) -> list[bytes]:
        """Whole frames, at least one; blocks. Raises EOFError at the end, FrameError for garbage, OSError."""
        while True:
            # A thread that blocks in recv would also be woken whenever the supervisor has read what was written here.
            if not self._readable.poll(LOOK_S * 1000):
                # Nothing for LOOK_S. What has its number now may be another file: of that nothing may be read.
                if os.fstat(self._socket.fileno()).st_ino != self._inode:
                    raise OSError(errno.EBADF, "the pipe was closed in this process")
                continue
            data = self._socket.recv(READ_BYTES)
            if not data:
                raise EOFError
            if frames := self._decoder.feed(data):
                return frames

    # -- writing ------------------------------------------------------------------------------

    def send(self, message: Upward) -> None:
        """Hand one message over; it is in the kernel's buffer on return unless that is full or another thread writes.

        Raises FrameError for a message over the frame cap. Not to be interrupted by an asynchronous exception.
        """
        self._outgoing.append(encode_frame(encode(message)))
        if self._turn.acquire(blocking=False):
            self._write_all()

    def flush(self, timeout_s: float) -> bool:
        """Wait until all that was handed over is written; False when that took longer than timeout_s."""
        if not self._turn.acquire(timeout=timeout_s):
            return False
        self._write_all()
        if not self._turn.acquire(timeout=timeout_s):
            return False
        self._turn.release()
        return not self._outgoing

    def _write_all(self) -> None:
        """Write until nothing waits, then give the turn back; called by the thread that has it."""
        while True:
            while self._outgoing:
                data = self._next_batch()
                try:
                    sent = self._socket.send(data, socket.MSG_DONTWAIT)
                except BlockingIOError:
                    sent = 0
                except OSError as error:
                    self._on_broken(error)
                    self._outgoing.clear()
                    break
                if sent < len(data):
                    self._leave_to_writer(memoryview(data)[sent:])
                    return
            self._turn.release()
            # What another thread appended after our last look, it left to us if we still had the turn.
            if not self._outgoing or not self._turn.acquire(blocking=False):
                return

    def _next_batch(self) -> bytes:
        first = self._outgoing.popleft()
        if not self._outgoing:
            return first
        batch, size = [first], len(first)
        while self._outgoing and size + len(self._outgoing[0]) <= WRITE_BYTES:
            batch.append(self._outgoing.popleft())
            size += len(batch[-1])
        return b"".join(batch)

    def _leave_to_writer(self, rest: memoryview) -> None:
        self._rest = rest
        if self._writer is None:
            self._writer = threading.Thread(target=self._write_waiting, name="pipe-writer", daemon=True)
            self._writer.start()
        self._full.release()

    def _write_waiting(self) -> None:
        """The writer thread: has the turn whenever `_full` is raised."""
        while True:
            self._full.acquire()
            try:
                self._socket.sendall(self._rest)
            except OSError as error:
                self._on_broken(error)
                self._outgoing.clear()
            self._rest = memoryview(b"")
            self._write_all()
