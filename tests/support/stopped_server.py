"""A gRPC server as a process of its own, for tests that stop it: prints its port, reads all it gets, says nothing."""

from __future__ import annotations

import asyncio

from tests.support.stream_server import Dial, serving


async def _behave(dial: Dial) -> None:
    await dial.headers()
    await dial.read_all()


async def _main() -> None:
    async with serving(_behave) as server:
        print(server.address, flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_main())
