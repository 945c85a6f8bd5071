"""What this host can run, as the hub asks for it to choose an artifact.

Owns: nothing; it looks at what is installed and imports none of it.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Final

from gen_worker.torch_build import cuda_version, torch_version

OPTIONAL_LIBRARIES: Final = ("flashpack", "bitsandbytes", "torchao", "transformer_engine")


def capabilities(gpu_sm: int) -> dict[str, Any]:
    """`capabilities` of resolve_artifact; "" for what is not installed."""
    return {
        "cuda_version": cuda_version() or "",
        "gpu_sm": gpu_sm,
        "torch_version": torch_version() or "",
        "installed_libs": sorted(name for name in OPTIONAL_LIBRARIES if importlib.util.find_spec(name) is not None),
    }


def preferences(found: dict[str, Any]) -> dict[str, list[str]]:
    """`preferences` of resolve_artifact for these capabilities: flashpack only where it can be read."""
    types = ["flashpack", "safetensors"] if "flashpack" in found["installed_libs"] else ["safetensors"]
    return {
        "file_type_preference": types,
        "quantization_preference": ["fp8", "bf16", "fp16"],
        "file_layout_preference": ["diffusers"],
    }
