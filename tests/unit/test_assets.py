"""Finding the Assets of a payload."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec
import pytest

from gen_worker import Asset
from gen_worker.assets import assets_in, holds_assets


class Inner(msgspec.Struct, frozen=True):
    image: Asset | None
    note: str = ""


class Photo(msgspec.Struct, tag=True):
    file: Asset


class Words(msgspec.Struct, tag=True):
    text: str


@dataclass
class Plain:
    file: Asset


class Special(Asset):
    pass


class Outer(msgspec.Struct):
    first: Asset
    inner: Inner
    many: list[Asset]
    named: dict[str, list[Inner]]
    pair: tuple[int, Asset]
    either: Photo | Words
    plain: Plain
    special: Special | None = None
    count: int = 0


class Tree(msgspec.Struct):
    children: list[Tree] = []
    leaf: Asset | None = None


class Untyped(msgspec.Struct):
    anything: Any = None
    words: list[str] = []


def payload(number: int = 0) -> dict[str, Any]:
    return {
        "first": {"ref": "1"},
        "inner": {"image": {"ref": "2"}},
        "many": [{"ref": "3"}, {"ref": "4"}],
        "named": {"x": [{"image": None}, {"image": {"ref": "5"}}]},
        "pair": [number, {"ref": "6"}],
        "either": {"type": "Photo", "file": {"ref": "7"}},
        "plain": {"file": {"ref": "8"}},
        "special": {"ref": "9"},
    }


def test_every_asset_with_its_place() -> None:
    decoded = msgspec.msgpack.decode(msgspec.msgpack.encode(payload()), type=Outer)
    found = list(assets_in(decoded))
    assert [(place, asset.ref) for place, asset in found] == [
        ("first", "1"),
        ("inner.image", "2"),
        ("many[0]", "3"),
        ("many[1]", "4"),
        ("named['x'][1].image", "5"),
        ("pair[1]", "6"),
        ("either.file", "7"),
        ("plain.file", "8"),
        ("special", "9"),
    ]
    found[1][1].local_path = "/set"
    assert decoded.inner.image is not None
    assert decoded.inner.image.local_path == "/set"


def test_what_is_no_asset() -> None:
    assert list(assets_in({"a": b"bytes", "b": "text", "c": None})) == []
    assert list(assets_in(Untyped({"ref": "not decoded as one"}))) == []


def test_a_long_key_is_cut() -> None:
    ((place, _),) = assets_in({"k" * 100: Asset("a")})
    assert place == f"['{'k' * 39}...]"


@pytest.mark.parametrize("type_", [Outer, Inner, Photo, Plain, Special, Tree])
def test_types_that_hold_assets(type_: type) -> None:
    assert holds_assets(type_)


@pytest.mark.parametrize("type_", [Untyped, Words, int])
def test_types_that_do_not(type_: type) -> None:
    assert not holds_assets(type_)
