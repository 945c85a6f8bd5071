"""Every metric of the worker: names, types, labels, help, and the text that Prometheus reads.

Owns: the metrics. Counters and histograms are moved by telemetry.py as things happen; PULLED are read from a Status
when somebody asks, so that their owners keep no second count. docs/metrics.md is rendered from here, the dashboard and
the alerts are tested against here.

Labels are bounded: functions by MAX_FUNCTIONS, everything else by the lists of this program. No run, user, model or
tenant is a label.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

import prometheus_client
from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from supervisor.status import GpuStatus, Status

PREFIX: Final = "gen_worker_"
MAX_FUNCTIONS: Final = 100
"""Functions that have a label of their own; those that are met after them share OTHER."""
OTHER: Final = "other"
UNKNOWN: Final = "unknown"
"""The function of requests for what this worker does not serve."""
SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
"""From a call without a model to a long video."""
LAG_SECONDS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)

_STATES: Final = ("queued", "waiting_model", "running", "canceling")
_EXECUTOR_STATES: Final = ("starting", "ready", "draining", "replaced", "given_up")
_MODEL_STATES: Final = ("hot", "loading", "unloading", "disk", "downloading")

Sample = tuple[tuple[str, ...], float]


@dataclass(frozen=True, slots=True)
class Pulled:
    """A metric that is read from a Status: label values and figures."""

    name: str
    kind: type[GaugeMetricFamily | CounterMetricFamily]
    help: str
    labels: tuple[str, ...]
    read: Callable[[Status], Iterable[Sample]]

    def family(self, samples: Iterable[Sample] = ()) -> Metric:
        family = self.kind(f"{PREFIX}{self.name}", self.help, labels=self.labels)
        for values, figure in samples:
            family.add_metric(values, figure)
        return family


def _one(read: Callable[[Status], float]) -> Callable[[Status], Iterable[Sample]]:
    return lambda status: [((), float(read(status)))]


def _per_gpu(read: Callable[[GpuStatus], float | None]) -> Callable[[Status], Iterable[Sample]]:
    """Nothing for a GPU whose figure is not to be had."""

    def samples(status: Status) -> Iterator[Sample]:
        for gpu in status.gpus:
            figure = read(gpu)
            if figure is not None:
                yield (str(gpu.index), gpu.uuid), float(figure)

    return samples


def _by_state(states: tuple[str, ...], read: Callable[[Status], Iterable[str]]) -> Callable[[Status], Iterable[Sample]]:
    """How many are in each state; 0 is said too, so that an alert on it has something to compare."""

    def samples(status: Status) -> Iterator[Sample]:
        found = list(read(status))
        for state in states:
            yield (state,), float(found.count(state))

    return samples


_GPU: Final = ("gpu", "uuid")

PULLED: Final = (
    Pulled(
        "info", GaugeMetricFamily, "1; the labels say which worker this is.", ("worker_id", "deployment_id", "version"),
        lambda status: [((status.worker.id, status.worker.deployment_id, status.worker.version), 1.0)],
    ),
    Pulled("ready", GaugeMetricFamily, "1 while /readyz says yes.", (), _one(lambda status: status.worker.ready)),
    Pulled(
        "draining", GaugeMetricFamily, "1 from SIGTERM on.", (), _one(lambda status: status.worker.draining)
    ),
    Pulled(
        "scheduler_registered", GaugeMetricFamily, "1 while a stream is open and the registration went out on it.", (),
        _one(lambda status: status.scheduler.registered),
    ),
    Pulled(
        "scheduler_streams_opened", CounterMetricFamily, "Streams opened; each after the first is a reconnect.", (),
        _one(lambda status: status.scheduler.streams_opened),
    ),
    Pulled(
        "scheduler_failed_dials", GaugeMetricFamily, "Dials that failed in a row, since a stream last stayed up.", (),
        _one(lambda status: status.scheduler.failed_dials),
    ),
    Pulled(
        "executors", GaugeMetricFamily, "Executors by state; given_up: the slot stays down.", ("state",),
        _by_state(_EXECUTOR_STATES, lambda status: (executor.state for executor in status.executors)),
    ),
    Pulled(
        "runs_active", GaugeMetricFamily, "Runs that have no result yet, by state.", ("state",),
        lambda status: [((state,), float(status.queue.runs.get(state, 0))) for state in _STATES],
    ),
    Pulled(
        "outbox_messages", GaugeMetricFamily, "Messages that wait for the stream.", (),
        _one(lambda status: status.queue.outbox_messages),
    ),
    Pulled(
        "backlog_bytes", GaugeMetricFamily, "What waits: runs for an executor, answers for the stream.", ("what",),
        lambda status: [(("runs",), status.queue.run_bytes), (("answers",), status.queue.answer_bytes)],
    ),
    Pulled(
        "reading", GaugeMetricFamily, "0 while so much waits that nothing is read from the scheduler.", (),
        _one(lambda status: status.queue.reading),
    ),
    Pulled(
        "models", GaugeMetricFamily, "Models by state; disk: in no executor.", ("state",),
        _by_state(_MODEL_STATES, lambda status: (model.state for model in status.models)),
    ),
    Pulled(
        "gpu_memory_bytes", GaugeMetricFamily, "Memory of the GPU.", _GPU,
        _per_gpu(lambda gpu: gpu.total_bytes),
    ),
    Pulled(
        "gpu_memory_used_bytes", GaugeMetricFamily, "Memory used by all processes, as NVML measures it.", _GPU,
        _per_gpu(lambda gpu: gpu.used_bytes),
    ),
    Pulled(
        "gpu_memory_models_bytes", GaugeMetricFamily, "What loaded models take, by the ledger.", _GPU,
        _per_gpu(lambda gpu: gpu.models_bytes),
    ),
    Pulled(
        "gpu_memory_reserved_bytes", GaugeMetricFamily, "What the ledger keeps for loads under way.", _GPU,
        _per_gpu(lambda gpu: gpu.reserved_bytes),
    ),
    Pulled(
        "gpu_utilization_ratio", GaugeMetricFamily, "Share of the last moment in which the GPU computed.", _GPU,
        _per_gpu(lambda gpu: gpu.utilization),
    ),
    Pulled(
        "event_loop_lag_max_seconds", GaugeMetricFamily, "The longest hold-up of the event loop in the last 10 s.", (),
        _one(lambda status: status.worker.loop_lag_s),
    ),
)  # fmt: skip


class _StatusCollector(Collector):
    def __init__(self, status: Callable[[], Status]) -> None:
        self._status = status

    def describe(self) -> Iterable[Metric]:
        """The names, for the registry: nothing is read for it, since not all is there yet."""
        return [pulled.family() for pulled in PULLED]

    def collect(self) -> Iterable[Metric]:
        status = self._status()
        return [pulled.family(pulled.read(status)) for pulled in PULLED]


class Metrics:
    """One worker's metrics."""

    def __init__(self) -> None:
        # The client would add a gauge with the time of creation to each counter and histogram, for nobody here.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        self.runs = Counter(
            f"{PREFIX}runs", "Requests that were answered, by outcome.", ("function", "outcome"), registry=registry
        )
        self.run_seconds = Histogram(
            f"{PREFIX}run_seconds", "From the arrival of a run to its result.", ("function",),
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.queue_seconds = Histogram(
            f"{PREFIX}run_queue_seconds", "From the arrival of a run until an executor has it, models included.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.model_wait_seconds = Histogram(
            f"{PREFIX}run_model_wait_seconds", "The part of that in which a model was not loaded, for those runs.",
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self.deltas = Counter(
            f"{PREFIX}run_deltas", "Deltas that functions streamed.", ("function",), registry=registry
        )
        self.delta_bytes = Counter(f"{PREFIX}run_delta_bytes", "Bytes of those.", ("function",), registry=registry)
        self.executor_deaths = Counter(
            f"{PREFIX}executor_deaths",
            "Executors that ended, by cause: a signal's name, oom, exit, boot, device, stopped.",
            ("cause",),
            registry=registry,
        )
        self.executor_restarts = Counter(
            f"{PREFIX}executor_restarts", "Executors started in the place of another one.", registry=registry
        )
        self.loads = Counter(f"{PREFIX}model_loads", "Loads of models, by outcome.", ("outcome",), registry=registry)
        self.load_seconds = Histogram(
            f"{PREFIX}model_load_seconds", "How long loads that succeeded took.", buckets=SECONDS, registry=registry
        )
        self.evictions = Counter(
            f"{PREFIX}model_evictions", "Models taken off a device, by reason: room, command, recycled.", ("reason",),
            registry=registry,
        )  # fmt: skip
        self.downloads = Counter(
            f"{PREFIX}model_downloads", "Downloads of models, by outcome.", ("outcome",), registry=registry
        )
        self.download_bytes = Counter(
            f"{PREFIX}model_download_bytes", "Bytes that downloads of models brought.", registry=registry
        )
        self.stream_ends = Counter(
            f"{PREFIX}scheduler_stream_ends", "Streams and dials that ended, by gRPC status.", ("code",),
            registry=registry,
        )  # fmt: skip
        self.loop_lag = Histogram(
            f"{PREFIX}event_loop_lag_seconds", "How much later than asked the event loop came round.",
            buckets=LAG_SECONDS, registry=registry,
        )  # fmt: skip
        ProcessCollector(registry=registry)
        self._functions: dict[str, str] = {}

    def pull_from(self, status: Callable[[], Status]) -> None:
        """Read PULLED from `status` at each exposition. Once."""
        self.registry.register(_StatusCollector(status))

    def function_label(self, function: str) -> str:
        """The label of a function that executors serve."""
        label = self._functions.get(function)
        if label is None:
            label = function if len(self._functions) < MAX_FUNCTIONS else OTHER
            if label is not OTHER:
                self._functions[function] = label
        return label

    def expose(self, accept: str) -> tuple[str, bytes]:
        """Content type and text, in the format that an Accept header asks for."""
        encode, content_type = choose_encoder(accept)
        return content_type, encode(self.registry)


@dataclass(frozen=True, slots=True)
class Described:
    """A metric as a reader of the exposition meets it. `samples`: the names of its series."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str
    samples: tuple[str, ...]


def describe() -> list[Described]:
    """All metrics of this program, without those of the process, in the order of the exposition."""
    metrics = Metrics()
    found = []
    for metric in vars(metrics).values():
        if isinstance(metric, (Counter, Histogram)):
            family = next(iter(metric.describe()))
            found.append(_described(family, tuple(metric._labelnames)))  # noqa: SLF001  (it tells nobody else)
    found += [_described(pulled.family(), pulled.labels) for pulled in PULLED]
    return found


def _described(family: Metric, labels: tuple[str, ...]) -> Described:
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
    name = f"{family.name}_total" if family.type == "counter" else family.name
    return Described(name, family.type, labels, family.documentation, tuple(f"{family.name}{end}" for end in endings))


def render_table() -> str:
    """The metrics as a Markdown table, for the documentation."""
    rows = [
        f"| `{metric.name}` | {metric.kind} | {', '.join(metric.labels) or '-'} | {metric.help} |"
        for metric in describe()
    ]
    return "\n".join(["| metric | type | labels | meaning |", "|---|---|---|---|", *rows])
