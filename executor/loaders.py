"""From a model's local files to the object that is injected.

Owns: the order of ways (the files themselves, a registered loader, from_pretrained), the keyword arguments that
each kind of from_pretrained takes, and the check of what came out.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from pathlib import Path
from typing import Any, Final

from gen_worker.context import ActionContext
from gen_worker.errors import FatalError, WorkerError
from gen_worker.injection import ModelArtifacts, find_runtime_loader, qualified_name
from gen_worker.types import Asset
from gen_worker.weights import dtype_of, variant_of

log = logging.getLogger(__name__)

_DTYPE_SINCE: Final = {"transformers": (4, 56), "diffusers": (1, 0)}
"""transformers deprecated `torch_dtype` in 4.56; diffusers has announced its removal for 1.0."""
_NAMED_ARGUMENTS: Final = ("local_files_only", "variant", "dtype", "torch_dtype")
"""Given to a from_pretrained of a type that is neither transformers' nor diffusers', when it names them."""


class LoadingHost:
    """RunHost of a loader's context: a load belongs to no run, so what it emits goes to the log."""

    def emit(self, event_type: str, payload_json: bytes) -> None:
        log.info("%s %s", event_type, payload_json.decode())

    def store(self, ref: str, source: bytes | Path, *, create: bool) -> Asset:  # noqa: ARG002  # the protocol's
        raise WorkerError(f"{ref!r} can't be stored while a model is loaded: files belong to a run")


def load_object(type_: type, artifacts: ModelArtifacts, device: str) -> object:
    """The object that parameters of `type_` get. Raises FatalError, and whatever the loader raises."""
    if type_ is ModelArtifacts:
        return artifacts
    if not artifacts.root_dir.is_dir():
        raise FatalError(f"there is no directory {artifacts.root_dir}")
    loader = find_runtime_loader(type_)
    if loader is not None:
        context = ActionContext(run_id="", host=LoadingHost(), device=device)
        loaded = loader(context, artifacts)
    elif hasattr(type_, "from_pretrained"):
        loaded = _from_pretrained(type_, artifacts.root_dir, device)
    else:
        raise FatalError(
            f"{qualified_name(type_)} has neither a registered loader nor from_pretrained: register one with "
            "register_runtime_loader or name one in WORKER_RUNTIME_LOADERS_JSON"
        )
    if not _is_factory(type_) and not isinstance(loaded, type_):
        raise FatalError(f"loading made a {qualified_name(type(loaded))}, the parameter is a {qualified_name(type_)}")
    return loaded


def _from_pretrained(type_: Any, root: Path, device: str) -> Any:
    loaded = type_.from_pretrained(str(root), **_arguments(type_, root))
    if callable(getattr(loaded, "to", None)):
        moved = loaded.to(device)
        loaded = loaded if moved is None else moved
    if callable(getattr(loaded, "eval", None)):
        loaded.eval()
    return loaded


def _arguments(type_: Any, root: Path) -> dict[str, Any]:
    """The keyword arguments for from_pretrained: what the type accepts of dtype, variant and local_files_only."""
    accepted = _accepted(type_)
    arguments: dict[str, Any] = {}
    if "local_files_only" in accepted:
        arguments["local_files_only"] = True
    variant = variant_of(root) if "variant" in accepted else None
    if variant is not None:
        arguments["variant"] = variant
    keyword = next((name for name in ("dtype", "torch_dtype") if name in accepted), None)
    dtype = dtype_of(root, variant) if keyword is not None else None
    if keyword is not None and dtype is not None:
        arguments[keyword] = getattr(importlib.import_module("torch"), dtype)
    return arguments


def _accepted(type_: Any) -> frozenset[str]:
    """Which keyword arguments a type's from_pretrained is given.

    transformers and diffusers take theirs as **kwargs, so for those it is what kind of class it is that decides.
    """
    bases = {qualified_name(base) for base in type_.__mro__}
    names = {name.rpartition(".")[2] for name in bases if name.startswith(("transformers.", "diffusers."))}
    if names & {"PreTrainedModel", "_BaseAutoModelClass"}:
        return frozenset({"local_files_only", "variant", _dtype_keyword("transformers")})
    if type_.__module__.startswith("diffusers.") and _is_factory(type_):
        return frozenset({"local_files_only", "variant", _dtype_keyword("diffusers")})
    if names & {"DiffusionPipeline", "ModelMixin"}:
        return frozenset({"local_files_only", "variant", _dtype_keyword("diffusers")})
    if names:
        return frozenset({"local_files_only"})  # tokenizers, processors, schedulers, configs
    parameters = inspect.signature(type_.from_pretrained).parameters
    return frozenset(name for name in _NAMED_ARGUMENTS if name in parameters)


@functools.cache
def _dtype_keyword(library: str) -> str:
    """`dtype`, or `torch_dtype` where the installed version of the library knows only that."""
    version = str(importlib.import_module(library).__version__)
    major, minor = (int(part) for part in version.split(".")[:2])
    return "dtype" if (major, minor) >= _DTYPE_SINCE[library] else "torch_dtype"


def _is_factory(type_: type) -> bool:
    """AutoModel, AutoTokenizer, AutoPipelineForText2Image ...: they choose another class by the files."""
    library = type_.__module__.partition(".")[0]
    return library in {"transformers", "diffusers"} and type_.__name__.startswith("Auto")
