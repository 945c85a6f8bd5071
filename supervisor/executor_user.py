"""The user that executors run as, when it is not the supervisor's own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ExecutorUser:
    """`name` is empty and `home` None when the user database does not know it."""

    uid: int
    gid: int
    groups: tuple[int, ...] = ()
    name: str = ""
    home: Path | None = None
