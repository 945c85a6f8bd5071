"""What is read off the weight files of a model directory."""

from __future__ import annotations

from pathlib import Path

import pytest

from gen_worker import weights
from gen_worker.weights import WeightsError, dtype_of, variant_of, weight_bytes

torch = pytest.importorskip("torch")
safetensors_torch = pytest.importorskip("safetensors.torch")


def save(path: Path, **tensors: tuple[str, int]) -> None:
    """A real safetensors file with tensors of (dtype, number of elements)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made = {name: torch.zeros(count, dtype=getattr(torch, dtype)) for name, (dtype, count) in tensors.items()}
    safetensors_torch.save_file(made, str(path), metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_the_dtype_is_the_headers(tmp_path: Path, dtype: str) -> None:
    save(tmp_path / "model.safetensors", a=(dtype, 8))
    assert dtype_of(tmp_path) == dtype


def test_most_bytes_decide(tmp_path: Path) -> None:
    save(tmp_path / "unet" / "model.safetensors", a=("float16", 100), norm=("float32", 10))
    save(tmp_path / "vae" / "model.safetensors", a=("float32", 30))
    assert dtype_of(tmp_path) == "float16"


def test_quantized_and_missing_weights_say_nothing(tmp_path: Path) -> None:
    assert dtype_of(tmp_path) is None
    save(tmp_path / "model.safetensors", a=("int8", 100), scale=("float32", 2))
    assert dtype_of(tmp_path) is None


def test_a_variant_is_what_a_folder_has_alone(tmp_path: Path) -> None:
    save(tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors", a=("float16", 8))
    save(tmp_path / "text_encoder" / "model.fp16-00001-of-00002.safetensors", a=("float16", 8))
    save(tmp_path / "text_encoder" / "model.fp16-00002-of-00002.safetensors", a=("float16", 8))
    save(tmp_path / "vae" / "diffusion_pytorch_model.safetensors", a=("float32", 2))
    assert variant_of(tmp_path) == "fp16"


def test_plain_weights_come_before_a_variant(tmp_path: Path) -> None:
    save(tmp_path / "unet" / "model.fp16.safetensors", a=("float16", 80))
    save(tmp_path / "unet" / "model.safetensors", a=("float32", 80))
    save(tmp_path / "vae" / "model-00001-of-00001.safetensors", a=("float32", 80))
    assert variant_of(tmp_path) is None
    assert dtype_of(tmp_path) == "float32"
    assert dtype_of(tmp_path, "fp16") == "float32", "the vae has no such variant and is as large"


@pytest.mark.parametrize("content", [b"", b"\xff" * 20, b"\x05\x00\x00\x00\x00\x00\x00\x00nope!"])
def test_a_broken_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(WeightsError, match=r"model\.safetensors is not a safetensors file"):
        dtype_of(tmp_path)


@pytest.mark.parametrize(
    ("files", "counted"),
    [
        ([], []),
        (["config.json"], []),
        (["model.safetensors", "config.json", "pytorch_model.bin"], ["model.safetensors"]),
        (["pytorch_model.bin", "tokenizer.json"], ["pytorch_model.bin"]),
        (["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"], ["model-00001", "model-00002"]),
        (["model.gguf", "sub/engine.plan"], ["model.gguf", "sub/engine.plan"]),
        (["unet/m.fp16.safetensors", "vae/m.fp16.safetensors"], ["unet", "vae"]),
        (["unet/m.fp16.safetensors", "vae/m.fp16.safetensors", "vae/m.safetensors"], ["unet", "vae/m.fp16"]),
        (["unet/m.fp16.safetensors", "unet/m.safetensors"], ["unet/m.safetensors"]),
        (["model_index.json", "all-in-one.safetensors", "unet/m.safetensors", "unet/m.bin"], ["unet/m.safetensors"]),
    ],
)
def test_weight_bytes_are_those_of_the_files_that_would_be_loaded(
    tmp_path: Path, files: list[str], counted: list[str]
) -> None:
    for number, name in enumerate(files):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"x" * 10**number)
    expected = sum(10**number for number, name in enumerate(files) if name.startswith(tuple(counted)))
    assert weight_bytes(tmp_path) == expected


def test_a_directory_of_something_else_is_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "FILES_CAP", 2)
    for name in "abc":
        (tmp_path / name).touch()
    with pytest.raises(WeightsError, match="more than 2 files"):
        weight_bytes(tmp_path)
    assert dtype_of(tmp_path) is None, "a load still looks at it"
