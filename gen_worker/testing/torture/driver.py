"""One torture: a worker is started, hurt by a plan, and judged.

Owns: the order of things, and what is asked of the worker at the end.

1. The scheduler listens, the worker starts and registers.
2. The plan is played: requests, realtime sessions, faults of streams and of processes, each at its time.
3. The worker is left in peace: every run is answered, every executor is there again, probes succeed.
4. SIGTERM while runs are under way: they are answered, it leaves with 0 and leaves nothing behind.
5. The history is checked and summed up.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, Final

from gen_worker.errors import ValidationError
from gen_worker.testing.torture import functions
from gen_worker.testing.torture.conversations import WAIT_S, Conversations
from gen_worker.testing.torture.faults import BACK_S, StreamFaults
from gen_worker.testing.torture.history import History, Light, Run
from gen_worker.testing.torture.invariants import Bounds, bound_of, check, unanswered
from gen_worker.testing.torture.options import (
    DRAIN_S,
    GRACE_S,
    Options,
    command_line,
    keeps_results,
    worker_environment,
)
from gen_worker.testing.torture.plan import (
    LONG_TIMEOUT_MS,
    Converse,
    HurtProcess,
    HurtStream,
    ProcessFault,
    Send,
    make_plan,
)
from gen_worker.testing.torture.processes import WorkerProcess
from gen_worker.testing.torture.pulse import note_stalls
from gen_worker.testing.torture.report import Report, summarize
from gen_worker.testing.torture.requests import (
    SUCCESS,
    BuiltIn,
    GivenPayload,
    GivenPayloads,
    OwnFunctions,
    Request,
    Workload,
    probe,
    read_payloads,
    short_rest,
    with_model,
)
from gen_worker.testing.torture.scheduler import Scheduler

START_S: Final = 120.0
"""A tenant's imports may take long."""
ALL_BACK_S: Final = 75.0
"""For the longest wait before an executor is replaced (60 s), and its start."""
PROGRESS_S: Final = 5.0
_WAITING_FAULTS: Final = 2
"""Stream faults that wait for their turn; further ones are left out."""


class WorkerDidNotStartError(ValidationError):
    """The worker never registered; the message has the end of its log."""


async def torture(options: Options, say: Callable[[str], None]) -> Report:
    """Do it. `say` gets lines of progress. Raises ValidationError when the options or the project can't be used."""
    given = read_payloads(options.payloads) if options.payloads is not None else []
    if given and options.project is None:
        raise ValidationError("--payloads goes with --project: the built-in functions have payloads of their own")
    history = History(has_ledger=options.project is None)
    light = Light(history)
    with TemporaryDirectory(prefix="torture-") as folder:
        async with Scheduler(history, light) as scheduler:
            cwd = options.project or Path(folder)
            overrides = worker_environment(options, scheduler.addresses, Path(folder))
            worker = WorkerProcess(
                history=history,
                light=light,
                cwd=cwd,
                cwd_is_ours=options.project is None,
                overrides=overrides,
                log_file=options.log_file,
            )
            one = _Torture(options, history, light, scheduler, worker, given, say)
            try:
                await one.run()
            finally:
                await worker.destroy()
        light.close(time.monotonic())
        if history.has_ledger:
            history.starts = _ledger(Path(folder) / functions.LEDGER)
            history.ends = _end_times(Path(folder) / functions.ENDS)
        return one.judge()


def _ledger(path: Path) -> dict[str, int]:
    try:
        return Counter(path.read_text().split())
    except FileNotFoundError:  # no function began
        return {}


def _end_times(path: Path) -> dict[str, float]:
    try:
        lines = path.read_text().splitlines()
    except FileNotFoundError:  # none ended
        return {}
    return {run_id: float(at) for run_id, at in (line.split() for line in lines)}


class _Torture:
    """The steps of one torture, in their order."""

    def __init__(
        self,
        options: Options,
        history: History,
        light: Light,
        scheduler: Scheduler,
        worker: WorkerProcess,
        given: list[GivenPayload],
        say: Callable[[str], None],
    ) -> None:
        self._options = options
        self._history = history
        self._light = light
        self._scheduler = scheduler
        self._stream_faults = StreamFaults(scheduler, history, light)
        self._worker = worker
        self._given = given
        self._say = say
        self._workload: Workload = BuiltIn()
        self._bounds = Bounds(
            GRACE_S,
            executor_rss=options.executor_memory_bytes,
        )
        self._run_ids = (f"{options.seed}-{number}" for number in itertools.count())
        self._faults: Counter[str] = Counter()
        self._conversations = Conversations(scheduler, history)
        self._talking: set[asyncio.Task[None]] = set()
        self._hurting: set[asyncio.Task[None]] = set()
        self._stream_faults_waiting = 0
        self._executors = 0
        self._began = time.monotonic()

    async def run(self) -> None:
        await self._start()
        watching = asyncio.create_task(self._worker.watch())
        progress = asyncio.create_task(self._show_progress())
        pulse = asyncio.create_task(note_stalls(self._history.stalls))
        try:
            await self._play()
            if self._worker.is_running:
                await self._settle()
                await self._prove_it_serves()
                await self._stop()
        finally:
            left = (watching, progress, pulse, *self._hurting, *self._talking)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def judge(self) -> Report:
        """After `run`, when the processes are gone and the ledger is read."""
        self._worker.read_log()
        return summarize(
            self._history,
            seed=self._options.seed,
            seconds=self._options.seconds,
            faults=self._faults,
            executors_lost=max(0, self._worker.executors_seen - self._executors),
            lost=len(self._unanswered()),
            violations=check(self._history, self._bounds),
            reproduce=command_line(self._options),
        )

    # -- 1 ------------------------------------------------------------------------------------------

    async def _start(self) -> None:
        await self._worker.start()
        registered = asyncio.ensure_future(self._scheduler.functions(START_S))
        ended = asyncio.ensure_future(self._worker.wait_ended())
        await asyncio.wait((registered, ended), return_when=asyncio.FIRST_COMPLETED)
        ended.cancel()
        if not registered.done() or registered.exception() is not None:
            registered.cancel()
            log = "\n".join(self._worker.log_tail())
            raise WorkerDidNotStartError(f"the worker did not register; the end of its log:\n{log}")
        known = registered.result()
        if self._given:
            self._workload = GivenPayloads(self._given, known)
        elif self._options.project is not None:
            self._workload = OwnFunctions(known)
        # All are spawned at once; the first that is ready makes the worker register.
        self._executors = len(self._worker.executors())
        self._history.peaks.fds_at_start = self._worker.descriptors()
        self._say(f"seed {self._options.seed}: {self._executors} executors serve {len(known)} functions")

    # -- 2 ------------------------------------------------------------------------------------------

    async def _play(self) -> None:
        loop = asyncio.get_running_loop()
        began = self._began = time.monotonic()
        for action in make_plan(self._options.seed, self._options.seconds).actions:
            await asyncio.sleep(max(0.0, began + action.at_s - time.monotonic()))
            if not self._worker.is_running:
                return  # watching notes it
            match action:
                case Send():
                    self._send(action, loop)
                case Converse():
                    self._converse(action)
                case HurtStream():
                    if self._stream_faults_waiting < _WAITING_FAULTS:
                        self._stream_faults_waiting += 1
                        self._hurt(self._hurt_stream(action))
                case HurtProcess(fault=ProcessFault.KILL_SUPERVISOR) if not keeps_results(self._options):
                    pass
                case HurtProcess():
                    self._hurt(self._hurt_process(action))
        await asyncio.wait({asyncio.ensure_future(asyncio.sleep(0)), *self._hurting}, timeout=2 * BACK_S)

    def _send(self, action: Send, loop: asyncio.AbstractEventLoop) -> None:
        run_id = next(self._run_ids)
        rng = Random(action.seed)  # noqa: S311  (to reproduce)
        request = self._workload.request(rng, run_id, lethal=action.lethal)
        if request.steady:
            timeout_ms, cancel_after_s = LONG_TIMEOUT_MS, None
        else:
            timeout_ms, cancel_after_s = request.timeout_ms or action.timeout_ms, action.cancel_after_s
        run = self._scheduler.send(run_id, request, timeout_ms, action.copies)
        if cancel_after_s is not None:
            loop.call_later(cancel_after_s, self._scheduler.cancel, run)
        if action.lethal and self._history.has_ledger:
            self._faults[f"request: {request.function.removeprefix('torture_')}"] += 1

    def _converse(self, action: Converse) -> None:
        if not self._history.has_ledger:
            return  # a tenant's own handlers have manners of their own
        task = asyncio.create_task(self._conversations.hold(action))
        self._talking.add(task)
        task.add_done_callback(self._talking.discard)

    def _hurt(self, fault: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(fault)
        self._hurting.add(task)
        task.add_done_callback(self._hurting.discard)

    async def _hurt_stream(self, action: HurtStream) -> None:
        try:
            await self._stream_faults.hurt(action)
        finally:
            self._stream_faults_waiting -= 1
        self._faults[action.fault] += 1

    async def _hurt_process(self, action: HurtProcess) -> None:
        if await self._worker.hurt(action):
            self._faults[action.fault] += 1

    async def _show_progress(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_S)
            history = self._history
            answered = sum(any(run.results) for run in history.runs.values())
            self._say(
                f"{time.monotonic() - self._began:5.0f} s  {len(history.runs)} runs, {answered} answered; "
                f"{sum(self._faults.values())} faults, {len(history.streams)} streams, "
                f"{len(self._worker.executors())} of {self._executors} executors; "
                f"{len(history.trouble) + len(history.strays) + len(history.offences)} oddities"
            )

    # -- 3 ------------------------------------------------------------------------------------------

    async def _settle(self) -> None:
        """Until every accepted run is answered, and no one talks. What is not in its time, the check will find."""
        await self._stream_faults.wait_back("at the end")
        await _until(lambda: not self._talking, WAIT_S + BACK_S)
        longest = max((bound_of(run, self._bounds) for run in self._unanswered()), default=0.0)
        await _until(lambda: not self._scheduler.backlog and not self._unanswered(), BACK_S + longest)

    def _unanswered(self) -> list[Run]:
        return unanswered(self._history, self._bounds)

    async def _prove_it_serves(self) -> None:
        await _until(lambda: len(self._worker.executors()) >= self._executors, ALL_BACK_S)
        here = len(self._worker.executors())
        if here < self._executors:
            self._history.trouble.append(f"{here} of {self._executors} executors are there after {ALL_BACK_S:g} s")
        probes = [self._ask(self._probe) for _ in range(2 * self._executors)]
        await _until(lambda: all(any(run.results) for run in probes), LONG_TIMEOUT_MS / 1000 + BACK_S)
        for run in probes:
            outcome = next((result.outcome for result in run.results), None)
            if outcome is None or (self._history.has_ledger and outcome.kind != SUCCESS):
                kind = outcome.kind if outcome else "no result"
                self._history.trouble.append(
                    f"the worker does not serve at the end: {kind} of a {run.request.function}"
                )
        if self._history.has_ledger:
            await self._prove_it_loads_models()
        self._history.peaks.fds_at_end = self._worker.descriptors()

    async def _prove_it_loads_models(self) -> None:
        """After all the commands of the torture, of which some had no answer since their stream broke."""
        for command in ("load", "unload", "load"):
            error = await self._scheduler.command_model(command, functions.MODEL, LONG_TIMEOUT_MS / 1000)
            if error:
                self._history.trouble.append(f"at the end it does not {command} a model: {error}")
        run = self._ask(with_model)
        await _until(lambda: any(run.results), LONG_TIMEOUT_MS / 1000)
        kinds = [result.outcome.kind for result in run.results if result.outcome]
        if kinds[:1] != [SUCCESS]:
            self._history.trouble.append(f"at the end a run with a model ends {kinds or 'not at all'}")

    def _probe(self, run_id: str) -> Request:
        return probe(run_id) if self._history.has_ledger else self._own_request(run_id)

    def _rest(self, run_id: str) -> Request:
        return short_rest(run_id) if self._history.has_ledger else self._own_request(run_id)

    def _own_request(self, run_id: str) -> Request:
        return self._workload.request(Random(run_id), run_id, lethal=False)  # noqa: S311  (to reproduce)

    def _ask(self, make: Callable[[str], Request]) -> Run:
        run_id = next(self._run_ids)
        return self._scheduler.send(run_id, make(run_id), LONG_TIMEOUT_MS)

    # -- 4 ------------------------------------------------------------------------------------------

    async def _stop(self) -> None:
        for _ in range(2 * self._executors):
            self._ask(self._rest)
        await _until(lambda: not self._scheduler.backlog, BACK_S)
        self._history.stopped_at = time.monotonic()
        stopping = asyncio.create_task(self._worker.stop(2 * DRAIN_S + BACK_S))
        for _ in range(self._executors):
            self._ask(self._rest)
        await stopping


async def _until(check: Callable[[], bool], within_s: float) -> None:
    """Wait until `check()`, at most that long: of what did not come to be, whoever asks next will say so."""
    end = time.monotonic() + within_s
    while not check() and time.monotonic() < end:  # noqa: ASYNC110  (processes, and what they owe, announce nothing)
        await asyncio.sleep(0.05)


def run(options: Options, say: Callable[[str], None]) -> Report:
    """`torture` on an event loop of its own. SIGTERM is a KeyboardInterrupt here: the worker must not be left alone."""

    async def interruptible() -> Report:
        task = asyncio.ensure_future(torture(options, say))
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        return await task

    try:
        return asyncio.run(interruptible())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
