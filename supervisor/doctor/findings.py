"""What a check says.

Owns: the shape of a finding. Each says what was looked at, what is there, and, unless all is well, what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from supervisor.settings import Settings

Level = Literal["ok", "note", "warning", "broken"]
"""`note`: nothing wrong, but worth knowing. `broken`: a worker can't do its work like this."""


class Finding(msgspec.Struct, frozen=True, omit_defaults=True):
    level: Level
    check: str
    what: str
    todo: str = ""


@dataclass(frozen=True, slots=True)
class Host:
    """What checks look at: the settings as a worker here would have them, and its environment."""

    settings: Settings
    environ: Mapping[str, str]


Check = Callable[[Host], Sequence[Finding]]
