"""Payloads that are made from a schema fit the struct that the schema is of."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import uuid
from random import Random
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_worker.testing.torture.schemas import UnsupportedSchemaError, payload_for


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Leaf(msgspec.Struct, tag="leaf"):
    number: Annotated[int, msgspec.Meta(ge=3, lt=40, multiple_of=7)]


class Twig(msgspec.Struct, tag="twig"):
    text: Annotated[str, msgspec.Meta(min_length=3, max_length=5)]
    deeper: list[Twig | Leaf] = []


class Pair(msgspec.Struct, array_like=True):
    one: int
    two: str = ""


class Everything(msgspec.Struct):
    flag: bool
    count: int
    share: Annotated[float, msgspec.Meta(gt=0, le=1)]
    below: Annotated[int, msgspec.Meta(lt=-5)]
    data: bytes
    key: uuid.UUID
    price: decimal.Decimal
    color: Color
    choice: Literal["a", 3]
    tree: Leaf | Twig
    pair: Pair
    both: tuple[int, str]
    some: Annotated[list[int], msgspec.Meta(min_length=2, max_length=3)]
    numbers: set[int]
    names: dict[str, float]
    day: dt.date
    moment: Annotated[dt.datetime, msgspec.Meta(tz=True)]
    itself: Everything | None
    length: dt.timedelta | None = None
    anything: Any = None
    late: Annotated[dt.time, msgspec.Meta(tz=False)] | None = None


class Empty(msgspec.Struct):
    pass


@given(st.integers(0, 2**64), st.sampled_from([Everything, Empty, Pair, Twig]))
@settings(max_examples=200, deadline=None)
def test_it_decodes(seed: int, struct: type[msgspec.Struct]) -> None:
    schema = msgspec.json.decode(msgspec.json.encode(msgspec.json.schema(struct)))
    payload = payload_for(schema, Random(seed))
    msgspec.msgpack.decode(msgspec.msgpack.encode(payload), type=struct)
    assert payload_for(schema, Random(seed)) == payload


def test_optional_fields_come_and_go() -> None:
    schema = msgspec.json.schema(Twig)
    assert {"deeper" in payload_for(schema, Random(seed)) for seed in range(50)} == {True, False}


@pytest.mark.parametrize("schema", [{"type": "string", "pattern": "^a+$"}, {"type": "dream"}])
def test_what_it_can_not_make(schema: dict[str, str]) -> None:
    with pytest.raises(UnsupportedSchemaError):
        payload_for(schema, Random(1))
