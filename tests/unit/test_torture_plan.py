"""The torture's plan and its requests follow from the seed alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from random import Random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gen_worker.errors import ValidationError
from gen_worker.testing.torture import functions
from gen_worker.testing.torture.plan import (
    CALM_S,
    STORM_S,
    Converse,
    HurtProcess,
    HurtStream,
    ProcessFault,
    Send,
    StreamFault,
    make_plan,
)
from gen_worker.testing.torture.requests import (
    SUCCESS,
    BuiltIn,
    GivenPayload,
    GivenPayloads,
    OwnFunction,
    OwnFunctions,
    read_payloads,
)

seeds = st.integers(0, 2**32)


@given(seeds, st.floats(1, 40), st.floats(1, 40))
@settings(max_examples=20, deadline=None)
def test_one_seed_one_plan(seed: int, seconds: float, other: float) -> None:
    short, long = make_plan(seed, min(seconds, other)), make_plan(seed, max(seconds, other))
    assert make_plan(seed, short.seconds) == short
    assert long.actions[: len(short.actions)] == short.actions
    assert all(action.at_s < long.seconds for action in long.actions)
    assert all(one.at_s <= two.at_s for one, two in pairwise(long.actions))


def test_other_seeds_other_plans() -> None:
    assert len({make_plan(seed, 5).actions for seed in range(20)}) == 20


def test_everything_happens_sooner_or_later() -> None:
    actions = [action for seed in range(5) for action in make_plan(seed, 120).actions]
    assert {action.fault for action in actions if isinstance(action, HurtStream)} == set(StreamFault)
    assert {action.fault for action in actions if isinstance(action, HurtProcess)} == set(ProcessFault)
    assert sum(isinstance(action, Converse) for action in actions) > 100
    sends = [action for action in actions if isinstance(action, Send)]
    assert any(send.copies > 1 for send in sends)
    assert any(send.cancel_after_s is not None for send in sends)
    assert any(send.lethal for send in sends)


@given(seeds)
@settings(max_examples=8, deadline=None)
def test_executors_are_lost_in_storms_only(seed: int) -> None:
    losses = [
        action.at_s
        for action in make_plan(seed, 300).actions
        if (isinstance(action, Send) and action.lethal) or (isinstance(action, HurtProcess) and action.fault.is_lethal)
    ]
    calms = [two - one for one, two in pairwise(losses) if two - one > STORM_S]
    assert len(losses) <= 4 * STORM_S
    assert len(calms) >= 2
    assert min(calms) >= CALM_S


@given(seeds, st.booleans())
@settings(deadline=None)
def test_built_in_requests(seed: int, lethal: bool) -> None:
    request = BuiltIn().request(Random(seed), "a-run", lethal=lethal)
    assert request == BuiltIn().request(Random(seed), "a-run", lethal=lethal)
    assert request.outcomes
    if SUCCESS in request.outcomes:
        assert request.output is not None
    if lethal:
        assert request.payload != BuiltIn().request(Random(seed), "another", lethal=True).payload


def test_every_built_in_request_has_its_function() -> None:
    requests = [BuiltIn().request(Random(seed), "r", lethal=seed % 2 == 0) for seed in range(1000)]
    names = {request.function for request in requests if not request.function.startswith("no_such_function")}
    assert names | {"torture_socket"} == {name for name in vars(functions) if name.startswith("torture_")}


class TestPayloads:
    known = (OwnFunction("f", {"type": "object", "properties": {}}, incremental=True), OwnFunction("g", {}, False))

    def test_from_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "payloads"
        path.write_text('{"function": "f", "payload": {"a": 1}}\n\n')
        request = GivenPayloads(read_payloads(path), self.known).request(Random(1), "r", lethal=True)
        assert (request.function, msgspec.msgpack.decode(request.payload), request.incremental) == ("f", {"a": 1}, True)

    @pytest.mark.parametrize("text", ["", "{}", "nonsense", '{"function": "f", "payload": 1}', '{"function": "f"}'])
    def test_a_file_that_is_wrong(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "payloads"
        path.write_text(text)
        with pytest.raises(ValidationError, match="payloads"):
            read_payloads(path)

    def test_a_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ValidationError, match="can't be read: No such file"):
            read_payloads(tmp_path / "payloads")

    def test_a_function_that_is_not_served(self) -> None:
        with pytest.raises(ValidationError, match=r"'h'; the worker serves: f, g"):
            GivenPayloads([GivenPayload("h", {})], self.known)

    def test_from_schemas(self) -> None:
        request = OwnFunctions(self.known[:1]).request(Random(1), "r", lethal=False)
        assert (request.function, request.payload, request.incremental) == ("f", b"\x80", True)

    def test_nothing_to_run(self) -> None:
        with pytest.raises(ValidationError, match="no function"):
            OwnFunctions(())
