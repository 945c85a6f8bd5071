"""What tenants import: its names are pinned, and it stays light."""

from __future__ import annotations

import subprocess
import sys

import pytest

import gen_worker
import gen_worker.testing

PUBLIC = {
    "ActionContext", "Asset", "AuthError", "CanceledError", "FatalError", "ModelArtifacts", "ModelRef",
    "ModelRefSource", "ProjectValidationResult", "RealtimeSocket", "ResourceError", "ResourceRequirements",
    "RetryableError", "ValidationError", "WorkerError", "__version__", "discover_manifest", "register_runtime_loader",
    "validate_project", "worker_function", "worker_websocket",
}  # fmt: skip
HEAVY = ["torch", "grpc", "huggingface_hub", "pynvml", "google.protobuf", "httpx", "numpy", "asyncio"]


def test_the_names() -> None:
    assert set(gen_worker.__all__) == PUBLIC
    assert all(getattr(gen_worker, name) is not None for name in PUBLIC)
    assert set(dir(gen_worker)) >= PUBLIC


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        gen_worker.nothing  # noqa: B018


@pytest.mark.parametrize("module", ["gen_worker", "gen_worker.manifest", "gen_worker.testing"])
def test_importing_loads_nothing_heavy(module: str) -> None:
    heavy = [name for name in HEAVY if not (name == "asyncio" and module == "gen_worker.testing")]
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=30)
    assert loaded.stdout.strip() == "[]"


def test_import_time() -> None:
    # The best of three in fresh processes: the limit is on the import, not on what else the host does meanwhile.
    code = "import time; t = time.perf_counter(); import gen_worker; print(time.perf_counter() - t)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 0.15
