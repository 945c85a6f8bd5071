"""The same load from a scheduler on grpcio, as deployed ones are: `make bench` takes it with `--peer grpcio`.

Its server takes some 8,000 messages a second, so it hides what a fast worker could do; it shows what one does there.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

import grpc
from load import LoadScheduler

from gen_worker.wire import METHOD, TRANSPORT_LIMIT_BYTES

_OPTIONS = [
    ("grpc.max_send_message_length", TRANSPORT_LIMIT_BYTES),
    ("grpc.max_receive_message_length", TRANSPORT_LIMIT_BYTES),
]


class GrpcioWire:
    """One worker's stream: what is queued is written by whoever flushes first."""

    def __init__(self, context: Any) -> None:
        self._context = context
        self._waiting: deque[bytes] = deque()
        self._writing = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()

    def send(self, message: bytes) -> None:
        self._waiting.append(message)

    def flush(self) -> None:
        task = asyncio.ensure_future(self.drain())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self) -> None:
        async with self._writing:
            while self._waiting:
                await self._context.write(self._waiting.popleft())

    def close(self) -> None:
        """Nothing: the server ends it."""


class GrpcioLoadScheduler(LoadScheduler):
    """See the module."""

    async def start(self) -> None:
        self._grpc = grpc.aio.server(options=_OPTIONS)
        service, method = METHOD.strip("/").split("/")
        handlers = {method: grpc.stream_stream_rpc_method_handler(self._serve)}
        self._grpc.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        self.port = self._grpc.add_insecure_port("127.0.0.1:0")
        await self._grpc.start()

    async def stop(self) -> None:
        await self._grpc.stop(1.0)

    async def _serve(self, _requests: object, context: Any) -> None:
        wire = GrpcioWire(context)
        try:
            while (message := await context.read()) is not grpc.aio.EOF:
                self.on_messages(wire, [message])
                await wire.drain()
        finally:
            self.on_lost(wire, None)
