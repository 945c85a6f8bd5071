"""Results that the scheduler's gRPC library refuses for their size, stream after stream.

Owns: which result is suspected, how often, and which ones are given up. A library that gets a message over its limit
(4 MiB by default) ends the whole stream; the result would be sent again on the next one, and so on for ever.

1. A stream that ended so names the size of what it refused, in most libraries: the result of that size is the one.
2. Else the largest of those that may not have arrived is suspected; STRIKES such ends in a row prove it.
3. What is proven is replaced by a failure that says so, in place of the output.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final, NamedTuple

from supervisor.held_output import LargeResult
from supervisor.runs import invalid
from supervisor.transport import StatusCode, StreamStatus
from supervisor.wire_codec import decode, encode_result

STRIKES: Final = 3
_WORDS: Final = re.compile(r"larger than max|exceeds (the )?max|length too large|exceeds maximum", re.IGNORECASE)
"""As the libraries of C++, Python, Ruby, Go and Node; Java; Rust; .NET say it."""
_CODES: Final = (StatusCode.RESOURCE_EXHAUSTED, StatusCode.OUT_OF_RANGE)


class Name(NamedTuple):
    """What names a result: its run's key, and for one of an earlier supervisor the keeper's ticket."""

    key: int
    ticket: int


class Oversize:
    """See the module."""

    def __init__(self) -> None:
        self._suspect: Name | None = None
        self._strikes = 0
        self._given_up: dict[Name, str] = {}

    def refused(self, status: StreamStatus, results: Iterable[tuple[Name, int]]) -> None:
        """A stream has ended so; `results`, with the sizes of their messages, went out on it or were about to."""
        said = {int(number) for number in re.findall(r"\d+", status.details)}
        candidates = sorted(results, key=lambda named: (named[1] in said, named[1]))
        if not candidates:
            return
        suspect, size = candidates[-1]
        self._strikes = self._strikes + 1 if suspect == self._suspect else 1
        self._suspect = suspect
        if size in said or self._strikes >= STRIKES:
            words = f"it ended {self._strikes} stream(s) with {status}"
            self._given_up[suspect] = f"the scheduler takes no result of {size} bytes: {words}"

    @property
    def has_replacements(self) -> bool:
        """Whether any result is to be replaced."""
        return bool(self._given_up)

    def replacement(self, name: Name, message: bytes | LargeResult) -> bytes | None:
        """What goes out instead of a result that is proven too large, once; None: the result itself."""
        reason = self._given_up.pop(name, None)
        if reason is None:
            return None
        self._suspect, self._strikes = None, 0
        run_id = decode(message).run_result.run_id if isinstance(message, bytes) else message.run_id
        return encode_result(run_id, b"", invalid("output too large", reason))


def refuses_size(status: StreamStatus) -> bool:
    """Whether a stream ended since a message on it was too large."""
    return status.code in _CODES and _WORDS.search(status.details) is not None
