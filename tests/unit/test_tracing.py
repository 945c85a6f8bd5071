"""Traces at a real collector on loopback: the spans of a run, and a collector that is away."""

from __future__ import annotations

import http.server
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from gen_worker.pipe.messages import Failure, Result
from supervisor.config import ConfigError, child_environment, load_settings, secrets
from supervisor.observer import Observers
from supervisor.telemetry import Telemetry
from supervisor.tracing import Tracing
from supervisor.wiring import open_tracing
from tests.support.rig import Rig, function, use_recording_children

A = "cozy:org/a:latest"


class Collector(http.server.ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def spans(self) -> list[Any]:
        return [
            span
            for _, _, body in self.requests
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.requests.append((self.path, dict(self.headers.items()), body))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def tracing(collector: Collector) -> Tracing:
    return Tracing(collector.url, {"api-key": "k"}, {"service.instance.id": "w1"})


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch, tracing: Tracing) -> AsyncIterator[Rig]:
    use_recording_children(monkeypatch.setattr)
    observer = Observers(None, tracing, Telemetry())
    rig = Rig([function("g"), function("f", models=["a"])], models=[A], labels={"a": A}, observer=observer)
    yield rig
    rig.close()


async def test_a_run_and_what_it_waited_for(rig: Rig, tracing: Tracing, collector: Collector) -> None:
    before = time.time_ns()
    rig.submit("r1", "f")
    rig.executors[0].load_done(A)
    rig.executors[0].succeed("r1")
    await tracing.close()
    path, headers, body = collector.requests[0]
    assert (path, headers["api-key"]) == ("/v1/traces", "k")
    (resource,) = ExportTraceServiceRequest.FromString(body).resource_spans
    said = {each.key: each.value.string_value for each in resource.resource.attributes}
    assert (said["service.name"], said["service.instance.id"]) == ("gen-worker", "w1")
    spans = {span.name: span for span in collector.spans()}
    assert spans.keys() == {"run f", "queue", "wait for a model", "execute"}
    run = spans["run f"]
    assert not run.parent_span_id
    assert {span.parent_span_id for span in spans.values() if span is not run} == {run.span_id}
    assert {span.trace_id for span in spans.values()} == {run.trace_id}
    attributes = {each.key: each.value for each in run.attributes}
    assert attributes["gen_worker.run_id"].string_value == "r1"
    assert attributes["gen_worker.executor"].string_value == "0"
    assert [each.string_value for each in attributes["gen_worker.models"].array_value.values] == [A]
    chain = [spans[name] for name in ("queue", "wait for a model", "execute")]
    moments = [(span.start_time_unix_nano, span.end_time_unix_nano) for span in chain]
    assert moments[0][0] == run.start_time_unix_nano
    assert [end for _, end in moments[:-1]] == [start for start, _ in moments[1:]]
    assert moments[-1][1] == run.end_time_unix_nano
    assert before - 5e9 < run.start_time_unix_nano <= run.end_time_unix_nano < time.time_ns() + 5e9


async def test_a_run_whose_id_is_a_uuid_is_in_the_trace_of_that_id(
    rig: Rig, tracing: Tracing, collector: Collector
) -> None:
    plain, dashed, nil = "0af7651916cd43dd8448eb211c80319c", "11111111-2222-4333-8444-555555555555", "0" * 32
    for run_id in (plain, dashed, nil, "r1"):
        rig.submit(run_id, "g")
        rig.executors[0].succeed(run_id)
    await tracing.close()
    by_run: dict[str, set[str]] = {}
    for run in (span for span in collector.spans() if not span.parent_span_id):
        (run_id,) = [each.value.string_value for each in run.attributes if each.key == "gen_worker.run_id"]
        by_run[run_id] = {span.trace_id.hex() for span in collector.spans() if span.parent_span_id == run.span_id}
        assert by_run[run_id] == {run.trace_id.hex()}
    assert by_run[plain] == {plain}
    assert by_run[dashed] == {dashed.replace("-", "")}
    others = by_run[nil] | by_run["r1"]
    assert len(others) == 2, "those have ids at random"
    assert nil not in others


async def test_runs_that_fail_or_never_start(rig: Rig, tracing: Tracing, collector: Collector) -> None:
    rig.submit("r1", "g")
    rig.executors[0].say(Result(rig.executors[0].key_of("r1"), failure=Failure("internal", "internal error", "secret")))
    rig.submit("r2", "f")
    rig.dispatcher.cancel("r2")  # while it waits for its model
    await tracing.close()
    runs = {span.name: span for span in collector.spans() if not span.parent_span_id}
    assert (runs["run g"].status.code, runs["run g"].status.message) == (2, "internal error")
    assert runs["run f"].status.code == 0
    assert {each.key: each.value.string_value for each in runs["run f"].attributes}["error.type"] == "canceled"
    children = {span.name for span in collector.spans() if span.parent_span_id == runs["run f"].span_id}
    assert children == {"queue", "wait for a model"}
    assert b"secret" not in collector.requests[0][2]


async def test_a_collector_that_is_away_holds_nothing_up(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("supervisor.tracing.CLOSE_S", 0.2)
    lost = Tracing("http://127.0.0.1:1", {}, {})
    rig.submit("r1", "g")
    lost.run_ended(rig.dispatcher._active["r1"], None, time.monotonic())
    await lost.close()
    assert "the last traces were not taken within 0.2 s" in caplog.text


def test_settings() -> None:
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c:4318/", "OTEL_EXPORTER_OTLP_HEADERS": "api-key=s3cret%20key,x=y"}
    settings = load_settings(env)
    assert settings.otel_exporter_otlp_endpoint == "http://c:4318"
    assert "s3cret" not in repr(settings)
    assert secrets(settings) == {"api-key=s3cret%20key,x=y"}
    assert "OTEL_EXPORTER_OTLP_HEADERS" not in child_environment(env, settings)
    with pytest.raises(ConfigError, match="a value not shown; expected HTTP headers as name=value"):
        load_settings({"OTEL_EXPORTER_OTLP_HEADERS": "no header"})


async def test_opening(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    concealed: list[str] = []
    assert open_tracing(load_settings({}), concealed.extend) is None
    env = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_EXPORTER_OTLP_HEADERS": "api-key=s3cret%20key,x=y",
    }  # fmt: skip
    opened = open_tracing(load_settings(env), concealed.extend)
    assert opened is not None
    assert concealed == ["s3cret key", "y"]
    await opened.close()
    monkeypatch.setitem(sys.modules, "supervisor.tracing", None)
    assert open_tracing(load_settings(env), concealed.extend) is None
    assert "pip install 'gen-worker[otel]'" in caplog.text
