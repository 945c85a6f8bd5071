"""How fast models get onto the device: from disk, and back from host memory, beside plain safetensors and the bus.

    python benchmarks/models.py [--gib 4] [--rounds 5] [--device cuda:0 | cpu]

A model of so many GiB of random half-precision weights is saved in shards and read once, so the page cache is warm.
Then, in turns, each as the median of the rounds:

- bus: one page-locked buffer of that size to the device: what nothing can beat
- load_file: safetensors.torch.load_file of every shard, straight to the device
- reader: every shard by the worker's own reader, several threads through page-locked buffers
- filled: the half of that before the device: the buffers are filled from the page cache, and nothing is copied on
- library: the model by from_pretrained, as the library alone does it
- from disk: the same by the worker, as an executor loads it: from_pretrained over the reader
- to host: its eviction to a page-locked copy
- from host: its return

The goals are from host >= 0.7 of the bus, and reader and from disk >= 2 x load_file. `--device cpu` runs the same code,
and its figures mean nothing for a GPU. There load_file only maps the file, so each tensor is copied, too; `mapped` is
without that. `reader` reads into the tensors, `buffers` takes the way of a GPU: into buffers, and from there.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from executor import host_copies
from executor.loaders import load_object
from executor.pretrained import arguments
from executor.weight_reader import CopyStream, WeightReader
from gen_worker.injection import ModelArtifacts
from gen_worker.weights import weight_bytes

LAYER_BYTES = 2 * (4 * 2048 * 2048 + 3 * 2048 * 8192)
"""Of one layer of the model below in half precision: its attention's and its feed-forward's matrices."""


def save_model(root: Path, gib: float, transformers: Any, torch: Any) -> None:
    """A Llama of random weights with as many layers as fill `gib`."""
    layers = max(1, round(gib * 2**30 / LAYER_BYTES))
    config = transformers.LlamaConfig(
        hidden_size=2048, intermediate_size=8192, num_attention_heads=16, num_key_value_heads=16,
        num_hidden_layers=layers, vocab_size=256,
    )  # fmt: skip
    torch.set_default_dtype(torch.float16)
    model = transformers.LlamaModel(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(root, max_shard_size="1GB")


class Clock:
    """Seconds of steps by their names; the device has finished before each reading."""

    def __init__(self, device: str, torch: Any) -> None:
        self._device = device
        self._torch = torch
        self.seconds: dict[str, list[float]] = {}

    def time(self, name: str, step: Callable[[], Any]) -> Any:
        self._wait()
        started = time.perf_counter()
        made = step()
        self._wait()
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)
        return made

    def _wait(self) -> None:
        gc.collect()
        if self._device.startswith("cuda"):
            self._torch.cuda.synchronize(self._device)


class HostStream:
    """A CopyStream that copies in host memory, at once; or nothing, and so shows how fast its buffers are filled."""

    def __init__(self, torch: Any, *, copies: bool = True) -> None:
        self._torch = torch
        self._copies = copies

    def buffer(self, size: int) -> Any:
        return self._torch.empty(size, dtype=self._torch.uint8)

    def begin(self) -> None:
        pass

    def copy(self, target: Any, source: Any) -> None:
        if self._copies:
            target.copy_(source)

    def mark(self) -> Callable[[], None]:
        return lambda: None


def read_all(shards: list[Path], device: str, stream: Callable[[], CopyStream] | None = None) -> list[dict[str, Any]]:
    with WeightReader(device, stream=stream) as reader:
        files = [reader.open(shard) for shard in shards]
        return [reader.load_all(file, list(file.tensors)) for file in files]


def by_load_file(shards: list[Path], device: str, *, copied: bool) -> list[dict[str, Any]]:
    load_file = importlib.import_module("safetensors.torch").load_file
    loaded = [load_file(shard, device=device) for shard in shards]
    return [{name: tensor.clone() for name, tensor in each.items()} for each in loaded] if copied else loaded


def measure(root: Path, size: int, device: str, rounds: int, torch: Any, transformers: Any) -> Clock:
    clock, artifacts = Clock(device, torch), ModelArtifacts("benchmark", root)
    shards = sorted(root.glob("*.safetensors"))
    on_gpu = device.startswith("cuda")
    for _ in range(rounds + 1):  # the first warms everything up, and is left out
        source = torch.empty(size, dtype=torch.uint8, pin_memory=on_gpu)
        clock.time("bus", partial(source.to, device, non_blocking=True, copy=True))
        del source
        clock.time("load_file", partial(by_load_file, shards, device, copied=not on_gpu))
        if not on_gpu:
            clock.time("mapped", partial(by_load_file, shards, device, copied=False))
            clock.time("buffers", partial(read_all, shards, device, partial(HostStream, torch)))
        clock.time("filled", partial(read_all, shards, "cpu", partial(HostStream, torch, copies=False)))
        clock.time("reader", partial(read_all, shards, device))
        given = arguments(transformers.LlamaModel, root, device)
        clock.time("library", partial(transformers.LlamaModel.from_pretrained, str(root), **given))
        model = clock.time("from disk", partial(load_object, transformers.LlamaModel, artifacts, device))
        copy = clock.time("to host", partial(host_copies.to_host, model, device))
        clock.time("from host", partial(host_copies.to_device, copy, device))
        del model, copy
        if on_gpu:
            torch.cuda.empty_cache()
    return clock


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast models get onto the device.")
    parser.add_argument("--gib", type=float, default=4.0, help="size of the model (default: 4)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, each step once (default: 5)")
    parser.add_argument("--device", default="cuda:0", help="a torch device (default: cuda:0)")
    options = parser.parse_args()
    torch, transformers = importlib.import_module("torch"), importlib.import_module("transformers")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no CUDA device here, so nothing is measured; `--device cpu` runs the same code, for the code's sake")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        save_model(root, options.gib, transformers, torch)
        size = weight_bytes(root)
        clock = measure(root, size, options.device, options.rounds, torch, transformers)
    device = torch.cuda.get_device_name(options.device) if options.device.startswith("cuda") else "the CPU"
    print(f"{size / 2**30:.2f} GiB on {device}, median of {options.rounds} rounds")
    medians = {name: statistics.median(seconds[1:]) for name, seconds in clock.seconds.items()}
    for name, seconds in medians.items():
        print(
            f"{name:10} {seconds:8.3f} s {size / 2**30 / seconds:8.2f} GiB/s"
            f"   {medians['load_file'] / seconds:6.2f} x load_file   {medians['bus'] / seconds:5.2f} of the bus"
        )


if __name__ == "__main__":
    main()
