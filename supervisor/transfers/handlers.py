"""Which request is served by what.

Owns: the table, and through the stack the life of what the handlers share (HTTP connections).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack

from supervisor.transfers.messages import TransferSettings, Upward
from supervisor.transfers.models import model_handlers
from supervisor.transfers.open_files import open_files
from supervisor.transfers.service import Handlers


async def open_handlers(settings: TransferSettings, stack: AsyncExitStack, send: Callable[[Upward], None]) -> Handlers:
    """The whole table. What it opens is closed with the stack; `send` is for what is no answer to a request."""
    return {**await model_handlers(settings, stack, send), **await open_files(settings, stack)}
