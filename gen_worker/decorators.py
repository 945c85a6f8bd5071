"""The decorators that mark tenant functions.

Owns: the mark. A decorator stamps a frozen Definition on the function and returns the function itself, so it stays
directly callable; the signature is checked when functions are discovered (signature.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeVar

from gen_worker.errors import SignatureError

F = TypeVar("F", bound=Callable[..., Any])

_ATTRIBUTE: Final = "__gen_worker_definition__"


@dataclass(frozen=True, slots=True)
class ResourceRequirements:
    """What one function asks of an executor.

    `max_concurrency`: at most that many runs of it at once on one executor. None: as many as come, but
    WORKER_MODEL_CONCURRENCY at a time for a function with an injected model.
    """

    max_concurrency: int | None = None


@dataclass(frozen=True, slots=True)
class Definition:
    """What a decorator leaves on a function. `func` tells the marked function from one that copied its attributes."""

    kind: Literal["function", "websocket"]
    func: Callable[..., Any]
    resources: ResourceRequirements


def worker_function(resources: ResourceRequirements | None = None) -> Callable[[F], F]:
    """Mark a function as one that the scheduler can call.

    `def f(ctx: ActionContext, payload: SomeStruct) -> OutStruct`, plus any number of injected model parameters; or
    `-> Iterator[DeltaStruct]` and its relatives for incremental output. `def`, `async def` and generators of both.
    """
    return _marker("function", "worker_function", resources)


def worker_websocket(resources: ResourceRequirements | None = None) -> Callable[[F], F]:
    """Mark `async def h(ctx: ActionContext, sock: RealtimeSocket, [injected models]) -> None` as a handler."""
    return _marker("websocket", "worker_websocket", resources)


def definition_of(candidate: object) -> Definition | None:
    """The mark on `candidate`, if it has one."""
    attributes = getattr(candidate, "__dict__", {})
    definition = attributes.get(_ATTRIBUTE)
    return definition if isinstance(definition, Definition) else None


def _marker(
    kind: Literal["function", "websocket"], decorator: str, resources: ResourceRequirements | None
) -> Callable[[F], F]:
    if callable(resources):
        raise SignatureError(f"write @{decorator}() with parentheses above {_name(resources)}")
    if resources is not None and not isinstance(resources, ResourceRequirements):
        raise SignatureError(f"@{decorator} takes a ResourceRequirements, got {resources!r}")

    def mark(func: F) -> F:
        try:
            setattr(func, _ATTRIBUTE, Definition(kind, func, resources or ResourceRequirements()))
        except AttributeError:
            raise SignatureError(f"@{decorator} can't mark {_name(func)}: it is not a function") from None
        return func

    return mark


def _name(candidate: object) -> str:
    module, name = getattr(candidate, "__module__", None), getattr(candidate, "__qualname__", None)
    return f"{module}.{name}" if module and name else repr(candidate)
