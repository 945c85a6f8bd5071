"""The registration: what this worker says of itself to the scheduler, first on every stream and in each heartbeat.

Owns: nothing that changes; each call reads the owners anew.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path
from typing import Final

import msgspec
import psutil

from gen_worker.pipe.messages import FunctionInfo
from gen_worker.wire import worker_scheduler_pb2 as pb
from supervisor.devices import DeviceError, DeviceProbe
from supervisor.dispatcher import Dispatcher
from supervisor.executor_handle import ExecutorHandle
from supervisor.pool import Pool
from supervisor.residency import Residency
from supervisor.settings import Settings
from supervisor.wire_codec import encode_registration

log = logging.getLogger(__name__)

CGROUP_MEMORY_LIMITS: Final = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where cgroup v2 and v1 keep the container's limit."""

INT32_MAX: Final = 2**31 - 1
"""The wire's int32 fields refuse more, and with it the whole registration."""


class Registration:
    """Encodes the registration from what pool, dispatcher, residency and probe say now."""

    def __init__(
        self, settings: Settings, pool: Pool, dispatcher: Dispatcher, residency: Residency, probe: DeviceProbe
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._dispatcher = dispatcher
        self._residency = residency
        self._probe = probe
        self._cpu_cores = len(os.sched_getaffinity(0))
        self._memory_bytes = memory_limit()

    def encode(self, is_heartbeat: bool) -> bytes:  # noqa: FBT001  (the session's callable has this one argument)
        return encode_registration(self._resources(), is_heartbeat=is_heartbeat)

    def _resources(self) -> pb.WorkerResources:
        settings = self._settings
        ready = self._pool.ready
        functions = self._dispatcher.functions if ready else {}
        resources = pb.WorkerResources(
            worker_id=settings.worker_id,
            cpu_cores=self._cpu_cores,
            memory_bytes=self._memory_bytes,
            available_functions=sorted(functions),
            vram_models=self._residency.hot_models(),
            disk_models=self._residency.disk_models(),
            supports_model_loading=any(info.injections for info in functions.values()),
            deployment_id=settings.deployment_id,
            runpod_pod_id=settings.runpod_pod_id,
            max_concurrency=min(settings.max_concurrency, INT32_MAX),
            function_concurrency=self._concurrency(functions, ready),
            function_schemas=[_schema(functions[name]) for name in sorted(functions)],
        )
        self._add_gpus(resources, ready)
        self._add_versions(resources, ready)
        return resources

    def _add_gpus(self, resources: pb.WorkerResources, ready: list[ExecutorHandle]) -> None:
        """The GPU with the most free memory speaks for all: it decides whether a model fits."""
        gpus = [handle for handle in ready if handle.device.is_gpu]
        if not gpus:
            return
        resources.gpu_count = len(gpus)
        resources.gpu_is_busy = all(handle.load for handle in gpus)
        resources.gpu_driver = self._probe.driver_version
        try:
            memory, device = max(
                ((self._probe.memory(handle.device), handle.device) for handle in gpus),
                key=lambda pair: pair[0].free_bytes,
            )
        except DeviceError as error:
            log.error("the memory of the GPUs can't be read: %s", error)
            return
        resources.gpu_name = device.name
        resources.gpu_sm = device.sm
        resources.gpu_memory_bytes = device.memory_bytes
        resources.gpu_memory_used_bytes = memory.used_bytes
        resources.gpu_memory_free_bytes = memory.free_bytes

    def _add_versions(self, resources: pb.WorkerResources, ready: list[ExecutorHandle]) -> None:
        versions = ready[0].versions if ready else {}
        resources.cuda_version = versions.get("cuda", "")
        resources.torch_version = versions.get("torch", "")
        resources.tensorrt_version = versions.get("tensorrt", "")
        resources.onnxruntime_version = versions.get("onnxruntime", "")

    def _concurrency(self, functions: dict[str, FunctionInfo], ready: list[ExecutorHandle]) -> dict[str, int]:
        """At once over all live executors, for the functions that have a limit."""
        total: Counter[str] = Counter()
        for handle in ready:
            for name in handle.functions:
                if name in functions:
                    total[name] += self._dispatcher.lanes.limit_of(functions[name])
        return {name: min(limit, INT32_MAX) for name, limit in total.items() if limit}


def memory_limit() -> int:
    """The memory that this host or container may use, in bytes."""
    total = int(psutil.virtual_memory().total)
    for path in CGROUP_MEMORY_LIMITS:
        try:
            text = path.read_text().strip()
        except OSError:
            continue  # the other cgroup version, or none
        if text.isdigit():
            return min(total, int(text))
    return total


def _schema(info: FunctionInfo) -> pb.FunctionSchema:
    injections = [
        {
            "model_ref": {"key": injection.key, "source": injection.source},
            "param": injection.param,
            "type": injection.type_name,
        }
        for injection in info.injections
    ]
    return pb.FunctionSchema(
        name=info.name,
        input_schema_json=info.input_schema,
        output_schema_json=info.output_schema,
        injection_json=msgspec.json.encode(injections),
        incremental_output=info.mode in ("generator", "async_generator"),
        delta_schema_json=info.delta_schema,
    )
