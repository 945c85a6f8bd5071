"""A tenant's functions for the tests of model memory: models of any size that cost nothing, and some that are kept."""

from __future__ import annotations

import os
from typing import Annotated

import msgspec

from gen_worker import (
    ActionContext,
    ModelArtifacts,
    ModelRef,
    ModelRefSource,
    ResourceRequirements,
    register_runtime_loader,
    worker_function,
)


class Weights:
    """Stands for what a library of its own makes of weight files."""

    def __init__(self, model_id: str) -> None:
        self.model_id = model_id


def load_weights(ctx: ActionContext, artifacts: ModelArtifacts) -> Weights:
    if "oom" in artifacts.metadata:
        raise MemoryError("a loader that wants more than it said")
    return Weights(artifacts.model_id)


register_runtime_loader(Weights, load_weights)

_kept: list[Weights] = []


class Use(msgspec.Struct):
    model: str = "first"
    seconds: float = 0.0
    keep: bool = False
    """Leak it: a global holds what the worker will think is gone."""


class Used(msgspec.Struct):
    model: str
    pid: int


class Nothing(msgspec.Struct):
    pass


@worker_function(ResourceRequirements(max_concurrency=8))
def use(
    ctx: ActionContext, payload: Use, weights: Annotated[Weights, ModelRef(ModelRefSource.PAYLOAD, "model")]
) -> Used:
    ctx.emit("started", {})
    if payload.keep:
        _kept.append(weights)
    ctx.done().wait(payload.seconds)
    return Used(weights.model_id, os.getpid())


@worker_function()
def both(
    ctx: ActionContext,
    payload: Nothing,
    one: Annotated[Weights, ModelRef(ModelRefSource.DEPLOYMENT, "first")],
    other: Annotated[Weights, ModelRef(ModelRefSource.DEPLOYMENT, "second")],
) -> Used:
    return Used(f"{one.model_id} {other.model_id}", os.getpid())
