"""Payloads from JSON schemas, as far as msgspec writes them.

Owns: which value is made for which schema. Pure: the randomness is handed in. Optional fields are left out half of
the time; strings are short, numbers small, unless the schema bounds them otherwise.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any, Final
from uuid import UUID

MAX_DEPTH: Final = 6
"""Deeper than that optional parts are left out and lists are short, so that recursive types end."""
_REF: Final = "#/$defs/"
_EPOCH: Final = datetime(2024, 1, 1, tzinfo=UTC)
_NUMBER_SPAN: Final = 10
_MORE_ITEMS: Final = 3
_MORE_CHARS: Final = 12

Schema = Mapping[str, Any]


class UnsupportedSchemaError(ValueError):
    """A schema that no value is known for."""


def payload_for(schema: Schema, rng: Random) -> Any:
    """A value that fits `schema`; `$ref`s are looked up in its `$defs`. Raises UnsupportedSchemaError."""
    return _Maker(schema.get("$defs", {}), rng).make(schema, 0)


class _Maker:
    def __init__(self, definitions: Mapping[str, Schema], rng: Random) -> None:
        self._definitions = definitions
        self._rng = rng
        self._by_type: dict[str, Callable[[Schema, int], Any]] = {
            "null": lambda _schema, _depth: None,
            "boolean": lambda _schema, _depth: rng.random() < 0.5,  # noqa: PLR2004  (a coin)
            "integer": self._integer,
            "number": self._number,
            "string": self._string,
            "array": self._array,
            "object": self._object,
        }

    def make(self, schema: Schema, depth: int) -> Any:
        if "$ref" in schema:
            return self.make(self._definitions[schema["$ref"].removeprefix(_REF)], depth)
        if "const" in schema:
            return schema["const"]
        if "enum" in schema:
            return self._rng.choice(schema["enum"])
        if "anyOf" in schema:
            # Of the alternatives that stand late, `null` is one: it ends a recursive type.
            options = schema["anyOf"]
            ends = [option for option in options if option.get("type") == "null"]
            return self.make(self._rng.choice(ends if ends and depth > MAX_DEPTH else options), depth)
        kind = schema.get("type")
        if kind is None:
            return self._rng.choice((None, True, 7, "anything"))
        if isinstance(kind, list):
            kind = self._rng.choice(kind)
        if kind not in self._by_type:
            raise UnsupportedSchemaError(f"no value is known for the schema {dict(schema)!r}")
        return self._by_type[kind](schema, depth)

    def _integer(self, schema: Schema, _depth: int) -> int:
        low, high = self._bounds(schema, step=1)
        factor = schema.get("multipleOf", 1)
        return int(self._rng.randint(-int(-low // factor), int(high // factor)) * factor)

    def _number(self, schema: Schema, _depth: int) -> float:
        low, high = self._bounds(schema, step=1e-6)
        factor = schema.get("multipleOf")
        if factor:
            return float(self._rng.randint(-int(-low // factor), int(high // factor)) * factor)
        return self._rng.uniform(low, high)

    def _bounds(self, schema: Schema, step: float) -> tuple[float, float]:
        """The least and the greatest value; what the schema leaves open is near to what it says."""
        low = schema.get("minimum")
        if "exclusiveMinimum" in schema:
            low = schema["exclusiveMinimum"] + step
        high = schema.get("maximum")
        if "exclusiveMaximum" in schema:
            high = schema["exclusiveMaximum"] - step
        span = _NUMBER_SPAN * max(1, schema.get("multipleOf", 1))
        if low is None:
            low = 0 if high is None or high >= 0 else high - span
        return low, low + span if high is None else high

    def _string(self, schema: Schema, _depth: int) -> str | bytes:
        if "pattern" in schema:
            raise UnsupportedSchemaError(
                f"a string that matches {schema['pattern']!r} can't be made up: use --payloads"
            )
        if schema.get("contentEncoding") == "base64":
            return self._rng.randbytes(self._size(schema, "Length", _MORE_CHARS))  # as it is: payloads are MessagePack
        made = self._formatted(schema.get("format", ""))
        if made:
            return made
        return "".join(self._rng.choices(string.ascii_lowercase, k=self._size(schema, "Length", _MORE_CHARS)))

    def _formatted(self, kind: str) -> str:
        moment = _EPOCH + timedelta(seconds=self._rng.randint(0, 10**8))
        formats: dict[str, Callable[[], str]] = {
            "date-time": moment.isoformat,
            "date": moment.date().isoformat,
            "time": lambda: f"{moment.time().isoformat()}Z",
            "partial-time": lambda: moment.time().isoformat(),
            "duration": lambda: f"PT{self._rng.randint(0, 3600)}S",
            "uuid": lambda: str(UUID(int=self._rng.getrandbits(128), version=4)),
            "decimal": lambda: str(self._rng.randint(0, 999) / 10),
        }
        return formats[kind]() if kind in formats else ""

    def _size(self, schema: Schema, what: str, more: int) -> int:
        least = schema.get(f"min{what}", 0)
        return self._rng.randint(least, min(schema.get(f"max{what}", least + more), least + more))

    def _array(self, schema: Schema, depth: int) -> list[Any]:
        first = [self.make(item, depth + 1) for item in schema.get("prefixItems", ())]
        items = schema.get("items", {})
        if items is False:
            return first
        size = self._size(schema, "Items", 0 if depth > MAX_DEPTH else _MORE_ITEMS)
        found = first + [self.make(items, depth + 1) for _ in range(size - len(first))]
        return found if not schema.get("uniqueItems") else list({repr(item): item for item in found}.values())

    def _object(self, schema: Schema, depth: int) -> dict[str, Any]:
        required = schema.get("required", ())
        made = {
            name: self.make(field, depth + 1)
            for name, field in schema.get("properties", {}).items()
            if name in required or (depth <= MAX_DEPTH and self._rng.random() < 0.5)  # noqa: PLR2004  (a coin)
        }
        extra = schema.get("additionalProperties")
        if isinstance(extra, Mapping) and not schema.get("properties"):
            for number in range(self._size(schema, "Properties", 0 if depth > MAX_DEPTH else _MORE_ITEMS)):
                made[f"key{number}"] = self.make(extra, depth + 1)
        return made
