"""Small questions about type annotations, as typing leaves them after they were resolved.

Owns: nothing; signature.py asks.
"""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, TypeGuard, TypeVar, Union, get_args, get_origin

T = TypeVar("T")


def split_annotated(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    """`T` and the extras of `Annotated[T, ...]`; any other hint and no extras."""
    if get_origin(hint) is not Annotated:
        return hint, ()
    plain, *extras = get_args(hint)
    return plain, tuple(extras)


def optional_of(hint: Any) -> Any:
    """`T` of `T | None`, else None."""
    if get_origin(hint) not in {Union, UnionType}:
        return None
    members = get_args(hint)
    others = [member for member in members if member is not NoneType]
    return split_annotated(others[0])[0] if len(others) == 1 and len(members) > 1 else None


def is_a(hint: Any, base: type[T]) -> TypeGuard[type[T]]:
    """Whether the hint is a class (not an alias such as `Box[int]`) derived from `base`."""
    return isinstance(hint, type) and get_origin(hint) is None and issubclass(hint, base)


def show(hint: Any) -> str:
    """The hint as an error message names it."""
    if hint is NoneType:
        return "None"
    return hint.__qualname__ if isinstance(hint, type) and get_origin(hint) is None else str(hint)
