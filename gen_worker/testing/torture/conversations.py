"""Realtime sessions in the torture: numbered frames to a handler that sends them back, and one of several ends.

Owns: what is said in a session, and the record of it. It judges nothing.
"""

from __future__ import annotations

import asyncio
import time
from random import Random
from typing import Final

from gen_worker.testing.mock_orchestrator import NoWorkerError, RealtimeSession, StreamEndedError
from gen_worker.testing.torture.functions import SOCKET_ENDS
from gen_worker.testing.torture.history import BY_SCHEDULER, Conversation, History
from gen_worker.testing.torture.plan import Converse
from gen_worker.testing.torture.scheduler import Scheduler

TIMEOUT_MS: Final = 20_000
WAIT_S: Final = 45.0
"""For a close: the timeout, twice the grace, and what a stream may be unread or a process frozen meanwhile."""
LARGE_BYTES: Final = 1_200_000
"""By shared memory."""


class Conversations:
    """See the module. `hold` is one session, from its opening to its close."""

    def __init__(self, scheduler: Scheduler, history: History) -> None:
        self._scheduler = scheduler
        self._history = history

    async def hold(self, action: Converse) -> None:
        rng = Random(action.seed)  # noqa: S311  (to reproduce)
        end = rng.choice((*SOCKET_ENDS, BY_SCHEDULER))
        talk = Conversation(f"session-{action.seed:x}", end, TIMEOUT_MS / 1000)
        self._history.conversations.append(talk)
        try:
            session = await self._scheduler.open_session("torture_socket", talk.session_id, TIMEOUT_MS)
        except StreamEndedError:
            talk.stream_ended = True
            return
        talk.opened_at = time.monotonic()
        tasks = [
            asyncio.create_task(self._say(session, talk, rng)),
            asyncio.create_task(self._hear(session, talk)),
            asyncio.create_task(session.broken.wait()),
        ]
        try:
            await asyncio.wait(tasks[1:], timeout=WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        talk.closed_at = time.monotonic()
        talk.reason = session.close_reason or ""
        talk.stream_ended = session.stream_ended

    async def _say(self, session: RealtimeSession, talk: Conversation, rng: Random) -> None:
        try:
            for _ in range(rng.choice((0, 1, 20, 200))):
                size = LARGE_BYTES if rng.random() < 0.01 else rng.choice((0, 100, 3000))  # noqa: PLR2004
                await session.send(f"{talk.sent} {talk.session_id} ".encode() + b"." * size)
                talk.sent += 1
                await asyncio.sleep(rng.choice((0.0, 0.0, 0.0, 0.02)))
            if talk.end == BY_SCHEDULER:
                await session.close()
            else:
                await session.send(talk.end)
        except (StreamEndedError, NoWorkerError):
            talk.stream_ended = True

    async def _hear(self, session: RealtimeSession, talk: Conversation) -> None:
        async for frame in session:
            place, _, rest = frame.data.partition(b" ")
            if place != str(talk.heard).encode() or not rest.startswith(talk.session_id.encode()):
                talk.disorder = talk.disorder or f"frame {talk.heard} should have come, not {frame.data[:60]!r}"
            talk.heard += 1
