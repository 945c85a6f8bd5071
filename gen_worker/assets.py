"""Finds the Assets of a payload, wherever they are in it.

Owns: nothing. `holds_assets` looks at a type once, so that payloads without files cost nothing; `assets_in` looks at a
value and says of each Asset where it stands, in words for an error message.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from gen_worker.type_walk import types_in
from gen_worker.types import Asset


def assets_in(value: object, place: str = "") -> Iterator[tuple[str, Asset]]:
    """Every Asset inside a decoded payload, after its place (`images[2]`, `style.photo`, `by_name['x']`).

    Structs, dataclasses, attrs classes, mappings (their values), lists, tuples and sets are looked into.
    """
    if isinstance(value, Asset):
        yield place, value
        return
    for step, item in _inside(value):
        yield from assets_in(item, f"{place}{step}" if place else step.removeprefix("."))


def _inside(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, msgspec.Struct):
        yield from ((f".{name}", getattr(value, name)) for name in value.__struct_fields__)
    elif isinstance(value, Mapping):
        yield from ((f"[{_shown(key)}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from (("[*]", item) for item in value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((f".{field.name}", getattr(value, field.name, None)) for field in dataclasses.fields(value))
    elif hasattr(type(value), "__attrs_attrs__"):
        fields: Any = type(value)
        yield from ((f".{field.name}", getattr(value, field.name, None)) for field in fields.__attrs_attrs__)


def _shown(key: object) -> str:
    text = repr(key)
    return text if len(text) <= _KEY_CHARS else f"{text[:_KEY_CHARS]}..."


_KEY_CHARS = 40


@functools.cache
def holds_assets(type_: type) -> bool:
    """Whether a value that msgspec decodes as this type may have an Asset in it."""
    return any(isinstance(each, msgspec.inspect.StructType) and issubclass(each.cls, Asset) for each in types_in(type_))
