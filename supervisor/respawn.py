"""When a child that died is started again.

Owns: how often one place's children died in a row. At once after the first death, then after 1, 2, 4 ... 60 s; one that
lived ALIVE_S died of something new, and the count starts over.
"""

from __future__ import annotations

from typing import Final

BACKOFF_FIRST_S: Final = 1.0
BACKOFF_MAX_S: Final = 60.0
ALIVE_S: Final = 60.0
_MAX_DOUBLINGS: Final = 16
"""Far beyond the cap, and no power that overflows."""


class Respawn:
    """See the module."""

    def __init__(self) -> None:
        self.deaths_in_a_row = 0

    def delay_after_death(self, lived_s: float) -> float:
        """Seconds until the replacement starts."""
        if lived_s >= ALIVE_S:
            self.deaths_in_a_row = 0
        self.deaths_in_a_row += 1
        if self.deaths_in_a_row == 1:
            return 0.0
        return min(BACKOFF_MAX_S, BACKOFF_FIRST_S * 2.0 ** min(self.deaths_in_a_row - 2, _MAX_DOUBLINGS))
