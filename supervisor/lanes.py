"""Which executor takes which waiting run, and when.

Owns: the runs that wait, and the executors reserved for a run that must be alone.

1. A run waits in the lane of its function and models. Within a lane runs keep their order; lanes pass each other.
2. `pump` gives the heads of the lanes to executors: one that has the models hot, else one that has room, the least
   loaded first. When nobody holds the models, one executor is told to load them, and the lane waits.
3. A suspect (quarantine.py) runs alone: an executor is reserved for it, and takes nothing else until it has ended.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

from gen_worker.pipe.messages import FunctionInfo
from supervisor.executor_handle import ExecutorHandle
from supervisor.residency import ModelKey, Models, Residence, Residency
from supervisor.runs import Run, RunState


class _Lane:
    """The waiting runs of one function with the same models, in order."""

    __slots__ = ("info", "keys", "limit", "waiting")

    def __init__(self, info: FunctionInfo, keys: list[ModelKey], limit: int) -> None:
        self.info = info
        self.keys = keys
        self.limit = limit
        self.waiting: OrderedDict[int, Run] = OrderedDict()
        """By key; a run that ends while it waits leaves at once, so that none is counted or looked at in vain."""


class Lanes:
    """See the module. `start` is called for each run that an executor can take now."""

    def __init__(
        self,
        *,
        residency: Residency,
        executors: Callable[[], Sequence[ExecutorHandle]],
        model_concurrency: int,
        start: Callable[[Run, ExecutorHandle], None],
        held: Callable[[], bool] = lambda: False,
    ) -> None:
        """While `held` is true no run is started; `pump` is to be called when it is not any more."""
        self._residency = residency
        self._executors = executors
        self._model_concurrency = model_concurrency
        self._start = start
        self._held = held
        self._lanes: dict[tuple[str, Models], _Lane] = {}
        self._reserved: dict[ExecutorHandle, int] = {}

    def limit_of(self, info: FunctionInfo) -> int:
        """How often the function may run at once on one executor; 0: as often as it comes."""
        return info.max_concurrency or (self._model_concurrency if info.injections else 0)

    def add(self, run: Run, info: FunctionInfo) -> None:
        """Queue a run, and start it if it can."""
        lane = self._lanes.get((info.name, run.models))
        if lane is None:
            lane = _Lane(info, self._residency.keys(info, run.models), self.limit_of(info))
            self._lanes[info.name, run.models] = lane
        lane.waiting[run.key] = run
        self._pump_lane(lane)

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

    def of(self, function: str) -> list[Run]:
        """The runs of a function that wait."""
        return [run for key, lane in self._lanes.items() if key[0] == function for run in lane.waiting.values()]

    def remove(self, run: Run) -> None:
        """The run has ended, waiting or not."""
        if run.handle is None:
            lane = self._lanes.get((run.function, run.models))
            if lane is not None:
                lane.waiting.pop(run.key, None)
        if run.alone:
            self._release(run)

    def forget(self, handle: ExecutorHandle) -> None:
        """The executor is gone."""
        self._reserved.pop(handle, None)

    def pump(self) -> None:
        """Give waiting runs to executors until none can take one."""
        lanes = [lane for lane in self._lanes.values() if lane.waiting]
        lanes.sort(key=lambda lane: next(iter(lane.waiting)))
        for lane in lanes:
            self._pump_lane(lane)

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
            self._start(run, handle)

    def _choose(self, lane: _Lane, run: Run) -> ExecutorHandle | None:
        """The executor for the lane's next run; None: it waits (and what it waits for is under way)."""
        able = [
            handle
            for handle in self._executors()
            if handle.can_take(lane.info.name, lane.limit) and self._reserved.get(handle, run.key) == run.key
        ]
        hot = [handle for handle in able if self._residency.state(handle, lane.keys) is Residence.HOT]
        if not hot:
            if lane.keys:
                self._load_for(lane, able)
            return None
        chosen = min(hot, key=load_of)
        if not run.alone:
            return chosen
        if chosen.load:  # none is empty: stay with the one that is already running empty for it
            chosen = next((handle for handle in hot if handle in self._reserved), chosen)
        self._release(run)
        self._reserved[chosen] = run.key
        return None if chosen.load else chosen

    def _release(self, run: Run) -> None:
        """No executor is reserved for it any more."""
        self._reserved = {handle: key for handle, key in self._reserved.items() if key != run.key}

    def _load_for(self, lane: _Lane, able: Sequence[ExecutorHandle]) -> None:
        """Start a load when those that load the models already will not have room for all who wait.

        Those that have them are full, or this would not be called: an idle executor does not wait for them.
        """
        states = {handle: self._residency.state(handle, lane.keys) for handle in self._executors()}
        serving = sum(state is not None for state in states.values())
        loading = sum(state is Residence.LOADING for state in states.values())
        cold = [
            handle
            for handle in able
            if states.get(handle) is None and not (serving and self._residency.has_failed(handle, lane.keys))
        ]
        for run in reversed(lane.waiting.values()):
            if run.state is not RunState.QUEUED:
                break  # nor are those before it: this was here for them
            run.wait_for_model()
        if not cold or (loading and len(lane.waiting) <= loading * (lane.limit or len(lane.waiting))):
            return
        idle = [handle for handle in cold if not serving or not handle.load]
        if idle:
            self._residency.load(min(idle, key=load_of), lane.keys)


def load_of(handle: ExecutorHandle) -> tuple[int, int]:
    """How loaded an executor is, for min(); the lower slot wins."""
    return handle.load, handle.slot
