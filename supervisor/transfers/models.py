"""The requests that are about models.

Owns: which models are being fetched. Requests for one model share one download, which is stopped when nobody waits for
it any more; at most WORKER_MAX_CONCURRENT_DOWNLOADS models come at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Final, Protocol

from gen_worker.errors import ResourceError
from gen_worker.model_refs import ParsedModelRef, parse_model_ref
from supervisor.transfers.budget import Budget
from supervisor.transfers.cozy import CozyModels
from supervisor.transfers.http import open_session
from supervisor.transfers.hub import Hub
from supervisor.transfers.hugging_face import HuggingFaceModels
from supervisor.transfers.messages import (
    FetchModel,
    ListModels,
    ModelFiles,
    ModelList,
    ModelRemoved,
    ModelsRemoved,
    RemoveModel,
    TransferSettings,
    Upward,
)
from supervisor.transfers.meter import Meter
from supervisor.transfers.service import Handlers, OnProgress
from supervisor.transfers.store import Store

log = logging.getLogger(__name__)


class Source(Protocol):
    """One place that models come from."""

    async def fetch(self, ref: ParsedModelRef, meter: Meter) -> ModelFiles:
        """Raises WorkerError, OSError."""

    def models(self) -> list[ModelFiles]:
        """What is whole on disk; blocks."""

    async def remove(self, ref: str) -> int | None:
        """Freed bytes; None: it is in use."""


class _Flight:
    """One model on its way, and who waits for it."""

    def __init__(self, meter: Meter, task: asyncio.Task[ModelFiles]) -> None:
        self.meter = meter
        self.task = task


class Models:
    """See the module. `sources` are by scheme of the ref."""

    def __init__(self, sources: dict[str, Source], at_once: int) -> None:
        self._sources = sources
        self._slots = asyncio.Semaphore(at_once)
        self._flights: dict[str, _Flight] = {}

    async def fetch(self, request: FetchModel, progress: OnProgress) -> ModelFiles:
        ref = parse_model_ref(request.ref)
        flight = self._flights.get(ref.canonical)
        if flight is None:
            meter = Meter(ref.canonical)
            flight = _Flight(meter, asyncio.get_running_loop().create_task(self._download(ref, meter)))
            self._flights[ref.canonical] = flight
            flight.task.add_done_callback(lambda _: self._landed(ref.canonical, flight))
        waiter: Final = object()
        flight.meter.listeners[waiter] = progress
        try:
            return await asyncio.shield(flight.task)
        except asyncio.CancelledError:
            if len(flight.meter.listeners) == 1 and not flight.task.done():
                self._landed(ref.canonical, flight)
                flight.task.cancel()
                await asyncio.wait([flight.task])
            raise
        finally:
            flight.meter.listeners.pop(waiter, None)

    async def list_models(self, _request: ListModels, _progress: OnProgress) -> ModelList:
        found = [await asyncio.to_thread(source.models) for source in self._sources.values()]
        return ModelList(tuple(model for models in found for model in models))

    async def remove(self, request: RemoveModel, _progress: OnProgress) -> ModelRemoved:
        ref = parse_model_ref(request.ref)
        if ref.canonical in self._flights:
            raise ResourceError(f"{ref.canonical} can't be removed: it is being downloaded")
        freed = await self._sources[ref.scheme].remove(ref.canonical)
        if freed is None:
            raise ResourceError(f"{ref.canonical} can't be removed: it is in use")
        return ModelRemoved(freed)

    def _landed(self, ref: str, flight: _Flight) -> None:
        if flight.task.done() and not flight.task.cancelled():
            flight.task.exception()  # nobody may be left to ask for it
        if self._flights.get(ref) is flight:
            del self._flights[ref]

    async def _download(self, ref: ParsedModelRef, meter: Meter) -> ModelFiles:
        async with self._slots:
            try:
                return await self._sources[ref.scheme].fetch(ref, meter)
            except OSError as error:
                raise ResourceError(f"{ref.canonical} can't be written to disk: {error}") from error


async def model_handlers(settings: TransferSettings, stack: AsyncExitStack, send: Callable[[Upward], None]) -> Handlers:
    """The handlers, over a session and a store of their own."""
    loop = asyncio.get_running_loop()

    def removed(refs: tuple[str, ...]) -> None:
        loop.call_soon_threadsafe(send, ModelsRemoved(refs))

    session = await stack.enter_async_context(open_session(settings.http_timeout_s))
    store = Store(settings.model_cache_dir)
    budget = Budget(store, settings.model_cache_max_bytes, removed)
    cozy = CozyModels(settings, session, Hub(session, settings), store, budget)
    models = Models(
        {"cozy": cozy, "hf": HuggingFaceModels(settings, session, budget)}, settings.max_concurrent_downloads
    )
    return {FetchModel: models.fetch, ListModels: models.list_models, RemoveModel: models.remove}
