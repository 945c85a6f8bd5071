"""What the hub is told of this host."""

from __future__ import annotations

import importlib.util
from importlib.machinery import ModuleSpec

import pytest

from supervisor.transfers.capabilities import capabilities, preferences


def test_flashpack_is_preferred_only_where_it_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preferences(capabilities(0))["file_type_preference"] == ["safetensors"]
    real = importlib.util.find_spec
    here = {"torchao", "flashpack", "bitsandbytes"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: ModuleSpec(name, None) if name in here else real(name)
    )
    found = capabilities(90)
    assert found["installed_libs"] == ["bitsandbytes", "flashpack", "torchao"]
    assert found["gpu_sm"] == 90
    assert preferences(found)["file_type_preference"] == ["flashpack", "safetensors"]
