"""Is the installation ours, whole and of one piece?"""

from __future__ import annotations

import importlib.metadata
import platform
import re

from gen_worker._version import __version__
from gen_worker.entrypoint import find_clash
from supervisor.doctor.findings import Finding, Host

_NAME = re.compile(r"[A-Za-z0-9._-]+")


def check_packages(host: Host) -> list[Finding]:  # noqa: ARG001  (each check gets the host)
    """Python, gen-worker, other distributions that install packages of our names, and what we require."""
    findings = [Finding("ok", "gen-worker", f"{__version__} on Python {platform.python_version()}")]
    clash = find_clash()
    if clash is not None:
        what, _, todo = clash.rpartition(": ")
        findings.append(Finding("broken", "packages", what, todo))
    owners = importlib.metadata.packages_distributions()
    for name in ("supervisor", "executor", "gen_worker"):
        others = sorted({owner for owner in owners.get(name, []) if _same(owner) != "gen-worker"})
        if others and clash is None:
            findings.append(
                Finding(
                    "warning",
                    "packages",
                    f"{', '.join(others)} installs a package {name!r} too; ours is found first, for now",
                    f"pip uninstall {' '.join(others)}",
                )
            )
    missing = _missing()
    if missing:
        findings.append(
            Finding("broken", "packages", f"not installed: {', '.join(missing)}", "install gen-worker again, with pip")
        )
    elif len(findings) == 1:
        findings.append(Finding("ok", "packages", "no other distribution has packages of these names; all are here"))
    return findings


def _missing() -> list[str]:
    """What gen-worker requires and is not here. Extras are nobody's duty."""
    try:
        required = importlib.metadata.requires("gen-worker") or []
    except importlib.metadata.PackageNotFoundError:
        return []  # run from a checkout that was never installed
    names = [_NAME.match(line) for line in required if "extra ==" not in line]
    return [name.group() for name in names if name is not None and not _installed(name.group())]


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _same(name: str) -> str:
    """Names that differ in this are one name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
