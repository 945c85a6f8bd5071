"""Which files of a Hugging Face repo a pipeline needs. Pure: from a listing and a few small files to a list of paths.

Owns: the rules. They are applied in two steps, since what the weights hold is not in their names:

1. `survey` finds the components and, in each, the support files and the sets of weights (one file, or an index and its
   shards) that could be taken. It says which small files must be read for that (`reads`).
2. `select` takes one set per component, by the precision that the headers of the weights say (`probes` names one file
   of each set), else by the name; and refuses what is too large.

    model_index.json             its components that have a folder, less the optional ones
    known component folders      those, if a unet or a transformer is among them
    config.json + *.safetensors  a plain transformers repo: what is at the root
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import msgspec

from gen_worker.errors import FatalError, ResourceError
from supervisor.transfers.messages import HuggingFaceOptions

LIMIT_BYTES: Final = 30 * 2**30
MODEL_INDEX: Final = "model_index.json"
OPTIONAL_COMPONENTS: Final = frozenset({"safety_checker", "feature_extractor"})
KNOWN_COMPONENTS: Final = (
    "transformer", "unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
)  # fmt: skip
SUPPORT_SUFFIXES: Final = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".vocab", ".yaml", ".yml")
SUPPORT_BYTES: Final = 64 * 2**20
"""The largest tokenizers have some 30 MiB; a larger file is data or weights under a harmless name."""
OTHER_WEIGHTS: Final = (".bin", ".ckpt", ".pt", ".pth", ".msgpack", ".onnx", ".h5")
PRECISIONS: Final = {"F16": "fp16", "BF16": "bf16", "F32": "fp32", "F64": "fp64", "F8_E4M3": "fp8", "F8_E5M2": "fp8"}
"""safetensors' names of dtypes -> ours."""
_ANY_WEIGHTS: Final = (".safetensors", *OTHER_WEIGHTS)
_NAMED_PRECISIONS: Final = frozenset({"fp16", "bf16", "fp32", "fp8"})
_CANONICAL_STEMS: Final = ("diffusion_pytorch_model", "model", "pytorch_model")
_SHARD: Final = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}(?P<variant>\.[^./]+)?\.safetensors")
_INDEX: Final = re.compile(r"(?P<stem>.+)\.safetensors\.index(?P<variant>\.[^./]+)?\.json")
_SINGLE: Final = re.compile(r"(?P<stem>[^.]+)(?P<variant>(?:\.[^./]+)*)\.safetensors")


@dataclass(frozen=True, slots=True)
class WeightSet:
    """One way to take a component's weights."""

    stem: str
    variant: str
    """What the name says beyond the stem, such as `fp16` or `non_ema`; "" for nothing."""
    files: tuple[str, ...]
    """The weights, and the index of sharded ones; the first is a file of weights."""


@dataclass(frozen=True, slots=True)
class Component:
    name: str
    """Its folder; "" is the root."""
    support: tuple[str, ...]
    sets: tuple[WeightSet, ...]
    other_weights: tuple[str, ...]
    """Files that hold weights in a form that is never taken, and shards, which are nothing without their index."""
    any_precision: bool = False
    """Whether a set of another precision is better than none."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What step 1 found. `fixed` is taken in any case."""

    fixed: tuple[str, ...]
    components: tuple[Component, ...]

    @property
    def probes(self) -> tuple[str, ...]:
        """One file of each set, whose header says the precision."""
        return tuple(weights.files[0] for component in self.components for weights in component.sets)


@dataclass(frozen=True, slots=True)
class Selection:
    files: tuple[str, ...]
    size_bytes: int
    precisions: Mapping[str, str]
    """Component -> what was taken, for the log and the model's metadata."""


def reads(files: Mapping[str, int]) -> tuple[str, ...]:
    """The small files that `survey` must know the contents of."""
    return tuple(path for path in sorted(files) if path == MODEL_INDEX or _INDEX.fullmatch(path.rpartition("/")[2]))


def survey(repo: str, files: Mapping[str, int], contents: Mapping[str, bytes], options: HuggingFaceOptions) -> Survey:
    """Step 1. `files` is path -> bytes. Raises FatalError when the repo is of no known form."""
    if options.full_repo:
        return Survey(tuple(sorted(files)), ())
    root_json = [path for path in files if "/" not in path and path.endswith(".json")]
    fixed = {MODEL_INDEX} & files.keys() | ({*root_json} if options.allow_root_json else set())
    names = _component_names(repo, files, contents, options)
    if names is None:
        return Survey(tuple(sorted(fixed)), (_component("", repo, files, contents),))
    return Survey(tuple(sorted(fixed)), tuple(_component(name, repo, files, contents) for name in names))


def select(
    repo: str, files: Mapping[str, int], found: Survey, dtypes: Mapping[str, str], options: HuggingFaceOptions
) -> Selection:
    """Step 2. `dtypes` is weights file -> safetensors dtype, as far as they are known.

    Raises FatalError for a component without acceptable weights, ResourceError for a selection that is too large.
    """
    chosen, precisions = set(found.fixed), {}
    for component in found.components:
        chosen.update(component.support)
        taken = _best(component, repo, dtypes, options)
        if taken is not None:
            chosen.update(taken.files)
            precisions[component.name or "model"] = _precision(taken, dtypes)
    size = sum(files[path] for path in chosen)
    if size > LIMIT_BYTES and not (options.full_repo or options.components):
        sizes = f"the selection has {size / 2**30:.1f} GB, over the limit of {LIMIT_BYTES / 2**30:.0f} GB"
        overrides = "COZY_HF_COMPONENTS names the folders to take, COZY_HF_FULL_REPO_DOWNLOAD=1 takes all"
        raise ResourceError(f"{repo}: {sizes}; {overrides}, both without a limit")
    return Selection(tuple(sorted(chosen)), size, precisions)


def precision_of(header: Mapping[str, Any]) -> str:
    """The safetensors dtype that holds most of a file's bytes, from its header; "" for one without tensors."""
    sizes: dict[str, int] = {}
    for name, tensor in header.items():
        if name != "__metadata__":
            start, end = tensor["data_offsets"]
            sizes[tensor["dtype"]] = sizes.get(tensor["dtype"], 0) + end - start
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else ""


# -- components --------------------------------------------------------------------------------------


def _component_names(
    repo: str, files: Mapping[str, int], contents: Mapping[str, bytes], options: HuggingFaceOptions
) -> list[str] | None:
    """The folders to take; None for a plain transformers repo. Raises FatalError."""
    folders = {path.partition("/")[0] for path in files if "/" in path}
    if options.components:
        missing = [name for name in options.components if name not in folders]
        if missing:
            raise FatalError(f"{repo} has no folder {missing[0]!r}, which COZY_HF_COMPONENTS names")
        return list(options.components)
    optional = frozenset() if options.include_optional else OPTIONAL_COMPONENTS
    if MODEL_INDEX in files:
        index = _json_object(repo, MODEL_INDEX, contents)
        return [name for name in index if not name.startswith("_") and name in folders and name not in optional]
    if {"unet", "transformer"} & folders:
        return [name for name in KNOWN_COMPONENTS if name in folders]
    if "config.json" in files and any("/" not in path and path.endswith(_ANY_WEIGHTS) for path in files):
        return None
    overrides = "COZY_HF_COMPONENTS names the folders to take, COZY_HF_FULL_REPO_DOWNLOAD=1 takes all"
    forms = "neither model_index.json, nor a unet or transformer folder, nor config.json beside weights"
    raise FatalError(f"{repo} is of no known form: it has {forms}; {overrides}")


def _component(name: str, repo: str, files: Mapping[str, int], contents: Mapping[str, bytes]) -> Component:
    prefix = f"{name}/" if name else ""
    own = [path for path in sorted(files) if path.startswith(prefix)]
    direct = {path.removeprefix(prefix): path for path in own if "/" not in path.removeprefix(prefix)}
    nested = own if name else list(direct.values())
    shards = [path for file, path in direct.items() if _SHARD.fullmatch(file)]  # of use only with an index
    return Component(
        name,
        support=tuple(path for path in nested if _is_support(path, files[path])),
        sets=tuple(_sets(repo, direct, contents)),
        other_weights=(*(path for path in own if path.endswith(OTHER_WEIGHTS)), *shards),
        any_precision=not name,
    )


def _is_support(path: str, size: int) -> bool:
    name = path.rpartition("/")[2]
    return (
        name.endswith(SUPPORT_SUFFIXES)
        and size <= SUPPORT_BYTES
        and not name.endswith(".index.json")
        and (_INDEX.fullmatch(name) is None and ".bin.index" not in name)
    )


def _sets(repo: str, direct: Mapping[str, str], contents: Mapping[str, bytes]) -> Iterable[WeightSet]:
    """The sets among the files of one folder, by name -> path."""
    for name, path in direct.items():
        if (index := _INDEX.fullmatch(name)) is not None:
            shards = _shards(repo, path, contents)
            known = [direct[shard] for shard in shards if shard in direct]
            if len(known) < len(shards):
                missing = next(shard for shard in shards if shard not in direct)
                raise FatalError(f"{repo}: {path} names the shard {missing!r}, which is not there")
            yield WeightSet(index["stem"], _variant(index["variant"]), (*known, path))
        elif _SHARD.fullmatch(name) is None and (single := _SINGLE.fullmatch(name)) is not None:
            yield WeightSet(single["stem"], _variant(single["variant"]), (path,))


def _shards(repo: str, path: str, contents: Mapping[str, bytes]) -> list[str]:
    weights = _json_object(repo, path, contents).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(isinstance(name, str) for name in weights.values()):
        raise FatalError(f"{repo}: {path} is no index of shards: it has no weight_map")
    return sorted(set(weights.values()))


def _variant(written: str | None) -> str:
    return (written or "").removeprefix(".")


def _json_object(repo: str, path: str, contents: Mapping[str, bytes]) -> dict[str, Any]:
    try:
        return msgspec.json.decode(contents[path], type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise FatalError(f"{repo}: {path} is broken: {error}") from error


# -- one set per component ---------------------------------------------------------------------------


def _best(component: Component, repo: str, dtypes: Mapping[str, str], options: HuggingFaceOptions) -> WeightSet | None:
    """The set to take; None for a component without weights. Raises FatalError."""
    where = f"{repo}: {component.name or 'the root'}"
    if not component.sets:
        if component.other_weights:
            first = component.other_weights[0]
            form = "neither a safetensors file nor shards with their index"
            raise FatalError(f"{where} has {form}, only what is never downloaded, such as {first}")
        return None
    accepted = [each for each in component.sets if _precision(each, dtypes) in (*options.precisions, "")]
    if not accepted and not component.any_precision:
        there = sorted({_precision(each, dtypes) for each in component.sets})
        known = ",".join((*options.precisions, *(each for each in there if each in ("fp16", "bf16", "fp32"))))
        way_out = f"; COZY_HF_WEIGHT_PRECISIONS={known} accepts them" if known != ",".join(options.precisions) else ""
        wanted = " or ".join(options.precisions)
        raise FatalError(f"{where} has weights as {', '.join(there)} only, not as {wanted}{way_out}")
    return min(accepted or component.sets, key=lambda each: _preference(each, dtypes, options))


def _precision(weights: WeightSet, dtypes: Mapping[str, str]) -> str:
    """By the header, else by the name; "" when neither says it."""
    dtype = dtypes.get(weights.files[0], "")
    if dtype:
        return PRECISIONS.get(dtype, dtype.lower())
    return next((part for part in weights.variant.split(".") if part in _NAMED_PRECISIONS), "")


def _preference(
    weights: WeightSet, dtypes: Mapping[str, str], options: HuggingFaceOptions
) -> tuple[int, bool, int, bool, str]:
    """Smaller is better: its precision, a variant that is only a precision, the usual stem, no variant, one file."""
    precision = _precision(weights, dtypes)
    order = options.precisions.index(precision) if precision in options.precisions else len(options.precisions)
    odd = weights.variant not in ("", *_NAMED_PRECISIONS)
    stem = _CANONICAL_STEMS.index(weights.stem) if weights.stem in _CANONICAL_STEMS else len(_CANONICAL_STEMS)
    return order, odd, stem, weights.variant != "", weights.files[0]
