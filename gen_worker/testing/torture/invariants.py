"""What must hold, whatever was done to the worker: from a history to the list of violations.

Owns: the rules. Pure. What a rule can't decide, it lets pass:

- A request that was written on a stream which then broke may never have reached the worker. It counts as accepted when
  anything came for it, when its function began (the ledger), when its stream lives, or when something came for a
  request that was written after it on the same stream.
- What a worker had handed to a stream that broke is lost to everybody. Results are sent again, and of events what can't
  have been read, or may not have been where the scheduler had stopped reading. So a step back is let pass where a
  stream ended and nowhere else, on no more streams than the worker spoke of. A gap is let pass, as `doubtful`, where
  all that is missing was made within DOUBTFUL_S of a stream's end, and what this scheduler was behind with what came
  before, and the time that it had no turn just then: nobody can tell whether a program had time to read that. There
  is no gap at all in a run that is `whole`, whose stream was cut by a scheduler that had stopped reading.
- What was not answered when the supervisor was killed may have gone with it, unless the function had ended a second
  before.
- A request that was sent several times may be run again when a copy reaches the worker after the first one's end.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from gen_worker.testing.torture.functions import SOCKET_ENDS
from gen_worker.testing.torture.history import Arrival, Conversation, History, Interval, Outcome, Run, What
from gen_worker.testing.torture.plan import LONG_TIMEOUT_MS
from gen_worker.testing.torture.requests import BUSY, CRASHED, ERROR_TYPES, SUCCESS

SAFE_MESSAGE_MAX_CHARS: Final = 500
QUARANTINE_WORDS: Final = "crashed the worker"
"""In the safe_message of a request that is refused because it killed executors before."""

FLOODED_WORDS: Final = "too much waits already"
"""In the error_message of a request that is refused because the backlog stands still."""


DOUBTFUL_S: Final = 0.1
"""What a scheduler that reads may be behind, on a machine that has better things to do."""
STALLED_S: Final = 1.0
"""How long before a stream's end a scheduler's stall can be why it was behind."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """In seconds and bytes."""

    grace_s: float
    """WORKER_CANCEL_GRACE_SECONDS of the worker."""
    slack_s: float = 6.0
    """For the way there and back, on a machine that has better things to do; a result must be out within 1 s."""
    supervisor_rss: int = 200 * 2**20
    executor_rss: int = 200 * 2**20
    """0: not judged."""
    more_fds: int = 6
    """What the supervisor may have more at the end than at the start."""
    kept_s: float = 1.0
    """Within which a result must be on disk."""


@dataclass(frozen=True, slots=True)
class Violation:
    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.text}"


def check(history: History, bounds: Bounds) -> list[Violation]:
    """All violations, those of one rule together."""
    accepted = accepted_runs(history)
    found = list(_strays(history))
    for rule, find in _PER_RUN.items():
        for run in history.runs.values():
            found += [Violation(rule, f"{_named(run)} {text}") for text in find(run, history)]
    found += [
        Violation("lost", f"{_named(run)} was accepted and has no result")
        for run in history.runs.values()
        if run.run_id in accepted and not any(run.results) and not _may_be_gone(run, history, bounds)
    ]
    for run in history.runs.values():
        found += [Violation("late", f"{_named(run)} {text}") for text in _lateness(run, history, bounds)]
    found += _repeats(history)
    for talk in history.conversations:
        found += [Violation("session", f"{talk.session_id} {text}") for text in _conversation(talk)]
    found += _resources(history, bounds)
    return found


def _strays(history: History) -> Iterator[Violation]:
    yield from (Violation("stray", text) for text in history.strays)
    yield from (Violation("protocol", text) for text in history.offences)
    yield from (Violation("process", text) for text in history.trouble)


def _repeats(history: History) -> Iterator[Violation]:
    """Events come again only when the worker has seen that they were not read."""
    streams = set()
    for run in history.runs.values():
        if run.request.deltas is not None and not _may_run_again(run):
            places = [(arrival.place, arrival.stream) for arrival in in_order(run) if arrival.what is What.DELTA]
            streams |= {later[1] for one, later in pairwise(places) if later[0] <= one[0] and later[1] != one[1]}
    if len(streams) > history.resendings:
        yield Violation("deltas", f"{len(streams)} streams repeat some, the worker meant to on {history.resendings}")


# -- acceptance ---------------------------------------------------------------------------------------


def accepted_runs(history: History) -> set[str]:
    """The run_ids of which it is certain that the worker got them."""
    reached: defaultdict[int, int] = defaultdict(lambda: -1)
    """Stream -> the last position of which something came back."""
    for run in history.runs.values():
        if len(run.writings) == 1 and run.arrivals:
            reached[run.writings[0].stream] = max(reached[run.writings[0].stream], run.writings[0].position)
    return {
        run.run_id
        for run in history.runs.values()
        if run.arrivals
        or history.starts.get(run.run_id)
        or any(
            writing.position <= reached[writing.stream] or history.streams[writing.stream].ended_at is None
            for writing in run.writings
        )
    }


def unanswered(history: History, bounds: Bounds) -> list[Run]:
    """Accepted runs that have no result (yet) and must have one."""
    accepted = accepted_runs(history)
    return [
        run
        for run in history.runs.values()
        if run.run_id in accepted and not any(run.results) and not _may_be_gone(run, history, bounds)
    ]


def _may_be_gone(run: Run, history: History, bounds: Bounds) -> bool:
    """Whether it may have gone with a supervisor: unless its result was on disk by then."""
    killed = [at for at in history.kills if any(writing.at <= at for writing in run.writings)]
    if not killed:
        return False
    ended = history.ends.get(run.run_id)
    return ended is None or all(ended > at - bounds.kept_s for at in killed)


# -- rules for one run --------------------------------------------------------------------------------


def _named(run: Run) -> str:
    return f"run {run.run_id} of {run.request.function}"


def _may_run_again(run: Run) -> bool:
    return len(run.writings) > 1


def _result_count(run: Run, _history: History) -> Iterator[str]:
    """One result; duplicates only on different streams, and identical."""
    results = list(run.results)
    kinds = {result.outcome.digest: result.outcome.kind for result in results if result.outcome}
    if len(kinds) > max(1, len(run.writings)):
        yield f"has {len(kinds)} different results ({', '.join(kinds.values())}) for {len(run.writings)} requests"
    for stream, count in Counter(result.stream for result in results).items():
        if count > max(1, len(run.writings)):
            yield f"has {count} results on stream {stream}"


def _starts(run: Run, history: History) -> Iterator[str]:
    starts = history.starts.get(run.run_id, 0)
    if starts > max(1, len(run.writings)):
        yield f"was sent {len(run.writings)} times and began {starts} times"


def _order(run: Run, _history: History) -> Iterator[str]:
    """All events before the result; an incremental run's last event says how it ended."""
    if _may_run_again(run):
        return
    for stream, arrivals in by_stream(run).items():
        first = next((place for place, arrival in enumerate(arrivals) if arrival.what is What.RESULT), None)
        if first is None:
            continue
        late = [arrival for arrival in arrivals[first:] if arrival.what is not What.RESULT]
        if late:
            yield f"has {len(late)} events after its result on stream {stream}, the first a {late[0].what.value}"
        if run.request.incremental and arrivals[first].outcome is not None:
            yield from _end_of_stream(arrivals[:first], arrivals[first])
    last = in_order(run)[-1:]
    if any(run.results) and last[0].what is not What.RESULT and all(r.stream < last[0].stream for r in run.results):
        yield f"has events after its result, on stream {last[0].stream}"


def _end_of_stream(events: Sequence[Arrival], result: Arrival) -> Iterator[str]:
    ends = [event for event in events if event.what in (What.COMPLETED, What.ERROR)]
    success = result.outcome is not None and result.outcome.kind == SUCCESS
    if success and any(event.what is What.ERROR for event in ends):
        yield "succeeded after output.error"
    if success and events and events[-1].what is not What.COMPLETED:
        yield f"succeeded and its last event is a {events[-1].what.value}, not output.completed"
    if len(ends) > 1:
        yield f"has {len(ends)} ends of its output"


def _deltas(run: Run, history: History) -> Iterator[str]:
    """In order, none twice, none missing but what a stream's end excuses."""
    if run.request.deltas is None or _may_run_again(run) or not run.writings:
        return
    places = [arrival.place for arrival in run.arrivals if arrival.what is What.DELTA]
    if min(places, default=0) < 0:
        yield "got a delta of another run"
        return
    if max(places, default=0) >= max(1, run.request.deltas):
        yield f"got delta {max(places)} of {run.request.deltas}"
    for last, following in _breaks(run):
        gap = _Gap(last, following)
        if last.stream == following.stream:
            yield f"got {gap} on one stream"
        elif gap.missing > 0 and not _excused(run, gap, history):
            early_s = (history.streams[last.stream].ended_at or 0.0) - gap.made_at(run)
            yield f"got {gap}; the first that is missing was made {early_s:.3f} s before stream {last.stream} ended"


@dataclass(frozen=True, slots=True)
class _Gap:
    """Two deltas, one after the other, that are not neighbours. The ends of a run count as deltas."""

    last: Arrival
    following: Arrival

    def __str__(self) -> str:
        return f"delta {self.following.place} after delta {self.last.place}"

    @property
    def missing(self) -> int:
        """How many should be between them; negative: what came came before."""
        return self.following.place - self.last.place - 1

    def made_at(self, run: Run) -> float:
        """When the first that is missing was made, at the earliest."""
        return (self.last.made_at or self.last.at) + run.request.pause_s


def _breaks(run: Run) -> Iterator[tuple[Arrival, Arrival]]:
    """Pairs of deltas that follow each other and are not neighbours."""
    arrivals = in_order(run)
    seen = [Arrival(run.writings[0].stream, run.writings[0].at, What.DELTA)]
    seen += [arrival for arrival in arrivals if arrival.what is What.DELTA]
    result = next((arrival for arrival in reversed(arrivals) if arrival.what is What.RESULT), None)
    if result is not None and result.outcome is not None and result.outcome.kind == SUCCESS:
        seen.append(Arrival(result.stream, result.at, What.DELTA, run.request.deltas or 0))
    return ((last, following) for last, following in pairwise(seen) if following.place != last.place + 1)


def _excused(run: Run, gap: _Gap, history: History) -> bool:
    """Whether a gap may be."""
    return _went_with_a_supervisor(gap, history) or (not run.request.whole and _is_doubtful(run, gap, history))


def _went_with_a_supervisor(gap: _Gap, history: History) -> bool:
    """Events are not kept on disk."""
    return any((gap.last.made_at or gap.last.at) <= at <= gap.following.at for at in history.kills)


def _is_doubtful(run: Run, gap: _Gap, history: History) -> bool:
    """Whether all that is missing went out just before a stream ended, by how far its scheduler was behind."""
    made_at = gap.made_at(run)
    behind_s = DOUBTFUL_S + (gap.last.at - gap.last.made_at if gap.last.made_at else 0.0)
    ends = [(one.opened_at, one.ended_at) for one in history.streams[gap.last.stream : gap.following.stream]]
    return any(end and max(made_at, begin) >= end - behind_s - _stalled_s(history, end) for begin, end in ends)


def _stalled_s(history: History, end: float) -> float:
    """For how long of the last moments before `end` the scheduler had no turn."""
    return sum(max(0.0, min(stall.end, end) - max(stall.start, end - STALLED_S)) for stall in history.stalls)


def doubtful(history: History) -> int:
    """How many deltas are missing that nobody could know to be unread."""
    return sum(
        gap.missing
        for run in history.runs.values()
        if run.request.deltas is not None and not _may_run_again(run) and run.writings
        for gap in (_Gap(last, following) for last, following in _breaks(run))
        if gap.missing > 0 and gap.last.stream != gap.following.stream and not _went_with_a_supervisor(gap, history)
    )


def _outcome(run: Run, history: History) -> Iterator[str]:
    """Every result says what may have happened."""
    for result in run.results:
        if result.outcome is not None:
            yield from _improper(result.outcome)
            reason = _unexpected(run, result, result.outcome, history)
            if reason:
                yield f"ended {result.outcome.kind} ({result.outcome.safe_message!r}): {reason}"


def _improper(outcome: Outcome) -> Iterator[str]:
    if outcome.kind != SUCCESS and outcome.kind not in ERROR_TYPES:
        yield f"has an error_type that does not exist: {outcome.kind!r}"
    if outcome.retryable != (outcome.kind == "retryable"):
        yield f"has retryable={outcome.retryable} with {outcome.kind}"
    if len(outcome.safe_message) > SAFE_MESSAGE_MAX_CHARS:
        yield f"has a safe_message of {len(outcome.safe_message)} characters"
    if not outcome.output_fits:
        yield "succeeded with an output that is not its own"


def _unexpected(run: Run, result: Arrival, outcome: Outcome, history: History) -> str:
    """Why this can't have come of the run, or ""."""
    if outcome.kind == "timeout":
        return _wrong_timeout(run, result)
    if outcome.kind in run.request.outcomes:
        return ""
    match outcome.kind, outcome.safe_message:
        case "retryable", message if message == CRASHED:
            objection = ""
        case "retryable", message if message == BUSY:
            told = history.stopped_at is not None and result.at >= history.stopped_at
            flooded = FLOODED_WORDS in outcome.error_message
            objection = "" if told or flooded else "the worker was not told to stop"
        case "canceled", _:
            objection = "" if run.cancels else "nobody canceled it"
        case "fatal", message if QUARANTINE_WORDS in message:
            objection = "" if _may_run_again(run) else "it is the first of its kind"
        case _:
            objection = f"it may end {', '.join(sorted(run.request.outcomes))}; {outcome.error_message[:300]}"
    return objection


def _wrong_timeout(run: Run, result: Arrival) -> str:
    waited = result.at - min((writing.at for writing in run.writings), default=result.at)
    if waited < run.timeout_ms / 1000:
        return f"after {waited:.2f} s of {run.timeout_ms / 1000:g} s"
    return "it was stuck: it takes seconds at most" if run.request.brief and run.timeout_ms >= LONG_TIMEOUT_MS else ""


_PER_RUN: Final[dict[str, Callable[[Run, History], Iterator[str]]]] = {
    "one result": _result_count,
    "one start": _starts,
    "events first": _order,
    "deltas": _deltas,
    "outcome": _outcome,
}


def by_stream(run: Run) -> dict[int, list[Arrival]]:
    """A run's messages by the stream that they came on."""
    found: dict[int, list[Arrival]] = {}
    for arrival in run.arrivals:
        found.setdefault(arrival.stream, []).append(arrival)
    return found


def in_order(run: Run) -> list[Arrival]:
    """A run's messages as the worker sent them: a stream that is read late does not make them late."""
    return sorted(run.arrivals, key=lambda arrival: arrival.stream)


# -- rules for one session ----------------------------------------------------------------------------


def _conversation(talk: Conversation) -> Iterator[str]:
    """Its frames in order and, when its stream went on, one close that says what may have happened.

    That there is no second close, and no frame after it, is a rule of the stream (`offences`).
    """
    if talk.disorder:
        yield f"got another frame than the next one: {talk.disorder}"
    if talk.stream_ended:
        return
    asked = SOCKET_ENDS.get(talk.end, "closed")
    if not talk.reason:
        yield "was not closed"
    elif talk.reason == "timeout":
        if talk.closed_at - talk.opened_at < talk.timeout_s:
            yield f"ended by a timeout after {talk.closed_at - talk.opened_at:.1f} s"
    elif talk.reason not in (asked, "worker_crashed"):
        yield f"ended {talk.reason}, and was to end {asked}"
    elif talk.reason == asked and talk.end in SOCKET_ENDS and talk.heard != talk.sent:
        yield f"ended {asked} with {talk.heard} of {talk.sent} frames sent back"


# -- time and memory ----------------------------------------------------------------------------------


def lit_seconds(dark: Sequence[Interval], start: float, end: float) -> float:
    """How much of the time from `start` to `end` was not dark. `dark` is in order and does not overlap."""
    lit = end - start
    for interval in dark[max(0, bisect_left(dark, (start,)) - 1) :]:
        if interval.start >= end:
            break
        lit -= max(0.0, min(end, interval.end) - max(start, interval.start))
    return lit


def bound_of(run: Run, bounds: Bounds) -> float:
    """Seconds of light within which a run must be answered."""
    return run.timeout_ms / 1000 + bounds.grace_s + bounds.slack_s


def _lateness(run: Run, history: History, bounds: Bounds) -> Iterator[str]:
    first = next(run.results, None)
    if first is None or not run.writings:
        return
    waited = lit_seconds(history.dark, run.writings[0].at, first.at)
    if waited > bound_of(run, bounds):
        kind = first.outcome.kind if first.outcome else "?"
        yield f"ended {kind} after {waited:.1f} s in which results could come; its timeout is {run.timeout_ms} ms"


def _resources(history: History, bounds: Bounds) -> Iterator[Violation]:
    for name, peak, bound in (
        ("supervisor", history.peaks.supervisor_rss, bounds.supervisor_rss),
        ("executor", history.peaks.executor_rss, bounds.executor_rss),
    ):
        if bound and peak > bound:
            yield Violation("memory", f"the {name} took {peak / 2**20:.0f} MiB, the bound is {bound / 2**20:.0f} MiB")
    start, end = history.peaks.fds_at_start, history.peaks.fds_at_end
    more = end.total() - start.total()
    if more > bounds.more_fds:
        which = ", ".join(f"{kind} {count}" for kind, count in (end - start).most_common())
        yield Violation("descriptors", f"the supervisor has {more} more at the end than at the start: {which}")
