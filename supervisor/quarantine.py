"""Requests that kill executors: the same function and payload, three times, is refused.

Owns: the strikes. A scheduler sends a `retryable` run again, so one bad request could take executor after executor
down with it.

1. When an executor dies by itself, each run on it gets a strike; which of them did it can't be known.
2. A run that ends in any other way clears its request: what works can't be what kills.
3. A request with two strikes runs alone on an executor (`is_suspect`). If that dies too, the third strike is proof, and
   the request is refused for an hour (`refusal`). So no request is refused for what its neighbour did.

Realtime sessions have no payload that could name them, and the protocol has no reason by which to refuse one: an
executor that dies under them is replaced, with the usual backoff.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gen_worker.pipe.messages import Failure
from supervisor.input_arena import Payload

STRIKES: Final = 3
REFUSED_S: Final = 3600.0
REMEMBERED: Final = 10_000
"""Requests with strikes that are kept in mind, the latest ones."""
WHOLE_BYTES: Final = 1024 * 1024
"""Payloads up to this size are fingerprinted whole, larger ones by samples: hashing 64 MiB would stall the loop."""
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 4096


def fingerprint(function: str, payload: Payload) -> bytes:
    """What names a request: 16 bytes of function and payload."""
    digest = hashlib.blake2b(f"{function}\0{len(payload)}\0".encode(), digest_size=16)
    view = memoryview(payload) if isinstance(payload, bytes) else payload.view()
    if len(payload) <= WHOLE_BYTES:
        digest.update(view)
    else:
        last = len(payload) - _SAMPLE_BYTES
        for index in range(_SAMPLES):
            start = last * index // (_SAMPLES - 1)
            digest.update(view[start : start + _SAMPLE_BYTES])
    return digest.digest()


@dataclass(slots=True)
class _Record:
    strikes: int
    last: float


class Quarantine:
    """See the module. `clock` gives monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: OrderedDict[bytes, _Record] = OrderedDict()

    def __len__(self) -> int:
        return len(self._records)

    def strike(self, request: bytes) -> int:
        """An executor died under this request; returns how often that was."""
        record = self._records.setdefault(request, _Record(0, 0.0))
        record.strikes += 1
        record.last = self._clock()
        self._records.move_to_end(request)
        if len(self._records) > REMEMBERED:
            self._records.popitem(last=False)
        return record.strikes

    def clear(self, request: bytes) -> None:
        """The request ended without harm."""
        if self._records:
            self._records.pop(request, None)

    def forgive(self) -> None:
        """All requests: what they will meet is other code."""
        self._records.clear()

    def is_suspect(self, request: bytes) -> bool:
        """Whether the request must run alone."""
        record = self._current(request)
        return record is not None and record.strikes >= STRIKES - 1

    def refusal(self, request: bytes, function: str) -> Failure | None:
        """The answer to a request in quarantine, else None."""
        record = self._current(request)
        if record is None or record.strikes < STRIKES:
            return None
        minutes = max(1, round((REFUSED_S - (self._clock() - record.last)) / 60))
        safe = f"this request crashed the worker {record.strikes} times"
        detail = f"{function} with this payload killed {record.strikes} executors; refused for {minutes} more minutes"
        return Failure("fatal", safe, detail)

    def _current(self, request: bytes) -> _Record | None:
        """The record, unless its hour is over."""
        record = self._records.get(request) if self._records else None
        if record is not None and self._clock() - record.last >= REFUSED_S:
            del self._records[request]
            return None
        return record
