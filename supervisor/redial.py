"""What comes after a dial or a stream that ended: which address, and after how long.

Owns: the Targets and the Backoff, and the count of failed dials. Pure; the session does the waiting.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from supervisor.backoff import Backoff, Lifetime, ReconnectSettings
from supervisor.targets import Targets


class Redial:
    """See the module. `uniform` gives random numbers from 0 to 1."""

    def __init__(
        self, seeds: Sequence[str], settings: ReconnectSettings, uniform: Callable[[], float] = random.random
    ) -> None:
        self._targets = Targets(seeds)
        self._backoff = Backoff(settings, uniform)
        self._max_attempts = settings.max_attempts
        self._failed_dials = 0

    @property
    def target(self) -> str:
        """The address to dial next."""
        return self._targets.current

    @property
    def failed_dials(self) -> int:
        """In a row, since a stream last stayed up; redirects that were followed at once are no failures."""
        return self._failed_dials

    @property
    def exhausted(self) -> bool:
        """MAX_RECONNECT_ATTEMPTS dials in a row failed."""
        return 0 < self._max_attempts <= self._failed_dials

    def after(self, life: Lifetime, redirect: str | None = None) -> float:
        """Take note of the end of a dial to `target`. Returns the seconds to wait before the next one."""
        if self._backoff.stayed_up(life):
            self._targets.stayed_up()
            self._failed_dials = 0
        worth_another = self._backoff.record(life)
        if redirect is not None and self._targets.redirect(redirect):
            return 0.0
        if redirect is None and worth_another:
            self._targets.keep()
            return self._backoff.quick_delay()
        self._failed_dials += 1
        if redirect is None and not self._targets.failed():
            return 0.0
        return self._backoff.next_delay()

    def not_dialed(self) -> float:
        """Take note that there was no credential to dial with. Returns the seconds to wait."""
        self._failed_dials += 1
        return self._backoff.next_delay()
