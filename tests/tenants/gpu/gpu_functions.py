"""A tenant's functions for the tests that need a GPU."""

from __future__ import annotations

import os
from typing import Annotated

import msgspec
import torch
from safetensors.torch import load_file

from gen_worker import (
    ActionContext,
    ModelArtifacts,
    ModelRef,
    ModelRefSource,
    ResourceRequirements,
    register_runtime_loader,
    worker_function,
)


class Weights(torch.nn.Module):
    """One tensor in the device's memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.data = torch.nn.Parameter(tensor, requires_grad=False)


def load_weights(ctx: ActionContext, artifacts: ModelArtifacts) -> Weights:
    return Weights(load_file(artifacts.root_dir / "model.safetensors", device=str(ctx.device))["data"])


register_runtime_loader(Weights, load_weights)

_kept: list[torch.Tensor] = []


class Use(msgspec.Struct):
    model: str = "a"
    keep: bool = False


class Used(msgspec.Struct):
    checksum: float
    device: str
    pid: int


class How(msgspec.Struct):
    how: str = ""


class Done(msgspec.Struct):
    pid: int


Chosen = Annotated[Weights, ModelRef(ModelRefSource.PAYLOAD, "model")]


@worker_function()
def use(ctx: ActionContext, payload: Use, weights: Chosen) -> Used:
    if payload.keep:
        _kept.append(weights.data)
    head = weights.data[:1024].float().sum()
    return Used(float(head), str(weights.data.device), os.getpid())


@worker_function(ResourceRequirements(max_concurrency=1))
def trouble(ctx: ActionContext, payload: How) -> Done:
    if payload.how == "memory":
        hoard = []
        while True:
            hoard.append(torch.empty(4 * 2**30, dtype=torch.uint8, device=ctx.device))
    if payload.how == "assert":
        table = torch.zeros(4, device=ctx.device)
        table[torch.tensor([1_000_000], device=ctx.device)].sum().item()
    return Done(os.getpid())
