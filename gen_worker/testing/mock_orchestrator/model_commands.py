"""Load and unload commands and the answers to them.

Owns: who waits for which answer. A command has no id of its own: answers of one worker to one verb and model are
given to those who wait in the order of their commands, whichever stream brings them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from gen_worker.wire import worker_scheduler_pb2 as pb

from .connection import WorkerConnection
from .errors import WaitTimeoutError

logger = logging.getLogger(__name__)

_Key = tuple[str, str, str]
"""Verb, worker_id, model_id."""


class ModelCommands:
    """Commands under way, of all workers."""

    def __init__(self) -> None:
        self._waiting: dict[_Key, deque[asyncio.Future[pb.WorkerSchedulerMessage]]] = {}

    async def load(self, connection: WorkerConnection, model_id: str, timeout: float) -> pb.LoadModelResult:
        """The worker's answer. Raises WaitTimeoutError and StreamEndedError."""
        command = pb.WorkerSchedulerMessage(load_model_cmd=pb.LoadModelCommand(model_id=model_id))
        answer = await self._ask(("load", connection.worker_id, model_id), connection, command, timeout)
        return answer.load_model_result

    async def unload(self, connection: WorkerConnection, model_id: str, timeout: float) -> pb.UnloadModelResult:
        """The worker's answer. Raises WaitTimeoutError and StreamEndedError."""
        command = pb.WorkerSchedulerMessage(unload_model_cmd=pb.UnloadModelCommand(model_id=model_id))
        answer = await self._ask(("unload", connection.worker_id, model_id), connection, command, timeout)
        return answer.unload_model_result

    def take_load(self, connection: WorkerConnection, message: pb.WorkerSchedulerMessage) -> None:
        self._take(("load", connection.worker_id, message.load_model_result.model_id), message)

    def take_unload(self, connection: WorkerConnection, message: pb.WorkerSchedulerMessage) -> None:
        self._take(("unload", connection.worker_id, message.unload_model_result.model_id), message)

    async def _ask(
        self, key: _Key, connection: WorkerConnection, command: pb.WorkerSchedulerMessage, timeout: float
    ) -> pb.WorkerSchedulerMessage:
        future: asyncio.Future[pb.WorkerSchedulerMessage] = asyncio.get_running_loop().create_future()
        waiting = self._waiting.setdefault(key, deque())
        waiting.append(future)
        try:
            async with asyncio.timeout(timeout):
                await connection.send(command)
                return await future
        except TimeoutError:
            verb, _, model_id = key
            text = f"{connection!r}: no answer to {verb} {model_id} within {timeout:g} s"
            raise WaitTimeoutError(text) from None
        finally:
            if future in waiting:
                waiting.remove(future)
            if not waiting and self._waiting.get(key) is waiting:
                del self._waiting[key]

    def _take(self, key: _Key, message: pb.WorkerSchedulerMessage) -> None:
        waiting = self._waiting.get(key)
        if not waiting:
            logger.info("worker %s answered to %s %s, which nobody waits for", key[1], key[0], key[2])
            return
        future = waiting.popleft()
        if not future.done():
            future.set_result(message)
