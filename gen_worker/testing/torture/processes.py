"""The worker as processes: started, signalled, watched, and looked for when it should be gone.

Owns: the supervisor's process and its log file, every executor process that was ever seen, and what sampling found:
peaks of memory and descriptors, zombies and orphans that stay.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec
import psutil

from gen_worker.testing.torture import functions
from gen_worker.testing.torture.history import History, Light
from gen_worker.testing.torture.plan import HurtProcess, ProcessFault

SAMPLE_S: Final = 0.4
LINGER_S: Final = 3.0
"""A dead child, or what a dead executor left behind, may wait this long for a supervisor that is busy."""
GONE_S: Final = 3.0
"""1 s is what a worker needs; the rest is for a machine that has better things to do."""
_KILLED: Final = "the supervisor is killed"
_STOPPED: Final = "the supervisor is stopped"
_SIGNALS: Final[Mapping[ProcessFault, signal.Signals]] = {
    ProcessFault.KILL: signal.SIGKILL,
    ProcessFault.SEGV: signal.SIGSEGV,
    ProcessFault.ABRT: signal.SIGABRT,
}
_GRPC_NOTICE: Final = re.compile(rb"[IW]\d{4} \d\d:\d\d:\d\d|WARNING: All log messages before absl::InitializeLog")
_KIND_END: Final = re.compile(r"(?<=.)[:(]\[?\d| \(deleted\)")
_LOG_TAIL_LINES: Final = 15
_MAX_TROUBLE: Final = 300


class _Record(msgspec.Struct):
    """One line of the worker's log, as far as it matters here."""

    level: str = ""
    logger: str = ""
    message: str = ""
    exc: str = ""


class WorkerProcess:
    """A supervisor and its executors, in `cwd`. `overrides` go over the environment of this process."""

    def __init__(
        self,
        *,
        history: History,
        light: Light,
        cwd: Path,
        cwd_is_ours: bool,
        overrides: Mapping[str, str],
        log_file: Path,
    ) -> None:
        self._history = history
        self._light = light
        self._cwd = cwd.resolve()
        self._cwd_is_ours = cwd_is_ours
        # A worker's environment is its operator's, whose settings for models and stores must reach a tenant's project.
        self._env = {**os.environ, **overrides}  # noqa: TID251  (the worker gets what this process has)
        self.log_file = log_file
        self._seen: dict[int, psutil.Process] = {}
        self._lingers: dict[int, float] = {}
        self._is_frozen = False
        self._expected_end = False
        self._restarting = False
        self.log_file.unlink(missing_ok=True)

    async def start(self) -> None:
        with self.log_file.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "gen_worker.entrypoint",
                cwd=self._cwd,
                env=self._env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C is for the driver, which ends the worker itself
            )
        self._supervisor = psutil.Process(self._process.pid)

    @property
    def executors_seen(self) -> int:
        """How many executor processes there were."""
        return len(self._seen)

    @property
    def is_running(self) -> bool:
        return self._restarting or self._process.returncode is None

    async def wait_ended(self) -> None:
        """Wait for the supervisor's end."""
        await self._process.wait()

    def executors(self) -> list[psutil.Process]:
        """Those that are alive, oldest first."""
        found = []
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self._supervisor.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if child.status() == psutil.STATUS_ZOMBIE:
                        continue
                    if child.pid not in self._seen:
                        if "executor" not in child.cmdline():
                            continue
                        self._seen[child.pid] = child
                    found.append(child)
        return sorted(found, key=lambda child: child.create_time())

    # -- faults -------------------------------------------------------------------------------------

    async def hurt(self, action: HurtProcess) -> bool:
        """Inject one fault; False when there was no process to hurt."""
        if action.fault is ProcessFault.FREEZE_SUPERVISOR:
            await self._freeze_supervisor(action.seconds)
            return True
        if action.fault is ProcessFault.KILL_SUPERVISOR:
            await self._replace_supervisor()
            return True
        alive = self.executors()
        if not alive:
            return False
        victim = alive[action.pick % len(alive)]
        with contextlib.suppress(psutil.NoSuchProcess):  # it may die by itself just now
            if action.fault is ProcessFault.FREEZE_EXECUTOR:
                await _freeze(victim, action.seconds)
            else:
                victim.send_signal(_SIGNALS[action.fault])
            return True
        return False

    async def _freeze_supervisor(self, seconds: float) -> None:
        self._light.dim(_STOPPED, time.monotonic())
        self._is_frozen = True
        try:
            await _freeze(self._supervisor, seconds)
        finally:
            self._is_frozen = False
            self._light.brighten(_STOPPED, time.monotonic())

    async def _replace_supervisor(self) -> None:
        """SIGKILL; what it leaves behind must be gone within GONE_S; then another one is started in its place."""
        if self._expected_end:
            return
        self._light.dim(_KILLED, time.monotonic())
        self._restarting = True
        try:
            self.executors()
            self._history.kills.append(time.monotonic())
            self._process.kill()
            await self._process.wait()
            end = time.monotonic() + GONE_S
            while (left := self.left_behind()) and time.monotonic() < end:  # noqa: ASYNC110  (nothing tells of it)
                await asyncio.sleep(0.05)
            if left:
                self._history.trouble.append(f"{len(left)} processes outlived a killed supervisor by {GONE_S:g} s")
            await self.start()
        finally:
            self._restarting = False
            self._light.brighten(_KILLED, time.monotonic())

    # -- watching -----------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Sample until canceled, or until the supervisor ends, which is trouble unless it was told to."""
        while self.is_running:
            self._sample()
            await asyncio.sleep(SAMPLE_S)
        if not self._expected_end:
            self._history.trouble.append(f"the supervisor ended by itself, exit code {self._process.returncode}")

    def _sample(self) -> None:
        peaks = self._history.peaks
        with contextlib.suppress(psutil.NoSuchProcess):
            peaks.supervisor_rss = max(peaks.supervisor_rss, self._supervisor.memory_info().rss)
            peaks.supervisor_fds = max(peaks.supervisor_fds, self._supervisor.num_fds())
        for executor in self.executors():
            with contextlib.suppress(psutil.NoSuchProcess):
                peaks.executor_rss = max(peaks.executor_rss, executor.memory_info().rss)
        self._note_lingering()

    def _note_lingering(self) -> None:
        """What a supervisor that is not hindered must get rid of."""
        now = time.monotonic()
        found = {} if self._is_frozen else dict(self._lingering())
        for pid, what in found.items():
            since = self._lingers.setdefault(pid, now)
            if now - since > LINGER_S:
                self._history.trouble.append(f"process {pid} {what} for {now - since:.1f} s")
                self._lingers[pid] = now
        for pid in self._lingers.keys() - found.keys():
            del self._lingers[pid]

    def _lingering(self) -> Iterator[tuple[int, str]]:
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self._supervisor.children():
                with contextlib.suppress(psutil.NoSuchProcess):
                    if _is_zombie(child):
                        yield child.pid, "has been a zombie"
                    elif child.cmdline()[:1] == [functions.CHILD_PROGRAM]:
                        yield child.pid, "has outlived its executor"

    def descriptors(self) -> Counter[str]:
        """What the supervisor has open now, by kind, but for files, whose number follows what was sent last."""
        found: Counter[str] = Counter()
        for descriptor in Path(f"/proc/{self._process.pid}/fd").glob("*"):
            with contextlib.suppress(OSError):  # it is closed by now
                target = str(descriptor.readlink())
                if not target.startswith("/") or target.startswith("/memfd:"):
                    found[_KIND_END.split(target, maxsplit=1)[0]] += 1
        return found

    # -- the end ------------------------------------------------------------------------------------

    async def stop(self, within_s: float) -> None:
        """SIGTERM; the worker must leave by itself in that time, with exit code 0 and without a rest."""
        self._expected_end = True
        self.executors()
        if self.is_running:
            self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(within_s):
                code = await self._process.wait()
        except TimeoutError:
            self._history.trouble.append(f"the supervisor was still there {within_s:g} s after SIGTERM")
        else:
            if code != 0:
                self._history.trouble.append(f"exit code {code} after SIGTERM, expected 0")
        left = [f"{process.pid} ({_words(process)})" for process in self.left_behind()]
        if left:
            self._history.trouble.append(f"{len(left)} processes are left: {'; '.join(left)}")

    def left_behind(self) -> list[psutil.Process]:
        """What is alive of the executors and of all that was started in them."""
        return [process for process in psutil.process_iter() if self._is_ours(process)]

    def _is_ours(self, process: psutil.Process) -> bool:
        with contextlib.suppress(psutil.Error, OSError):
            if process.pid in {os.getpid(), self._process.pid} or _is_zombie(process):
                return False
            if process == self._seen.get(process.pid) or os.getsid(process.pid) in self._seen:
                return True
            # What left its session is still where it was started, when nobody else has business there.
            return self._cwd_is_ours and Path(process.cwd()) == self._cwd
        return False  # it is gone, or another user's

    async def destroy(self) -> None:
        """Leave nothing behind, whatever happened."""
        if self.is_running:
            self._process.kill()
        await self._process.wait()
        for process in self.left_behind():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def read_log(self) -> None:
        """Take what the supervisor itself says went wrong in it as trouble."""
        for record in self._records():
            ours = not record.logger.startswith("executor")
            if ours and (record.exc or record.level == "critical" or record.logger == "asyncio"):
                text = f"{record.message} {record.exc}".strip()
                self._history.trouble.append(f"the log says {record.level}: {text[-_MAX_TROUBLE:]}")
            if record.logger == "supervisor.outbox" and "are sent again" in record.message:
                self._history.resendings += 1
            if "defect in the executor" in record.message:
                self._history.trouble.append(f"the log says {record.message[:_MAX_TROUBLE]}")

    def log_tail(self) -> list[str]:
        """The last lines of the log, for a worker that did not even start."""
        return self.log_file.read_text(errors="replace").splitlines()[-_LOG_TAIL_LINES:]

    def _records(self) -> Iterator[_Record]:
        decode = msgspec.json.Decoder(_Record).decode
        with self.log_file.open("rb") as lines:
            for line in lines:
                try:
                    yield decode(line)
                except ValueError:
                    # Printed past the log: by gRPC's core, or by an interpreter in distress.
                    if line.strip() and not _GRPC_NOTICE.match(line):
                        self._history.trouble.append(f"past the log: {line.decode(errors='replace')[:_MAX_TROUBLE]}")


async def _freeze(process: psutil.Process, seconds: float) -> None:
    process.send_signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(seconds)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


def _is_zombie(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.status() == psutil.STATUS_ZOMBIE
    return False


def _words(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return "gone"
