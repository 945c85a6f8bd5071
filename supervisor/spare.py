"""The spare: a started executor without a slot, for the next slot that needs one (WORKER_WARM_SPARE).

Owns: that process until a slot takes it, and when there is one.

1. It starts when all slots that are not given up serve, so it is in nobody's way at the start; it imports what
   executors import, says Parked, and waits. It has made nothing of CUDA and belongs to no device.
2. `take` gives it away. From then on it is that slot's executor, and the next spare starts when it serves.
3. When a slot may be filled is the pool's to say, with a spare as without: it makes a replacement fast, not early.
4. One that dies while it waits counts against no slot; the next comes later and later (respawn.py).
5. Modules that use CUDA while they are imported would bind it to a device, or take the device's memory for nothing:
   then there is none until there is new code, which the log says once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

import msgspec

from gen_worker.pipe.messages import PIPE_PROTOCOL, CudaUse, Fatal, Init, Parked, decode_upward, encode
from supervisor.child import Child, ExitCause
from supervisor.devices import Device
from supervisor.executor_handle import LEAVE_S
from supervisor.executor_user import ExecutorUser
from supervisor.input_arena import InputArena
from supervisor.output_log import OutputLog
from supervisor.respawn import Respawn

log = logging.getLogger(__name__)

NAME: Final = "spare"
NO_SLOT: Final = -1
ASK_NVML: Final = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
"""Has torch.cuda.is_available() ask NVML, which does not start CUDA: many modules call it while they are imported."""


class SpareView(NamedTuple):
    """The spare, as others may see it."""

    pid: int
    parked: bool
    """It has imported everything."""


class Spare:
    """See the module. `wanted` says whether one may start now."""

    def __init__(
        self,
        devices: Sequence[Device],
        *,
        init: Callable[[int, Device], Init],
        env: Callable[[Device], Mapping[str, str]],
        user: ExecutorUser | None,
        wanted: Callable[[], bool],
        inputs: InputArena | None = None,
    ) -> None:
        self._inputs = inputs
        self._devices = devices
        self._init = init
        self._env = env
        self._user = user
        self._wanted = wanted
        self._loop = asyncio.get_running_loop()
        self._respawn = Respawn()
        self._timer: asyncio.TimerHandle | None = None
        self._starting: set[asyncio.Task[None]] = set()
        self._child: Child | None = None
        self._parked = False
        self._started_at = 0.0
        self._fatal = ""
        """What it said before it left."""
        self._refused = False
        """The present code can't have one."""
        self._closed = False
        self._living: set[Child] = set()
        """Those that no slot took, as long as their processes live."""
        self._all_gone = asyncio.Event()

    @property
    def view(self) -> SpareView | None:
        return None if self._child is None else SpareView(self._child.pid, self._parked)

    def want(self) -> None:
        """Have one, if there is none and one may start."""
        idle = self._child is None and self._timer is None and not self._starting
        if idle and not self._closed and not self._refused and self._wanted():
            task = self._loop.create_task(self._start())
            self._starting.add(task)
            task.add_done_callback(self._starting.discard)

    def take(self) -> Child | None:
        """The one that waits, for good; None when there is none, or it is not so far."""
        if not self._parked:
            return None
        child, self._child, self._parked = self._child, None, False
        if child is not None:
            self._living.discard(child)
        return child

    def lost(self) -> None:
        """One that was taken died before it served: that it was a spare may be why."""
        self._later()

    def discard(self, reason: str) -> None:
        """The code is another now: the next one imports that."""
        self._refused = False
        self._respawn = Respawn()
        self._cancel_timer()
        self._end(reason)

    async def close(self, reason: str, wait_s: float) -> None:
        """End it; no other starts."""
        self._closed = True
        self._cancel_timer()
        self._end(reason)
        if not self._living:
            return
        try:
            await asyncio.wait_for(self._all_gone.wait(), wait_s)
        except TimeoutError:
            log.debug("the spare is still there after %.1f s", wait_s)

    # -- inside -------------------------------------------------------------------------------

    async def _start(self) -> None:
        if self._closed or self._child is not None:
            return
        output = OutputLog(NAME)
        child = Child(
            on_frame=lambda body: self._on_frame(child, body),
            on_line=output.line,
            on_writable=lambda: None,
            on_exit=lambda cause: self._on_exit(child, cause),
            inputs=self._inputs,
        )
        device = self._devices[0]
        init = msgspec.structs.replace(self._init(NO_SLOT, device), spare=True)
        self._started_at = self._loop.time()
        self._fatal = ""
        self._child = child
        self._living.add(child)
        self._all_gone.clear()
        try:
            await child.spawn("executor", [], {**self._env(device), **ASK_NVML}, init.project_root, self._user)
        except (OSError, ValueError) as error:
            self._forget(child)
            self._later(f"can't be started: {error}")
            return
        log.info("a spare started: pid %d", child.pid)
        child.send(encode(init))

    def _on_frame(self, child: Child, body: bytes) -> None:
        try:
            message = decode_upward(body)
        except ValueError as error:
            child.kill(f"it sent a message that is not one: {error}")
            return
        if isinstance(message, Parked) and message.protocol == PIPE_PROTOCOL and not self._parked:
            self._park(child, message.cuda)
        elif isinstance(message, Fatal):
            self._fatal = message.message
            self._loop.call_later(LEAVE_S, child.kill, "it stayed after it said that it leaves")
        else:
            child.kill(f"{type(message).__name__} is not for a spare to say now")

    def _park(self, child: Child, cuda: CudaUse) -> None:
        if child is not self._child:
            return  # its end is on its way
        why = ""
        if cuda == "context":
            why = "so it would hold memory of a GPU for nothing"
        elif cuda == "driver" and len({device.visible for device in self._devices}) > 1:
            why = "so it could serve one GPU alone"
        if not why:
            self._parked = True
            log.info("the spare is ready: pid %d", child.pid)
            return
        self._refused = True
        log.warning("no spare is kept: the modules of this project start CUDA while they are imported, %s", why)
        self._end(why)

    def _on_exit(self, child: Child, cause: ExitCause) -> None:
        waited_for = child is self._child
        self._forget(child)
        if waited_for:
            self._later(f"{self._fatal} ({cause})" if self._fatal else str(cause))

    def _end(self, reason: str) -> None:
        """From now on it is none that anybody could take."""
        if self._child is not None:
            child, self._child, self._parked = self._child, None, False
            child.kill(reason)

    def _forget(self, child: Child) -> None:
        if child is self._child:
            self._child, self._parked = None, False
        self._living.discard(child)
        if not self._living:
            self._all_gone.set()

    def _later(self, words: str = "") -> None:
        """Try again after the backoff."""
        if self._closed or self._timer is not None:
            return
        delay = self._respawn.delay_after_death(self._loop.time() - self._started_at)
        if words:
            log.warning("the spare was lost: %s; another one starts in %.0f s", words, delay)
        self._timer = self._loop.call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.want()

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
