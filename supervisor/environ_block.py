"""The strings that this process was started with, where /proc/<pid>/environ shows them to others.

Owns: nothing; the kernel laid the block out at exec and reads it again for whoever looks. Unsetting a variable only
takes its pointer out of libc's list, the string stays; so values are overwritten in place.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

_ENV_START: Final = 50
_ENV_END: Final = 51
"""Fields of /proc/<pid>/stat, counted from 1 (proc_pid_stat(5))."""
_AFTER_NAME: Final = 3
"""The first field after the parenthesized name, which may itself have blanks."""


def overwrite_values(names: Iterable[str]) -> None:
    """Overwrite the values of these variables with zeros. Raises OSError when the kernel hides where they are."""
    wanted = {os.fsencode(name) for name in names}
    start, end = _place()
    position = start
    for entry in ctypes.string_at(start, end - start).split(b"\0"):
        name, _, value = entry.partition(b"=")
        if name in wanted:
            ctypes.memset(position + len(name) + 1, 0, len(value))
        position += len(entry) + 1


def _place() -> tuple[int, int]:
    fields = Path("/proc/self/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    start, end = int(fields[_ENV_START - _AFTER_NAME]), int(fields[_ENV_END - _AFTER_NAME])
    if not 0 < start <= end:
        raise OSError(f"/proc/self/stat says that the environment lies from {start} to {end}")
    return start, end
