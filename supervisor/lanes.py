"""Which executor takes which waiting run, and when.

Owns: the runs that wait, and the executors reserved for a run that must be alone or has waited long for room.

1. A run waits in the lane of its function and models. Within a lane runs keep their order; lanes pass each other.
2. `pump` gives the heads of the lanes to executors: one that has the models hot, the least loaded first. For what is
   left it has models fetched and loaded: where there is room, else where idle models can leave, the least loaded first.
3. While all room is in use, runs of the models that are there go on: each swap costs a load. After PATIENCE_S an
   executor is reserved for the run that waits: it runs empty, so that its models can leave.
4. A run whose executor has its inputs at last (it took no place while it waited) goes on before new runs, as soon as
   there is a place for it.
5. Runs that their executor calls tiny are not spread: waking another executor costs more than it would save. They go
   where the last one went, until that has TINY_RUNS.
6. A suspect (quarantine.py) runs alone: an executor is reserved for it, and takes nothing else until it has ended. Only
   realtime sessions may be beside it: they get no strikes, and waiting for them could block the executor for hours.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Final

from gen_worker.pipe.messages import Failure, FunctionInfo
from supervisor.executor_handle import ExecutorHandle
from supervisor.model_names import Models
from supervisor.residence import ModelKey, Residence, Room
from supervisor.residency import Residency
from supervisor.runs import Run, RunState

TINY_RUNS: Final = 64
"""Each takes under 0.1 ms (executor/pace.py), so that the last of them waits some milliseconds for those before it."""
PATIENCE_S: Final = 5.0
"""How long the head of a lane waits for models in use to get idle by themselves. About what a load from disk takes:
with less, two busy models on one GPU would be swapped more than used."""


class _Lane:
    """The waiting runs of one function with the same models, in order."""

    __slots__ = ("blocked_since", "info", "keys", "last", "limit", "waiting")

    def __init__(self, info: FunctionInfo, keys: list[ModelKey], limit: int) -> None:
        self.info = info
        self.keys = keys
        self.limit = limit
        self.waiting: OrderedDict[int, Run] = OrderedDict()
        """By key; a run that ends while it waits leaves at once, so that none is counted or looked at in vain."""
        self.last: ExecutorHandle | None = None
        """That took a run of it last, unless that one had to be alone."""
        self.blocked_since: float | None = None
        """When all room was found to be in use; None: it is not."""


class Lanes:
    """See the module. `start` is called for each run that an executor can take now."""

    def __init__(
        self,
        *,
        residency: Residency,
        executors: Callable[[], Sequence[ExecutorHandle]],
        model_concurrency: int,
        start: Callable[[Run, ExecutorHandle], None],
        fail: Callable[[Run, Failure], None],
        held: Callable[[], bool] = lambda: False,
    ) -> None:
        """`fail` is called for runs that no executor can ever take.

        While `held` is true no run is started; `pump` is to be called when it is not any more.
        """
        self._residency = residency
        self._executors = executors
        self._model_concurrency = model_concurrency
        self._start = start
        self._fail = fail
        self._loop = asyncio.get_running_loop()
        self._patience: asyncio.TimerHandle | None = None
        self._held = held
        self._lanes: dict[tuple[str, Models], _Lane] = {}
        self._reserved: dict[ExecutorHandle, int] = {}
        self.tiny: dict[str, bool] = {}
        """Whether the runs of a function take next to nothing, by the last word of an executor."""
        self._returning: OrderedDict[int, tuple[Run, Callable[[], None]]] = OrderedDict()
        """By key: runs that wait for a place on their executor, in order."""

    def limit_of(self, info: FunctionInfo) -> int:
        """How often the function may run at once on one executor; 0: as often as it comes."""
        return info.max_concurrency or (self._model_concurrency if info.injections else 0)

    def add(self, run: Run, info: FunctionInfo) -> None:
        """Queue a run, and start it if it can."""
        lane = self._lanes.get((info.name, run.models))
        if lane is None:
            lane = _Lane(info, self._residency.keys(info, run.models), self.limit_of(info))
            self._lanes[info.name, run.models] = lane
        if not lane.waiting:
            lane.blocked_since = None
        lane.waiting[run.key] = run
        self._pump_lane(lane)
        self._bring_models(lane)

    def changed(self, info: FunctionInfo) -> list[Run]:
        """A function is another than before; returns the waiting runs that were meant for its earlier models."""
        lanes = {key: lane for key, lane in self._lanes.items() if key[0] == info.name}
        unfit: list[Run] = []
        for key, lane in lanes.items():
            if lane.info.injections != info.injections:
                unfit.extend(lane.waiting.values())
                del self._lanes[key]
            else:
                lane.info, lane.limit = info, self.limit_of(info)
        return unfit

    def waiting_of(self, function: str) -> list[Run]:
        """The runs of a function that wait, whatever their models are."""
        return [run for (name, _), lane in self._lanes.items() if name == function for run in lane.waiting.values()]

    def go_on(self, run: Run, start: Callable[[], None]) -> None:
        """Call `start` when the executor that has this paused run has a place for it, which it then takes."""
        self._returning[run.key] = run, start
        self.pump()

    def remove(self, run: Run) -> None:
        """The run has ended, waiting or not."""
        self._returning.pop(run.key, None)
        if run.handle is None:
            lane = self._lanes.get((run.function, run.models))
            if lane is not None:
                lane.waiting.pop(run.key, None)
        if run.key in self._reserved.values():
            self._release(run)

    def forget(self, handle: ExecutorHandle) -> None:
        """The executor is gone."""
        self._reserved.pop(handle, None)
        for lane in self._lanes.values():
            if lane.last is handle:
                lane.last = None

    def pump(self) -> None:
        """Give waiting runs to executors until none can take one."""
        for run, start in list(self._returning.values()):
            handle = run.handle
            if handle is not None and handle.has_place(run.function, self.limit_of(handle.functions[run.function])):
                del self._returning[run.key]
                handle.resume(run)
                start()
        lanes = [lane for lane in self._lanes.values() if lane.waiting]
        if not lanes:
            return
        lanes.sort(key=lambda lane: next(iter(lane.waiting)))
        for lane in lanes:
            self._pump_lane(lane)
        for lane in lanes:
            self._bring_models(lane)

    def waiting_for(self, model_id: str) -> Iterator[Run]:
        """The runs that wait in a lane that has this model."""
        for lane in self._lanes.values():
            if any(model_id == needed for needed, _ in lane.keys):
                yield from lane.waiting.values()

    def keys(self) -> set[ModelKey]:
        """All that is waited for."""
        return {key for lane in self._lanes.values() if lane.waiting for key in lane.keys}

    def stranded(self, keys: set[ModelKey]) -> list[Run]:
        """The runs that wait for one of these models while no executor has it or loads it."""
        return [
            run
            for lane in self._lanes.values()
            if not keys.isdisjoint(lane.keys)
            and not any(self._residency.state(handle, lane.keys) for handle in self._executors())
            for run in lane.waiting.values()
        ]

    # -- inside -------------------------------------------------------------------------------

    def _pump_lane(self, lane: _Lane) -> None:
        while lane.waiting and not self._held():
            run = next(iter(lane.waiting.values()))
            handle = self._choose(lane, run)
            if handle is None:
                return
            del lane.waiting[run.key]
            if self._reserved and not run.alone:
                self._release(run)
            self._start(run, handle)

    def _choose(self, lane: _Lane, run: Run) -> ExecutorHandle | None:
        """The executor for the lane's next run; None: it waits (and what it waits for is under way)."""
        if self._stays(lane, run):
            return lane.last
        able = self._able(lane, run)
        hot = [handle for handle in able if self._residency.state(handle, lane.keys) is Residence.HOT]
        if not hot:
            return None
        if not run.alone:
            lane.last = min(hot, key=load_of)
            return lane.last
        chosen = min(hot, key=load_of)
        if chosen.brief_load:  # none is empty: stay with the one that is already running empty for it
            chosen = next((handle for handle in hot if handle in self._reserved), chosen)
        self._release(run)
        self._reserved[chosen] = run.key
        return None if chosen.brief_load else chosen

    def _stays(self, lane: _Lane, run: Run) -> bool:
        """Whether the run goes where the one before it went, without a look at the other executors."""
        last = lane.last
        if last is None or last.load >= TINY_RUNS or run.alone or self._reserved or not self.tiny.get(run.function):
            return False
        return last.can_take(run.function, lane.limit) and self._residency.state(last, lane.keys) is Residence.HOT

    def _release(self, run: Run) -> None:
        """No executor is reserved for it any more."""
        self._reserved = {handle: key for handle, key in self._reserved.items() if key != run.key}

    def _able(self, lane: _Lane, run: Run) -> list[ExecutorHandle]:
        """The executors with room for the run, whatever models they hold."""
        return [
            handle
            for handle in self._executors()
            if handle.can_take(lane.info.name, lane.limit) and self._reserved.get(handle, run.key) == run.key
        ]

    def _bring_models(self, lane: _Lane) -> None:
        """Have the lane's models fetched and loaded, if runs wait for that.

        A load is started when the executors that have the models, or load them already, will not have room for all who
        wait. Those that have them are full, or no run would wait: an idle executor does not wait for them.
        """
        if not lane.waiting or not lane.keys:
            return
        states = {handle: self._residency.state(handle, lane.keys) for handle in self._executors()}
        serving = sum(state in {Residence.HOT, Residence.LOADING} for state in states.values())
        loading = sum(state is Residence.LOADING for state in states.values())
        for run in reversed(lane.waiting.values()):
            if run.state is not RunState.QUEUED:
                break  # nor are those before it: this was here for them
            run.wait_for_model()
        if loading and len(lane.waiting) <= loading * (lane.limit or len(lane.waiting)):
            return
        able = self._able(lane, next(iter(lane.waiting.values())))
        cold = [
            handle
            for handle in able
            if states.get(handle) is None
            and not (serving and (handle.load or self._residency.has_failed(handle, lane.keys)))
        ]
        if serving and not cold:
            return
        if sum(not self._residency.fetch(model_id) for model_id, _ in lane.keys):  # each is asked for at once
            return
        self._load(lane, cold, serves=bool(serving))

    def _load(self, lane: _Lane, cold: Sequence[ExecutorHandle], *, serves: bool) -> None:
        """Load the lane's models on the best of `cold`, or find out why none will do."""
        rooms = {handle: self._residency.room(handle, lane.keys) for handle in cold}
        fit = [handle for handle in cold if rooms[handle] <= Room.EVICT]
        if fit:
            chosen = min(fit, key=lambda handle: (rooms[handle], load_of(handle)))
            if self._residency.load(chosen, lane.keys):
                lane.blocked_since = None
                self._release(next(iter(lane.waiting.values())))
        elif not serves:
            failure = self._residency.refusal(lane.keys)
            if failure is None:
                self._wait_for_room(lane, [handle for handle in cold if rooms[handle] is Room.BUSY])
                return
            for run in list(lane.waiting.values()):
                self._fail(run, failure)

    def _wait_for_room(self, lane: _Lane, busy: Sequence[ExecutorHandle]) -> None:
        """Be patient while what would have to leave is in use. What is being loaded is used before it leaves."""
        run, now = next(iter(lane.waiting.values())), self._loop.time()
        in_use = [handle for handle in busy if not self._residency.loading(handle)]
        if not in_use:
            lane.blocked_since = None
            return
        if lane.blocked_since is None:
            lane.blocked_since = now
        elif now - lane.blocked_since >= PATIENCE_S and run.key not in self._reserved.values():
            self._reserved[min(in_use, key=load_of)] = run.key
        if self._patience is None:
            self._patience = self._loop.call_later(PATIENCE_S, self._patience_is_over)

    def _patience_is_over(self) -> None:
        self._patience = None
        self.pump()


def load_of(handle: ExecutorHandle) -> tuple[int, int]:
    """How loaded an executor is, for min(); the lower slot wins."""
    return handle.load, handle.slot
