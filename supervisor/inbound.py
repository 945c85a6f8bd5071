"""What the scheduler says, one message at a time.

Owns: nothing; it decodes and hands each message to whoever it is for. No message from the scheduler, however broken,
ends the stream or the worker: what can't be understood is logged and dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from supervisor.dispatcher import Dispatcher
from supervisor.residency import Residency
from supervisor.transport.large import LargeRequest
from supervisor.wire_codec import WireError, decode

if TYPE_CHECKING:
    from gen_worker.wire import worker_scheduler_pb2 as pb

log = logging.getLogger(__name__)


class Inbound:
    """Routes the scheduler's messages."""

    def __init__(self, dispatcher: Dispatcher, residency: Residency) -> None:
        self._dispatcher = dispatcher
        self._residency = residency
        self._handlers: dict[str, Callable[[Any], None]] = {
            "run_request": dispatcher.submit,
            "interrupt_run_cmd": lambda command: dispatcher.cancel(command.run_id),
            "load_model_cmd": lambda command: dispatcher.commands.load(command.model_id),
            "unload_model_cmd": lambda command: dispatcher.commands.unload(command.model_id),
            "deployment_model_config": self._configure,
            "realtime_open_cmd": dispatcher.sockets.open,
            "realtime_frame": dispatcher.sockets.take_frame,
            "realtime_close_cmd": dispatcher.sockets.close,
        }

    @property
    def full(self) -> bool:
        """So much waits here that nothing more should be read."""
        return self._dispatcher.backlog.full or self._dispatcher.sockets.room.full

    async def room(self) -> None:
        """Wait until more may be read."""
        await self._dispatcher.backlog.room()
        await self._dispatcher.sockets.room.room()

    def stream_closed(self) -> None:
        """Nothing more comes of the stream, and what was opened on it is over."""
        self._dispatcher.sockets.stream_closed()

    def handle(self, message: bytes | LargeRequest) -> None:
        """Take one message of the stream. Never raises."""
        try:
            decoded = decode(message if isinstance(message, bytes) else message.head)
        except WireError as error:
            log.warning("a message of the scheduler is dropped: %s", error)
            return
        kind = decoded.WhichOneof("msg")
        handler = self._handlers.get(kind) if kind else None
        if handler is None or kind is None:
            log.warning("a message of the scheduler is dropped: %s", f"unexpected {kind}" if kind else "it is empty")
            return
        try:
            if isinstance(message, LargeRequest):
                self._dispatcher.submit(decoded.run_request, message.payload)
            else:
                handler(getattr(decoded, kind))
        except Exception:
            # A defect of ours in one message must not cost the stream and with it every other run.
            log.exception("handling a %s of the scheduler failed", kind)

    def _configure(self, config: pb.DeploymentModelConfig) -> None:
        log.info(
            "the scheduler allows %d models and labels %d", len(config.supported_model_ids), len(config.model_id_by_key)
        )
        self._residency.names.configure(config.supported_model_ids, config.model_id_by_key)
        self._residency.prefetch()
