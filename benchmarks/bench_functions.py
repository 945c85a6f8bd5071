"""The functions of the floor, as a tenant writes them."""

from __future__ import annotations

import time
from collections.abc import Iterator

from floor import Count, Delta, Echo

from gen_worker import ActionContext, ResourceRequirements, worker_function


@worker_function()
def echo(ctx: ActionContext, payload: Echo) -> Echo:
    return payload


@worker_function()
def count(ctx: ActionContext, payload: Count) -> Iterator[Delta]:
    for index in range(payload.count):
        yield Delta(index, "x" * payload.size)


@worker_function(resources=ResourceRequirements(max_concurrency=1))
def once(ctx: ActionContext, payload: Echo) -> Echo:
    """Its concurrency is the number of executors that serve."""
    return payload


@worker_function()
def hold(ctx: ActionContext, payload: Echo) -> Echo:
    """Half a second of a run under way, for what happens meanwhile."""
    time.sleep(0.5)
    return payload
