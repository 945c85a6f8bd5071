"""Which functions are brief, as far as they have shown.

Owns: for each function, how many of its runs in a row were brief. One that was not starts the count again, so what
takes long now and then is taken for brief rarely, and what always takes long never.
"""

from __future__ import annotations

from typing import Final

BRIEF_S: Final = 0.001
"""A hand-over to another thread takes about a tenth of it; a message that comes meanwhile can wait so long."""
PROOF_RUNS: Final = 8


class Pace:
    """See the module. Any thread may call it: a count that two threads change at once is off by one, no more."""

    def __init__(self) -> None:
        self._in_a_row: dict[str, int] = {}

    def note(self, function: str, seconds: float) -> None:
        """A run took so long, from its payload to its answer."""
        self._in_a_row[function] = self._in_a_row.get(function, 0) + 1 if seconds < BRIEF_S else 0

    def is_brief(self, function: str) -> bool:
        """Whether the next run will most likely be."""
        return self._in_a_row.get(function, 0) >= PROOF_RUNS
