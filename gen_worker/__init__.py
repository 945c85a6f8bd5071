"""What tenant code imports: decorators, the run's context, injection, assets and errors.

Owns: the public surface, pinned by tests/unit/test_public_surface.py. Importing it loads neither torch nor grpc nor
huggingface_hub; what only build tools use is loaded on first access.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from gen_worker._version import __version__
from gen_worker.context import ActionContext
from gen_worker.decorators import ResourceRequirements, worker_function, worker_websocket
from gen_worker.errors import (
    AuthError,
    CanceledError,
    FatalError,
    ResourceError,
    RetryableError,
    ValidationError,
    WorkerError,
)
from gen_worker.injection import ModelArtifacts, ModelRef, ModelRefSource, register_runtime_loader
from gen_worker.realtime import RealtimeSocket
from gen_worker.types import Asset

if TYPE_CHECKING:
    from gen_worker.discover import discover_manifest
    from gen_worker.project import ProjectValidationResult, validate_project

__all__ = [
    "ActionContext",
    "Asset",
    "AuthError",
    "CanceledError",
    "FatalError",
    "ModelArtifacts",
    "ModelRef",
    "ModelRefSource",
    "ProjectValidationResult",
    "RealtimeSocket",
    "ResourceError",
    "ResourceRequirements",
    "RetryableError",
    "ValidationError",
    "WorkerError",
    "__version__",
    "discover_manifest",
    "register_runtime_loader",
    "validate_project",
    "worker_function",
    "worker_websocket",
]

_LAZY: Final = {
    "ProjectValidationResult": "gen_worker.project",
    "discover_manifest": "gen_worker.discover",
    "validate_project": "gen_worker.project",
}


def __getattr__(name: str) -> Any:
    module = _LAZY.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(module), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
