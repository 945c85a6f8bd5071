"""The keyword arguments that a type's from_pretrained is given for a local directory.

Owns: what the two libraries take. Both take theirs as **kwargs, so it is the kind of class that decides. The aim: the
variant and dtype that the files hold, tensors read straight to the device, no network, and no stop for a component
that a pipeline can do without.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
from pathlib import Path
from typing import Any, Final

import msgspec

from gen_worker.injection import qualified_name
from gen_worker.weights import dtype_of, variant_of

log = logging.getLogger(__name__)

_DTYPE_SINCE: Final = {"transformers": (4, 56), "diffusers": (1, 0)}
"""transformers deprecated `torch_dtype` in 4.56; diffusers has announced its removal for 1.0."""
_NAMED_ARGUMENTS: Final = ("local_files_only", "variant", "dtype", "torch_dtype")
"""Given to a from_pretrained of a type that is neither transformers' nor diffusers', when it names them."""
_DISPENSABLE: Final = frozenset({"safety_checker", "feature_extractor", "image_encoder"})
"""Components that a pipeline does its work without; downloads leave the first two out."""


def arguments(type_: Any, root: Path, device: str) -> dict[str, Any]:
    """What from_pretrained of `type_` is called with, beside the directory."""
    accepted = _accepted(type_)
    found: dict[str, Any] = {}
    if "local_files_only" in accepted:
        found["local_files_only"] = True
    variant = variant_of(root) if "variant" in accepted else None
    if variant is not None:
        found["variant"] = variant
    keyword = next((name for name in ("dtype", "torch_dtype") if name in accepted), None)
    dtype = dtype_of(root, variant) if keyword is not None else None
    if keyword is not None and dtype is not None:
        found[keyword] = getattr(importlib.import_module("torch"), dtype)
    if "device_map" in accepted and importlib.util.find_spec("accelerate") is not None:
        found["device_map"] = {"": device}
    if "components" in accepted:
        found |= _pipeline_arguments(type_, root, device)
    return found


def is_factory(type_: type) -> bool:
    """AutoModel, AutoTokenizer, AutoPipelineForText2Image ...: they choose another class by the files."""
    library = type_.__module__.partition(".")[0]
    return library in {"transformers", "diffusers"} and type_.__name__.startswith("Auto")


def _accepted(type_: Any) -> frozenset[str]:
    """The arguments that a type takes, by their names; `components` stands for what only pipelines take."""
    bases = {qualified_name(base) for base in type_.__mro__}
    names = {name.rpartition(".")[2] for name in bases if name.startswith(("transformers.", "diffusers."))}
    if names & {"PreTrainedModel", "_BaseAutoModelClass"}:
        return frozenset({"local_files_only", "variant", _dtype_keyword("transformers"), "device_map"})
    if "DiffusionPipeline" in names or (type_.__module__.startswith("diffusers.") and is_factory(type_)):
        return frozenset({"local_files_only", "variant", _dtype_keyword("diffusers"), "components"})
    if "ModelMixin" in names:
        return frozenset({"local_files_only", "variant", _dtype_keyword("diffusers"), "device_map"})
    if names:
        return frozenset({"local_files_only"})  # tokenizers, processors, schedulers, configs
    parameters = inspect.signature(type_.from_pretrained).parameters
    return frozenset(name for name in _NAMED_ARGUMENTS if name in parameters)


def _pipeline_arguments(type_: Any, root: Path, device: str) -> dict[str, Any]:
    """For a pipeline: None for the components whose files are not there, and where to load the others."""
    diffusers = importlib.import_module("diffusers")
    index = _model_index(root)
    class_ = getattr(diffusers, str(index.get("_class_name", "")), None) or type_
    dispensable = _DISPENSABLE | set(getattr(class_, "_optional_components", ()))
    missing = [
        name
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and value[0] is not None and not (root / name).is_dir()
    ]
    found: dict[str, Any] = dict.fromkeys(name for name in missing if name in dispensable)
    if found:
        log.info("the pipeline in %s is loaded without %s", root, ", ".join(sorted(found)))
    where = device.partition(":")[0]
    known = importlib.import_module("diffusers.pipelines.pipeline_utils").SUPPORTED_DEVICE_MAP
    connected = getattr(class_, "_load_connected_pipes", False)  # diffusers can't place those itself
    if where in known and not connected and importlib.util.find_spec("accelerate") is not None:
        found["device_map"] = where
    return found


def _model_index(root: Path) -> dict[str, Any]:
    """model_index.json; empty when there is none, which the library will say better."""
    try:
        return msgspec.json.decode((root / "model_index.json").read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}


@functools.cache
def _dtype_keyword(library: str) -> str:
    """`dtype`, or `torch_dtype` where the installed version of the library knows only that."""
    version = str(importlib.import_module(library).__version__)
    major, minor = (int(part) for part in version.split(".")[:2])
    return "dtype" if (major, minor) >= _DTYPE_SINCE[library] else "torch_dtype"
