"""The executors of this host: one slot per device, each with one live executor at most.

Owns: how many there are, when a dead one is replaced, and when a slot is given up.

1. `start` spawns all slots at once; each reports when it is ready.
2. A dead executor is replaced at once, and later and later when they keep dying (respawn.py). One that was
   recycled (drained, because of memory that it kept) is replaced at once, however often.
3. BOOT_FAILURES deaths in a row before being ready close the slot: what it says will not change by itself.
4. `renew` replaces one slot's executor on purpose, without backoff, and opens a closed slot again.
5. A slot that may be filled takes the spare (spare.py), when there is one, instead of a new process.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from gen_worker.pipe.messages import Init
from supervisor.child import ExitCause
from supervisor.devices import Device
from supervisor.executor_handle import ExecutorHandle, HandleEvents, HandleState
from supervisor.executor_user import ExecutorUser
from supervisor.input_arena import InputArena
from supervisor.observer import Observer
from supervisor.respawn import Respawn
from supervisor.spare import Spare, SpareView

log = logging.getLogger(__name__)

BOOT_FAILURES: Final = 3
KILL_WAIT_S: Final = 5.0
LEAVE_S: Final = 2.0
"""How long an executor that is renewed may take to leave once it has no run."""


class SlotView(NamedTuple):
    """One device's place, as others may see it."""

    number: int
    device: Device
    handle: ExecutorHandle | None
    """None: it has no process now."""
    starts: int
    closed: bool
    """It was given up."""


class _Slot(Respawn):
    """One device's place and its history."""

    def __init__(self, number: int, device: Device) -> None:
        super().__init__()
        self.number = number
        self.device = device
        self.handle: ExecutorHandle | None = None
        self.incarnation = 0
        self.started_at = 0.0
        self.boot_failures = 0
        self.closed = False
        self.respawn: asyncio.TimerHandle | None = None
        self.renewing = False
        """Whether the death of its executor is wanted."""
        self.gone = asyncio.Event()
        self.settled = asyncio.Event()
        """Its executor serves, or it was given up."""


class Pool:
    """See the module. `events` hears what the executors say; the pool itself acts only on their ends."""

    def __init__(  # noqa: PLR0913  (what a pool can't know, by name)
        self,
        devices: Sequence[Device],
        *,
        init: Callable[[int, Device], Init],
        env: Callable[[Device], Mapping[str, str]],
        threads: int,
        events: HandleEvents,
        on_all_closed: Callable[[], None],
        user: ExecutorUser | None = None,
        inputs: InputArena | None = None,
        explain: Callable[[ExitCause], ExitCause] = lambda cause: cause,
        observer: Observer | None = None,
        warm_spare: bool = False,
    ) -> None:
        """`user` is whom executors run as, `inputs` where their large payloads lie, if they share that.

        `explain` may know more of why one died; `warm_spare`: keep one ready.
        """
        self._inputs = inputs
        self._slots = [_Slot(number, device) for number, device in enumerate(devices)]
        self._init = init
        self._env = env
        self._threads = threads
        self._events = events
        self._on_all_closed = on_all_closed
        self._user = user
        self._explain = explain
        self._observer = observer or Observer()
        self._loop = asyncio.get_running_loop()
        self._spawning: set[asyncio.Task[None]] = set()
        self._stopping = False
        self._spare = None
        if warm_spare:
            self._spare = Spare(devices, init=init, env=env, user=user, wanted=self._all_serve, inputs=inputs)
        self._empty = asyncio.Event()
        self.last_failure = ""
        """Why the last slot was closed, in one line."""
        self.last_reason = ""
        """The same as the executor's own word for it (Fatal.reason), "" when it had none."""

    # -- what is there ------------------------------------------------------------------------

    @property
    def handles(self) -> list[ExecutorHandle]:
        """The executors that have a process, whatever their state."""
        return [slot.handle for slot in self._slots if slot.handle is not None]

    @property
    def ready(self) -> list[ExecutorHandle]:
        return [
            slot.handle for slot in self._slots if slot.handle is not None and slot.handle.state is HandleState.READY
        ]

    @property
    def slots(self) -> list[SlotView]:
        """All places, whether there is an executor or not."""
        return [SlotView(slot.number, slot.device, slot.handle, slot.incarnation, slot.closed) for slot in self._slots]

    @property
    def open_slots(self) -> int:
        """Slots that have an executor or will have one again."""
        return sum(not slot.closed for slot in self._slots)

    @property
    def spare(self) -> SpareView | None:
        """The executor that waits for a slot; None when there is none."""
        return None if self._spare is None else self._spare.view

    def _all_serve(self) -> bool:
        """Whether every slot that is not given up has an executor that takes runs."""
        return not self._stopping and 0 < len(self.ready) == self.open_slots

    # -- life ---------------------------------------------------------------------------------

    def start(self) -> None:
        for slot in self._slots:
            self._spawn(slot)

    def new_code(self) -> None:
        """What is imported from now on is another code: a spare that has the old one is of no use."""
        if self._spare is not None:
            self._spare.discard("there is new code")

    async def renew(self, number: int, reason: str, drain_s: float) -> bool:
        """Replace one slot's executor: it takes no runs, has drain_s for those that it runs, and leaves.

        Returns whether a new one serves; the runs that were cut off are answered as those of any dead executor.
        """
        slot = self._slots[number]
        slot.boot_failures = slot.deaths_in_a_row = 0
        slot.closed = False
        slot.settled.clear()
        if slot.respawn is not None:
            slot.respawn.cancel()
        if slot.handle is None:
            self._spawn(slot)
        else:
            await self._retire(slot, slot.handle, reason, drain_s)
        await slot.settled.wait()
        return not slot.closed and not self._stopping

    async def _retire(self, slot: _Slot, handle: ExecutorHandle, reason: str, drain_s: float) -> None:
        """Have an executor leave; its slot is filled again as soon as it is gone."""
        slot.renewing = True
        slot.gone.clear()
        handle.drain()
        self._events.executor_draining(handle)
        if await handle.wait_idle(drain_s):
            handle.shutdown()
        else:
            handle.kill(f"{reason}, and it had runs after {drain_s:g} s")
        try:
            await asyncio.wait_for(slot.gone.wait(), LEAVE_S)
        except TimeoutError:
            handle.kill(reason)
            await slot.gone.wait()

    async def stop(self, reason: str, grace_s: float) -> None:
        """End all executors: those without runs are asked, and after grace_s the rest is killed."""
        self._stopping = True
        for slot in self._slots:
            slot.settled.set()
            if slot.respawn is not None:
                slot.respawn.cancel()
        spare = self._loop.create_task(self._spare.close(reason, KILL_WAIT_S)) if self._spare is not None else None
        for handle in self.handles:
            if not handle.runs and grace_s > 0:
                handle.shutdown()
            else:
                handle.kill(reason)
        await self._wait_empty(grace_s)
        self.kill(reason)
        await self._wait_empty(KILL_WAIT_S)
        if spare is not None:
            await spare

    def kill(self, reason: str) -> None:
        """End all executors now; `stop` then returns."""
        for handle in self.handles:
            handle.kill(reason)

    async def _wait_empty(self, timeout_s: float) -> None:
        if self.handles:
            self._empty.clear()
            try:
                await asyncio.wait_for(self._empty.wait(), timeout_s)
            except TimeoutError:
                log.debug("%d executors are still there after %.1f s", len(self.handles), timeout_s)

    def _spawn(self, slot: _Slot) -> None:
        slot.respawn = None
        if self._stopping:
            return
        task = self._loop.create_task(self._start_executor(slot))
        self._spawning.add(task)
        task.add_done_callback(self._spawning.discard)

    async def _start_executor(self, slot: _Slot) -> None:
        if self._stopping or slot.handle is not None:  # a renewal may have been faster
            return
        events = _SlotEvents(self, slot)
        handle = ExecutorHandle(slot.number, slot.incarnation, slot.device, self._threads, events, self._inputs)
        slot.incarnation += 1
        slot.started_at = self._loop.time()
        slot.handle = handle
        spare = self._spare.take() if self._spare is not None else None
        if spare is not None:
            handle.adopt(spare)
            self._observer.executor_started(handle)
            return
        try:
            await handle.start(self._init(slot.number, slot.device), self._env(slot.device), self._user)
        except (OSError, ValueError) as error:  # ValueError: what can't be in an environment
            log.error("executor %s can't be started: %s", handle.name, error)
            slot.handle = None
            slot.renewing = False
            slot.gone.set()
            if not self.handles:
                self._empty.set()
            self._replace(slot, f"can't be started: {error}", was_ready=False)
        else:
            self._observer.executor_started(handle)

    def _died(self, slot: _Slot, handle: ExecutorHandle, cause: ExitCause) -> None:
        slot.handle = None
        slot.gone.set()
        was_ready = bool(handle.functions)
        if not self._stopping:
            self._observer.executor_died(handle, cause)
        if handle.adopted and not was_ready and not self._stopping:
            log.warning("executor %s, a spare, was lost before it served: %s; a new one starts", handle.name, cause)
            if self._spare is not None:
                self._spare.lost()
            self._spawn(slot)
        elif slot.renewing and not self._stopping:
            log.info("executor %s left (%s): its slot is filled anew", handle.name, cause)
            self._spawn(slot)
        elif not self._stopping:
            words = f"{handle.fatal.message} ({cause})" if handle.fatal else str(cause)
            if not was_ready:
                self.last_reason = handle.fatal.reason if handle.fatal else ""
            if handle.recycled:
                log.info("executor of slot %d was recycled (%s): replaced at once", slot.number, handle.recycled)
                self._spawn(slot)
            else:
                self._replace(slot, words, was_ready=was_ready)
        slot.renewing = False
        if not self.handles:
            self._empty.set()

    def _have_spare(self) -> None:
        if self._spare is not None:
            self._spare.want()

    def _replace(self, slot: _Slot, words: str, *, was_ready: bool) -> None:
        slot.boot_failures = 0 if was_ready else slot.boot_failures + 1
        if slot.boot_failures >= BOOT_FAILURES:
            slot.closed = True
            slot.settled.set()
            self.last_failure = words
            log.error("executor slot %d stays down after %d failed starts: %s", slot.number, BOOT_FAILURES, words)
            if not self.open_slots:
                self._on_all_closed()
            self._have_spare()
            return
        delay = slot.delay_after_death(self._loop.time() - slot.started_at)
        what = "died" if was_ready else f"failed to start ({slot.boot_failures} of {BOOT_FAILURES})"
        log.error("executor of slot %d %s: %s; replaced in %.0f s", slot.number, what, words, delay)
        slot.respawn = self._loop.call_later(delay, self._spawn, slot)


class _SlotEvents:
    """Passes on what one executor says, and tells the pool first when it dies."""

    def __init__(self, pool: Pool, slot: _Slot) -> None:
        self._pool = pool
        self._slot = slot
        events = pool._events  # noqa: SLF001  (one object in two halves)
        self.executor_writable = events.executor_writable
        self.executor_draining = events.executor_draining
        self.run_event = events.run_event
        self.run_file = events.run_file
        self.run_result = events.run_result
        self.socket_frame = events.socket_frame
        self.socket_close = events.socket_close
        self.socket_credit = events.socket_credit
        self.model_loaded = events.model_loaded
        self.model_unloaded = events.model_unloaded

    def executor_ready(self, handle: ExecutorHandle) -> None:
        self._slot.settled.set()
        self._pool._events.executor_ready(handle)  # noqa: SLF001
        self._pool._have_spare()  # noqa: SLF001

    def executor_died(self, handle: ExecutorHandle, cause: ExitCause) -> None:
        cause = self._pool._explain(cause)  # noqa: SLF001
        # The runs are answered first; only then is the slot free for its next executor.
        self._pool._events.executor_died(handle, cause)  # noqa: SLF001
        self._pool._died(self._slot, handle, cause)  # noqa: SLF001
