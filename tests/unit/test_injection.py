"""Model refs of parameters, artifacts, and the registry of runtime loaders."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from gen_worker import ModelArtifacts, ModelRef, ModelRefSource, register_runtime_loader
from gen_worker.context import ActionContext
from gen_worker.errors import ArtifactNotFoundError, ProjectError
from gen_worker.injection import configure_runtime_loaders, find_runtime_loader, is_injectable, qualified_name


class Engine:
    pass


class Pretrained:
    @classmethod
    def from_pretrained(cls, path: str) -> Pretrained:
        return cls()


def load_engine(ctx: ActionContext, artifacts: ModelArtifacts) -> Engine:
    return Engine()


def load_other(ctx: ActionContext, artifacts: ModelArtifacts) -> Engine:
    return Engine()


@pytest.fixture(autouse=True)
def _clean_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("gen_worker.injection._registered", {})
    yield
    configure_runtime_loaders({})


def test_model_ref() -> None:
    assert ModelRef("payload", "model") == ModelRef(ModelRefSource.PAYLOAD, "model")  # type: ignore[arg-type]
    assert (ModelRefSource.DEPLOYMENT.value, ModelRefSource.PAYLOAD.value) == ("deployment", "payload")
    with pytest.raises(ValueError, match="'elsewhere' is not a valid ModelRefSource"):
        ModelRef("elsewhere", "model")  # type: ignore[arg-type]


def test_artifacts() -> None:
    artifacts = ModelArtifacts("hf:a/b", Path("/m"), {"unet": Path("/m/unet.st"), "vae": "/m/vae.st"})  # type: ignore[dict-item]
    assert artifacts.path("unet") == Path("/m/unet.st")
    assert artifacts.path("vae") == artifacts.get_path("vae") == Path("/m/vae.st")
    assert artifacts.get_path("none") is None
    assert artifacts.get_path("none", Path("x")) == Path("x")
    assert artifacts.metadata == {}


def test_an_artifact_that_is_not_there() -> None:
    artifacts = ModelArtifacts("hf:a/b", Path("/m"), {"vae": Path("v"), "unet": Path("u")})
    with pytest.raises(ArtifactNotFoundError) as caught:
        artifacts.path("clip")
    assert str(caught.value) == "model 'hf:a/b' has no file under key 'clip'; its keys: unet, vae"
    assert isinstance(caught.value, KeyError)
    with pytest.raises(KeyError, match="its keys: none"):
        ModelArtifacts("m", Path()).path("x")


def test_registered_loader() -> None:
    assert find_runtime_loader(Engine) is None
    assert not is_injectable(Engine)
    register_runtime_loader(Engine, load_engine)
    assert find_runtime_loader(Engine) is load_engine
    assert is_injectable(Engine)
    register_runtime_loader(Engine, load_other)
    assert find_runtime_loader(Engine) is load_other


def test_what_needs_no_loader() -> None:
    assert is_injectable(ModelArtifacts)
    assert is_injectable(Pretrained)


def test_a_loader_is_for_exactly_its_type() -> None:
    class Special(Engine):
        pass

    register_runtime_loader(Engine, load_engine)
    assert find_runtime_loader(Special) is None


def test_the_operators_loader_wins() -> None:
    register_runtime_loader(Engine, load_engine)
    configure_runtime_loaders({qualified_name(Engine): f"{__name__}:load_other"})
    assert find_runtime_loader(Engine) is load_other


@pytest.mark.parametrize(
    ("path", "rule"),
    [
        ("nowhere", "must have the form module:callable"),
        ("no_such_module:f", "can't be imported: No module named 'no_such_module'"),
        (f"{__name__}:nothing", "can't be imported: module"),
        (f"{__name__}:__name__", "is not callable"),
    ],
)
def test_a_broken_configured_loader(path: str, rule: str) -> None:
    configure_runtime_loaders({qualified_name(Engine): path})
    with pytest.raises(ProjectError) as caught:
        find_runtime_loader(Engine)
    assert rule in str(caught.value)
    assert repr(path) in str(caught.value)


def test_wrong_registrations() -> None:
    with pytest.raises(TypeError, match="needs a class first, got 'Engine'"):
        register_runtime_loader("Engine", load_engine)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"the loader for .*Engine is not callable: 3"):
        register_runtime_loader(Engine, 3)  # type: ignore[arg-type]
