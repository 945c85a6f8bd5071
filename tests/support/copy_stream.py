"""A device's copy stream as far as it can be had without a device: nothing is copied until somebody waits for it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from executor.pretrained import arguments
from executor.weight_seams import reading_straight


class DeferredStream:
    """A CopyStream. Whoever reads into a buffer again too early, or waits for too little, has wrong bytes."""

    def __init__(self) -> None:
        self.buffers: list[Any] = []
        self._asked: deque[tuple[Any, Any]] = deque()
        self._done = 0

    def buffer(self, size: int) -> Any:
        import torch

        self.buffers.append(torch.empty(size, dtype=torch.uint8))
        return self.buffers[-1]

    def begin(self) -> None:
        assert not self._asked, "the reader before did not wait for its copies"

    def copy(self, target: Any, source: Any) -> None:
        self._asked.append((target, source))

    def mark(self) -> Callable[[], None]:
        end = self._done + len(self._asked)
        return lambda: self._work(end)

    def _work(self, end: int) -> None:
        while self._done < end:
            target, source = self._asked.popleft()
            target.copy_(source)
            self._done += 1


def load_straight(type_: Any, root: Path) -> tuple[Any, int]:
    """A model by from_pretrained as for a GPU, but to the CPU; and how many bytes our reader read of it."""
    found = arguments(type_, root, "cpu")
    with reading_straight(root, "cpu", found.get("dtype", found.get("torch_dtype")), stream=DeferredStream) as reader:
        loaded = type_.from_pretrained(str(root), **found)
    return loaded, 0 if reader is None else reader.read_bytes


def assert_same(one: Any, other: Any) -> None:
    """Two modules have the same parameters and buffers, to the bit, and share the same ones among themselves."""
    import torch

    def tensors(module: Any) -> dict[str, Any]:
        found = dict(module.named_parameters(remove_duplicate=False))
        return found | dict(module.named_buffers(remove_duplicate=False))

    def shared(found: dict[str, Any]) -> set[tuple[str, ...]]:
        by_id: dict[int, list[str]] = {}
        for name, tensor in found.items():
            by_id.setdefault(id(tensor), []).append(name)
        return {tuple(sorted(names)) for names in by_id.values()}

    mine, others = tensors(one), tensors(other)
    assert mine.keys() == others.keys()
    assert shared(mine) == shared(others)
    for name, tensor in mine.items():
        expected = others[name]
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (expected.dtype, expected.shape, expected.stride()), (
            name
        )
        assert (tensor.device, tensor.requires_grad) == (expected.device, expected.requires_grad), name
        assert type(tensor) is type(expected), name
        assert torch.equal(_bits(tensor), _bits(expected)), name


def _bits(tensor: Any) -> Any:
    import torch

    return tensor.detach().reshape(-1).view(torch.uint8)
