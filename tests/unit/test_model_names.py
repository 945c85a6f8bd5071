"""Which model a parameter gets: labels, refs, the allowlist, payload fields and their defaults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_worker.pipe.messages import FunctionInfo, InjectionInfo
from supervisor.model_names import ModelNames
from supervisor.runs import Refused
from tests.support.rig import Shelf, function

A, B, C = "cozy:org/a:latest", "cozy:org/b:v2", "hf:org/c@main"
SOURCE = Shelf(dict.fromkeys([A, B, C, "local"], 0))


@pytest.fixture
def names() -> ModelNames:
    return ModelNames({"base": "org/a", "other": B}, SOURCE)


def chosen(names: ModelNames, info: FunctionInfo, required: Sequence[str] = (), payload: bytes = b"") -> list[str]:
    return [model_id for _, model_id in names.resolve(info, required, payload)]


# -- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "model_id"),
    [
        ("base", A),
        ("other", B),
        ("org/a", A),
        ("org/a:latest", A),
        ("cozy:org/a", A),
        ("cozy:org/b:v2", B),
        ("org/b:v2", B),
        ("hf:org/c@main", C),
        ("local", "local"),
    ],
)
def test_names_become_canonical_ids(names: ModelNames, name: str, model_id: str) -> None:
    assert names.model_id(name) == model_id


@pytest.mark.parametrize("name", ["unknown label", "org/a:v9", "hf:org/c", ""])
def test_models_that_are_not_here_are_refused(names: ModelNames, name: str) -> None:
    with pytest.raises(Refused) as caught:
        names.model_id(name)
    failure = caught.value.failure
    assert (failure.error_type, failure.safe_message, failure.retryable) == ("validation", "model not available", False)
    assert "WORKER_MODEL_ARTIFACTS_JSON" in failure.detail


def test_the_allowlist(names: ModelNames) -> None:
    names.configure(["org/a"], {})
    assert names.model_id("base") == A
    with pytest.raises(Refused) as caught:
        names.model_id("other")
    assert caught.value.failure.safe_message == "model not allowed"
    assert caught.value.failure.error_type == "validation"
    assert B in caught.value.failure.detail
    names.configure([], {})
    assert names.model_id("other") == B


def test_labels_of_the_scheduler_go_before_our_own_until_it_says_otherwise(names: ModelNames) -> None:
    names.configure([], {"base": B, "extra": "hf:org/c@main"})
    assert [names.model_id(name) for name in ("base", "other", "extra")] == [B, B, C]
    names.configure([], {})
    assert [names.model_id(name) for name in ("base", "other")] == [A, B]
    with pytest.raises(Refused):
        names.model_id("extra")


# -- which model a parameter gets ---------------------------------------------------------------


def test_deployment_source(names: ModelNames) -> None:
    assert names.resolve(function(models=["base", "other"]), [], b"") == (("p0", A), ("p1", B))


@pytest.mark.parametrize(
    ("required", "found"),
    [([], [A, B]), ([B], [B, B]), (["", A], [A, A]), (["other", "org/a"], [B, A]), ([A, B, C], [A, B])],
)
def test_required_models_override_by_position(names: ModelNames, required: list[str], found: list[str]) -> None:
    assert chosen(names, function(models=["base", "other"]), required) == found


def test_payload_source(names: ModelNames) -> None:
    info = function(payload_field="model")
    payload = msgspec.msgpack.encode({"prompt": "x", "model": "other", "deep": [[{}]]})
    assert chosen(names, info, payload=payload) == [B]
    assert chosen(names, info, required=[A], payload=b"not looked into") == [A]


def test_the_payload_can_not_name_what_is_not_allowed(names: ModelNames) -> None:
    names.configure([A], {})
    with pytest.raises(Refused, match="not on this deployment's allowlist"):
        chosen(names, function(payload_field="model"), payload=msgspec.msgpack.encode({"model": B}))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode([1]),
        msgspec.msgpack.encode({}),
        msgspec.msgpack.encode({"model": 1}),
        msgspec.msgpack.encode({"model": None}),
        msgspec.msgpack.encode({"model": ""}),
        b"\x81\xa5model\xa2\xff\xff",
        b"\x82\xa2\xff\xff\x01\xa5model\xa4base",
        b"\x82\xa1d" + b"\x91" * 100_000 + b"\x01\xa5model\xa4base",
    ],
    ids=["empty", "invalid", "list", "absent", "number", "nil", "no text", "no UTF-8", "no UTF-8 key", "bottomless"],
)
def test_payloads_that_name_no_model_are_refused(names: ModelNames, payload: bytes) -> None:
    with pytest.raises(Refused) as caught:
        chosen(names, function(payload_field="model"), payload=payload)
    assert caught.value.failure.error_type == "validation"
    assert caught.value.failure.safe_message == "payload field 'model' must name a model"


class Defaults(msgspec.Struct):
    model: str = "other"
    maybe: str | None = "base"
    none: str | None = None


@pytest.mark.parametrize(
    ("field", "payload", "found"),
    [
        ("model", {}, B),
        ("model", {"model": "base"}, A),
        ("maybe", {}, A),
        ("maybe", {"maybe": None}, A),
        ("maybe", {"maybe": "local"}, "local"),
        ("none", {"none": "local"}, "local"),
        ("none", {"none": None}, None),
        ("none", {}, None),
    ],
)
def test_the_default_of_a_payload_field_counts(
    names: ModelNames, field: str, payload: dict[str, Any], found: str | None
) -> None:
    schema = msgspec.json.encode(msgspec.json.schema(Defaults))
    info = msgspec.structs.replace(function(payload_field=field), input_schema=schema)
    if found is not None:
        assert chosen(names, info, payload=msgspec.msgpack.encode(payload)) == [found]
        return
    with pytest.raises(Refused, match="its default is no name"):
        chosen(names, info, payload=msgspec.msgpack.encode(payload))


def test_what_is_wanted_before_it_is_asked_for(names: ModelNames) -> None:
    assert names.wanted() == [A, B], "what labels name"
    names.configure(["local", "org/unheard-of"], {})
    assert names.wanted() == ["local"], "what is allowed, as far as it can be had"


@given(st.binary(max_size=60) | st.binary(max_size=30).map(lambda data: b"\x81\xa5model" + data))
def test_no_payload_raises_anything_else(payload: bytes) -> None:
    names, errors = ModelNames({}, SOURCE), []
    try:
        chosen(names, function(payload_field="model"), payload=payload)
    except Refused as refused:
        errors.append(refused.failure.error_type)
    assert errors in ([], ["validation"])


def test_types_of_a_model(names: ModelNames) -> None:
    functions = {
        "f": FunctionInfo("f", "sync", injections=(InjectionInfo("p", "t.Pipe", "deployment", "base"),)),
        "g": FunctionInfo("g", "sync", injections=(InjectionInfo("p", "t.Tokenizer", "deployment", "org/a"),)),
        "h": FunctionInfo("h", "sync", injections=(InjectionInfo("p", "t.Other", "deployment", "other"),)),
    }
    assert names.types_of(A, functions) == {"t.Pipe", "t.Tokenizer"}
    assert names.types_of(C, functions) == {"t.Pipe", "t.Tokenizer", "t.Other"}, "any may be asked to take it"
    assert names.types_of(A, {}) == set()
