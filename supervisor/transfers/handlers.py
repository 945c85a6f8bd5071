"""Which request is served by what.

Owns: the table, and through the stack the life of what the handlers share (HTTP connections).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AsyncExitStack

from supervisor.transfers.messages import TransferSettings, Upward
from supervisor.transfers.service import Handlers


async def open_handlers(
    settings: TransferSettings,  # noqa: ARG001  (for the first handlers)
    stack: AsyncExitStack,  # noqa: ARG001
    send: Callable[[Upward], None],  # noqa: ARG001
) -> Handlers:
    """The whole table. What it opens is closed with the stack; `send` is for what is no answer to a request."""
    return {}
