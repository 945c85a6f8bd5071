"""Which address is dialed next.

Owns: the address in turn and the count of redirect hops. Pure.

1. At first the seeds are dialed in their order.
2. A scheduler that is not the leader names another address: that one is next, at once, for MAX_HOPS hops since a
   stream last stayed up. Further redirects are followed too, but after a wait: two schedulers may point at each other.
3. When the address in turn fails, the seed list is gone through in order, without a wait between two seeds. Only
   its end is a reason to wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from gen_worker.wire import NOT_LEADER_PREFIX
from supervisor.config_parse import Invalid, address
from supervisor.transport import StatusCode, StreamStatus

MAX_HOPS: Final = 5


class Targets:
    """See the module."""

    def __init__(self, seeds: Sequence[str]) -> None:
        """`seeds`: `host:port` each, SCHEDULER_ADDR first. Raises ValueError when there is none."""
        self._seeds = tuple(dict.fromkeys(seeds))
        if not self._seeds:
            raise ValueError("there is no scheduler address to dial")
        self._position = 0
        self._current = self._seeds[0]
        self._hops = 0

    @property
    def current(self) -> str:
        return self._current

    def stayed_up(self) -> None:
        """A stream to the address in turn stayed up: hops are counted anew."""
        self._hops = 0

    def keep(self) -> None:
        """Dial the address in turn once more; if that fails, the seed list is gone through from its start."""
        self._position = 0 if self._current == self._seeds[0] else -1

    def redirect(self, target: str) -> bool:
        """Dial `target` next. False when there were too many hops to do so at once."""
        self._current = target
        self.keep()
        self._hops += 1
        return self._hops <= MAX_HOPS

    def failed(self) -> bool:
        """Go on to the next seed. True when the list is through and starts again."""
        position = self._position + 1
        self._position = position % len(self._seeds)
        self._current = self._seeds[self._position]
        return position == len(self._seeds)


class MalformedRedirect(ValueError):
    """A redirect names what is no `host:port`."""


def redirect_target(status: StreamStatus) -> str | None:
    """The address that a status redirects to; None when it does not, or when no leader is known yet.

    Raises MalformedRedirect.
    """
    if status.code is not StatusCode.FAILED_PRECONDITION or not status.details.startswith(NOT_LEADER_PREFIX):
        return None
    named = status.details.removeprefix(NOT_LEADER_PREFIX).strip()
    if not named:
        return None
    try:
        return address(named)
    except Invalid as error:
        raise MalformedRedirect(f"{named[:100]!r} is not {error}") from None
