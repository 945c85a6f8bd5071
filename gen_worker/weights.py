"""What the weight files of a model directory say about how to load it.

Owns: reading safetensors headers (8 bytes of length, then JSON; https://github.com/huggingface/safetensors#format) and
the file names of diffusers' variants. Nothing is loaded here and torch is not needed, so both processes may ask: an
executor what to load, the supervisor how much room that takes.
"""

from __future__ import annotations

import itertools
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import msgspec

HEADER_CAP_BYTES: Final = 100 * 1024 * 1024
"""The safetensors library's own limit."""
FILES_CAP: Final = 10_000
"""Far more than any model has: counting a directory that is something else must not hold the supervisor up."""

_FLOAT_DTYPES: Final = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""safetensors' names -> torch's. What is quantized (F8 and integers) is left to the loading library."""
_VARIANT: Final = re.compile(r"[^.]+\.(?P<variant>[A-Za-z0-9_]+)(?:-\d{5}-of-\d{5})?\.safetensors")
"""`diffusion_pytorch_model.fp16.safetensors`, `model.fp16-00001-of-00002.safetensors`."""


_OTHER_WEIGHTS: Final = frozenset(
    {".bin", ".ckpt", ".engine", ".flashpack", ".gguf", ".npz", ".onnx", ".plan", ".pt", ".pth"}
)  # fmt: skip
"""Counted where a folder has no safetensors, which every library prefers."""


class WeightsError(ValueError):
    """A weights file that is not what its name says."""


_Count = Annotated[int, msgspec.Meta(ge=0)]


class _Tensor(msgspec.Struct):
    dtype: str
    shape: tuple[_Count, ...]
    data_offsets: tuple[_Count, _Count]


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in its file."""

    dtype: str
    """As safetensors names it."""
    shape: tuple[int, ...]
    start: int
    """Its first byte, counted from the file's."""
    size: int
    """Bytes."""


_HEADER = msgspec.json.Decoder(dict[str, msgspec.Raw])
_TENSOR = msgspec.json.Decoder(_Tensor)


def variant_of(root: Path) -> str | None:
    """The diffusers variant to ask for: one that a folder holds which holds no plain weights; else None."""
    return _variant_of(_with_safetensors(_files(root)))


def dtype_of(root: Path, variant: str | None = None) -> str | None:
    """Torch's name of the float type that most bytes of the weights have; None when there are no such weights.

    Of a folder with weights of the variant only those count. Raises WeightsError for a file with a broken header.
    """
    sizes: Counter[str] = Counter()
    for files in _with_safetensors(_files(root)).values():
        chosen = [path for path in files if variant and f".{variant}" in path.name] or files
        for path in chosen:
            sizes.update(_bytes_by_dtype(path))
    if not sizes:
        return None
    return _FLOAT_DTYPES.get(sizes.most_common(1)[0][0])


def weight_bytes(root: Path) -> int:
    """Bytes of the weight files that would be loaded from `root`: one variant of each folder.

    Raises OSError, and WeightsError for a directory with more than FILES_CAP entries.
    """
    files = _files(root, FILES_CAP)
    folders = _with_safetensors(files)
    variant, total = _variant_of(folders), 0
    for found in folders.values():
        wanted = [path for path in found if variant and f".{variant}" in path.name]
        wanted = wanted or [path for path in found if not _VARIANT.fullmatch(path.name)] or found
        total += sum(path.stat().st_size for path in wanted)
    return total + sum(
        path.stat().st_size for path in files if path.suffix in _OTHER_WEIGHTS and path.parent not in folders
    )


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """What a safetensors file holds, by its header. Raises OSError, and WeightsError for one that is not whole."""
    try:
        with path.open("rb") as file:
            file_bytes = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if length > min(HEADER_CAP_BYTES, file_bytes):
                raise WeightsError(f"{path} is not a safetensors file: its header says it has {length} bytes")
            header = _HEADER.decode(file.read(length))
        found = {name: _TENSOR.decode(raw) for name, raw in header.items() if name != "__metadata__"}
    except msgspec.DecodeError as error:
        raise WeightsError(f"{path} is not a safetensors file: {error}") from error
    first, tensors = 8 + length, {}
    for name, tensor in found.items():
        start, end = tensor.data_offsets
        if end < start:
            raise WeightsError(f"{path} is not a safetensors file: {name!r} ends before it starts")
        tensors[name] = StoredTensor(tensor.dtype, tensor.shape, first + start, end - start)
    told = max((tensor.start + tensor.size for tensor in tensors.values()), default=first)
    if told != file_bytes:
        raise WeightsError(f"{path} is not whole: by its header it has {told} bytes, on disk are {file_bytes}")
    return tensors


def _variant_of(folders: dict[Path, list[Path]]) -> str | None:
    variants: Counter[str] = Counter()
    for files in folders.values():
        found = [_VARIANT.fullmatch(path.name) for path in files]
        if all(found):
            variants.update({match["variant"] for match in found if match})
    return variants.most_common(1)[0][0] if variants else None


def _with_safetensors(files: list[Path]) -> dict[Path, list[Path]]:
    folders: dict[Path, list[Path]] = defaultdict(list)
    for path in files:
        if path.suffix == ".safetensors":
            folders[path.parent].append(path)
    return folders


def _files(root: Path, cap: int | None = None) -> list[Path]:
    """All files, less those at the root of a pipeline of folders: a checkpoint there repeats what the folders have."""
    is_pipeline = (root / "model_index.json").is_file()
    entries = list(itertools.islice(root.rglob("*"), None if cap is None else cap + 1))
    if cap is not None and len(entries) > cap:
        raise WeightsError(f"{root} has more than {cap} files and folders: it does not look like a model's directory")
    return [path for path in sorted(entries) if path.is_file() and not (is_pipeline and path.parent == root)]


def _bytes_by_dtype(path: Path) -> Counter[str]:
    sizes: Counter[str] = Counter()
    for tensor in stored_tensors(path).values():
        sizes[tensor.dtype] += tensor.size
    return sizes
