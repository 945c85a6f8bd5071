"""The worker: its parts, wired together, from the first executor to the last result.

Owns: the order in which things start and stop. Each part owns its own state; this module only connects them.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from gen_worker.errors import ProjectError
from gen_worker.pipe.messages import PIPE_PROTOCOL, Init
from supervisor.auth import Auth, AuthError
from supervisor.config import child_environment
from supervisor.devices import Device, open_probe
from supervisor.dispatcher import Dispatcher
from supervisor.executor_place import ExecutorPlace
from supervisor.exit_codes import ExitCode
from supervisor.family import FAMILY
from supervisor.inbound import Inbound
from supervisor.input_arena import InputArena
from supervisor.model_files import HostModels
from supervisor.model_names import ModelNames
from supervisor.model_sizes import ModelSizes
from supervisor.observer import Observers
from supervisor.oom import OomWatch, find_counter
from supervisor.outbox import DELIVERED_S
from supervisor.pool import Pool
from supervisor.registration import Registration
from supervisor.renewal import Renewal
from supervisor.residency import Residency
from supervisor.result_store import ResultStore
from supervisor.session import GaveUp, Session
from supervisor.tenant import find_tenant
from supervisor.transfer_process import TransferProcess
from supervisor.transport import StatusCode
from supervisor.wiring import (
    auth_settings,
    file_service,
    file_settings,
    limits,
    memory_limits,
    open_monitoring,
    open_tracing,
    open_transport,
    session_settings,
    transfer_settings,
)

if TYPE_CHECKING:
    from supervisor.logs import LogHandle
    from supervisor.settings import Settings
    from supervisor.tenant import Tenant

log = logging.getLogger(__name__)

FLUSH_S: Final = 10.0
"""How long the last results may take to go out once nothing runs any more."""
REMOVE_S: Final = 2.0
"""How long the inputs of the last runs may take to be removed."""
LEAVE_S: Final = 2.0
"""How long executors may take to leave when asked."""


class Worker:
    """One worker process. `run` returns the exit code."""

    def __init__(
        self,
        settings: Settings,
        environ: Mapping[str, str],
        tenant: Tenant,
        place: ExecutorPlace,
        logs: LogHandle,
    ) -> None:
        """`logs` is told the secrets that turn up later. Raises DeviceError when a GPU asked for is not there."""
        self._settings = settings
        self._monitoring = open_monitoring(settings, logs.redact)
        self._tracing = open_tracing(settings, logs.add_secrets)
        observer = Observers(self._monitoring.telemetry if self._monitoring else None, self._tracing)
        self._environ = place.inherited(child_environment(environ, settings))
        self._files = file_settings(settings, place)
        self._run_dir = str(place.run_dir)
        self._oom = OomWatch(find_counter())
        self._project_root = str(Path.cwd())
        self._modules = tenant.modules
        self._probe = open_probe(
            gpus=settings.gpus,
            visible=environ.get("CUDA_VISIBLE_DEVICES"),
            executors=settings.executors,
            fake_count=settings.fake_gpu_count,
            fake_memory_bytes=settings.fake_gpu_memory_bytes,
            fake_name=settings.fake_gpu_name,
            held=self._held,
        )
        self._transfers = TransferProcess(
            transfer_settings(settings, self._probe.devices, self._files),
            child_environment(environ, settings),
        )
        self._model_files = HostModels(
            settings.model_artifacts,
            self._transfers,
            hub=bool(settings.cozy_hub_url),
            at_once=settings.max_concurrent_downloads,
            observer=observer,
        )
        self._residency = Residency(
            ModelNames(tenant.models, self._model_files),
            self._model_files,
            limits=memory_limits(settings, len(self._probe.devices)),
            probe=self._probe,
            sizes=ModelSizes(settings.model_cache_dir),
        )
        self._store = ResultStore(settings.outbox_dir, settings.worker_id) if settings.outbox_dir else None
        self._dispatcher = Dispatcher(
            limits=limits(settings),
            residency=self._residency,
            executors=lambda: self._pool.ready,
            changed=self._announce,
            files=file_service(settings, self._transfers),
            keeper=self._store,
            observer=observer,
        )
        self._model_files.events = self._dispatcher.news
        inputs = InputArena()
        self._pool = Pool(
            self._probe.devices,
            init=self._init_message,
            env=self._executor_environment,
            threads=settings.executor_threads,
            events=self._dispatcher,
            on_all_closed=lambda: self._events.put_nowait("all executors are down"),
            user=place.user,
            inputs=inputs,
            explain=self._oom.explain,
            observer=observer,
            warm_spare=settings.warm_spare,
        )
        self._renewal = Renewal(lambda: self._pool, settings.drain_timeout_seconds, self._read_project)
        registration = Registration(settings, self._pool, self._dispatcher, self._residency, self._probe)
        self._session = Session(
            settings=session_settings(settings),
            transport=open_transport(settings, inputs),
            auth=Auth(auth_settings(settings), conceal=logs.add_secrets),
            outgoing=self._dispatcher.outbox,
            incoming=Inbound(self._dispatcher, self._residency),
            registration=registration.encode,
            observer=observer,
        )
        if self._monitoring is not None:
            self._monitoring.watch(
                pool=self._pool,
                dispatcher=self._dispatcher,
                session=self._session,
                ledger=self._residency,
                probe=self._probe,
            )
        self._events: asyncio.Queue[str] = asyncio.Queue()
        self._signals = 0
        self._undelivered = 0
        self._first_ready = asyncio.Event()
        self._forced = asyncio.Event()

    async def run(self) -> ExitCode:
        """Serve until a signal, or until there is no way on."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal, number)
        if not _has_terminal():
            loop.add_signal_handler(signal.SIGHUP, self._renewal.request)
        FAMILY.follow(loop)
        self._oom.start(loop)
        if self._monitoring is not None:
            await self._monitoring.start()
        if self._store is not None:
            await self._store.open()
        self._pool.start()
        self._model_files.start(self._settings.model_cache_dir)
        self._residency.prefetch()
        session = loop.create_task(self._serve())
        session.add_done_callback(lambda _: self._events.put_nowait("the session ended"))
        event = await self._events.get()
        log.info("stopping: %s", event)
        try:
            await self._shutdown(session)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
                signal.signal(number, signal.SIG_IGN)  # what is left takes a moment, and its exit code is known
            loop.remove_signal_handler(signal.SIGHUP)
            self._oom.stop()
            if self._monitoring is not None:
                await self._monitoring.stop()
            if self._tracing is not None and not self._forced.is_set():
                await self._tracing.close()
            FAMILY.unfollow()
        return self._exit_code(session)

    async def _serve(self) -> None:
        """Dial as soon as one executor serves: an empty worker is of no use to a scheduler."""
        await self._first_ready.wait()
        keeping = asyncio.ensure_future(self._deliver_kept())
        try:
            await self._session.run()
        finally:
            keeping.cancel()

    async def _deliver_kept(self) -> None:
        """Results of dead supervisors go first; and a quiet stream proves by time that results have arrived."""
        outbox = self._dispatcher.outbox
        if self._store is not None:
            await self._store.hand_over(outbox.put_kept, self._dispatcher.backlog.room_for_answers)
        while True:
            await asyncio.sleep(DELIVERED_S / 4)
            outbox.forget_delivered()

    async def _shutdown(self, session: asyncio.Task[None]) -> None:
        """The one way down. Each step is cut short by a second signal."""
        self._renewal.stop()
        # New runs are refused from here on, so what is active can only become less.
        self._dispatcher.drain()
        self._model_files.drain()
        await self._unless_forced(self._dispatcher.wait_idle(self._settings.drain_timeout_seconds))
        # Handlers of realtime sessions are told that theirs is over, and get a moment to end.
        self._dispatcher.sockets.close_all("the worker shuts down")
        await self._unless_forced(self._dispatcher.wait_sockets(min(LEAVE_S, self._settings.cancel_grace_seconds)))
        # What still runs would be lost with its executor: its scheduler hears it now and can place it elsewhere.
        self._dispatcher.abandon("the worker was shut down while it ran")
        # Executors leave while results go out; both take longest when something is wrong.
        leaving = asyncio.ensure_future(self._end_children())
        if not self._first_ready.is_set():
            session.cancel()  # it has not dialed: there is no one to flush to
        elif not session.done():
            await self._unless_forced(self._session.drain(FLUSH_S))
        if not self._session.drained:
            self._undelivered = self._dispatcher.outbox.depth
        self._session.stop()
        await self._unless_forced(asyncio.wait([session, leaving], timeout=FLUSH_S))
        if self._forced.is_set():
            self._pool.kill("a second signal")
            await asyncio.wait([leaving], timeout=LEAVE_S)
        session.cancel()
        if self._session.read_to_end:
            self._dispatcher.outbox.stream_read_to_end()
        if self._store is not None:
            await self._store.close()

    async def _end_children(self) -> None:
        grace_s = 0 if self._forced.is_set() else LEAVE_S
        leaving = asyncio.ensure_future(self._pool.stop("the worker shuts down", grace_s))
        await self._model_files.stop()
        await self._dispatcher.files.wait_removed(REMOVE_S)
        await self._transfers.stop()
        await leaving

    async def _unless_forced(self, step: Coroutine[Any, Any, object]) -> None:
        task = asyncio.ensure_future(step)
        forced = asyncio.ensure_future(self._forced.wait())
        await asyncio.wait([task, forced], return_when=asyncio.FIRST_COMPLETED)
        for pending in (task, forced):
            pending.cancel()

    def _exit_code(self, session: asyncio.Task[None]) -> ExitCode:
        if self._signals > 1:
            return ExitCode.FORCED_STOP
        if session.done() and not session.cancelled() and (error := session.exception()) is not None:
            log.critical("%s", error)
            if isinstance(error, GaveUp):
                refused = error.status.code in (StatusCode.UNAUTHENTICATED, StatusCode.PERMISSION_DENIED)
                return ExitCode.TOKEN_REFUSED if refused else ExitCode.SCHEDULER_UNREACHABLE
            if isinstance(error, AuthError):
                return ExitCode.TOKEN_REFUSED
            raise error
        if not self._signals and not self._pool.open_slots:
            log.critical("no executor is left: %s", self._pool.last_failure)
            return ExitCode.NO_FUNCTIONS if self._pool.last_reason == "no_functions" else ExitCode.BOOT_FAILED
        if self._undelivered and self._store is None:
            log.critical(
                "%d messages were not delivered: no scheduler took them within %g s; "
                "with WORKER_OUTBOX_DIR the next worker would deliver the results",
                self._undelivered,
                FLUSH_S,
            )
            return ExitCode.UNDELIVERED
        return ExitCode.OK

    def _on_signal(self, number: signal.Signals) -> None:
        self._signals += 1
        if self._signals > 1:
            log.warning("%s again: stopping at once", number.name)
            self._forced.set()
        self._events.put_nowait(number.name)

    def _read_project(self) -> bool:
        """Which modules new executors import. False when the project says nothing that can be used."""
        try:
            self._modules = find_tenant(self._settings, Path(self._project_root)).modules
        except ProjectError as error:
            log.error("the executors stay as they are: %s", error)
            return False
        self._dispatcher.new_code()
        self._pool.new_code()
        return True

    def _announce(self) -> None:
        if self._pool.ready:
            self._first_ready.set()
        self._session.announce()

    def _held(self, device: Device) -> int:
        """What the executors of a simulated device say that they hold."""
        return sum(handle.memory.device_bytes for handle in self._pool.handles if handle.device.uuid == device.uuid)

    def _init_message(self, slot: int, device: Device) -> Init:
        settings = self._settings
        return Init(
            protocol=PIPE_PROTOCOL,
            slot=slot,
            device=device.torch_device,
            modules=tuple(self._modules),
            project_root=self._project_root,
            run_dir=self._run_dir,
            threads=settings.executor_threads,
            cancel_grace_s=settings.cancel_grace_seconds,
            max_output_bytes=settings.max_output_bytes,
            max_delta_bytes=settings.max_output_delta_bytes,
            max_delta_events=settings.max_output_delta_events,
            runtime_loaders=dict(settings.runtime_loaders),
            file_socket=self._files.socket,
            max_upload_bytes=settings.max_upload_bytes,
        )

    def _executor_environment(self, device: Device) -> Mapping[str, str]:
        return {
            **self._environ,
            "CUDA_VISIBLE_DEVICES": device.visible,
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "PYTHONUNBUFFERED": "1",
        }


def _has_terminal() -> bool:
    """Whether a SIGHUP says that the terminal went away, which is an end; without one it is the operator's word."""
    try:
        return os.isatty(0)
    except OSError:
        return False
