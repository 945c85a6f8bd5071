"""One realtime session: frames both ways and how it was closed.

Owns: the session's inbox. It outlives the stream it was opened on: frames are matched by session_id.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from gen_worker.wire import worker_scheduler_pb2 as pb

from .errors import StreamEndedError, WaitTimeoutError


class RealtimeSession:
    """A session that was opened on a worker; `close_reason` is None until the worker closed it."""

    def __init__(
        self,
        session_id: str,
        function_name: str,
        worker_id: str,
        *,
        send: Callable[[str, pb.WorkerSchedulerMessage], Awaitable[None]],
    ) -> None:
        self.session_id = session_id
        self.function_name = function_name
        self.worker_id = worker_id
        self.close_reason: str | None = None
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
        return frame

    async def __aiter__(self) -> AsyncIterator[pb.RealtimeFrame]:
        """Frames until the worker closes."""
        while (frame := await self._inbox.get()) is not None:
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
        self._inbox.put_nowait(frame)

    def take_close(self, reason: str) -> None:
        if self.close_reason is None:
            self.close_reason = reason
            self._inbox.put_nowait(None)
            self._closed.set()
