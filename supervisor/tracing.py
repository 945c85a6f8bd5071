"""Traces of runs by OpenTelemetry: one span for each run, and in it one for each thing that it waited for.

Owns: the tracer and its exporter, which sends from a thread of its own. Imports OpenTelemetry, which the extra `otel`
brings, so import this module only when OTEL_EXPORTER_OTLP_ENDPOINT is set.

A run's spans are made when it has ended, from the moments that it kept anyway, so that one which runs costs nothing:

    run FUNCTION                       from its arrival to its result
    |-- queue                          until an executor had it, or until it was found that a model is missing
    |-- wait for a model               from there until an executor had it
    `-- execute                        on the executor

The wire has no place for a trace context but the run's id. One that is a UUID is the trace's id too: whoever made
it can have spans of its own in that trace, and a run that is tried again is in the same one. Any other run is a
trace with an id at random; `gen_worker.run_id` finds it.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Final

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.trace import INVALID_TRACE_ID, Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context

from gen_worker._version import __version__
from gen_worker.pipe.messages import Failure
from supervisor.observer import Observer
from supervisor.runs import Run

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 5
"""For one request to the collector, retries included."""
CLOSE_S: Final = 3.0
QUEUE_SPANS: Final = 4096
"""Spans that wait for the exporter; further ones are dropped."""
CALLERS_DOING: Final = frozenset({"validation", "canceled"})
"""Failures that do not make a span an error: the worker did what it should."""


class Tracing(Observer):
    """See the module."""

    def __init__(
        self, endpoint: str, headers: Mapping[str, str], attributes: Mapping[str, str],
        now: Callable[[], float] = time.time,
    ) -> None:  # fmt: skip
        """`endpoint`: a collector's base URL; `attributes` are the resource's. `now` gives epoch seconds."""
        self._now = now
        self._ids = _RunIds()
        self._provider = TracerProvider(
            id_generator=self._ids,
            resource=Resource.create({"service.name": "gen-worker", "service.version": __version__, **attributes}),
            shutdown_on_exit=False,
        )
        exporter = OTLPSpanExporter(f"{endpoint}/v1/traces", headers=dict(headers), timeout=TIMEOUT_S)
        self._processor = BatchSpanProcessor(exporter, max_queue_size=QUEUE_SPANS, max_export_batch_size=QUEUE_SPANS)
        self._provider.add_span_processor(self._processor)
        self._tracer: Tracer = self._provider.get_tracer("gen_worker", __version__)

    def run_ended(self, run: Run, failure: Failure | None, now: float) -> None:
        end_of_queue = run.model_wait_from or run.started or now
        epoch_ns = int((self._now() - now) * 1e9)

        def at(moment: float) -> int:
            return epoch_ns + int(moment * 1e9)

        self._ids.run_id = run.run_id
        span = self._tracer.start_span(
            f"run {run.function}", kind=SpanKind.SERVER, start_time=at(run.arrived), attributes=_attributes(run)
        )
        if failure is not None:
            span.set_attribute("error.type", failure.error_type)
            if failure.error_type not in CALLERS_DOING:
                span.set_status(Status(StatusCode.ERROR, failure.safe_message))
        self._child(span, "queue", at(run.arrived), at(end_of_queue))
        if run.model_wait_from:
            self._child(span, "wait for a model", at(run.model_wait_from), at(run.started or now))
        if run.started:
            self._child(span, "execute", at(run.started), at(now))
        span.end(at(now))

    async def close(self) -> None:
        """Send what is left. A collector that does not answer is not waited for longer than CLOSE_S."""
        loop = asyncio.get_running_loop()
        closed = asyncio.Event()

        def shut_down() -> None:
            self._provider.shutdown()
            try:
                loop.call_soon_threadsafe(closed.set)
            except RuntimeError:
                log.debug("the traces' exporter ended after the event loop")

        threading.Thread(target=shut_down, name="traces-close", daemon=True).start()
        try:
            async with asyncio.timeout(CLOSE_S):
                await closed.wait()
        except TimeoutError:
            log.warning("the last traces were not taken within %g s", CLOSE_S)

    def _child(self, parent: Span, name: str, start: int, end: int) -> None:
        self._tracer.start_span(name, context=set_span_in_context(parent), start_time=start).end(end)


class _RunIds(RandomIdGenerator):
    """The next trace's id is that of the run, if that is a UUID."""

    run_id = ""

    def generate_trace_id(self) -> int:
        try:
            trace_id = uuid.UUID(self.run_id).int
        except ValueError:
            trace_id = INVALID_TRACE_ID
        return trace_id if trace_id != INVALID_TRACE_ID else super().generate_trace_id()


def _attributes(run: Run) -> dict[str, str | list[str]]:
    found: dict[str, str | list[str]] = {"gen_worker.run_id": run.run_id, "gen_worker.function": run.function}
    if run.handle is not None:
        found["gen_worker.executor"] = run.handle.name
    if run.models:
        found["gen_worker.models"] = [model_id for _, model_id in run.models]
    return found
