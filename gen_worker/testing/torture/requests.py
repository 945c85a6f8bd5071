"""What is asked of the worker: one request from one seed, with what may come of it.

Owns: the catalogue of built-in requests, and the requests to a tenant's own functions. Pure. Each built-in payload has
its run's id in it: no two are the same, so none is refused for what an earlier one did to its executor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, Final, Protocol

import msgspec

from gen_worker.errors import ValidationError
from gen_worker.testing.torture import functions
from gen_worker.testing.torture.schemas import payload_for

SUCCESS: Final = "success"
CRASHED: Final = "worker process crashed"
BUSY: Final = "worker busy"
"""The safe_messages of `retryable` results that are no function's doing."""
ERROR_TYPES: Final = frozenset(
    ("validation", "retryable", "resource", "canceled", "fatal", "auth", "internal", "timeout")
)
MAX_ECHO_BYTES: Final = 3 * 1024 * 1024
"""Past the size from which payloads go by shared memory."""


@dataclass(frozen=True, slots=True)
class Request:
    """One request and what it may lead to when nobody interferes."""

    function: str
    payload: bytes
    outcomes: frozenset[str]
    """`success`, or error types."""
    output: bytes | None = None
    """The exact output of a success; None: not looked at."""
    deltas: int | None = None
    """How many deltas a success has, each with its index; None: not looked at."""
    pause_s: float = 0.0
    """Between two of them."""
    incremental: bool = False
    timeout_ms: int | None = None
    """Instead of the plan's, for a request that must be stopped."""
    brief: bool = False
    """It ends by itself within seconds: the plan's long deadline is never what ends it."""
    steady: bool = False
    """Not to be canceled, nor given a short deadline."""
    whole: bool = False
    """A success has all of its deltas, whatever became of streams: the one that broke under it was not read."""


class Workload(Protocol):
    """Where requests come from."""

    def request(self, rng: Random, nonce: str, *, lethal: bool) -> Request:
        """The request that `rng` leads to. `lethal`: one that costs an executor, if there are such."""
        ...


Make = Callable[[Random, str], Request]


class BuiltIn:
    """Requests to the functions of this package."""

    def request(self, rng: Random, nonce: str, *, lethal: bool) -> Request:
        catalogue = _LETHAL if lethal else _TAME
        make = rng.choices(list(catalogue), list(catalogue.values()))[0]
        return make(rng, nonce)


def probe(nonce: str) -> Request:
    """What a worker that serves answers at once, and with success."""
    return _ask("torture_echo", functions.Echo(nonce, b"probe"), functions.Echo(nonce, b"probe"))


def short_rest(nonce: str) -> Request:
    """What is under way when the worker is told to stop."""
    return _ask("torture_rest", functions.Wait(nonce, 0.5), functions.Done(nonce))


def flood(nonce: str) -> Request:
    """More deltas than lie unread in any window: four of these fill those of a stream that is not read."""
    payload = msgspec.msgpack.encode(functions.Parts(nonce, 1500, 4096))
    return Request("torture_count", payload, frozenset((SUCCESS,)), b"", 1500, incremental=True, brief=True, whole=True)


def with_model(nonce: str) -> Request:
    """What a worker answers that can load a model."""
    return _ask("torture_model", functions.Done(nonce), functions.Done(nonce))


def _ask(function: str, payload: msgspec.Struct, output: msgspec.Struct, **more: Any) -> Request:
    encode = msgspec.msgpack.encode
    return Request(function, encode(payload), frozenset((SUCCESS,)), encode(output), brief=True, **more)


def _echo(rng: Random, nonce: str) -> Request:
    echo = functions.Echo(nonce, rng.randbytes(rng.choice((0, 10, 1000, 30_000))))
    return _ask(rng.choice(("torture_echo", "torture_echo", "torture_aecho")), echo, echo)


def _large(rng: Random, nonce: str) -> Request:
    echo = functions.Echo(nonce, rng.randbytes(rng.randint(200_000, MAX_ECHO_BYTES)))
    return _ask(rng.choice(("torture_echo", "torture_aecho")), echo, echo)


def _stream(rng: Random, nonce: str, count: int, size: int, pause_s: float) -> Request:
    payload = msgspec.msgpack.encode(functions.Parts(nonce, count, size, pause_s))
    function = rng.choice(("torture_count", "torture_acount"))
    return Request(function, payload, frozenset((SUCCESS,)), b"", count, pause_s, incremental=True, brief=True)


def _count(rng: Random, nonce: str) -> Request:
    return _stream(rng, nonce, rng.choice((0, 1, 20, 300)), rng.choice((0, 50, 500)), 0.0)


def _trickle(rng: Random, nonce: str) -> Request:
    return _stream(rng, nonce, rng.randint(5, 40), 20, 0.05)


def _torrent(rng: Random, nonce: str) -> Request:
    return _stream(rng, nonce, rng.randint(500, 1500), 4096, 0.0)


def _count_then_fail(rng: Random, nonce: str) -> Request:
    payload = msgspec.msgpack.encode(functions.Parts(nonce, rng.randint(0, 50)))
    return Request("torture_count_then_fail", payload, frozenset(("validation",)), incremental=True)


def _wait(rng: Random, nonce: str) -> Request:
    function = rng.choice(("torture_rest", "torture_sleep", "torture_asleep"))
    return _ask(function, functions.Wait(nonce, rng.uniform(0, 1.5)), functions.Done(nonce))


def _alone(rng: Random, nonce: str) -> Request:
    return _ask("torture_alone", functions.Wait(nonce, rng.uniform(0, 0.1)), functions.Done(nonce), steady=True)


def _talk(rng: Random, nonce: str) -> Request:
    parts = functions.Parts(nonce, rng.randint(1, 10), rng.choice((10, 500)))
    return _ask("torture_talk", parts, functions.Done(nonce))


def _model(_rng: Random, nonce: str) -> Request:
    return with_model(nonce)


def _litter(rng: Random, nonce: str) -> Request:
    litter = functions.Litter(nonce, escapes=rng.choice((True, False)))
    return _ask("torture_litter", litter, functions.Done(nonce))


def _fail(rng: Random, nonce: str) -> Request:
    how = rng.choice(sorted(functions.FAILURES))
    payload = msgspec.msgpack.encode(functions.How(nonce, how))
    return Request("torture_fail", payload, frozenset((functions.FAILURES[how][0],)))


def _broken(rng: Random, _nonce: str) -> Request:
    return Request("torture_echo", rng.choice((b"", b"\xc1", b"\x81\xa5", b"\x80")), frozenset(("validation",)))


def _unknown(rng: Random, nonce: str) -> Request:
    name = f"no_such_function_{rng.randint(0, 9)}"
    return Request(name, msgspec.msgpack.encode(functions.Done(nonce)), frozenset(("validation",)))


def _die(rng: Random, nonce: str) -> Request:
    payload = msgspec.msgpack.encode(functions.How(nonce, rng.choice(functions.DEATHS)))
    return Request("torture_die", payload, frozenset(("retryable",)))


def _stubborn(rng: Random, nonce: str) -> Request:
    payload = msgspec.msgpack.encode(functions.Wait(nonce, 60.0))
    function = rng.choice(("torture_stubborn", "torture_hold_gil"))
    return Request(function, payload, frozenset(("timeout",)), timeout_ms=rng.randint(100, 800))


_TAME: Final[Mapping[Make, int]] = {
    _echo: 35, _large: 6, _count: 12, _trickle: 6, _torrent: 2, _count_then_fail: 3, _wait: 20, _alone: 5, _talk: 5,
    _litter: 3, _model: 6, _fail: 8, _broken: 1, _unknown: 1,
}  # fmt: skip
_LETHAL: Final[Mapping[Make, int]] = {_die: 3, _stubborn: 1}


# -- a tenant's own functions -----------------------------------------------------------------------

_ANYTHING: Final = ERROR_TYPES - {"timeout"} | {SUCCESS}
"""What comes of a tenant's own function is the tenant's affair; a timeout needs a deadline that passed."""


@dataclass(frozen=True, slots=True)
class OwnFunction:
    """A function as the worker registered it; `schema` is its decoded input schema."""

    name: str
    schema: Mapping[str, Any]
    incremental: bool


class OwnFunctions:
    """Payloads made from the functions' schemas. None of these requests is lethal by intent."""

    def __init__(self, known: Sequence[OwnFunction]) -> None:
        """Raises ValidationError when there is no function."""
        if not known:
            raise ValidationError("the worker serves no function that could be run")
        self._known = sorted(known, key=lambda function: function.name)

    def request(self, rng: Random, nonce: str, *, lethal: bool) -> Request:  # noqa: ARG002  (see Workload)
        function = rng.choice(self._known)
        payload = msgspec.msgpack.encode(payload_for(function.schema, rng))
        return Request(function.name, payload, _ANYTHING, incremental=function.incremental)


class GivenPayload(msgspec.Struct, forbid_unknown_fields=True):
    """One line of a --payloads file."""

    function: str
    payload: dict[str, Any]


class GivenPayloads:
    """Payloads from a file, taken at random."""

    def __init__(self, lines: Sequence[GivenPayload], known: Sequence[OwnFunction]) -> None:
        """Raises ValidationError when a line names a function that the worker does not serve."""
        incremental = {function.name: function.incremental for function in known}
        for line in lines:
            if line.function not in incremental:
                served = ", ".join(sorted(incremental)) or "none"
                raise ValidationError(f"the payloads name function {line.function!r}; the worker serves: {served}")
        self._requests = [
            Request(
                line.function,
                msgspec.msgpack.encode(line.payload),
                _ANYTHING,
                incremental=incremental[line.function],
            )
            for line in lines
        ]

    def request(self, rng: Random, nonce: str, *, lethal: bool) -> Request:  # noqa: ARG002  (see Workload)
        return rng.choice(self._requests)


def read_payloads(path: Path) -> list[GivenPayload]:
    """The lines of a --payloads file. Raises ValidationError, which names the file and the line."""
    try:
        text = path.read_bytes()
    except OSError as error:
        raise ValidationError(f"{path} can't be read: {error.strerror}") from error
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                found.append(msgspec.json.decode(line, type=GivenPayload))
            except ValueError as error:
                form = '{"function": NAME, "payload": {...}}'
                raise ValidationError(f"{path}:{number}: {error}; a line is {form}") from error
    if not found:
        raise ValidationError(f"{path} has no payload in it")
    return found
