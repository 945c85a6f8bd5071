"""Requests of the supervisor, each served by a task of its own.

Owns: which requests are under way. A request ends once: by a Reply, a Failed, or a Cancel, which stops its task at once
and has no answer.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from gen_worker.errors import WorkerError
from gen_worker.failures import failure_of, sanitize
from gen_worker.pipe.messages import Failure
from supervisor.transfers.messages import Cancel, Failed, Progress, Reply, ReplyBody, Request, Upward

log = logging.getLogger(__name__)

OnProgress = Callable[[int, int, float], None]
"""(bytes done, bytes in all or 0 while that is unknown, bytes per second)."""
Handler = Callable[[Any, OnProgress], Awaitable[ReplyBody]]
"""`async def handler(request, progress) -> reply`. A WorkerError that it raises becomes the request's failure."""
Handlers = Mapping[type, Handler]


class Service:
    """See the module. `send` gives a message to the supervisor."""

    def __init__(self, handlers: Handlers, send: Callable[[Upward], None]) -> None:
        self._handlers = handlers
        self._send = send
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def request(self, request: Request) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(request))
        self._tasks[request.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(request.id, None))

    def cancel(self, cancel: Cancel) -> None:
        task = self._tasks.pop(cancel.id, None)
        if task is not None:  # else its answer crossed the cancel
            task.cancel()

    async def close(self) -> None:
        """Stop all that is under way."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, request: Request) -> None:
        number, body = request.id, request.body

        def progress(done_bytes: int, total_bytes: int, bytes_per_s: float) -> None:
            if number in self._tasks:  # a handler's helper thread may still tell of a canceled request
                self._send(Progress(number, done_bytes, total_bytes, bytes_per_s))

        try:
            reply = await self._handlers[type(body)](body, progress)
        except WorkerError as error:
            self._send(Failed(number, expected_failure(error)))
        except Exception as error:
            log.exception("a defect in serving %s", type(body).__name__)
            self._send(Failed(number, failure_of(error)))
        else:
            self._send(Reply(number, reply))


def expected_failure(error: WorkerError) -> Failure:
    """What went wrong, without where in the code: nothing there is to be mended."""
    text = str(error)
    return Failure(error.error_type, sanitize(text), text, error.retryable)
