"""What came of a torture, as figures and as text.

Owns: the counting, and the table that a person reads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gen_worker.testing.torture.history import Conversation, History, Peaks, What
from gen_worker.testing.torture.invariants import Violation, accepted_runs, doubtful

MAX_SHOWN = 20
"""Violations that are spelled out; the rest is counted."""


@dataclass(frozen=True, slots=True)
class Report:
    """`ok` decides the exit code."""

    seed: int
    seconds: float
    runs: int
    accepted: int
    lost: int
    gone: int
    """Accepted and not answered when the supervisor was killed: they went with it, as its scheduler can see."""
    results: Mapping[str, int]
    """By error_type; `success` is one of them."""
    redelivered: int
    """Results that came more than once, because a stream had broken after them."""
    deltas: int
    doubtful: int
    """Deltas that are missing, which nobody could know to be unread when their stream ended."""
    repeated: int
    """Deltas that came twice, since nobody could know that they had been read."""
    sessions: Mapping[str, int]
    """Realtime sessions by the reason of their close; `stream ended` when it took the session with it."""
    faults: Mapping[str, int]
    streams: int
    executors_lost: int
    peaks: Peaks
    violations: Sequence[Violation] = field(default=())
    reproduce: str = ""
    """The command that does it again."""

    @property
    def ok(self) -> bool:
        return not self.violations


def summarize(  # noqa: PLR0913  (what a history does not tell, by name)
    history: History,
    *,
    seed: int,
    seconds: float,
    faults: Mapping[str, int],
    executors_lost: int,
    lost: int,
    violations: Sequence[Violation],
    reproduce: str,
) -> Report:
    results: Counter[str] = Counter()
    redelivered = deltas = repeated = answered = 0
    for run in history.runs.values():
        outcomes = [result.outcome for result in run.results if result.outcome is not None]
        if outcomes:
            answered += 1
            results[outcomes[0].kind] += 1
            redelivered += len(outcomes) - 1
        places = [arrival.place for arrival in run.arrivals if arrival.what is What.DELTA]
        came = len(set(places)) if run.request.deltas is not None else len(places)
        deltas += came
        repeated += len(places) - came
    accepted = len(accepted_runs(history))
    return Report(
        seed=seed,
        seconds=seconds,
        runs=len(history.runs),
        accepted=accepted,
        lost=lost,
        gone=accepted - answered - lost,
        results=dict(results.most_common()),
        redelivered=redelivered,
        deltas=deltas,
        doubtful=doubtful(history),
        repeated=repeated,
        sessions=dict(Counter(map(_end_of, history.conversations)).most_common()),
        faults=dict(sorted(faults.items())),
        streams=len(history.streams),
        executors_lost=executors_lost,
        peaks=history.peaks,
        violations=tuple(violations),
        reproduce=reproduce,
    )


def _end_of(talk: Conversation) -> str:
    return "stream ended" if talk.stream_ended else talk.reason or "not closed"


def render(report: Report) -> str:
    """The report as text, with the violations last."""
    rows = list(_rows(report))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    lines += _violations(report)
    return "\n".join(lines)


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    yield "seed", str(report.seed)
    yield "minutes", f"{report.seconds / 60:.2f}"
    unsure = report.runs - report.accepted
    yield "runs", f"{report.runs} sent, {report.accepted} accepted, {unsure} that a cut stream may have swallowed"
    for kind, count in report.results.items():
        yield f"  {kind}", str(count)
    yield "deltas", f"{report.deltas}, {report.repeated} came again"
    yield "doubtful", f"{report.doubtful} deltas of the last moments of streams that broke"
    yield "sent again", f"{report.redelivered} results, after streams that had broken"
    yield "sessions", str(sum(report.sessions.values()))
    for reason, count in report.sessions.items():
        yield f"  {reason}", str(count)
    yield "faults", str(sum(report.faults.values()))
    for name, count in report.faults.items():
        yield f"  {name}", str(count)
    yield "reconnects", str(max(0, report.streams - 1))
    yield "executors lost", str(report.executors_lost)
    peaks = report.peaks
    supervisor, executor = (rss / 2**20 for rss in (peaks.supervisor_rss, peaks.executor_rss))
    yield "max memory", f"supervisor {supervisor:.0f} MiB, executor {executor:.0f} MiB"
    start, end = peaks.fds_at_start.total(), peaks.fds_at_end.total()
    yield "max descriptors", f"supervisor {peaks.supervisor_fds}; {start} at the start, {end} at the end"
    yield "gone", f"{report.gone} with supervisors that were killed while they ran"
    yield "lost", str(report.lost)
    yield "violations", str(len(report.violations))


def _violations(report: Report) -> Iterator[str]:
    for violation in report.violations[:MAX_SHOWN]:
        yield f"VIOLATION {violation}"
    if len(report.violations) > MAX_SHOWN:
        by_rule = Counter(violation.rule for violation in report.violations)
        yield f"... and {len(report.violations) - MAX_SHOWN} more: {dict(by_rule)}"
    if report.violations:
        yield f"reproduce with: {report.reproduce}"
