"""What the development server knows now: of the worker, its processes, its models and its runs.

Owns: the worker's phase. All else is read from its owner when it is asked for.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import AsyncGenerator
from dataclasses import asdict
from enum import Enum
from typing import Any, Final

import msgspec
import psutil

from gen_worker._version import __version__
from gen_worker.serve.changes import Changes
from gen_worker.serve.functions import Function
from gen_worker.serve.local_worker import LocalWorker
from gen_worker.serve.runs import RunRecord, Runs
from gen_worker.serve.streams import sse
from gen_worker.serve.worker_log import LogLine

REFRESH_S: Final = 2.0
"""Memory and load change without a word."""
LEAST_S: Final = 0.1
"""Between two states of one watcher."""
SHOWN_LINES: Final = 100

_RESOURCES: Final = (
    "cpu_cores", "memory_bytes", "gpu_count", "gpu_name", "gpu_sm", "gpu_driver", "gpu_memory_bytes",
    "gpu_memory_used_bytes", "gpu_memory_free_bytes", "gpu_is_busy", "cuda_version", "torch_version", "deployment_id",
)  # fmt: skip


_ABOUT_EXECUTORS: Final = ("supervisor.pool", "supervisor.renewal")
_ABOUT_FUNCTIONS: Final = "supervisor.dispatcher"
_OF_SLOT: Final = re.compile(r"executor(?: of)? slot (\d+) ")
_READY: Final = re.compile(r"executor (\d+)(?:\.\d+)? is ready: ")
"""What supervisor/pool.py says of a slot, and supervisor/dispatcher.py of the executor that is in it now."""
RENEWED: Final = "all executors are new"
"""What supervisor/renewal.py logs when a reload is done."""


class Phase(Enum):
    STARTING = "starting"
    SERVING = "serving"
    RELOADING = "reloading"
    DOWN = "down"
    STOPPING = "stopping"


class DevState:
    """See the module."""

    def __init__(self, title: str, worker: LocalWorker) -> None:
        self.title = title
        self.worker = worker
        self.changes = Changes()
        self.runs = Runs(worker, self.changes)
        self.phase = Phase.STARTING
        self.problem = ""
        """Why nothing is served, or what is wrong with an executor, in one line."""
        self._slots_down: dict[int, str] = {}
        """What was said of slots that have no executor now, the latest last."""

    def enter(self, phase: Phase, problem: str = "") -> None:
        """The worker's phase is another now."""
        self.phase, self.problem = phase, problem
        if not problem:
            self._slots_down.clear()
        self.changes.tell()

    def take_line(self, line: LogLine) -> None:
        """The worker wrote a line. An executor that died or does not start is a problem until another serves."""
        if line.logger in _ABOUT_EXECUTORS and self.phase in (Phase.SERVING, Phase.RELOADING):
            if line.is_error:
                self._take_problem(line.message)
            elif line.message == RENEWED:
                self.problem = ""
                self._slots_down.clear()
        elif line.logger == _ABOUT_FUNCTIONS and (ready := _READY.match(line.message)):
            self._take_ready(int(ready[1]))
        self.changes.tell()

    def _take_problem(self, words: str) -> None:
        self.problem = words
        if of_slot := _OF_SLOT.search(words):
            slot = int(of_slot[1])
            self._slots_down.pop(slot, "")
            self._slots_down[slot] = words

    def _take_ready(self, slot: int) -> None:
        if self._slots_down.pop(slot, "") == self.problem:
            self.problem = next(reversed(self._slots_down.values()), "")

    async def settled(self, timeout_s: float) -> None:
        """Until the worker serves or is down, or the time is over: a call in the midst of a reload waits for it."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.phase in (Phase.STARTING, Phase.RELOADING):
                    await self.changes.wait(self.changes.number)
        except TimeoutError:
            return

    def functions(self) -> dict[str, Function]:
        """What is served now, by name."""
        return self.worker.functions()

    def snapshot(self) -> dict[str, Any]:
        """All that the page shows, but the functions' schemas: `functions_version` says when those are others."""
        functions = self.functions()
        return {
            "title": self.title,
            "version": __version__,
            "phase": self.phase.value,
            "problem": self.problem,
            "functions_version": _digest(functions),
            "executors": _executors(self.worker.pid),
            **self._registered(),
            "runs": [_summary(record) for record in self.runs.recent],
            "log": [
                {"text": str(line), "is_error": line.is_error, "is_output": line.is_output}
                for line in list(self.worker.lines)[-SHOWN_LINES:]
            ],
        }

    async def watch(self) -> AsyncGenerator[bytes, None]:
        """The state as events, now and at each change, until the server stops."""
        while True:
            seen = self.changes.number
            yield sse("state", self.snapshot())
            if self.phase is Phase.STOPPING:
                return
            await asyncio.sleep(LEAST_S)
            try:
                await asyncio.wait_for(self.changes.wait(seen), REFRESH_S)
            except TimeoutError:
                continue  # what changes without a word

    def _registered(self) -> dict[str, Any]:
        connection = self.worker.connection
        resources = connection.resources if connection is not None else None
        if resources is None:
            return {"resources": None, "models": []}
        models = [{"id": model, "where": "VRAM"} for model in resources.vram_models]
        models += [{"id": model, "where": "disk"} for model in resources.disk_models]
        models += [{"id": model, "where": where} for model, where in self._downloads().items()]
        return {"resources": {name: getattr(resources, name) for name in _RESOURCES}, "models": models}

    def _downloads(self) -> dict[str, str]:
        """What runs hear of models that they wait for."""
        waiting = (record for record in self.runs.recent if record.state == "running" and record.fetches)
        return {record.fetches: f"downloading, {record.progress or 0:.0%}" for record in waiting}


def _summary(record: RunRecord) -> dict[str, Any]:
    """A run without what may be large."""
    return {name: value for name, value in asdict(record).items() if name not in ("payload", "output")}


def _executors(supervisor_pid: int | None) -> list[dict[str, Any]]:
    """The executor processes, as the system shows them."""
    if supervisor_pid is None:
        return []
    found = []
    try:
        for child in psutil.Process(supervisor_pid).children():
            with child.oneshot():
                if child.status() != psutil.STATUS_ZOMBIE and "executor" in child.cmdline():
                    seconds = time.time() - child.create_time()
                    found.append({"pid": child.pid, "memory_bytes": child.memory_info().rss, "seconds": seconds})
    except psutil.NoSuchProcess:
        return found  # one of them ended just now
    return sorted(found, key=lambda executor: -executor["seconds"])


def _digest(functions: dict[str, Function]) -> str:
    described = [
        (each.name, each.incremental, each.input.document, each.output.document) for each in functions.values()
    ]
    return hashlib.sha256(msgspec.json.encode(described)).hexdigest()[:16]
