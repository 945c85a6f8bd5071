"""Which model a parameter gets, and who has it in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gen_worker.pipe.messages import FunctionInfo, InjectionInfo, LoadModel, UnloadModel
from supervisor.residency import ModelRefused, Residence, Residency
from tests.support.rig import Executor, ModelDir, Rig, function, use_recording_children

A, B, C = "cozy:org/a:latest", "cozy:org/b:v2", "hf:org/c@main"
ARTIFACTS = {
    A: ModelDir("/models/a"),
    B: ModelDir("/models/b"),
    C: ModelDir("/models/c"),
    "local": ModelDir("/models/l"),
}


@pytest.fixture
def residency() -> Residency:
    return Residency({"base": "org/a", "other": B}, ARTIFACTS)


def chosen(residency: Residency, info: FunctionInfo, required: Sequence[str] = (), payload: bytes = b"") -> list[str]:
    return [model_id for _, model_id in residency.resolve(info, required, payload)]


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
def test_names_become_canonical_ids(residency: Residency, name: str, model_id: str) -> None:
    assert residency.model_id(name) == model_id


def test_artifacts_may_be_named_in_any_spelling() -> None:
    residency = Residency({}, {"org/a": ModelDir()})
    assert residency.model_id("cozy:org/a:latest") == A
    assert residency.disk_models() == [A]


@pytest.mark.parametrize("name", ["unknown label", "org/a:v9", "hf:org/c", ""])
def test_models_that_are_not_here_are_refused(residency: Residency, name: str) -> None:
    with pytest.raises(ModelRefused) as caught:
        residency.model_id(name)
    failure = caught.value.failure
    assert (failure.error_type, failure.safe_message, failure.retryable) == ("validation", "model not available", False)
    assert "WORKER_MODEL_ARTIFACTS_JSON" in failure.detail


def test_the_allowlist(residency: Residency) -> None:
    residency.configure(["org/a"], {})
    assert residency.model_id("base") == A
    with pytest.raises(ModelRefused) as caught:
        residency.model_id("other")
    assert caught.value.failure.safe_message == "model not allowed"
    assert caught.value.failure.error_type == "validation"
    assert B in caught.value.failure.detail
    residency.configure([], {})
    assert residency.model_id("other") == B


def test_labels_of_the_scheduler_go_before_our_own_until_it_says_otherwise(residency: Residency) -> None:
    residency.configure([], {"base": B, "extra": "hf:org/c@main"})
    assert [residency.model_id(name) for name in ("base", "other", "extra")] == [B, B, C]
    residency.configure([], {})
    assert [residency.model_id(name) for name in ("base", "other")] == [A, B]
    with pytest.raises(ModelRefused):
        residency.model_id("extra")


# -- which model a parameter gets ---------------------------------------------------------------


def test_deployment_source(residency: Residency) -> None:
    assert residency.resolve(function(models=["base", "other"]), [], b"") == (("p0", A), ("p1", B))


@pytest.mark.parametrize(
    ("required", "found"),
    [([], [A, B]), ([B], [B, B]), (["", A], [A, A]), (["other", "org/a"], [B, A]), ([A, B, C], [A, B])],
)
def test_required_models_override_by_position(residency: Residency, required: list[str], found: list[str]) -> None:
    assert chosen(residency, function(models=["base", "other"]), required) == found


def test_payload_source(residency: Residency) -> None:
    info = function(payload_field="model")
    payload = msgspec.msgpack.encode({"prompt": "x", "model": "other", "deep": [[{}]]})
    assert chosen(residency, info, payload=payload) == [B]
    assert chosen(residency, info, required=[A], payload=b"not looked into") == [A]


def test_the_payload_can_not_name_what_is_not_allowed(residency: Residency) -> None:
    residency.configure([A], {})
    with pytest.raises(ModelRefused, match="not on this deployment's allowlist"):
        chosen(residency, function(payload_field="model"), payload=msgspec.msgpack.encode({"model": B}))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        msgspec.msgpack.encode([1]),
        msgspec.msgpack.encode({}),
        msgspec.msgpack.encode({"model": 1}),
        msgspec.msgpack.encode({"model": None}),
        b"\x81\xa5model\xa2\xff\xff",
        b"\x82\xa2\xff\xff\x01\xa5model\xa4base",
        b"\x82\xa1d" + b"\x91" * 100_000 + b"\x01\xa5model\xa4base",
    ],
    ids=["empty", "invalid", "list", "absent", "number", "nil", "no UTF-8", "no UTF-8 key", "bottomless"],
)
def test_payloads_that_name_no_model_are_refused(residency: Residency, payload: bytes) -> None:
    with pytest.raises(ModelRefused) as caught:
        chosen(residency, function(payload_field="model"), payload=payload)
    assert caught.value.failure.error_type == "validation"
    assert caught.value.failure.safe_message == "payload field 'model' must name a model"


@given(st.binary(max_size=60) | st.binary(max_size=30).map(lambda data: b"\x81\xa5model" + data))
def test_no_payload_raises_anything_else(payload: bytes) -> None:
    residency, errors = Residency({}, ARTIFACTS), []
    try:
        chosen(residency, function(payload_field="model"), payload=payload)
    except ModelRefused as refused:
        errors.append(refused.failure.error_type)
    assert errors in ([], ["validation"])


def test_types_of_a_model(residency: Residency) -> None:
    functions = {
        "f": FunctionInfo("f", "sync", injections=(InjectionInfo("p", "t.Pipe", "deployment", "base"),)),
        "g": FunctionInfo("g", "sync", injections=(InjectionInfo("p", "t.Tokenizer", "deployment", "org/a"),)),
        "h": FunctionInfo("h", "sync", injections=(InjectionInfo("p", "t.Other", "deployment", "other"),)),
    }
    assert residency.types_of(A, functions) == {"t.Pipe", "t.Tokenizer"}
    assert residency.types_of(C, functions) == {"t.Pipe", "t.Tokenizer", "t.Other"}, "any may be asked to take it"
    assert residency.types_of(A, {}) == set()


# -- what is where ------------------------------------------------------------------------------

KEY_A, KEY_B = (A, "t.T"), (B, "t.T")


@pytest.fixture
def executors(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], list[Executor]]]:
    use_recording_children(monkeypatch.setattr)
    rigs: list[Rig] = []

    def make(count: int) -> list[Executor]:
        rigs.append(Rig([], executors=count))
        return rigs[-1].executors

    yield make
    for rig in rigs:
        rig.close()


async def test_states_of_a_model(residency: Residency, executors: Callable[[int], list[Executor]]) -> None:
    (executor,) = executors(1)
    handle = executor.handle
    assert residency.state(handle, [KEY_A]) is None
    residency.load(handle, [KEY_A, KEY_B])
    residency.load(handle, [KEY_A])
    assert [message.model_id for message in executor.sent(LoadModel)] == [A, B], "each is asked for once"
    assert executor.sent(LoadModel)[0] == LoadModel(A, "t.T", "/models/a", {}, {})
    assert residency.state(handle, [KEY_A]) is Residence.LOADING
    residency.loaded(handle, KEY_A, 100)
    assert residency.state(handle, [KEY_A]) is Residence.HOT
    assert residency.state(handle, [KEY_A, KEY_B]) is Residence.LOADING
    assert residency.loading(handle) == {KEY_B}
    assert residency.is_loading(B)
    assert not residency.is_loading(A)
    residency.load_failed(handle, KEY_B)
    assert residency.state(handle, [KEY_A, KEY_B]) is None
    assert residency.has_failed(handle, [KEY_A, KEY_B])
    assert residency.hot_models() == [A]
    assert residency.disk_models() == [B, C, "local"]
    residency.load(handle, [KEY_B])
    residency.loaded(handle, KEY_B, 0)
    assert not residency.has_failed(handle, [KEY_B])


async def test_unloading(residency: Residency, executors: Callable[[int], list[Executor]]) -> None:
    (executor,) = executors(1)
    handle = executor.handle
    residency.load(handle, [KEY_A])
    residency.unload(handle, A)
    assert not executor.sent(UnloadModel), "it is not there yet"
    residency.loaded(handle, KEY_A, 100)
    residency.unload(handle, A)
    assert executor.sent(UnloadModel) == [UnloadModel(A)]
    assert residency.state(handle, [KEY_A]) is Residence.LOADING, "no run may be given to it for this model"
    assert residency.hot_models() == []
    assert residency.holders(A) == [handle]
    residency.unload_failed(handle, A)
    assert residency.state(handle, [KEY_A]) is Residence.HOT
    residency.unload(handle, A)
    residency.unloaded(handle, A)
    assert residency.state(handle, [KEY_A]) is None
    assert residency.holders(A) == []


async def test_bytes_per_device(residency: Residency, executors: Callable[[int], list[Executor]]) -> None:
    first, second = executors(2)
    residency.loaded(first.handle, KEY_A, 100)
    residency.loaded(first.handle, KEY_B, 30)
    residency.loaded(second.handle, KEY_A, 7)
    assert [residency.bytes_on(each.handle.device) for each in (first, second)] == [130, 7]
    assert residency.hot_models() == [A, B]
    residency.unloaded(first.handle, A)
    assert residency.bytes_on(first.handle.device) == 30
    residency.forget(first.handle)
    assert residency.bytes_on(first.handle.device) == 0
    assert residency.hot_models() == [A]
    assert residency.state(first.handle, [KEY_B]) is None
