"""How `gen-worker top` draws a Status.

Owns: layout and colours. What tenants and schedulers wrote is shown as plain text: no markup, no terminal escapes.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from supervisor.status import GpuStatus, ModelStatus, RunStatus, Status

MAX_RUNS: Final = 20
MAX_MODELS: Final = 20
MAX_FAULTS: Final = 8
BAR: Final = 16
_GIB: Final = 2**30
_MIB: Final = 2**20
_COLOURS: Final = {
    "ready": "green", "hot": "green", "running": "green", "parked": "green", "starting": "yellow", "loading": "yellow",
    "downloading": "yellow", "waiting_model": "yellow", "draining": "yellow", "replaced": "yellow",
    "unloading": "yellow", "canceling": "yellow", "given_up": "red",
}  # fmt: skip


def view(status: Status, problem: str = "") -> Group:
    """All of it. `problem`: why this is not the present state."""
    parts: list[RenderableType] = [_head(status), _executors(status)]
    if problem:
        parts.insert(0, Panel(plain(problem, "bold red"), title="not up to date", border_style="red"))
    if status.gpus:
        parts.append(_gpus(status))
    if status.models:
        parts.append(_models(status))
    parts += [_runs(status), _faults(status)]
    return Group(*parts)


def plain(text: str, style: str = "") -> Text:
    """`text` as it is, on one line."""
    return Text("".join(char if char.isprintable() else "�" for char in text), style=style)


def _head(status: Status) -> Panel:
    worker, scheduler, rates = status.worker, status.scheduler, status.rates
    lines = Text()
    lines.append("ready" if worker.ready else "not ready", "bold green" if worker.ready else "bold red")
    for reason in worker.unready_because:
        lines.append("  ").append_text(plain(reason, "red"))
    lines.append(f"\nscheduler {plain(scheduler.address).plain}  ")
    lines.append("registered" if scheduler.registered else "not registered", _yes(scheduler.registered))
    lines.append(f"  streams {scheduler.streams_opened}  failed dials {scheduler.failed_dials}")
    lines.append(f"\nover {rates.window_s:.0f} s: {rates.runs_per_s:.2f} runs/s  ")
    lines.append(f"{rates.failures_per_s:.2f} failures/s", "red" if rates.failures_per_s else "")
    lines.append(f"  {rates.deltas_per_s:.1f} deltas/s")
    outcomes = "  ".join(f"{name} {count}" for name, count in sorted(status.outcomes.items())) or "nothing yet"
    lines.append(f"\nsince the start: {outcomes}")
    queue = status.queue
    lines.append(f"\noutbox {queue.outbox_messages} messages  waiting {_size(queue.run_bytes)} of runs, ")
    lines.append(f"{_size(queue.answer_bytes)} of answers  loop lag {worker.loop_lag_s * 1000:.0f} ms  ")
    lines.append(f"supervisor {_size(worker.resident_bytes)}")
    if not queue.reading:
        lines.append("  the scheduler is made to wait", "bold yellow")
    title = plain(f"{worker.id}  gen-worker {worker.version}  pid {worker.pid}  up {_duration(worker.uptime_s)}")
    return Panel(lines, title=title, title_align="left")


def _executors(status: Status) -> Table:
    table = _table("executors", "name", "state", "pid", "gpu", "runs", "starts")
    for executor in status.executors:
        table.add_row(
            executor.name, _state(executor.state), str(executor.pid or "-"), plain(executor.gpu or "-"),
            str(executor.runs), str(executor.starts),
        )  # fmt: skip
    if (spare := status.spare) is not None:
        table.add_row("spare", _state(spare.state), str(spare.pid), _size(spare.resident_bytes), "", "")
    return table


def _gpus(status: Status) -> Table:
    table = _table("GPUs", "#", "name", "busy", "memory used", "", "models", "reserved")
    for gpu in status.gpus:
        busy = "-" if gpu.utilization is None else f"{gpu.utilization:.0%}"
        table.add_row(
            str(gpu.index), plain(gpu.name), busy, *_memory(gpu), _size(gpu.models_bytes), _size(gpu.reserved_bytes)
        )
    return table


def _memory(gpu: GpuStatus) -> tuple[ProgressBar | str, str]:
    """A bar of what is used, as measured, and the figures."""
    if gpu.used_bytes is None:
        return "-", f"unknown of {_size(gpu.total_bytes)}"
    return (
        ProgressBar(total=max(gpu.total_bytes, 1), completed=gpu.used_bytes, width=BAR),
        f"{_size(gpu.used_bytes)} of {_size(gpu.total_bytes)}",
    )


def _models(status: Status) -> Table:
    table = _table("models", "id", "state", "executors", "on devices", "downloaded")
    for model in status.models[:MAX_MODELS]:
        where = ", ".join(model.executors) or "-"
        table.add_row(plain(model.id), _state(model.state), where, _size(model.device_bytes), _downloaded(model))
    _say_more(table, len(status.models), MAX_MODELS)
    return table


def _downloaded(model: ModelStatus) -> str:
    if model.state != "downloading":
        return "-"
    return f"{_size(model.done_bytes)} of {_size(model.total_bytes) if model.total_bytes else '?'}"


def _runs(status: Status) -> Table:
    total = sum(status.queue.runs.values())
    states = ", ".join(f"{count} {name}" for name, count in sorted(status.queue.runs.items())) or "none"
    table = _table(f"runs: {states}", "id", "function", "state", "executor", "waited", "running", "progress", "")
    for run in status.runs[:MAX_RUNS]:
        table.add_row(
            plain(run.id), plain(run.function), _state(run.state), run.executor or "-",
            _duration(run.waited_s), _duration(run.running_s) if run.executor else "-", _progress(run),
            plain(run.stage),
        )  # fmt: skip
    _say_more(table, total, MAX_RUNS)
    return table


def _progress(run: RunStatus) -> ProgressBar | str:
    return "" if run.progress is None else ProgressBar(total=1.0, completed=run.progress, width=BAR)


def _faults(status: Status) -> Table:
    table = _table("last faults", "when", "what", "subject", "message")
    table.columns[-1].no_wrap = False  # the message is what one looks for: it is never cut off
    for fault in status.faults[:MAX_FAULTS]:
        when = time.strftime("%H:%M:%S", time.localtime(fault.at))
        table.add_row(when, fault.kind, plain(fault.subject), plain(fault.message, "red"))
    if not status.faults:
        table.add_row("-", "none", "", "")
    return table


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, expand=True)
    for column in columns:
        table.add_column(column, header_style="dim", overflow="ellipsis", no_wrap=True)
    return table


def _say_more(table: Table, total: int, shown: int) -> None:
    if total > shown:
        table.add_row(f"... and {total - shown} more")


def _state(state: str) -> Text:
    return plain(state, _COLOURS.get(state, ""))


def _yes(good: bool) -> str:  # noqa: FBT001  (its one argument)
    return "green" if good else "red"


def _size(count: int) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / _MIB:.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 60:  # noqa: PLR2004  (a minute)
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
