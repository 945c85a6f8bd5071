"""Payloads by their schema: words of a command line, base64, Assets, and what is said of what does not fit."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import pytest

from gen_worker.errors import ValidationError
from gen_worker.serve.schema import LocalFile, Schema
from gen_worker.types import Asset


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Inner(msgspec.Struct):
    x: int
    y: float | None = None
    deep: dict[str, int] = {}


class Cat(msgspec.Struct, tag="cat"):
    photo: Asset | None = None


class Dog(msgspec.Struct, tag="dog"):
    sound: bytes = b""


class Everything(msgspec.Struct):
    text: str = ""
    number: Annotated[int, msgspec.Meta(ge=0)] = 0
    ratio: float = 0.0
    flag: bool = False
    mode: Literal["fast", "good", 3] = "fast"
    color: Color = Color.RED
    inner: Inner | None = None
    tags: list[str] = []
    numbers: list[int] = []
    either: int | str = 0
    pair: tuple[int, bytes] = (0, b"")
    anything: Any = None
    free: dict[str, Any] = {}
    asset: Asset | None = None
    assets: list[Asset] = []
    raw: bytes = b""
    pet: Cat | Dog | None = None
    inners: list[Inner] = []


SCHEMA = Schema(msgspec.json.schema(Everything))


@pytest.mark.parametrize(
    ("word", "payload"),
    [
        ("text=hello world", {"text": "hello world"}),
        ("text=5", {"text": "5"}),
        ("text=true", {"text": "true"}),
        ("text=a=b", {"text": "a=b"}),
        ("text=", {"text": ""}),
        ("number=7", {"number": 7}),
        ("ratio=1e-3", {"ratio": 0.001}),
        ("ratio=2", {"ratio": 2}),
        ("flag=true", {"flag": True}),
        ("mode=good", {"mode": "good"}),
        ("mode=3", {"mode": 3}),
        ("color=blue", {"color": "blue"}),
        ("inner.x=1", {"inner": {"x": 1}}),
        ("inner=null", {"inner": None}),
        ('inner={"x": 2}', {"inner": {"x": 2}}),
        ("inner.deep.any=3", {"inner": {"deep": {"any": 3}}}),
        ("tags=a", {"tags": ["a"]}),
        ('tags=["a","b"]', {"tags": ["a", "b"]}),
        ("numbers=4", {"numbers": [4]}),
        ("either=4", {"either": 4}),
        ("either=four", {"either": "four"}),
        ("anything=[1]", {"anything": [1]}),
        ("anything=word", {"anything": "word"}),
        ("free.a.b=1", {"free": {"a": {"b": 1}}}),
        ("asset=https://x/y.png", {"asset": "https://x/y.png"}),
        ("asset=@a.png", {"asset": LocalFile(Path("a.png"))}),
        ("assets=@a.png", {"assets": [LocalFile(Path("a.png"))]}),
        ("raw=@a.bin", {"raw": LocalFile(Path("a.bin"))}),
        ("text=@home", {"text": "@home"}),
    ],
)
def test_a_word_is_what_its_field_is(word: str, payload: dict[str, Any]) -> None:
    assert SCHEMA.parse([word]) == payload


def test_words_make_one_payload() -> None:
    words = ["inner.x=1", "inner.y=2.5", "tags=a", "tags=b", "text=t"]
    assert SCHEMA.parse(words) == {"inner": {"x": 1, "y": 2.5}, "tags": ["a", "b"], "text": "t"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["text"], "'text' is not field=value"),
        (["=5"], "'=5' is not field=value"),
        (["tezt=x"], "there is no field 'tezt'; did you mean 'text'?"),
        (["inner.z=1"], "inner has no field 'z'; it has: deep, x, y"),
        (["text.a=1"], "text has no fields, and so no 'a'"),
        (["number=five"], "number=five: expected an integer"),
        (["number=1.5"], "number=1.5: expected an integer"),
        (["ratio=x"], "ratio=x: expected a number"),
        (["flag=yes"], "flag=yes: expected true or false"),
        (["mode=slow"], "mode=slow: expected 3 or fast or good"),
        (["color=green"], "color=green: expected blue or red"),
        (["inner=5"], "inner=5: expected null or a JSON object"),
        (["numbers=x"], "numbers=x: expected an integer"),
        (["text=a", "text=b"], "text is given twice"),
        (["inner=null", "inner.x=1"], "inner.x: inner has a value of its own already"),
    ],
)
def test_what_does_not_fit_is_said_with_the_word(words: list[str], message: str) -> None:
    with pytest.raises(ValidationError) as caught:
        SCHEMA.parse(words)
    assert str(caught.value) == message


def test_json_becomes_what_the_wire_takes() -> None:
    plain = {
        "raw": "QUI=",
        "pair": [1, "QUI="],
        "text": "QUI=",
        "asset": "ref/a",
        "assets": ["http://x", {"ref": "y"}],
        "pet": {"type": "dog", "sound": "QUI="},
        "unknown": {"raw": "QUI="},
        "inner": None,
        "inners": [{"x": 1}],
    }
    fitted = SCHEMA.fit(plain)
    assert fitted == {
        **plain,
        "raw": b"AB",
        "pair": [1, b"AB"],
        "asset": {"ref": "ref/a"},
        "assets": [{"ref": "http://x"}, {"ref": "y"}],
        "pet": {"type": "dog", "sound": b"AB"},
    }
    msgspec.msgpack.decode(msgspec.msgpack.encode(fitted), type=Everything)
    cat = SCHEMA.fit({"pet": {"type": "cat", "photo": "p"}})
    assert cat == {"pet": {"type": "cat", "photo": {"ref": "p"}}}


def test_base64_that_is_none_names_its_field() -> None:
    with pytest.raises(ValidationError, match=r"^payload\.pair\[1\]: not base64: "):
        SCHEMA.fit({"pair": [1, "***"]})


def test_files_go_to_the_store_or_become_bytes(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"12")
    payload = SCHEMA.parse([f"raw=@{path}", f"asset=@{path}"])
    assert SCHEMA.fit(payload, lambda each: f"stored/{each.name}") == {"raw": b"12", "asset": {"ref": "stored/a.bin"}}
    with pytest.raises(ValidationError, match="missing can't be read: No such file"):
        SCHEMA.fit({"raw": LocalFile(tmp_path / "missing")})
    with pytest.raises(ValidationError, match="can't be given here"):
        SCHEMA.fit({"asset": LocalFile(path)})


def test_no_schema_takes_everything() -> None:
    schema = Schema({})
    assert schema.parse(["a=1", "b=x", "c.d=true"]) == {"a": 1, "b": "x", "c": {"d": True}}
    assert schema.fit({"a": ["QUI="]}) == {"a": ["QUI="]}
