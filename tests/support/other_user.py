"""What tests of WORKER_EXECUTOR_UID need: root, and a Python that another user can run."""

from __future__ import annotations

import functools
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

import pytest

from tests.support.worker_process import PROGRAM

UID: Final = 12345
"""In no user database."""
_ROOT: Final = Path(__file__).resolve().parents[2]


def require_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can do this")


@functools.cache
def unshares(*options: str) -> str:
    """Why `unshare` with these options does not work here; "" when it does."""
    try:
        done = subprocess.run(["unshare", *options, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return "there is no unshare (util-linux) here"
    return "" if done.returncode == 0 else f"unshare {' '.join(options)}: {done.stderr.strip()}"


def worker_command(directory: Path, program: Path = PROGRAM) -> list[str | Path]:
    """The command of a supervisor whose Python and project every user can reach; skips where that can't be.

    `directory` is one that every user can reach, for what this leaves there.

    A Python under a home directory that is closed to others gets a mount namespace in which that directory has
    nothing but it.
    """
    require_root()
    needed = [Path(path) for path in (sys.base_prefix, sys.prefix, _ROOT)]
    hidden = {path: closed for path in needed if (closed := _closed_ancestor(path)) is not None}
    if not hidden:
        return [program]
    if reason := unshares("--mount"):
        pytest.skip(f"{sys.base_prefix} is closed to other users, and {reason}")
    stage = Path(tempfile.mkdtemp(dir=directory))
    lines = ["set -e"]
    for number, path in enumerate(hidden):
        (stage / str(number)).mkdir()
        lines.append(f"mount --bind {shlex.quote(str(path))} {stage / str(number)}")
    lines += [f"mount -t tmpfs -o mode=755 tmpfs {shlex.quote(str(closed))}" for closed in sorted(set(hidden.values()))]
    for number, path in enumerate(hidden):
        quoted = shlex.quote(str(path))
        lines.append(f"mkdir -p {quoted}; mount --move {stage / str(number)} {quoted}")
    lines.append('exec "$@"')
    return ["unshare", "--mount", "sh", "-c", "\n".join(lines), "sh", program]


def _closed_ancestor(path: Path) -> Path | None:
    """The topmost directory on the way to `path` that others may not pass."""
    for ancestor in [*reversed(path.resolve().parents), path.resolve()]:
        if not ancestor.stat().st_mode & 0o001:
            return ancestor
    return None
