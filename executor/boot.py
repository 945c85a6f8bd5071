"""From Init to Ready: imports the tenant's modules and says what they serve.

Owns: what can go wrong on the way, as BootError with the Fatal that says it. Nothing here imports torch; the tenant's
modules may.
"""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import platform
import sys
from collections.abc import Iterable
from typing import Final

from gen_worker.errors import ProjectError, SignatureError
from gen_worker.failures import describe
from gen_worker.injection import configure_runtime_loaders
from gen_worker.modules import find_modules, import_modules, import_roots
from gen_worker.pipe.messages import PIPE_PROTOCOL, Fatal, FunctionInfo, Init, InjectionInfo, Ready
from gen_worker.signature import FunctionSpec, collect_functions
from gen_worker.torch_build import cuda_version, torch_version

_DISTRIBUTIONS: Final = {
    "tensorrt": ("tensorrt", "tensorrt-cu12", "tensorrt-cu13"),
    "onnxruntime": ("onnxruntime-gpu", "onnxruntime"),
}
"""The name in Ready -> the distributions that it may come from, the most telling first."""


class BootError(Exception):
    """The executor can't start; `fatal` says why."""

    def __init__(self, fatal: Fatal) -> None:
        super().__init__(fatal.message)
        self.fatal = fatal


def load_functions(init: Init) -> tuple[FunctionSpec, ...]:
    """Import the tenant's modules and inspect what they mark. Raises BootError."""
    if init.protocol != PIPE_PROTOCOL:
        versions = f"pipe protocol {init.protocol}, this executor {PIPE_PROTOCOL}"
        raise BootError(Fatal("protocol", f"the supervisor speaks {versions}: restart the worker"))
    sys.path[:0] = [str(root) for root in import_roots(init.project_root) if str(root) not in sys.path]
    configure_runtime_loaders(init.runtime_loaders)
    names = init.modules or find_modules(init.project_root)
    try:
        specs = collect_functions(import_modules(names))
    except SignatureError as error:
        raise BootError(Fatal("signature", str(error), describe(error))) from error
    except ProjectError as error:
        raise BootError(Fatal("import", str(error), describe(error))) from error
    if not specs:
        looked_at = ", ".join(names) or f"no module under {init.project_root} mentions one"
        raise BootError(Fatal("no_functions", f"no @worker_function() or @worker_websocket() found: {looked_at}"))
    # A tenant that has configured logging keeps its own way.
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(name)s: %(message)s")
    # What was imported stays: the collector need not look at it again.
    gc.collect()
    gc.freeze()
    return specs


def ready(specs: Iterable[FunctionSpec]) -> Ready:
    """What the supervisor is told of the functions and of what is installed."""
    return Ready(PIPE_PROTOCOL, tuple(_function_info(spec) for spec in specs), installed_versions())


def installed_versions() -> dict[str, str]:
    """Versions of torch, cuda, tensorrt, onnxruntime and python, as far as they are there; none of them is imported."""
    versions = {"python": platform.python_version()}
    for name, distributions in _DISTRIBUTIONS.items():
        found = next(filter(None, map(_version, distributions)), None)
        if found is not None:
            versions[name] = found
    of_torch = {"torch": torch_version(), "cuda": cuda_version()}
    return versions | {name: version for name, version in of_torch.items() if version is not None}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _function_info(spec: FunctionSpec) -> FunctionInfo:
    return FunctionInfo(
        name=spec.name,
        mode=spec.mode,
        input_schema=spec.input_schema,
        output_schema=spec.output_schema,
        delta_schema=spec.delta_schema,
        injections=tuple(
            InjectionInfo(injection.param, injection.type_name, injection.ref.source.value, injection.ref.key)
            for injection in spec.injections
        ),
        max_concurrency=spec.resources.max_concurrency or 0,
    )
