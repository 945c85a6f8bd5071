"""Weights from disk to a real GPU: what comes through the buffers is what the libraries read.

`make gpu-test` runs these. CUDA runs in this process; test_vram.py, which measures what workers take, comes before.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from executor.loaders import load_object
from executor.pretrained import arguments
from executor.weight_reader import PIECE, READERS, WeightReader
from gen_worker.injection import ModelArtifacts
from gen_worker.torch_build import cuda_version
from tests.support.copy_stream import assert_same

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]  # CUDA's start and torch's import, on any machine

DEVICE = "cuda:0"


@pytest.fixture(scope="module")
def torch() -> Any:
    """Skips where there is no GPU for it."""
    for package in ("torch", "safetensors", "accelerate", "transformers", "diffusers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    if cuda_version() is None:
        pytest.skip("the installed torch is a build without CUDA")
    import torch

    if not torch.cuda.is_available():
        pytest.skip("torch finds no NVIDIA GPU")
    return torch


def test_what_is_read_beside_computations_is_what_safetensors_reads(torch: Any, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    torch.manual_seed(0)
    made = {"half": torch.randn(64, 2**20).half(), "odd": torch.randn(12_345_677), "one": torch.tensor(3)}
    made |= {f"small{number}": torch.randn(number + 1) for number in range(500)}
    path = tmp_path / "model.safetensors"
    save_file(made, path)
    busy = torch.randn(2048, 2048, device=DEVICE)
    before = torch.cuda.memory_allocated(DEVICE)
    with WeightReader(DEVICE) as reader:
        file = reader.open(path)
        for _ in range(50):
            torch.tanh(busy @ busy)  # its memory is given out again while it is still written to
        found = reader.load_all(file, list(file.tensors))
        alone = {name: reader.load(file, name) for name in ("half", "odd", "one")}
    for name, expected in load_file(path, device=DEVICE).items():
        assert (found[name].device, found[name].dtype) == (expected.device, expected.dtype)
        assert torch.equal(found[name], expected), name
    assert all(torch.equal(tensor, found[name]) for name, tensor in alone.items())
    del expected, found, alone
    assert torch.cuda.memory_allocated(DEVICE) == before
    if hasattr(torch.cuda, "host_memory_stats"):
        assert torch.cuda.host_memory_stats()["allocated_bytes.peak"] <= 2 * READERS * PIECE


def test_no_room_is_torchs_error_and_costs_nothing(torch: Any, tmp_path: Path) -> None:
    size = torch.cuda.get_device_properties(DEVICE).total_memory + 2**30
    with (tmp_path / "huge.safetensors").open("wb") as file:  # a hole: it takes no disk
        header = f'{{"a":{{"dtype":"U8","shape":[{size}],"data_offsets":[0,{size}]}}}}'.encode()
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + size)
    before = torch.cuda.memory_allocated(DEVICE)
    with WeightReader(DEVICE) as reader, pytest.raises(torch.OutOfMemoryError):
        reader.load_all(reader.open(tmp_path / "huge.safetensors"), ["a"])
    assert torch.cuda.memory_allocated(DEVICE) == before


@pytest.mark.parametrize("kind", ["transformers", "diffusers"])
def test_models_are_the_librarys_to_the_bit(torch: Any, tmp_path: Path, kind: str) -> None:
    torch.manual_seed(1)
    if kind == "transformers":
        import transformers

        config = transformers.LlamaConfig(
            vocab_size=512, hidden_size=512, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=8
        )
        made: Any = transformers.LlamaForCausalLM(config)
    else:
        import diffusers

        made = diffusers.UNet2DModel(sample_size=32, block_out_channels=(64, 128, 256, 256))
    made.to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="20MB")
    loaded = load_object(type(made), ModelArtifacts("m", tmp_path), DEVICE)
    plain = type(made).from_pretrained(str(tmp_path), **arguments(type(made), tmp_path, DEVICE))
    assert_same(loaded, plain)
    assert {parameter.device for parameter in plain.parameters()} == {torch.device(DEVICE)}
