"""The tenant's project, as far as the supervisor has to know it: what to import, and which model a label means.

Owns: where that is found. A manifest has both. Without one, USER_MODULES names the modules (none: executors look for
them as discovery does) and the `[tool.cozy.models]` of the project's pyproject.toml, when there is one, the labels.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gen_worker.manifest import load_manifest
from gen_worker.project import load_project
from supervisor.settings import DEFAULT_MANIFESTS, Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tenant:
    """Modules to import, in order; label -> ref; the deployment id, "" when the project has none."""

    modules: tuple[str, ...]
    models: Mapping[str, str] = field(default_factory=dict)
    deployment: str = ""


def find_tenant(settings: Settings, root: Path) -> Tenant:
    """The tenant of the project in `root`. Raises ProjectError (ManifestError for a manifest) in one line."""
    manifest = settings.manifest or next((path for path in DEFAULT_MANIFESTS if (root / path).is_file()), None)
    if manifest is not None:
        log.info("functions and models as in %s", manifest)
        found = load_manifest(root / manifest)
        return Tenant(found.modules, found.models, found.deployment or "")
    if not _has_project(root / "pyproject.toml"):
        return Tenant(settings.user_modules)
    project = load_project(root)
    return Tenant(settings.user_modules, project.models, project.deployment or "")


def _has_project(path: Path) -> bool:
    """Whether there is a `[tool.cozy]` to read. One that can't be read is for load_project to say."""
    try:
        return b"[tool.cozy" in path.read_bytes()
    except FileNotFoundError:
        return False
    except OSError:
        return True
