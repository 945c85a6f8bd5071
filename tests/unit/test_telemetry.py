"""What reports become: counters with bounded labels, the last faults, rates."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gen_worker.pipe.messages import Deltas, Event, Failure, Fatal, ModelLoaded, Result
from supervisor import metrics as module
from supervisor.child import ExitCause
from supervisor.executor_handle import ExecutorHandle
from supervisor.metrics import MAX_FUNCTIONS, describe
from supervisor.runs import busy, crashed
from supervisor.stream_end import StreamEnd
from supervisor.telemetry import FAULTS, WINDOW_S, Telemetry
from supervisor.transport import StatusCode, StreamStatus
from tests.support.rig import Rig, function, use_recording_children

A = "cozy:org/a:latest"


class Time:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture
def telemetry(clock: Time) -> Telemetry:
    return Telemetry(redact=lambda text: text.replace("hunter2", "***"), now=lambda: 1.5e9, monotonic=clock)


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch, telemetry: Telemetry) -> AsyncIterator[Rig]:
    use_recording_children(monkeypatch.setattr)
    functions = [function("g", "generator"), function("f", models=["a"])]
    rig = Rig(functions, models=[A], labels={"a": A}, observer=telemetry)
    yield rig
    rig.close()


def value(telemetry: Telemetry, name: str, **labels: str) -> float | None:
    return telemetry.metrics.registry.get_sample_value(f"gen_worker_{name}", labels)


def handle(**fields: Any) -> ExecutorHandle:
    from types import SimpleNamespace

    defaults = {
        "name": "0", "incarnation": 0, "functions": {"f": 1}, "was_killed": False, "poisoned": False, "fatal": None,
    }  # fmt: skip
    return cast("ExecutorHandle", SimpleNamespace(**{**defaults, **fields}))


async def test_a_run_is_counted_with_what_it_waited_for(rig: Rig, telemetry: Telemetry) -> None:
    rig.submit("r1", "g")
    key = rig.executors[0].key_of("r1")
    rig.executors[0].say(Event(key, "output.delta", b'{"text":"ab"}'))
    rig.executors[0].say(Deltas(key, (b'{"text":"cd"}', b"{}")))
    rig.executors[0].say(Event(key, "job.progress", b'{"progress":0.5}'))
    rig.executors[0].succeed("r1")
    assert value(telemetry, "runs_total", function="g", outcome="success") == 1
    assert value(telemetry, "run_seconds_count", function="g") == 1
    assert value(telemetry, "run_deltas_total", function="g") == 3
    assert value(telemetry, "run_delta_bytes_total", function="g") == len('{"text":"ab"}{"text":"cd"}{}')
    assert value(telemetry, "run_queue_seconds_count") == 1
    assert value(telemetry, "run_model_wait_seconds_count") == 0
    assert telemetry.faults == []


async def test_a_run_that_waits_for_its_model(rig: Rig, telemetry: Telemetry) -> None:
    rig.submit("r1", "f")
    assert value(telemetry, "run_queue_seconds_count") == 0
    rig.executors[0].load_done(A)
    rig.executors[0].succeed("r1")
    assert value(telemetry, "run_queue_seconds_count") == 1
    assert value(telemetry, "run_model_wait_seconds_count") == 1
    assert value(telemetry, "model_loads_total", outcome="success") == 1
    assert value(telemetry, "model_load_seconds_sum") == pytest.approx(0.1)


async def test_a_model_that_does_not_load_and_one_that_is_unloaded(rig: Rig, telemetry: Telemetry) -> None:
    failure = Failure("resource", "out of memory", "no room for hunter2")
    rig.submit("r1", "f")
    rig.executors[0].say(ModelLoaded(A, "t.T", 0, 0.1, failure))
    assert value(telemetry, "model_loads_total", outcome="failure") == 1
    assert value(telemetry, "runs_total", function="f", outcome="resource") == 1
    assert {(fault.kind, fault.message) for fault in telemetry.faults} == {
        ("model", "out of memory"),
        ("run", "resource: out of memory"),
    }
    rig.submit("r2", "f")
    rig.executors[0].load_done(A)
    rig.executors[0].succeed("r2")
    rig.dispatcher.commands.unload(A)
    rig.executors[0].unload_done(A)
    assert value(telemetry, "model_evictions_total", reason="command") == 1


async def test_outcomes(rig: Rig, telemetry: Telemetry) -> None:
    rig.submit("r1", "nobody-knows-this")
    rig.submit("r2", "g")
    rig.executors[0].say(
        Result(rig.executors[0].key_of("r2"), failure=Failure("internal", "internal error", "hunter2"))
    )
    rig.submit("r3", "g")
    rig.dispatcher.cancel("r3")
    rig.executors[0].succeed("r3")
    rig.submit("r4", "g")
    rig.executors[0].die(-11)
    rig.dispatcher.drain()
    rig.submit("r5", "g")
    assert value(telemetry, "runs_total", function="unknown", outcome="validation") == 1
    for outcome in ("internal", "canceled", "crashed", "busy"):
        assert value(telemetry, "runs_total", function="g", outcome=outcome) == 1, outcome
    assert telemetry.outcomes.total() == 5
    # What the caller did, and load, are no faults; and what a function said to operators stays in the log.
    assert [(fault.subject, fault.message) for fault in telemetry.faults] == [
        ("g r4", "crashed: worker process crashed"),
        ("g r2", "internal: internal error"),
    ]


@pytest.mark.parametrize(
    ("fields", "cause", "label"),
    [
        ({}, ExitCause(-11, ""), "SIGSEGV"),
        ({}, ExitCause(-9, ""), "SIGKILL"),
        ({}, ExitCause(-9, "the kernel's OOM killer", out_of_memory=True), "oom"),
        ({}, ExitCause(-42, ""), "signal"),
        ({}, ExitCause(3, ""), "exit"),
        ({"was_killed": True}, ExitCause(-9, "a deadline"), "stopped"),
        ({"poisoned": True}, ExitCause(1, ""), "device"),
        ({"functions": {}, "fatal": Fatal("import", "no module hunter2")}, ExitCause(1, ""), "boot"),
    ],
)
def test_why_an_executor_died(telemetry: Telemetry, fields: dict[str, Any], cause: ExitCause, label: str) -> None:
    telemetry.executor_died(handle(**fields), cause)
    assert value(telemetry, "executor_deaths_total", cause=label) == 1
    assert "hunter2" not in telemetry.faults[0].message


def test_only_a_replacement_is_a_restart(telemetry: Telemetry) -> None:
    telemetry.executor_started(handle(incarnation=0))
    telemetry.executor_started(handle(incarnation=1))
    assert value(telemetry, "executor_restarts_total") == 1


def test_downloads_and_evictions(telemetry: Telemetry) -> None:
    telemetry.download_ended(A, 2000, 1.5, None)
    telemetry.download_ended(A, 300, 1.5, Failure("retryable", "download failed", "403 for https://x/?sig=1"))
    telemetry.model_evicted(A, "room")
    assert value(telemetry, "model_downloads_total", outcome="success") == 1
    assert value(telemetry, "model_downloads_total", outcome="failure") == 1
    assert value(telemetry, "model_download_bytes_total") == 2300
    assert value(telemetry, "model_evictions_total", reason="room") == 1
    assert [fault.message for fault in telemetry.faults] == ["download failed"]


def test_ends_of_streams(telemetry: Telemetry) -> None:
    telemetry.stream_ended(StreamEnd("a:1", StreamStatus(StatusCode.OK, "")))
    telemetry.stream_ended(StreamEnd("a:1", StreamStatus(StatusCode.FAILED_PRECONDITION, "not_leader:b:1")))
    telemetry.stream_ended(StreamEnd("a:1", StreamStatus(StatusCode.UNAVAILABLE, "token=hunter2\nrefused")))
    assert value(telemetry, "scheduler_stream_ends_total", code="UNAVAILABLE") == 1
    (fault,) = telemetry.faults
    assert fault.subject == "a:1"
    assert "***" in fault.message
    assert "\n" not in fault.message


def test_faults_are_the_last_ones_newest_first(telemetry: Telemetry) -> None:
    for number in range(FAULTS + 5):
        telemetry.download_ended(f"m{number}", 0, 1.0, Failure("retryable", "x" * 1000))
    assert [fault.subject for fault in telemetry.faults][:2] == ["m24", "m23"]
    assert len(telemetry.faults) == FAULTS
    assert len(telemetry.faults[0].message) == 300


def test_rates_are_those_of_the_last_minute(telemetry: Telemetry, clock: Time) -> None:
    for _ in range(30):
        telemetry.run_refused("f", busy("full"))
    clock.now += 10
    telemetry.tick()
    assert telemetry.rates().runs_per_s == pytest.approx(3)
    assert telemetry.rates().failures_per_s == 0
    for _ in range(200):
        clock.now += 1
        telemetry.run_refused("f", crashed("died"))
        telemetry.tick()
    rates = telemetry.rates()
    assert rates.window_s == pytest.approx(WINDOW_S, abs=1)
    assert rates.runs_per_s == rates.failures_per_s == pytest.approx(1)
    assert len(telemetry._samples) <= WINDOW_S + 2


def test_functions_are_a_bounded_label(telemetry: Telemetry) -> None:
    for number in range(MAX_FUNCTIONS + 50):
        telemetry.run_refused(f"f{number}", busy("full"))
    families = {family.name: family for family in telemetry.metrics.registry.collect()}
    labels = {sample.labels["function"] for sample in families["gen_worker_runs"].samples}
    assert len(labels) == MAX_FUNCTIONS + 1
    assert value(telemetry, "runs_total", function="other", outcome="busy") == 50


@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_the_exposition_is_what_prometheus_reads(telemetry: Telemetry, accept: str) -> None:
    telemetry.run_refused('a"b\\c\n', busy("full"))
    content_type, text = telemetry.metrics.expose(accept)
    assert ("openmetrics" in content_type) is bool(accept)
    if not accept:
        families = list(text_string_to_metric_families(text.decode()))
        runs = next(family for family in families if family.name == "gen_worker_runs")
        assert runs.samples[0].labels == {"function": 'a"b\\c\n', "outcome": "busy"}
        assert not [family.name for family in families if family.name.endswith("_created")]


def test_every_metric_is_described_once_and_explained() -> None:
    described = describe()
    names = [metric.name for metric in described]
    assert len(set(names)) == len(names) > 20
    assert all(name.startswith(module.PREFIX) for name in names)
    assert not [metric.name for metric in described if not metric.help.endswith(".")]
