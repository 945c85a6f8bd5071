"""Injected model parameters: how a function asks for a model, and how a type of the tenant's own is loaded.

Owns: the registry of runtime loaders. A parameter `pipe: Annotated[Pipe, ModelRef(ModelRefSource.DEPLOYMENT, "sdxl")]`
is filled with, in this order: the ModelArtifacts themselves when `Pipe` is ModelArtifacts; what the loader that the
operator configured for its qualified name returns; what the loader registered for it returns; `Pipe.from_pretrained`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_worker.errors import ArtifactNotFoundError, ProjectError

if TYPE_CHECKING:
    from gen_worker.context import ActionContext


class ModelRefSource(StrEnum):
    """Where the label or ref of a model comes from."""

    DEPLOYMENT = "deployment"
    """`key` is a label of [tool.cozy.models], or a ref."""
    PAYLOAD = "payload"
    """`key` names the payload field that holds the label or ref."""


@dataclass(frozen=True, slots=True)
class ModelRef:
    """Which model a parameter gets: `Annotated[T, ModelRef(source, key)]`."""

    source: ModelRefSource
    key: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", ModelRefSource(self.source))


@dataclass(frozen=True, slots=True)
class ModelArtifacts:
    """The local files of one model. `files` maps the keys that the model's publisher chose to paths."""

    model_id: str
    root_dir: Path
    files: Mapping[str, Path] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "root_dir", Path(self.root_dir))
        object.__setattr__(self, "files", {key: Path(path) for key, path in self.files.items()})

    def path(self, key: str) -> Path:
        """The file under `key`. Raises ArtifactNotFoundError, which lists the keys that there are."""
        try:
            return self.files[key]
        except KeyError:
            known = ", ".join(sorted(self.files)[:20]) or "none"
            message = f"model {self.model_id!r} has no file under key {key!r}; its keys: {known}"
            raise ArtifactNotFoundError(message) from None

    def get_path(self, key: str, default: Path | None = None) -> Path | None:
        """The file under `key`, or `default`."""
        return self.files.get(key, default)


RuntimeLoader = Callable[["ActionContext", ModelArtifacts], object]
"""Turns a model's files into the object that is injected. Called once per executor and model."""

_registered: dict[type, RuntimeLoader] = {}
_configured: dict[str, str] = {}


def qualified_name(type_: type) -> str:
    """`module.QualName` of a class: how manifests, messages and settings name it."""
    return f"{type_.__module__}.{type_.__qualname__}"


def register_runtime_loader(type_: type, loader: RuntimeLoader) -> None:
    """Load parameters annotated with exactly `type_` by `loader`; a second call for a type replaces the first."""
    if not isinstance(type_, type):
        raise TypeError(f"register_runtime_loader needs a class first, got {type_!r}")
    if not callable(loader):
        raise TypeError(f"the loader for {qualified_name(type_)} is not callable: {loader!r}")
    _registered[type_] = loader


def configure_runtime_loaders(import_paths: Mapping[str, str]) -> None:
    """Set the operator's loaders, qualified type name -> `module:callable`; imported when first looked up."""
    _configured.clear()
    _configured.update(import_paths)


def find_runtime_loader(type_: type) -> RuntimeLoader | None:
    """The loader for `type_`, if any. Raises ProjectError when a configured one can't be imported."""
    import_path = _configured.get(qualified_name(type_))
    if import_path is not None:
        return _import_loader(qualified_name(type_), import_path)
    return _registered.get(type_)


def is_injectable(type_: type) -> bool:
    """Whether a value of `type_` can be made from a model's files."""
    return type_ is ModelArtifacts or find_runtime_loader(type_) is not None or hasattr(type_, "from_pretrained")


def _import_loader(type_name: str, import_path: str) -> RuntimeLoader:
    module_name, _, attribute = import_path.partition(":")
    where = f"the runtime loader configured for {type_name}, {import_path!r}"
    if not module_name or not attribute:
        raise ProjectError(f"{where}, must have the form module:callable")
    try:
        loader: Any = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ProjectError(f"{where}, can't be imported: {error}") from error
    if not callable(loader):
        raise ProjectError(f"{where}, is not callable")
    return loader  # type: ignore[no-any-return]  # its signature can't be checked before it is called
