"""All checks, in the order in which one builds on the other.

Owns: the list, and what becomes of a check that fails itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

from supervisor.config import ConfigError, load_settings, unknown_variables
from supervisor.doctor.credentials import check_token
from supervisor.doctor.findings import Check, Finding, Host
from supervisor.doctor.gpus import check_gpus
from supervisor.doctor.host import check_disks, check_limits, check_memory
from supervisor.doctor.network import check_port, check_scheduler
from supervisor.doctor.packages import check_packages

CHECKS: Final[tuple[Check, ...]] = (
    check_packages, check_gpus, check_memory, check_limits, check_disks, check_port, check_token, check_scheduler,
)  # fmt: skip


def examine(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Findings as they are made. With settings that don't parse there is nothing else to look at."""
    try:
        settings = load_settings(environ)
    except ConfigError as error:
        yield Finding("broken", "settings", str(error), "correct it; gen-worker-supervisor --help lists them all")
        return
    for warning in unknown_variables(environ):
        yield Finding("warning", "settings", warning, "correct the name, or remove it")
    yield Finding("ok", "settings", f"worker {settings.worker_id}")
    host = Host(settings, environ)
    for check in CHECKS:
        yield from check(host)
