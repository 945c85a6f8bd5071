"""The scheduler end of the wire, scriptable: takes workers' streams, sends them work, matches what comes back.

Owns: the gRPC server and its port, the set of streams, and everything that is matched over reconnects (runs, model
commands, realtime sessions).

    1. `start` listens. gRPC hands over each stream as raw bytes, so that anything can be sent and seen.
    2. A new stream becomes a WorkerConnection: the token is checked, `on_connect` may end or script it, headers go out.
    3. Its first registration makes it the worker's live connection (`workers`), in place of an older one.
    4. `run` and the other commands go out on it; what arrives is matched by run_id, model_id or session_id,
       whichever stream brings it. Results of runs that nobody asked for are kept in `stray_results`.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Self, TypeVar

import grpc
import msgspec

from gen_worker.wire import MESSAGE_LIMIT_BYTES, SERVICE
from gen_worker.wire import worker_scheduler_pb2 as pb

from .connection import Registration, WorkerConnection
from .errors import ListenError, NoWorkerError, StreamEndedError, WaitTimeoutError
from .model_commands import ModelCommands
from .policies import OnConnect
from .realtime import RealtimeSession
from .runs import RunHandle, RunResult
from .tcp import join_address, split_address, why_not_listen
from .waiting import Waiters

logger = logging.getLogger(__name__)

T = TypeVar("T")

Target = WorkerConnection | str | None
"""Whom a command is for: this connection; this worker, on the stream it has now; or whoever fits."""

OnMessage = Callable[[WorkerConnection, str, pb.WorkerSchedulerMessage], None]

_METHOD_NAME = "ConnectWorker"
_KEPT_CONNECTIONS = 1024
_KEPT_STRAYS = 10_000
_KEPT_CLOSED = 1024


def _server_options(message_limit: int) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", message_limit),
        ("grpc.max_send_message_length", message_limit),
        ("grpc.so_reuseport", 0),  # two schedulers on one port are a mistake, not a cluster
        # No keepalive ping is ever too many (else: GOAWAY with ENHANCE_YOUR_CALM).
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10),
        ("grpc.http2.max_ping_strikes", 0),
    ]


class MockOrchestrator:
    """A scheduler for development, tests and load. All methods belong to one event loop.

    Settings that may be changed at any time, for the streams that come next: `required_token`, `on_connect`,
    `send_headers` (False: they go out with the first message), `model_config` (sent after a stream's registration),
    `on_message` (called with every message that parses, before it is matched), `on_end` (called when a stream is over).

    workers           live connections by worker_id
    connections       live streams, registered or not
    history           the last 1024 streams, ended ones included
    stream_count      how many streams there were
    runs              what is known by run_id (see `forget`)
    sessions          the realtime sessions that no worker has closed, by session_id
    stray_results     the last 10,000 results of runs that are not known
    spawn_requests    the last 10,000 SpawnTasksRequests
    """

    def __init__(  # noqa: PLR0913  (settings of one server, by name)
        self,
        listen: str = "127.0.0.1:0",
        *,
        tls: grpc.ServerCredentials | None = None,
        required_token: str | None = None,
        on_connect: OnConnect | None = None,
        on_message: OnMessage | None = None,
        on_end: Callable[[WorkerConnection], None] | None = None,
        send_headers: bool = True,
        model_config: pb.DeploymentModelConfig | None = None,
        record: bool = False,
        message_limit: int = MESSAGE_LIMIT_BYTES,
        options: Iterable[tuple[str, int | str]] = (),
    ) -> None:
        """Listens on `listen` (`host:port`, port 0 for a free one) once started. Raises ListenError.

        `record` keeps every message in its connection's `log`; `message_limit` is in bytes; `options` are more gRPC
        server options.
        """
        self._host, self._port = split_address(listen)
        self._tls = tls
        self._record = record
        self._options: list[tuple[str, int | str]] = [*_server_options(message_limit), *options]
        self.required_token = required_token
        self.on_connect = on_connect
        self.on_message = on_message
        self.on_end = on_end
        self.send_headers = send_headers
        self.model_config = model_config

        self.workers: dict[str, WorkerConnection] = {}
        self.connections: set[WorkerConnection] = set()
        self.history: deque[WorkerConnection] = deque(maxlen=_KEPT_CONNECTIONS)
        self.stream_count = 0
        self.runs: dict[str, RunHandle] = {}
        self.stray_results: deque[RunResult] = deque(maxlen=_KEPT_STRAYS)
        self.spawn_requests: deque[pb.SpawnTasksRequest] = deque(maxlen=_KEPT_STRAYS)

        self._model_commands = ModelCommands()
        self._takers: dict[str, Callable[[WorkerConnection, pb.WorkerSchedulerMessage], None]] = {
            "worker_registration": self._take_registration,
            "worker_event": self._take_event,
            "run_result": self._take_result,
            "load_model_result": self._model_commands.take_load,
            "unload_model_result": self._model_commands.take_unload,
            "realtime_frame": self._take_frame,
            "realtime_close_cmd": self._take_close,
            "spawn_tasks": self._take_spawn,
        }
        self._server: grpc.aio.Server | None = None
        self._waiters = Waiters()
        self.sessions: dict[str, RealtimeSession] = {}
        self._closed_sessions: deque[str] = deque(maxlen=_KEPT_CLOSED)
        self._outstanding: defaultdict[str, int] = defaultdict(int)
        self._configuring: set[asyncio.Task[None]] = set()

    # -- life ---------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """`host:port` to dial; known after the first start and kept by later ones."""
        if self._port == 0:
            raise ListenError("the port is not known before start()")
        return join_address(self._host, self._port)

    async def start(self) -> None:
        """Listen, on the port of the last time if there was one. Raises ListenError."""
        if self._server is not None:
            raise ListenError(f"already listening on {self.address}")
        server = grpc.aio.server(options=self._options)
        handler = grpc.stream_stream_rpc_method_handler(self._serve)  # no (de)serialisers: bytes in, bytes out
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {_METHOD_NAME: handler}),))
        address = f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"
        try:
            port = server.add_secure_port(address, self._tls) if self._tls else server.add_insecure_port(address)
        except RuntimeError as error:
            reason = why_not_listen(self._host, self._port)
            raise ListenError(f"can't listen on {address}: {reason}") from error
        await server.start()
        self._port = port
        self._server = server

    async def stop(self, grace: float = 0.0) -> None:
        """Stop listening. Streams may go on for `grace` seconds, then they are cut; runs are kept.

        Workers of a stop without grace see UNAVAILABLE. May be started again.
        """
        server, self._server = self._server, None
        if server is None:
            return
        for connection in self.connections:
            connection.expect_cut("the server stopped")
        await server.stop(grace or None)
        for connection in tuple(self.connections):
            await connection.wait_ended()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    # -- waiting ------------------------------------------------------------------------------------

    async def wait_until(self, check: Callable[[], T | None], timeout: float = 10.0, *, what: str = "") -> T:
        """Wait until `check()` gives something true, and return that.

        It is looked at now and whenever a message arrived or a stream began or ended. Raises WaitTimeoutError, which
        names `what`, after `timeout` seconds.
        """
        return await self._waiters.wait(check, timeout, what or "what was waited for")

    async def wait_for_worker(self, worker_id: str | None = None, timeout: float = 30.0) -> WorkerConnection:
        """A live worker that has registered. Raises NoWorkerError after `timeout` seconds."""

        def check() -> WorkerConnection | None:
            here = [connection for connection in self.workers.values() if connection.live]
            return next((connection for connection in here if worker_id in (None, connection.worker_id)), None)

        try:
            return await self.wait_until(check, timeout)
        except WaitTimeoutError:
            name = f"worker {worker_id!r}" if worker_id is not None else "worker"
            raise NoWorkerError(f"no {name} registered within {round(timeout, 2):g} s; {self._who_is_here()}") from None

    async def wait_for_registration(
        self, predicate: Callable[[Registration], bool], timeout: float = 30.0, *, since: float = 0.0
    ) -> Registration:
        """The latest registration or heartbeat of a live worker, once it fits.

        Those that arrived before `since` (monotonic seconds) are not looked at. Raises WaitTimeoutError after
        `timeout` seconds.
        """

        def check() -> Registration | None:
            for connection in self.workers.values():
                latest = connection.registrations[-1]
                if latest.at >= since and predicate(latest):
                    return latest
            return None

        return await self.wait_until(check, timeout, what=f"a registration that fits ({self._who_is_here()})")

    # -- work ---------------------------------------------------------------------------------------

    async def run(  # noqa: PLR0913  (the fields of the message, by name)
        self,
        function_name: str,
        payload: object = None,
        *,
        run_id: str | None = None,
        timeout_ms: int = 0,
        required_models: Sequence[str] = (),
        tenant_id: str = "",
        user_id: str = "",
        file_base_url: str = "",
        file_token: str = "",
        worker: Target = None,
        keep_events: bool = True,
    ) -> RunHandle:
        """Send a run_request.

        `payload` is bytes as they are, or anything msgspec turns into MessagePack (a dict, a Struct; None is {}).
        Without `worker` it goes to the one with the fewest runs under way among those that have the function, or
        among all when none has it. A `run_id` that is known already is sent again, and has the same handle.
        Raises NoWorkerError and StreamEndedError; waits while the worker does not read.
        """
        request = pb.TaskExecutionRequest(
            run_id=run_id or uuid.uuid4().hex,
            function_name=function_name,
            input_payload=payload if isinstance(payload, bytes) else msgspec.msgpack.encode(payload or {}),
            required_models=required_models,
            timeout_ms=timeout_ms,
            tenant_id=tenant_id,
            user_id=user_id,
            file_base_url=file_base_url,
            file_token=file_token,
        )
        connection = self.find(worker, function_name)
        handle = self.runs.get(request.run_id)
        if handle is None:
            handle = RunHandle(
                request.run_id, function_name, connection.worker_id, send=self.send, keep_events=keep_events
            )
            self.runs[handle.run_id] = handle
            self._outstanding[handle.worker_id] += 1
        try:
            await connection.send(pb.WorkerSchedulerMessage(run_request=request))
        except StreamEndedError:
            self.forget(handle)
            raise
        return handle

    def forget(self, handle: RunHandle) -> None:
        """Drop what is known of a run, as a load generator must: what comes for it later is stray."""
        if self.runs.pop(handle.run_id, None) is not None and not handle.done:
            self._outstanding[handle.worker_id] -= 1

    async def load_model(self, model_id: str, timeout: float = 60.0, *, worker: Target = None) -> pb.LoadModelResult:
        """Have a worker load a model; its answer, success or not. Raises WaitTimeoutError after `timeout` seconds."""
        return await self._model_commands.load(self.find(worker), model_id, timeout)

    async def unload_model(
        self, model_id: str, timeout: float = 60.0, *, worker: Target = None
    ) -> pb.UnloadModelResult:
        """Have a worker unload a model; its answer, success or not. Raises WaitTimeoutError after `timeout` seconds."""
        return await self._model_commands.unload(self.find(worker), model_id, timeout)

    async def configure_models(
        self,
        supported_model_ids: Sequence[str] = (),
        model_id_by_key: Mapping[str, str] | None = None,
        *,
        worker: Target = None,
    ) -> None:
        """Send a deployment_model_config. For every stream from now on, set `model_config` instead."""
        config = pb.DeploymentModelConfig(
            supported_model_ids=supported_model_ids, model_id_by_key=dict(model_id_by_key or {})
        )
        await self.send(worker, pb.WorkerSchedulerMessage(deployment_model_config=config))

    async def open_realtime(  # noqa: PLR0913  (the fields of the message, by name)
        self,
        function_name: str,
        *,
        session_id: str | None = None,
        required_models: Sequence[str] = (),
        tenant_id: str = "",
        user_id: str = "",
        timeout_ms: int = 0,
        file_base_url: str = "",
        file_token: str = "",
        worker: Target = None,
    ) -> RealtimeSession:
        """Send a realtime_open_cmd. Raises NoWorkerError and StreamEndedError."""
        command = pb.RealtimeOpenCommand(
            session_id=session_id or uuid.uuid4().hex,
            function_name=function_name,
            required_models=required_models,
            tenant_id=tenant_id,
            user_id=user_id,
            timeout_ms=timeout_ms,
            file_base_url=file_base_url,
            file_token=file_token,
        )
        connection = self.find(worker, function_name)
        session = RealtimeSession(command.session_id, function_name, connection, send=self.send)
        self.sessions[session.session_id] = session
        with contextlib.suppress(ValueError):  # an id that is used again
            self._closed_sessions.remove(session.session_id)
        await connection.send(pb.WorkerSchedulerMessage(realtime_open_cmd=command))
        return session

    async def send(self, worker: Target, message: pb.WorkerSchedulerMessage) -> None:
        """Send any message to a worker. Raises NoWorkerError and StreamEndedError."""
        await self.find(worker).send(message)

    def find(self, worker: Target = None, function_name: str = "") -> WorkerConnection:
        """The connection that a command for `worker` goes out on (see `run`). Raises NoWorkerError."""
        if isinstance(worker, WorkerConnection):
            return worker
        if worker is not None:
            connection = self.workers.get(worker)
            if connection is None:
                raise NoWorkerError(f"worker {worker!r} is not connected; {self._who_is_here()}")
            return connection
        here = [connection for connection in self.workers.values() if connection.live]
        if not here:
            raise NoWorkerError("no worker is connected")
        if len(here) == 1:
            return here[0]
        offering = [
            connection
            for connection in here
            if function_name in connection.registrations[-1].resources.available_functions
        ]
        return min(offering or here, key=lambda connection: self._outstanding[connection.worker_id])

    @property
    def violations(self) -> list[str]:
        """What the workers of all streams in `history` did against the protocol."""
        return [f"{connection!r}: {text}" for connection in self.history for text in connection.violations]

    # -- streams ------------------------------------------------------------------------------------

    async def _serve(self, _requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        connection = WorkerConnection(
            context, index=self.stream_count, local_port=self._port, listener=self, record=self._record
        )
        self.stream_count += 1
        self.connections.add(connection)
        self.history.append(connection)
        self.changed()
        await connection.serve(self._open)

    async def _open(self, connection: WorkerConnection) -> None:
        if self.required_token is not None and connection.authorization != f"Bearer {self.required_token}":
            connection.close(grpc.StatusCode.UNAUTHENTICATED, "the bearer token is missing or wrong")
            return
        if self.on_connect is not None:
            answer = self.on_connect(connection)
            if inspect.isawaitable(answer):
                await answer
        if self.send_headers and not connection.headers_held:
            await connection.send_headers()

    def changed(self) -> None:
        """Something happened that someone may wait for (called by connections)."""
        self._waiters.look()

    def ended(self, connection: WorkerConnection) -> None:
        """A stream is over (called by connections)."""
        self.connections.discard(connection)
        for worker_id in [name for name, current in self.workers.items() if current is connection]:
            del self.workers[worker_id]
        for session in self.sessions.values():
            if session.connection is connection:
                session.take_stream_end()
        if self.on_end is not None:
            self.on_end(connection)
        self.changed()

    def received(self, connection: WorkerConnection, kind: str, message: pb.WorkerSchedulerMessage) -> None:
        """A message arrived (called by connections)."""
        if self.on_message is not None:
            self.on_message(connection, kind, message)
        if take := self._takers.get(kind):
            take(connection, message)
        if self._waiters:
            self.changed()

    def _take_registration(self, connection: WorkerConnection, _message: pb.WorkerSchedulerMessage) -> None:
        worker_id = connection.worker_id
        if self.workers.get(worker_id) is not connection and connection.live:
            self.workers[worker_id] = connection
        if len(connection.registrations) == 1 and self.model_config is not None:
            config = pb.WorkerSchedulerMessage(deployment_model_config=self.model_config)
            task = asyncio.create_task(self._configure(connection, config))
            self._configuring.add(task)
            task.add_done_callback(self._configuring.discard)

    async def _configure(self, connection: WorkerConnection, config: pb.WorkerSchedulerMessage) -> None:
        try:
            await connection.send(config)
        except StreamEndedError as error:
            logger.info("the model config was not sent: %s", error)

    def _take_event(self, connection: WorkerConnection, message: pb.WorkerSchedulerMessage) -> None:
        if handle := self.runs.get(message.worker_event.run_id):
            handle.take_event(message.worker_event, connection)

    def _take_result(self, connection: WorkerConnection, message: pb.WorkerSchedulerMessage) -> None:
        result = message.run_result
        handle = self.runs.get(result.run_id)
        if handle is None:
            self.stray_results.append(RunResult(time.monotonic(), result, connection))
            return
        if not handle.done:
            self._outstanding[handle.worker_id] -= 1
        handle.take_result(result, connection)

    def _take_frame(self, connection: WorkerConnection, message: pb.WorkerSchedulerMessage) -> None:
        session_id = message.realtime_frame.session_id
        if session := self.sessions.get(session_id):
            session.take_frame(message.realtime_frame)
        elif session_id in self._closed_sessions:
            connection.violate(f"a frame of session {session_id} came after its close")

    def _take_close(self, connection: WorkerConnection, message: pb.WorkerSchedulerMessage) -> None:
        session_id = message.realtime_close_cmd.session_id
        if session := self.sessions.pop(session_id, None):
            session.take_close(message.realtime_close_cmd.reason)
            self._closed_sessions.append(session_id)
        elif session_id in self._closed_sessions:
            connection.violate(f"a second close of session {session_id}")

    def _take_spawn(self, _connection: WorkerConnection, message: pb.WorkerSchedulerMessage) -> None:
        self.spawn_requests.append(message.spawn_tasks)

    def _who_is_here(self) -> str:
        if not self.workers:
            return f"none is registered, {len(self.connections)} streams are open"
        return f"registered: {', '.join(sorted(self.workers))}"
