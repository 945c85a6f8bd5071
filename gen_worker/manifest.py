"""The manifest: what a project contains, written at build time and read when a worker starts.

Owns: its shape and its reading. `python -m gen_worker.discover` writes it (discover.py); the supervisor learns from
it which modules to import, the models and the deployment without importing tenant code.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

from gen_worker.errors import ManifestError
from gen_worker.injection import ModelRefSource, qualified_name
from gen_worker.project import BuildConfig, ResourcesConfig
from gen_worker.signature import FunctionSpec

__all__ = [
    "Manifest",
    "ManifestError",
    "ManifestFunction",
    "ManifestInjection",
    "ManifestModelRef",
    "ManifestResources",
    "ManifestWebsocket",
    "function_entry",
    "load_manifest",
    "websocket_entry",
]


class ManifestResources(msgspec.Struct, frozen=True):
    """ResourceRequirements of one function."""

    max_concurrency: int | None = None


class ManifestModelRef(msgspec.Struct, frozen=True):
    """The ModelRef of one injection."""

    source: Literal["deployment", "payload"]
    key: str


class ManifestInjection(msgspec.Struct, frozen=True):
    """One injected model parameter, as the scheduler gets it."""

    param: str
    type: str
    model_ref: ManifestModelRef


class ManifestWebsocket(msgspec.Struct, frozen=True, kw_only=True):
    """One websocket handler."""

    name: str
    module: str
    resources: ManifestResources
    injection_json: list[ManifestInjection] = []
    required_models: list[str] = []
    """The deployment keys of its injections, each once."""


class ManifestFunction(ManifestWebsocket, frozen=True, kw_only=True):
    """One worker function. The digests are over the schemas as compact sorted JSON."""

    payload_type: str
    payload_schema_sha256: str
    input_schema: dict[str, Any]
    output_mode: Literal["single", "incremental"]
    output_type: str
    output_schema_sha256: str
    output_schema: dict[str, Any]
    incremental_output: bool
    delta_type: str | UnsetType = UNSET
    """This and the two below: of incremental functions only."""
    delta_schema_sha256: str | UnsetType = UNSET
    delta_output_schema: dict[str, Any] | UnsetType = UNSET


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """The whole project."""

    functions: list[ManifestFunction] = []
    websockets: list[ManifestWebsocket] = []
    deployment: str | None = None
    models: dict[str, str] = {}
    """Label -> canonical ref."""
    build: BuildConfig = BuildConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @property
    def modules(self) -> tuple[str, ...]:
        """The modules to import, each once, in the manifest's order."""
        return tuple(dict.fromkeys(entry.module for entry in (*self.functions, *self.websockets)))


def load_manifest(path: str | Path) -> Manifest:
    """Read a manifest. Raises ManifestError, which names the file and what is wrong where in it."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Manifest)
    except OSError as error:
        raise ManifestError(f"manifest {path} can't be read: {error.strerror or error}") from error
    except msgspec.DecodeError as error:
        raise ManifestError(f"manifest {path} is not one that this version writes: {error}") from error


def websocket_entry(spec: FunctionSpec) -> ManifestWebsocket:
    """The entry of a websocket handler."""
    return ManifestWebsocket(**_common(spec))


def function_entry(spec: FunctionSpec) -> ManifestFunction:
    """The entry of a worker function."""
    if spec.payload_type is None or spec.output_type is None:
        raise TypeError(f"{spec.qualified_name} is a websocket handler")
    output_schema: dict[str, Any] = msgspec.json.decode(spec.output_schema)
    output_type, output_digest = qualified_name(spec.output_type), hashlib.sha256(spec.output_schema).hexdigest()
    return ManifestFunction(
        **_common(spec),
        payload_type=qualified_name(spec.payload_type),
        payload_schema_sha256=hashlib.sha256(spec.input_schema).hexdigest(),
        input_schema=msgspec.json.decode(spec.input_schema),
        output_mode="incremental" if spec.incremental else "single",
        output_type=output_type,
        output_schema_sha256=output_digest,
        output_schema=output_schema,
        incremental_output=spec.incremental,
        delta_type=output_type if spec.incremental else UNSET,
        delta_schema_sha256=output_digest if spec.incremental else UNSET,
        delta_output_schema=output_schema if spec.incremental else UNSET,
    )


def _common(spec: FunctionSpec) -> dict[str, Any]:
    deployment_keys = [i.ref.key for i in spec.injections if i.ref.source is ModelRefSource.DEPLOYMENT]
    return {
        "name": spec.name,
        "module": spec.module,
        "resources": ManifestResources(spec.resources.max_concurrency),
        "injection_json": msgspec.json.decode(spec.injection_json, type=list[ManifestInjection]),
        "required_models": list(dict.fromkeys(deployment_keys)),
    }
