"""Requests that kill executors: struck, tried alone, refused; and what happens to those beside them."""

from __future__ import annotations

from typing import Any

import pytest

from gen_worker.wire import worker_scheduler_pb2 as pb
from tests.support.rig import Executor, Rig, function, use_recording_children


@pytest.fixture
async def rig(monkeypatch: pytest.MonkeyPatch) -> Any:
    use_recording_children(monkeypatch.setattr)
    made = Rig([function("f"), function("g")])
    yield made
    made.close()


def last(rig: Rig) -> Executor:
    return rig.executors[-1]


def die_and_replace(rig: Rig) -> dict[str, pb.TaskExecutionResult]:
    last(rig).die(-11)
    rig.add_executor()
    return rig.results()


async def test_the_fourth_request_is_refused_with_the_count(rig: Rig) -> None:
    for attempt in range(3):
        rig.submit(f"bad{attempt}", payload=b"\x81\xa1x\x01")
        assert last(rig).runs == [f"bad{attempt}"]
        result = die_and_replace(rig)[f"bad{attempt}"]
        assert (result.error_type, result.retryable) == ("retryable", True)
    assert "for the 3. time with this payload" in result.error_message
    rig.submit("bad3", payload=b"\x81\xa1x\x01")
    refused = rig.results()["bad3"]
    assert (refused.error_type, refused.retryable) == ("fatal", False)
    assert "3 times" in refused.safe_message
    assert "3 executors" in refused.error_message
    assert last(rig).runs == []
    rig.submit("other", payload=b"\x81\xa1x\x02")
    assert last(rig).runs == ["other"]


async def test_a_neighbour_is_not_refused_for_what_the_killer_did(rig: Rig) -> None:
    for attempt in range(2):
        rig.submit(f"bad{attempt}", payload=b"\x01")
        rig.submit(f"good{attempt}", payload=b"\x02")
        assert set(die_and_replace(rig)) == {f"bad{attempt}", f"good{attempt}"}
    # Both have two strikes now, so each is tried alone: the first takes the executor, the other waits for it.
    rig.submit("bad2", payload=b"\x01")
    rig.submit("good2", payload=b"\x02")
    assert last(rig).runs == ["bad2"]
    assert set(die_and_replace(rig)) == {"bad2"}
    assert last(rig).runs == ["good2"]
    last(rig).succeed("good2")
    assert rig.results()["good2"].success
    rig.submit("good3", payload=b"\x02")
    rig.submit("good4", payload=b"\x02")
    assert last(rig).runs == ["good2", "good3", "good4"], "what worked is no suspect any more"


async def strike_twice(rig: Rig, payload: bytes) -> None:
    for attempt in range(2):
        rig.submit(f"strike{attempt}", payload=payload)
        die_and_replace(rig)


async def test_a_suspect_waits_until_an_executor_is_empty_and_nothing_joins_it(rig: Rig) -> None:
    await strike_twice(rig, b"\x01")
    rig.submit("before", "g")
    rig.submit("suspect", payload=b"\x01")
    rig.submit("after", "g")
    assert last(rig).runs == ["before"], "the executor is reserved: it runs empty first"
    last(rig).succeed("before")
    assert last(rig).runs == ["before", "suspect"]
    last(rig).succeed("suspect")
    assert last(rig).runs == ["before", "suspect", "after"]
    assert set(rig.results()) == {"before", "suspect"}


async def test_a_suspect_that_is_canceled_while_it_waits_gives_its_executor_back(rig: Rig) -> None:
    await strike_twice(rig, b"\x01")
    rig.submit("before", "g")
    rig.submit("suspect", payload=b"\x01")
    rig.dispatcher.cancel("suspect")
    rig.submit("after", "g")
    assert last(rig).runs == ["before", "after"]


async def test_a_reserved_executor_that_dies_frees_the_suspect_for_another(rig: Rig) -> None:
    await strike_twice(rig, b"\x01")
    rig.submit("before", "g")
    rig.submit("suspect", payload=b"\x01")
    die_and_replace(rig)
    assert last(rig).runs == ["suspect"]


async def test_other_executors_serve_on_beside_a_suspect(rig: Rig) -> None:
    await strike_twice(rig, b"\x01")
    second = rig.add_executor()
    rig.submit("suspect", payload=b"\x01")
    holder = next(executor for executor in rig.executors if executor.runs == ["suspect"])
    for index in range(3):
        rig.submit(f"r{index}", "g")
    others = [executor for executor in (second, rig.executors[-2]) if executor is not holder]
    assert [executor.runs for executor in others] == [["r0", "r1", "r2"]]


async def test_what_this_supervisor_killed_is_no_strike(rig: Rig) -> None:
    for attempt in range(4):
        rig.submit(f"slow{attempt}", payload=b"\x01")
        last(rig).handle.kill("a deadline of another run")
        result = die_and_replace(rig)[f"slow{attempt}"]
        assert result.error_type == "retryable"
    rig.submit("again", payload=b"\x01")
    assert last(rig).runs == ["again"]
    assert rig.results() == {}


async def test_a_failure_that_the_function_raised_is_no_strike(rig: Rig) -> None:
    from gen_worker.pipe.messages import Failure, Result

    await strike_twice(rig, b"\x01")
    rig.submit("handled", payload=b"\x01")
    last(rig).say(Result(last(rig).key_of("handled"), failure=Failure("validation", "no")))
    rig.submit("one", payload=b"\x01")
    rig.submit("two", payload=b"\x01")
    assert last(rig).runs == ["handled", "one", "two"]


async def poison(rig: Rig, run_id: str) -> None:
    from gen_worker.pipe.messages import Failure, Result

    failure = Failure("retryable", "the device failed", retryable=True)
    last(rig).say(Result(last(rig).key_of(run_id), failure=failure, poisoned=True))


async def test_a_poisoned_executor_takes_no_run_more_not_even_one_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    use_recording_children(monkeypatch.setattr)
    rig = Rig([function("f", limit=1)])
    for run_id in ("bad", "waits"):
        rig.submit(run_id, payload=run_id.encode())
    changes = rig.changes
    await poison(rig, "bad")
    assert last(rig).runs == ["bad"]
    assert rig.changes > changes, "the registration says so at once"
    assert rig.results()["bad"].error_type == "retryable"
    die_and_replace(rig)
    assert last(rig).runs == ["waits"]
    rig.close()


async def test_poison_counts_against_the_run_that_did_it_and_not_its_neighbours(rig: Rig) -> None:
    for attempt in range(3):
        rig.submit(f"bad{attempt}", payload=b"\x01")
        if attempt < 2:  # the third time it runs alone
            rig.submit(f"good{attempt}", payload=b"\x02")
        await poison(rig, f"bad{attempt}")
        die_and_replace(rig)
    rig.submit("bad3", payload=b"\x01")
    assert rig.results()["bad3"].error_type == "fatal"
    for run_id in ("good3", "good4"):
        rig.submit(run_id, payload=b"\x02")
    assert last(rig).runs == ["good3", "good4"], "a neighbour has no strike and need not run alone"


async def test_an_empty_executor_is_taken_before_the_reserved_one(rig: Rig) -> None:
    await strike_twice(rig, b"\x01")
    rig.submit("before", "g")
    busy = last(rig)
    rig.submit("suspect", payload=b"\x01")
    assert busy.runs == ["before"]
    empty = rig.add_executor()
    assert empty.runs == ["suspect"]
    rig.submit("after", "g")
    assert busy.runs == ["before", "after"], "the reservation went with the suspect"
