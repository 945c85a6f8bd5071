"""Loading, sharing and unloading model objects, and how loaders are called."""

from __future__ import annotations

import queue
from pathlib import Path
from typing import Any, Self

import pytest

from executor import loaders
from executor.loaders import load_object
from executor.models import ModelStore
from gen_worker.errors import FatalError
from gen_worker.injection import ModelArtifacts
from gen_worker.pipe.messages import Failure, LoadModel, Memory, ModelLoaded, ModelUnloaded, UnloadModel, Upward


class Plain:
    """Has from_pretrained with named arguments, as a tenant's own class may."""

    def __init__(self, root: str, arguments: dict[str, Any]) -> None:
        self.root = root
        self.arguments = arguments
        self.device = ""
        self.is_eval = False

    @classmethod
    def from_pretrained(cls, root: str, *, local_files_only: bool = False, other: int = 0) -> Self:
        return cls(root, {"local_files_only": local_files_only, "other": other})

    def to(self, device: str) -> Self:
        self.device = device
        return self

    def eval(self) -> None:
        self.is_eval = True


class Bare:
    """Takes nothing but the directory."""

    @classmethod
    def from_pretrained(cls, root: str, **kwargs: object) -> Self:
        assert not kwargs
        return cls()


class Lying:
    @classmethod
    def from_pretrained(cls, _root: str) -> object:
        return "a string"


class Exploding:
    @classmethod
    def from_pretrained(cls, root: str) -> object:
        raise OSError(f"no config in {root}")


class Poisonous:
    @classmethod
    def from_pretrained(cls, _root: str) -> object:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Scheduler:
    def __init__(self) -> None:
        self.steps: list[int] = []

    def set_timesteps(self, count: int) -> None:
        self.steps = list(range(count))


class Pipeline(Bare):
    def __init__(self) -> None:
        self.weights = object()
        self.scheduler = Scheduler()


TYPES = {name: kind for kind in (Plain, Bare, Lying, Exploding, Poisonous, Pipeline) for name in [f"t.{kind.__name__}"]}


class Store:
    """A ModelStore and what it answers."""

    def __init__(self) -> None:
        self.answers: queue.SimpleQueue[Upward] = queue.SimpleQueue()
        self.poisoned: list[tuple[str, Failure]] = []
        self.store = ModelStore(
            TYPES, "cpu", send=self.answers.put, on_poisoned=lambda *arguments: self.poisoned.append(arguments)
        )

    def load(self, name: str, root: Path) -> ModelLoaded:
        self.store.load(LoadModel("m", f"t.{name}", str(root), {}, {}))
        answer = self.answer()
        assert isinstance(answer, ModelLoaded)
        return answer

    def unload(self, model_id: str = "m", *, to_host: bool = False) -> ModelUnloaded:
        self.store.unload(UnloadModel(model_id, to_host))
        answer = self.answer()
        assert isinstance(answer, ModelUnloaded)
        return answer

    def answer(self) -> Upward:
        """The next that is no Memory, which is kept."""
        while isinstance(answer := self.answers.get(timeout=20), Memory):
            self.memory = answer
        return answer


@pytest.fixture
def store() -> Store:
    return Store()


def test_a_named_argument_is_given_and_the_object_is_moved(tmp_path: Path) -> None:
    loaded = load_object(Plain, ModelArtifacts("m", tmp_path), "cpu")
    assert isinstance(loaded, Plain)
    assert loaded.root == str(tmp_path)
    assert loaded.arguments == {"local_files_only": True, "other": 0}
    assert (loaded.device, loaded.is_eval) == ("cpu", True)


def test_unknown_keyword_arguments_are_not_guessed(tmp_path: Path) -> None:
    assert isinstance(load_object(Bare, ModelArtifacts("m", tmp_path), "cpu"), Bare)


def test_a_type_without_a_way_is_said(tmp_path: Path) -> None:
    with pytest.raises(FatalError, match="register_runtime_loader"):
        load_object(int, ModelArtifacts("m", tmp_path), "cpu")


def test_loaders_can_log_but_not_store(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        loaders.LoadingHost().emit("job.log", b'{"message":"hi"}')
    assert '{"message":"hi"}' in caplog.text
    with pytest.raises(Exception, match="while a model is loaded"):
        loaders.LoadingHost().store("a", b"", create=True)


def test_an_object_is_loaded_once_and_shared(store: Store, tmp_path: Path) -> None:
    assert store.load("Plain", tmp_path).failure is None
    first = store.store.inject("m", "t.Plain")
    assert store.load("Plain", tmp_path).seconds == 0.0
    assert store.store.inject("m", "t.Plain") is first
    with pytest.raises(KeyError):
        store.store.inject("m", "t.Bare")


def test_unload_drops_every_type_of_the_model(store: Store, tmp_path: Path) -> None:
    store.load("Plain", tmp_path)
    store.load("Bare", tmp_path)
    assert store.unload() == ModelUnloaded("m", 0)
    for name in ("t.Plain", "t.Bare"):
        with pytest.raises(KeyError):
            store.store.inject("m", name)


@pytest.mark.parametrize(
    ("name", "words"),
    [("Lying", ("builtins.str", "Lying")), ("Exploding", ("no config in",)), ("Nobody", ("t.Plain", "t.Nobody"))],
)
def test_failures_name_model_type_directory_and_reason(
    store: Store, tmp_path: Path, name: str, words: tuple[str, ...]
) -> None:
    failure = store.load(name, tmp_path).failure
    assert failure is not None
    for word in ("'m'", f"t.{name}", str(tmp_path), *words):
        assert word in failure.detail
    assert failure.safe_message.startswith("model can't be loaded")
    assert store.load("Plain", tmp_path).failure is None, "the thread goes on"


def test_a_load_that_costs_the_context_is_told(store: Store, tmp_path: Path) -> None:
    failure_of_load = store.load("Poisonous", tmp_path)
    failure = failure_of_load.failure
    assert failure is not None
    assert failure.retryable
    assert failure_of_load.poisoned, "in the one message, so that no run is sent in between"
    assert isinstance(store.answer(), ModelLoaded)  # what a process that leaves does not get to
    store.unload()
    assert store.poisoned[0][0] == "loading m"


def test_each_call_gets_its_own_scheduler_around_the_same_weights(store: Store, tmp_path: Path) -> None:
    store.load("Pipeline", tmp_path)
    first, second = (store.store.inject("m", "t.Pipeline") for _ in range(2))
    assert isinstance(first, Pipeline)
    assert isinstance(second, Pipeline)
    assert first.weights is second.weights
    first.scheduler.set_timesteps(3)
    assert second.scheduler.steps == []
