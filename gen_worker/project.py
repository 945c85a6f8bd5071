"""A tenant's project: `[tool.cozy]` of its pyproject.toml, and whether the whole can be deployed.

Owns: the shape of that table and the rules for its values. `load_project` is for whoever needs the values and raises
at the first error; `validate_project` is for people and tells everything that it finds.

    [tool.cozy]
    deployment = "my-deployment"        # 3-63 lower-case letters, digits, single hyphens; starts with a letter
    [tool.cozy.models]
    sdxl = "hf:org/repo"                # label = ref
    [tool.cozy.build]                   # gpu, cuda, torch, backend, base_image
    [tool.cozy.resources]               # vram_gb, gpu_type, memory_gb, cpu_cores
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import msgspec

from gen_worker.errors import ProjectError, ValidationError
from gen_worker.model_refs import canonical_ref

_DEPLOYMENT_ID: Final = re.compile(r"[a-z](?:-?[a-z0-9])*")
_DEPLOYMENT_ID_CHARS: Final = range(3, 64)


class BuildConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[tool.cozy.build]: what the image is built with."""

    gpu: bool | None = None
    cuda: str | None = None
    torch: str | None = None
    backend: str | None = None
    base_image: str | None = None


class ResourcesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """[tool.cozy.resources]: what one worker needs; sizes in GB."""

    vram_gb: float | None = None
    gpu_type: str | None = None
    memory_gb: float | None = None
    cpu_cores: int | None = None


class CozyConfig(msgspec.Struct, frozen=True):
    """[tool.cozy]. The refs of `models` are canonical once loaded."""

    deployment: str | None = None
    models: dict[str, str] = {}
    build: BuildConfig = BuildConfig()
    resources: ResourcesConfig = ResourcesConfig()


@dataclass(frozen=True, slots=True)
class ProjectValidationResult:
    """What `validate_project` found; each entry is one line. `ok` means no errors."""

    ok: bool
    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def load_project(root: str | Path) -> CozyConfig:
    """[tool.cozy] of the project at `root`. Raises ProjectError, with all that is wrong in one line."""
    config, errors, _ = _read(Path(root))
    if errors:
        raise ProjectError("; ".join(errors))
    return config


def validate_project(root: str | Path, require_uv_lock: bool = False) -> ProjectValidationResult:  # noqa: FBT001, FBT002
    """Check a project before it is deployed. Never raises for what is wrong with the project."""
    root = Path(root)
    _, errors, warnings = _read(root)
    for name in ("requirements.txt", "cozy.toml"):
        if (root / name).exists():
            use = "[project] dependencies" if name == "requirements.txt" else "[tool.cozy]"
            errors.append(f"{name} is not used: move what it says to {use} of pyproject.toml and remove it")
    if not (root / "uv.lock").is_file():
        message = "no uv.lock: run `uv lock`, so that every build installs the same versions"
        (errors if require_uv_lock else warnings).append(message)
    return ProjectValidationResult(not errors, errors, warnings)


def check_deployment_id(text: str) -> str:
    """The id itself. Raises ValidationError, which says the rule."""
    if len(text) not in _DEPLOYMENT_ID_CHARS or not _DEPLOYMENT_ID.fullmatch(text):
        rule = "3-63 characters of lower-case letters, digits and single hyphens, starting with a letter"
        raise ValidationError(f"{text!r} is not a deployment id: {rule}, not ending with a hyphen")
    return text


def _read(root: Path) -> tuple[CozyConfig, list[str], list[str]]:
    """What is configured, errors and warnings."""
    path = root / "pyproject.toml"
    nothing = CozyConfig()
    try:
        document = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return (
            nothing,
            [f"no pyproject.toml in {root.resolve()}: name the project's folder, or begin one with gen-worker init"],
            [],
        )
    except (OSError, ValueError) as error:
        return nothing, [f"{path} can't be read: {error}"], []
    table = document.get("tool", {}).get("cozy")
    if not isinstance(table, dict):
        return nothing, [f"no [tool.cozy] in {path}"], []
    unknown = sorted(set(table) - set(CozyConfig.__struct_fields__))
    warnings = [f"[tool.cozy] has the unknown key {key!r}" for key in unknown]
    try:
        config = msgspec.convert(table, CozyConfig)
    except msgspec.ValidationError as error:
        return nothing, [f"[tool.cozy] of {path}: {error}"], warnings
    models, errors = _check_values(config)
    if config.deployment is None:
        warnings.append("[tool.cozy] has no `deployment`: the worker will report the id of its environment only")
    return msgspec.structs.replace(config, models=models), errors, warnings


def _check_values(config: CozyConfig) -> tuple[dict[str, str], list[str]]:
    """The models by canonical ref, and errors."""
    errors: list[str] = []
    models: dict[str, Any] = {}
    if config.deployment is not None:
        try:
            check_deployment_id(config.deployment)
        except ValidationError as error:
            errors.append(f"[tool.cozy] deployment: {error}")
    for label, ref in config.models.items():
        try:
            models[label] = canonical_ref(ref)
        except ValidationError as error:
            errors.append(f"[tool.cozy.models] {label}: {error}")
    return models, errors
