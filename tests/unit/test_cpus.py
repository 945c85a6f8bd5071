"""How many CPUs there are, by affinity and cgroup."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from supervisor.cpus import usable_cpus

HERE = float(len(os.sched_getaffinity(0)))


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, HERE),
        ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, HERE),
        ({"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        ({"sys/fs/cgroup/cpu.max": "garbage\n"}, HERE),
        ({"sys/fs/cgroup/cpu.max": "50000 0\n"}, HERE),
        ({"sys/fs/cgroup/cpu.max": "100000000 100000\n"}, min(HERE, 1000.0)),
        ({"proc/self/cgroup": "0::/a.slice/b\n", "sys/fs/cgroup/a.slice/b/cpu.max": "25000 100000\n"}, 0.25),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/pod\n",
                "sys/fs/cgroup/cpu/pod/cpu.cfs_quota_us": "75000\n",
                "sys/fs/cgroup/cpu/pod/cpu.cfs_period_us": "100000\n",
            },
            0.75,
        ),
        ({"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n", "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, HERE),
    ],
)
def test_the_least_of_affinity_and_quota(tmp_path: Path, files: dict[str, str], expected: float) -> None:
    assert usable_cpus(write(tmp_path, files)) == expected
