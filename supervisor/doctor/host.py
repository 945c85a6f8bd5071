"""Disk, memory and limits of this host or container."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Final

import psutil

from supervisor.doctor.findings import Finding, Host
from supervisor.registration import memory_limit

GIB: Final = 2**30
MIB: Final = 2**20
LITTLE_DISK: Final = 20 * GIB
"""A few models of usual size."""
FULL: Final = 0.95
"""From here on the cache removes snapshots."""
SPEED_BYTES: Final = 64 * MIB
SLOW: Final = 100 * MIB
"""Bytes a second: a model of 10 GB takes more than 100 s."""
LITTLE_MEMORY: Final = 2 * GIB
FEW_FILES: Final = 4096
FEW_PROCESSES: Final = 1024


def check_disks(host: Host) -> list[Finding]:
    """Space and speed where models lie, space where runs work."""
    settings = host.settings
    findings = [_space("model cache", settings.model_cache_dir), _speed(settings.model_cache_dir)]
    findings.append(_space("run directory", settings.run_dir))
    if settings.outbox_dir is not None:
        findings.append(_writable("WORKER_OUTBOX_DIR", settings.outbox_dir))
    return findings


def check_memory(host: Host) -> list[Finding]:  # noqa: ARG001  (each check gets the host)
    """The container's where it has a limit, else the machine's. What is available is the machine's, up to the limit."""
    limit = memory_limit()
    free = min(limit, psutil.virtual_memory().available)
    words = f"{limit / GIB:.1f} GiB, {free / GIB:.1f} GiB available"
    if free < LITTLE_MEMORY:
        return [Finding("warning", "memory", words, "models are read through memory: give the container more")]
    return [Finding("ok", "memory", words)]


def check_limits(host: Host) -> list[Finding]:  # noqa: ARG001  (each check gets the host)
    """Ulimits."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    core, _ = resource.getrlimit(resource.RLIMIT_CORE)
    findings = [
        _limit("open files", files, FEW_FILES, "ulimit -n"),
        _limit("processes", processes, FEW_PROCESSES, "ulimit -u"),
    ]
    if core:
        todo = "ulimit -c 0, unless you want them: an executor's core is as large as its models"
        findings.append(Finding("note", "core dumps", "are written when an executor crashes", todo))
    return findings


def _limit(name: str, limit: int, few: int, command: str) -> Finding:
    shown = "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
    if limit != resource.RLIM_INFINITY and limit < few:
        return Finding("warning", name, f"{shown} at most", f"raise it to {few}: {command} {few}")
    return Finding("ok", name, f"{shown} at most")


def _space(name: str, path: Path) -> Finding:
    where = _existing(path)
    try:
        usage = shutil.disk_usage(where)
    except OSError as error:
        return Finding("broken", name, f"{path}: {error.strerror}", "set another directory, or mount one there")
    words = f"{path}: {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free"
    if usage.free < (1 - FULL) * usage.total:
        return Finding("broken", name, f"{words}, over {FULL:.0%} full", "make room, or set another directory")
    if not os.access(where, os.W_OK | os.X_OK):
        return Finding(
            "broken", name, f"{words}, but not for this user to write", f"chown it, or set another; uid {os.getuid()}"
        )
    if usage.free < LITTLE_DISK:
        return Finding("warning", name, words, "a few models fill it: use a larger disk")
    return Finding("ok", name, words)


def _writable(name: str, path: Path) -> Finding:
    if os.access(_existing(path), os.W_OK | os.X_OK):
        return Finding("ok", name, f"{path} can be written")
    return Finding("broken", name, f"{path} can't be written by uid {os.getuid()}", "chown it, or set another")


def _speed(path: Path) -> Finding:
    """Write and fsync a file, which is removed again. Reading it back would only show the page cache."""
    block = os.urandom(MIB)  # some disks compress
    try:
        with tempfile.TemporaryFile(dir=_existing(path)) as file:
            started = time.monotonic()
            for _ in range(SPEED_BYTES // MIB):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
            speed = SPEED_BYTES / max(time.monotonic() - started, 1e-6)
    except OSError as error:
        return Finding(
            "broken", "disk speed", f"{path}: {error.strerror}", "make the directory writable, and make room"
        )
    words = f"{path}: {speed / MIB:.0f} MiB/s written"
    if speed < SLOW:
        return Finding("warning", "disk speed", words, "models load slowly from it: use a local SSD for the cache")
    return Finding("ok", "disk speed", words)


def _existing(path: Path) -> Path:
    """The nearest directory that is there: the worker makes the rest."""
    return next(each for each in (path, *path.parents) if each.is_dir())
