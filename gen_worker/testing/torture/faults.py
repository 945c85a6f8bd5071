"""What goes wrong on streams: one method per fault.

Owns: that faults come one at a time, and that the worker is back after each.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from random import Random
from typing import Final

import grpc

from gen_worker.testing.mock_orchestrator import ListenError, StreamEndedError, WorkerConnection
from gen_worker.testing.torture import functions
from gen_worker.testing.torture.history import History, Light, Run
from gen_worker.testing.torture.plan import LONG_TIMEOUT_MS, HurtStream, StreamFault
from gen_worker.testing.torture.requests import flood
from gen_worker.testing.torture.scheduler import Meet, Scheduler
from gen_worker.wire import NOT_LEADER_PREFIX
from gen_worker.wire import worker_scheduler_pb2 as pb

log = logging.getLogger(__name__)

BACK_S: Final = 30.0
"""Within which a worker must be registered again. Its reconnects are set to 0.5 s at most, but where neither side reads
it looks for the end of the stream only every 10 s."""

_BEGIN_S: Final = 5.0
_FILL_S: Final = 1.5
"""For the windows to fill, and for the worker to see that nothing is taken."""
_UNREAD: Final = "the stream is not read"
_ABORTS: Final = (
    grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.INTERNAL, grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.CANCELLED, grpc.StatusCode.UNKNOWN, grpc.StatusCode.DEADLINE_EXCEEDED,
)  # fmt: skip
_NOWHERE: Final = ("", "nowhere", "no port:at all", "127.0.0.1:999999", "\N{SNOWMAN}:1")
_UNKNOWN_FIELD: Final = bytes((0x9A, 0x3E, 3)) + b"new"
"""Field 995, length-delimited: of a protocol to come."""

Inject = Callable[[WorkerConnection, HurtStream, Random], Awaitable[None]]


class StreamFaults:
    """See the module."""

    def __init__(self, scheduler: Scheduler, history: History, light: Light) -> None:
        self._scheduler = scheduler
        self._history = history
        self._light = light
        self._turn = asyncio.Lock()
        self._inject: Mapping[StreamFault, Inject] = {
            StreamFault.DROP: self._drop,
            StreamFault.ABORT: self._abort,
            StreamFault.HALF_CLOSE: self._half_close,
            StreamFault.LEADER_MOVES: self._move_leader,
            StreamFault.REDIRECT_TO_SELF: self._redirect_to_self,
            StreamFault.REDIRECT_NOWHERE: self._redirect_nowhere,
            StreamFault.GARBAGE: self._garbage,
            StreamFault.EMPTY: self._empty,
            StreamFault.UNKNOWN: self._unknown,
            StreamFault.WRONG_WAY: self._wrong_way,
            StreamFault.CANCEL_UNKNOWN: self._cancel_unknown,
            StreamFault.UNREAD: self._stop_reading,
            StreamFault.UNREAD_CUT: self._stop_reading_then_cut,
            StreamFault.MODEL_COMMANDS: self._command_models,
            StreamFault.RESTART: self._restart,
            StreamFault.REFUSE: self._refuse,
            StreamFault.REFUSE_TOKEN: self._refuse_token,
            StreamFault.SILENT: self._accept_in_silence,
            StreamFault.GARBAGE_AT_CONNECT: self._garbage_at_connect,
            StreamFault.FLAP: self._flap,
        }

    async def hurt(self, action: HurtStream) -> None:
        """Inject one fault, and wait until the worker is back. One at a time."""
        async with self._turn:
            connection = await self._scheduler.usable()
            rng = Random(action.seed)  # noqa: S311  (to reproduce)
            try:
                await self._inject[action.fault](connection, action, rng)
            except StreamEndedError as error:
                log.debug("%s: the stream was gone already: %s", action.fault, error)
            await self.wait_back(f"after: {action.fault}")

    async def wait_back(self, when: str) -> None:
        """Wait until the worker is registered; a worker that does not come back is trouble."""
        try:
            async with asyncio.timeout(BACK_S):
                await self._scheduler.usable()
        except TimeoutError:
            self._history.trouble.append(f"the worker was not back within {BACK_S:g} s {when}")

    async def _drop(self, connection: WorkerConnection, _action: HurtStream, _rng: Random) -> None:
        connection.drop()

    async def _abort(self, connection: WorkerConnection, _action: HurtStream, rng: Random) -> None:
        connection.close(rng.choice(_ABORTS), "torture")

    async def _half_close(self, connection: WorkerConnection, _action: HurtStream, _rng: Random) -> None:
        connection.half_close()

    async def _move_leader(self, _connection: WorkerConnection, _action: HurtStream, _rng: Random) -> None:
        self._scheduler.move_leader()

    async def _redirect_to_self(self, connection: WorkerConnection, action: HurtStream, _rng: Random) -> None:
        details = f"{NOT_LEADER_PREFIX}{self._scheduler.leader.address}"
        self._scheduler.meet(*[_end_with(grpc.StatusCode.FAILED_PRECONDITION, details)] * (action.times - 1))
        connection.close(grpc.StatusCode.FAILED_PRECONDITION, details)

    async def _redirect_nowhere(self, connection: WorkerConnection, _action: HurtStream, rng: Random) -> None:
        connection.close(grpc.StatusCode.FAILED_PRECONDITION, f"{NOT_LEADER_PREFIX}{rng.choice(_NOWHERE)}")

    async def _garbage(self, connection: WorkerConnection, action: HurtStream, rng: Random) -> None:
        for _ in range(action.times):
            await connection.send_raw(b"\xff" + rng.randbytes(rng.choice((1, 100, 100_000))))

    async def _empty(self, connection: WorkerConnection, action: HurtStream, _rng: Random) -> None:
        for _ in range(action.times):
            await connection.send_raw(b"")

    async def _unknown(self, connection: WorkerConnection, action: HurtStream, _rng: Random) -> None:
        for _ in range(action.times):
            await connection.send_raw(_UNKNOWN_FIELD)

    async def _wrong_way(self, connection: WorkerConnection, action: HurtStream, _rng: Random) -> None:
        for number in range(action.times):
            result = pb.TaskExecutionResult(run_id=f"nobody-{number}", success=True)
            await connection.send(pb.WorkerSchedulerMessage(run_result=result))

    async def _cancel_unknown(self, connection: WorkerConnection, action: HurtStream, rng: Random) -> None:
        for _ in range(action.times):
            run_id = rng.choice(("", "nobody", f"{rng.getrandbits(64):x}"))
            command = pb.InterruptTaskCommand(run_id=run_id)
            await connection.send(pb.WorkerSchedulerMessage(interrupt_run_cmd=command))

    async def _stop_reading(self, connection: WorkerConnection, action: HurtStream, _rng: Random) -> None:
        self._light.dim(_UNREAD, time.monotonic())
        connection.pause_reading()
        try:
            await asyncio.sleep(action.seconds)
        finally:
            connection.resume_reading()
            self._light.brighten(_UNREAD, time.monotonic())

    async def _stop_reading_then_cut(self, connection: WorkerConnection, action: HurtStream, rng: Random) -> None:
        """The streams of its floods must be whole in the end: the worker can tell that nobody read."""
        floods = [self._flood(f"{action.seed:x}-{number}") for number in range(4)] if self._history.has_ledger else []
        await _until(lambda: any(any(run.arrivals) for run in floods) or not connection.live, _BEGIN_S)
        self._light.dim(_UNREAD, time.monotonic())
        connection.pause_reading()
        try:
            await asyncio.sleep(_FILL_S + rng.random())
            connection.drop()
        finally:
            connection.resume_reading()
            self._light.brighten(_UNREAD, time.monotonic())
        await self.wait_back("after a cut of a stream that was not read")
        await _until(lambda: all(any(run.results) for run in floods), BACK_S)  # no other fault meanwhile

    def _flood(self, run_id: str) -> Run:
        return self._scheduler.send(run_id, flood(run_id), LONG_TIMEOUT_MS)

    async def _command_models(self, connection: WorkerConnection, action: HurtStream, rng: Random) -> None:
        """Loads and unloads in any order, of a model that there is and of one that there is not."""
        for _ in range(action.times * 2):
            model_id = rng.choice((functions.MODEL, functions.MODEL, "no-such-model", ""))
            if rng.random() < 0.5:  # noqa: PLR2004  (a coin)
                message = pb.WorkerSchedulerMessage(load_model_cmd=pb.LoadModelCommand(model_id=model_id))
            else:
                message = pb.WorkerSchedulerMessage(unload_model_cmd=pb.UnloadModelCommand(model_id=model_id))
            await connection.send(message)

    async def _restart(self, _connection: WorkerConnection, action: HurtStream, rng: Random) -> None:
        leader = self._scheduler.leader
        await leader.stop(rng.choice((0.0, 0.05)))
        await asyncio.sleep(action.seconds)
        async with asyncio.timeout(BACK_S):
            while True:
                try:
                    await leader.start()
                except ListenError as error:  # some other process's dial may have the port for a moment
                    log.info("%s", error)
                    await asyncio.sleep(0.05)
                else:
                    return

    async def _refuse(self, connection: WorkerConnection, action: HurtStream, rng: Random) -> None:
        self._scheduler.meet(*[_end_with(rng.choice(_ABORTS)) for _ in range(action.times)])
        connection.drop()

    async def _refuse_token(self, connection: WorkerConnection, action: HurtStream, _rng: Random) -> None:
        self._scheduler.meet(*[_end_with(grpc.StatusCode.UNAUTHENTICATED)] * action.times)
        connection.close(grpc.StatusCode.UNAUTHENTICATED, "the token has expired")

    async def _accept_in_silence(self, connection: WorkerConnection, action: HurtStream, rng: Random) -> None:
        """The next stream gets no answer for a while; then it gets one, or is cut."""
        silent: asyncio.Future[WorkerConnection] = asyncio.get_running_loop().create_future()

        def meet(taken: WorkerConnection) -> None:
            taken.headers_held = True
            self._scheduler.set_aside(taken)
            if not silent.done():
                silent.set_result(taken)

        self._scheduler.meet(meet)
        connection.drop()
        try:
            async with asyncio.timeout(BACK_S):
                taken = await silent
        except TimeoutError:
            self._history.trouble.append(f"the worker did not dial within {BACK_S:g} s of a cut")
            return
        await asyncio.sleep(action.seconds)
        if rng.random() < 0.5:  # noqa: PLR2004  (a coin)
            taken.drop()
        else:
            await taken.send_headers()
            self._scheduler.use(taken)

    async def _garbage_at_connect(self, connection: WorkerConnection, action: HurtStream, rng: Random) -> None:
        self._scheduler.meet(*[_say(b"\xff" + rng.randbytes(20)) for _ in range(action.times)])
        connection.drop()

    async def _flap(self, connection: WorkerConnection, action: HurtStream, _rng: Random) -> None:
        self._scheduler.meet(*[WorkerConnection.drop] * action.times)
        connection.drop()


async def _until(check: Callable[[], bool], within_s: float) -> None:
    """Wait until `check()`, at most that long; what did not come to be, the invariants will find."""
    end = time.monotonic() + within_s
    while not check() and time.monotonic() < end:  # noqa: ASYNC110  (what arrives announces nothing)
        await asyncio.sleep(0.02)


def _end_with(code: grpc.StatusCode, details: str = "torture") -> Meet:
    return lambda connection: connection.close(code, details)


def _say(data: bytes) -> Meet:
    return lambda connection: connection.send_raw(data)
