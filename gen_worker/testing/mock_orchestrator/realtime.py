"""One realtime session: frames both ways and how it was closed.

Owns: the session's inbox. Frames are matched by session_id, whichever stream brings them; a worker ends its sessions
with the stream that they were opened on, and says so on the next one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from gen_worker.wire import worker_scheduler_pb2 as pb

from .connection import WorkerConnection
from .errors import StreamEndedError, WaitTimeoutError


class RealtimeSession:
    """A session that was opened on a worker.

    connection           the stream that it was opened on
    close_reason         None until the worker closed it
    waiting_bytes        of frames that were not received
    max_waiting_bytes    past it the session is `overflowed` and frames are dropped; 0: no limit
    stream_ended         whether the stream that it was opened on is over
    broken               an event: overflowed, or stream_ended
    """

    def __init__(
        self,
        session_id: str,
        function_name: str,
        connection: WorkerConnection,
        *,
        send: Callable[[str, pb.WorkerSchedulerMessage], Awaitable[None]],
    ) -> None:
        self.session_id = session_id
        self.function_name = function_name
        self.connection = connection
        self.worker_id = connection.worker_id
        self.close_reason: str | None = None
        self.waiting_bytes = 0
        self.max_waiting_bytes = 0
        self.overflowed = False
        self.stream_ended = False
        self.broken = asyncio.Event()
        self._send = send
        self._inbox: asyncio.Queue[pb.RealtimeFrame | None] = asyncio.Queue()
        self._closed = asyncio.Event()

    def __repr__(self) -> str:
        return f"<RealtimeSession {self.session_id} {self.function_name} close_reason={self.close_reason!r}>"

    async def send(self, data: bytes | str) -> None:
        """One frame; a str goes as a text frame. Raises StreamEndedError."""
        is_text = isinstance(data, str)
        raw = data.encode() if isinstance(data, str) else data
        frame = pb.RealtimeFrame(session_id=self.session_id, data=raw, is_text=is_text)
        await self._send(self.worker_id, pb.WorkerSchedulerMessage(realtime_frame=frame))

    async def close(self, reason: str = "closed") -> None:
        """Tell the worker that the session is over. Raises StreamEndedError."""
        command = pb.RealtimeCloseCommand(session_id=self.session_id, reason=reason)
        await self._send(self.worker_id, pb.WorkerSchedulerMessage(realtime_close_cmd=command))

    async def receive(self, timeout: float = 10.0) -> pb.RealtimeFrame:
        """The next frame. Raises StreamEndedError when the worker closed, WaitTimeoutError after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                frame = await self._inbox.get()
        except TimeoutError:
            raise WaitTimeoutError(f"{self!r}: no frame within {timeout:g} s") from None
        if frame is None:
            self._inbox.put_nowait(None)
            raise StreamEndedError(f"{self!r}: the worker closed it")
        self.waiting_bytes -= len(frame.data)
        return frame

    async def __aiter__(self) -> AsyncIterator[pb.RealtimeFrame]:
        """Frames until the worker closes."""
        while (frame := await self._inbox.get()) is not None:
            self.waiting_bytes -= len(frame.data)
            yield frame
        self._inbox.put_nowait(None)

    async def wait_closed(self, timeout: float = 10.0) -> str:
        """The worker's reason. Raises WaitTimeoutError after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self._closed.wait()
        except TimeoutError:
            raise WaitTimeoutError(f"{self!r}: not closed within {timeout:g} s") from None
        return self.close_reason or ""

    # -- called by the orchestrator -----------------------------------------------------------------

    def take_frame(self, frame: pb.RealtimeFrame) -> None:
        self.waiting_bytes += len(frame.data)
        if self.max_waiting_bytes and self.waiting_bytes > self.max_waiting_bytes:
            self.overflowed = True
            self.broken.set()
        if not self.overflowed:
            self._inbox.put_nowait(frame)

    def take_stream_end(self) -> None:
        self.stream_ended = True
        self.broken.set()

    def take_close(self, reason: str) -> None:
        if self.close_reason is None:
            self.close_reason = reason
            self._inbox.put_nowait(None)
            self._closed.set()
