"""Which functions are short, as far as they have shown.

Owns: for each function, how many of its runs in a row were. One that was not starts the count again, so what takes long
now and then is taken for short rarely, and what always takes long never.
"""

from __future__ import annotations

from typing import Final

BRIEF_S: Final = 0.001
"""A run that stays on the reader's thread (reader.py) takes less: a hand-over to another thread costs a tenth of it,
and a message that comes meanwhile can wait so long."""
TINY_S: Final = 0.000_1
"""A run that the supervisor need not spread over executors takes less; what it spends on one is a third of that."""
PROOF_RUNS: Final = 8


class Pace:
    """The functions whose runs are shorter than `limit_s`.

    Any thread may call it: a count that two threads change at once is off by one, no more.
    """

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._in_a_row: dict[str, int] = {}

    def note(self, function: str, seconds: float) -> None:
        """A run took so long, from its payload to its answer."""
        self._in_a_row[function] = self._in_a_row.get(function, 0) + 1 if seconds < self._limit_s else 0

    def is_short(self, function: str) -> bool:
        """Whether the next run will most likely be."""
        return self._in_a_row.get(function, 0) >= PROOF_RUNS
