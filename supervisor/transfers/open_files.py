"""The parts that serve runs' files, put together from the settings."""

from __future__ import annotations

from contextlib import AsyncExitStack

from supervisor.transfers.clients import open_client
from supervisor.transfers.descriptors import Descriptors
from supervisor.transfers.files import Files
from supervisor.transfers.messages import TransferSettings
from supervisor.transfers.service import Handlers
from supervisor.transfers.web import PublicWeb

KEPT_CONNECTIONS = 16
"""To file stores; a run's own token goes with each request."""


async def open_files(settings: TransferSettings, stack: AsyncExitStack) -> Handlers:
    """The handlers of files. What it opens is closed with the stack."""
    client = await stack.enter_async_context(open_client(settings.http_timeout_s, keep=KEPT_CONNECTIONS))
    web = PublicWeb(timeout_s=settings.http_timeout_s)
    stack.push_async_callback(web.close)
    descriptors = None
    if settings.files.socket:
        descriptors = Descriptors(settings.files.socket, settings.files.executor_uid)
        stack.callback(descriptors.close)
    files = Files(settings.files, settings.retry, client=client, web=web, descriptors=descriptors)
    if settings.files.run_dir:
        await files.sweep()
    return files.handlers
