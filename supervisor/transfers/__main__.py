"""`python -P -m supervisor.transfers`: one per worker, started by the supervisor.

1. tie this process to its parent's life, and close it off: it holds tokens;
2. the pipe; the first message is Start, with all settings;
3. Ready, then requests until the pipe ends. What is half downloaded then stays as a `.part` and is resumed.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from supervisor.prctl import die_with_parent, forbid_inspection
from supervisor.transfers.link import Link
from supervisor.transfers.messages import (
    TRANSFER_PROTOCOL,
    Cancel,
    Downward,
    Ready,
    Request,
    Start,
    TransferSettings,
    Upward,
)
from supervisor.transfers.service import Handlers, Service

OpenHandlers = Callable[[TransferSettings, AsyncExitStack, Callable[[Upward], None]], Awaitable[Handlers]]


async def serve(pipe: socket.socket, open_handlers: OpenHandlers) -> None:
    """Serve requests until the pipe ends. Raises what broke it, and RuntimeError for another protocol."""
    loop = asyncio.get_running_loop()
    start: asyncio.Future[Start] = loop.create_future()
    early: list[Downward] = []
    service: Service | None = None

    def on_message(message: Downward) -> None:
        match message:
            case Start():
                start.set_result(message)
            case _ if service is None:
                early.append(message)
            case Request():
                service.request(message)
            case Cancel():
                service.cancel(message)

    _, link = await loop.create_unix_connection(lambda: Link(on_message), sock=pipe)
    link.closed.add_done_callback(lambda _: start.cancel())
    await asyncio.wait([start])
    async with AsyncExitStack() as stack:
        if not start.cancelled():
            if start.result().protocol != TRANSFER_PROTOCOL:
                protocols = f"{start.result().protocol}, this process {TRANSFER_PROTOCOL}"
                raise RuntimeError(f"the supervisor speaks transfer protocol {protocols}: restart the worker")
            service = Service(await open_handlers(start.result().settings, stack, link.send), link.send)
            stack.push_async_callback(service.close)
            link.send(Ready(TRANSFER_PROTOCOL))
            for message in early:
                on_message(message)
        error = await link.closed
    if error is not None:
        raise error


def run(open_handlers: OpenHandlers) -> None:
    """The process, from its command line to its end."""
    parser = argparse.ArgumentParser(prog="python -P -m supervisor.transfers", description="Started by the supervisor.")
    for name in ("pipe-fd", "down-fd", "up-fd", "parent-pid"):
        parser.add_argument(f"--{name}", type=int, required=True)
    arguments = parser.parse_args()
    if not die_with_parent(arguments.parent_pid):
        return
    forbid_inspection()
    os.umask(0o022)  # executors may be another user, and read what is downloaded
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the supervisor, which ends this process
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs whole URLs, and those of files are credentials
    # asyncio's own loop reads larger pieces than uvloop, which is what counts here (benchmarks/download.py).
    asyncio.run(serve(socket.socket(fileno=arguments.pipe_fd), open_handlers))


def main() -> None:
    from supervisor.transfers.handlers import open_handlers  # noqa: PLC0415  (after the tie to the parent's life)

    run(open_handlers)


if __name__ == "__main__":
    main()
