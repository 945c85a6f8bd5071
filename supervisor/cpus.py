"""How many CPUs this process may use.

Owns: nothing. The affinity says which; a cgroup (a container's CPU limit) may give less time than those have.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def usable_cpus(root: Path = Path("/")) -> float:
    """The CPUs of the affinity, or the cgroup's quota where that is less. cgroup v2 and v1."""
    return min([float(len(os.sched_getaffinity(0))), *_quotas(root)])


def _quotas(root: Path) -> Iterator[float]:
    """In CPUs. In a container its cgroup is the mount's top; else the one that the process is said to be in."""
    mounts = root / "sys/fs/cgroup"
    try:
        lines = (root / "proc/self/cgroup").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    own = {line.split(":", 2)[2].lstrip("/") for line in lines if line.count(":") > 1}
    for inside in {"", *own}:
        yield from _quota(mounts / inside / "cpu.max")
        yield from _quota(mounts / "cpu" / inside / "cpu.cfs_quota_us", mounts / "cpu" / inside / "cpu.cfs_period_us")


def _quota(*files: Path) -> Iterator[float]:
    """The quota and its period, in one file or in two; nothing when there is none (`max`, or -1)."""
    try:
        quota, period = " ".join(file.read_text("ascii", "replace") for file in files).split()
    except (OSError, ValueError):
        return
    if quota.isdigit() and period.isdigit() and int(period):
        yield int(quota) / int(period)
