"""What an operator can see of a running worker, put together and kept running.

Owns: the tasks of it.

1. The worker's parts are built with `telemetry` as their observer, then handed to `watch`.
2. `start` comes before the first executor, since a probe asks from the first second on.
3. `stop` comes last, so that a worker which drains can be watched.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from supervisor.devices import DeviceProbe
from supervisor.dispatcher import Dispatcher
from supervisor.endpoints import Endpoints
from supervisor.http_server import HttpServer
from supervisor.loop_lag import LoopLag
from supervisor.settings import Settings
from supervisor.status_source import Connection, Ledger, Slots, StatusSource
from supervisor.telemetry import Telemetry


class Monitoring:
    """See the module. `redact` takes secrets out of text."""

    def __init__(self, settings: Settings, redact: Callable[[str], str]) -> None:
        self.telemetry = Telemetry(redact)
        self._settings = settings
        self._redact = redact
        self._lag = LoopLag(self._measured)
        self._measuring: asyncio.Task[None] | None = None
        self._server: HttpServer | None = None

    def watch(
        self, *, pool: Slots, dispatcher: Dispatcher, session: Connection, ledger: Ledger, probe: DeviceProbe
    ) -> None:
        """These are what is shown. Once, before `start`."""
        clock = asyncio.get_running_loop().time
        source = StatusSource(
            settings=self._settings,
            pool=pool,
            dispatcher=dispatcher,
            session=session,
            ledger=ledger,
            probe=probe,
            record=self.telemetry,
            loop_lag=lambda: self._lag.worst_s,
            redact=self._redact,
            now=clock,
            started=clock(),
        )
        metrics = self.telemetry.metrics
        metrics.pull_from(source.status)
        endpoints = Endpoints(unready=source.unready, status=source.status, metrics=metrics.expose)
        self._server = HttpServer(self._settings.http_addr, endpoints.answer)

    async def start(self) -> None:
        self._measuring = asyncio.create_task(self._lag.run(), name="loop-lag")
        if self._server is not None:
            await self._server.start()

    async def stop(self) -> None:
        if self._measuring is not None:
            self._measuring.cancel()
        if self._server is not None:
            await self._server.stop()

    def _measured(self, lag_s: float) -> None:
        self.telemetry.metrics.loop_lag.observe(lag_s)
        self.telemetry.tick()
