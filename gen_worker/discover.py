"""`python -m gen_worker.discover`: prints the manifest of a project as JSON.

Owns: the run of a discovery. 1. read [tool.cozy]; 2. find the modules that mention a decorator; 3. import them and
inspect what is marked; 4. print. Whatever is wrong with the project is one line on stderr and exit code 1.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from gen_worker.errors import ProjectError, WorkerError
from gen_worker.injection import is_injectable
from gen_worker.manifest import Manifest, ManifestWebsocket, function_entry, websocket_entry
from gen_worker.model_refs import is_model_ref
from gen_worker.modules import find_modules, import_modules, importable
from gen_worker.project import CozyConfig, load_project
from gen_worker.signature import FunctionSpec, collect_functions


def discover_manifest(root: str | Path = ".") -> dict[str, Any]:
    """The manifest of the project at `root`, as plain data; warnings go to stderr.

    The project's modules are imported, and forgotten again. Raises ProjectError and SignatureError.
    """
    config = load_project(root)
    names = find_modules(root)
    with importable(root, names):
        specs = collect_functions(import_modules(names))
        if not specs:
            looked_at = ", ".join(names) or "no module mentions one"
            raise ProjectError(f"no @worker_function() or @worker_websocket() in {Path(root).resolve()} ({looked_at})")
        manifest = _build(config, specs)
        _warn([*_missing_models(manifest), *_not_injectable(specs)])
    return msgspec.to_builtins(manifest)  # type: ignore[no-any-return]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. What tenant modules print while they are imported goes to stderr."""
    parser = argparse.ArgumentParser(prog="python -m gen_worker.discover", description=discover_manifest.__doc__)
    parser.add_argument("root", nargs="?", default=".", help="the project's folder (default: the current one)")
    root = parser.parse_args(arguments).root
    try:
        with contextlib.redirect_stdout(sys.stderr):
            manifest = discover_manifest(root)
    except WorkerError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        return 1
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(manifest), indent=2).decode() + "\n")
    return 0


def _build(config: CozyConfig, specs: Iterable[FunctionSpec]) -> Manifest:
    return Manifest(
        functions=[function_entry(spec) for spec in specs if spec.mode != "websocket"],
        websockets=[websocket_entry(spec) for spec in specs if spec.mode == "websocket"],
        deployment=config.deployment,
        models=config.models,
        build=config.build,
        resources=config.resources,
    )


def _missing_models(manifest: Manifest) -> list[str]:
    entries: list[ManifestWebsocket] = [*manifest.functions, *manifest.websockets]
    return [
        f"{entry.module}.{entry.name} needs model {key!r}, which [tool.cozy.models] lacks"
        for entry in entries
        for key in entry.required_models
        if key not in manifest.models and not is_model_ref(key)
    ]


def _not_injectable(specs: Iterable[FunctionSpec]) -> list[str]:
    return [
        f"{spec.qualified_name}: parameter {injection.param!r} injects {injection.type_name}, which has neither a "
        "registered loader nor from_pretrained: the worker must get one by WORKER_RUNTIME_LOADERS_JSON"
        for spec in specs
        for injection in spec.injections
        if not is_injectable(injection.type)
    ]


def _warn(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stderr.write(f"warning: {line}\n")


if __name__ == "__main__":
    sys.exit(main())
