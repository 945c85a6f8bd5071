"""What the supervisor and its transfer process ask of the kernel for themselves (prctl(2)).

Owns: nothing; each call changes one flag of this process and raises OSError when the kernel refuses.
"""

from __future__ import annotations

import ctypes
import os
import signal
from typing import Final

# linux/prctl.h
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_DUMPABLE: Final = 4
_PR_SET_CHILD_SUBREAPER: Final = 36


def forbid_inspection() -> None:
    """Make the entries of this process in /proc root's own, and refuse to be traced by others of this user.

    It costs core dumps, and debuggers need CAP_SYS_PTRACE. It does not hold against a root that has that.
    """
    _prctl(_PR_SET_DUMPABLE, 0)


def become_subreaper() -> None:
    """Have descendants whose parent dies become children of this process instead of init's."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent(parent_pid: int) -> bool:
    """Have the kernel kill this process when its parent dies. False when that one is gone already."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent_pid


def _prctl(option: int, value: int) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}, {value}): {os.strerror(number)}")
