"""Runs and executors: who gets what, when, and the one result of each run, whatever happens."""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from gen_worker.pipe.arena import BLOB_THRESHOLD_BYTES, ArenaReader, ArenaWriter, create_arena
from gen_worker.pipe.frames import FRAME_CAP_BYTES
from gen_worker.pipe.messages import (
    DELTAS_BYTES,
    EVENT_OVERHEAD_BYTES,
    PIPE_PROTOCOL,
    Blob,
    Cancel,
    Credit,
    Deltas,
    Event,
    Failure,
    Fatal,
    Free,
    FunctionMode,
    LoadModel,
    ModelLoaded,
    ModelUnloaded,
    Ready,
    Result,
    UnloadModel,
)
from gen_worker.pipe.messages import Run as RunMessage
from gen_worker.wire import worker_scheduler_pb2 as pb
from supervisor import executor_handle
from supervisor.dispatcher import WINDOW_BYTES, WINDOW_MIN_BYTES, Limits
from supervisor.executor_handle import HandleState
from supervisor.lanes import TINY_RUNS
from tests.support.rig import Executor, Rig, function, until, use_recording_children

A, B = "cozy:org/a:latest", "cozy:org/b:latest"
LABELS = {"a": A, "b": B}
MakeRig = Callable[..., Rig]


@pytest.fixture
async def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    use_recording_children(monkeypatch.setattr)
    rigs: list[Rig] = []

    def make_rig(*args: Any, **kwargs: Any) -> Rig:
        rigs.append(Rig(*args, **kwargs))
        return rigs[-1]

    yield make_rig
    for rig in rigs:
        rig.close()


@pytest.fixture
def models(make: MakeRig) -> Callable[..., Rig]:
    """A rig with functions f (model a), g (model b), fg (both) and plain (none)."""

    def make_rig(weights: int = 0, **kwargs: Any) -> Rig:
        functions = [
            function("f", models=["a"]),
            function("g", models=["b"]),
            function("fg", models=["a", "b"]),
            function("plain"),
            function("unlimited", "async", models=["a"], limit=0),
        ]
        return make(functions, models={A: weights, B: weights}, labels=LABELS, **kwargs)

    return make_rig


def limits(**values: float) -> Limits:
    return Limits(
        int(values.get("max_concurrency", 0)),
        int(values.get("model_concurrency", 1)),
        values.get("cancel_grace_s", 5.0),
        int(values.get("max_input_bytes", 0)),
    )


def said(result: pb.TaskExecutionResult) -> tuple[str, str, bool]:
    assert not result.success
    return result.error_type, result.safe_message, result.retryable


CANCELED = ("canceled", "canceled", False)
TIMED_OUT = ("timeout", "deadline exceeded", False)
BUSY = ("retryable", "worker busy", True)
CRASHED = ("retryable", "worker process crashed", True)


# -- what is refused at once --------------------------------------------------------------------


async def test_a_run_goes_out_and_its_result_comes_back(make: MakeRig) -> None:
    rig = make([function("f", "async")])
    rig.submit("r1", payload=b"\x81\xa1a\x01", tenant_id="t", user_id="u")
    (executor,) = rig.executors
    (sent,) = executor.sent(RunMessage)
    assert (sent.run_id, sent.function, sent.payload, sent.models) == ("r1", "f", b"\x81\xa1a\x01", {})
    assert (sent.timeout_ms, sent.deadline, sent.tenant_id, sent.user_id) == (0, 0.0, "t", "u")
    assert rig.results() == {}
    executor.succeed("r1", b"\x81\xa1b\x02")
    assert rig.results() == {
        "r1": pb.TaskExecutionResult(run_id="r1", success=True, output_payload=b"\x81\xa1b\x02"),
    }
    assert rig.dispatcher.active == executor.handle.load == 0


async def test_a_failure_is_passed_on(make: MakeRig) -> None:
    rig = make([function()])
    rig.submit("r1")
    (executor,) = rig.executors
    failure = Failure("retryable", "try later", "the store said 503", retryable=True)
    executor.say(Result(executor.key_of("r1"), failure=failure))
    result = rig.results()["r1"]
    assert said(result) == ("retryable", "try later", True)
    assert result.error_message == "the store said 503"


async def test_unknown_function(make: MakeRig) -> None:
    rig = make([function("f"), function("g")])
    rig.submit("r1", "h")
    result = rig.results()["r1"]
    assert said(result) == ("validation", "unknown function", False)
    assert result.error_message == "unknown function 'h'; it serves: f, g"


async def test_empty_run_id(make: MakeRig) -> None:
    rig = make([function()])
    rig.submit("")
    assert said(rig.results()[""]) == ("validation", "run_id is empty", False)
    assert rig.dispatcher.active == 0


async def test_a_duplicate_of_an_active_run_is_ignored(make: MakeRig, caplog: pytest.LogCaptureFixture) -> None:
    rig = make([function()])
    rig.submit("r1")
    rig.submit("r1", "no such function")
    assert rig.executors[0].runs == ["r1"]
    assert rig.results() == {}
    assert "run r1 is active already" in caplog.text
    rig.executors[0].succeed("r1")
    assert list(rig.results()) == ["r1"]
    rig.submit("r1")
    assert rig.executors[0].runs == ["r1", "r1"], "an id may come again when its run has ended"
    assert len({message.key for message in rig.executors[0].sent(RunMessage)}) == 2


async def test_more_than_max_concurrency_is_refused(make: MakeRig) -> None:
    rig = make([function()], limits=limits(max_concurrency=2), threads=1)
    for run_id in ("r1", "r2", "r3"):
        rig.submit(run_id)
    assert {run_id: said(result) for run_id, result in rig.results().items()} == {"r3": BUSY}
    rig.executors[0].succeed("r1")
    rig.submit("r4")
    assert list(rig.results()) == ["r1"]


async def test_input_over_the_limit(make: MakeRig) -> None:
    rig = make([function()], limits=limits(max_input_bytes=10))
    rig.submit("r1", payload=b"x" * 10)
    rig.submit("r2", payload=b"x" * 11)
    result = rig.results()["r2"]
    assert said(result) == ("validation", "input too large", False)
    assert "WORKER_MAX_INPUT_BYTES=10" in result.error_message
    assert rig.executors[0].runs == ["r1"]


async def test_a_request_that_no_frame_holds(make: MakeRig) -> None:
    rig = make([function()])
    rig.submit("r1", user_id="u" * FRAME_CAP_BYTES)
    assert said(rig.results()["r1"]) == ("validation", "request too large", False)
    assert rig.executors[0].handle.load == 0
    rig.submit("r2")
    assert rig.executors[0].runs == ["r2"]


async def test_models_that_are_refused(models: MakeRig) -> None:
    rig = models()
    rig.residency.names.configure([A], {})
    rig.submit("r1", "g")
    rig.submit("r2", "f", required_models=["cozy:org/absent"])
    results = rig.results()
    assert said(results["r1"]) == ("validation", "model not allowed", False)
    assert said(results["r2"]) == ("validation", "model not allowed", False)
    assert rig.executors[0].child.sent == []


# -- large payloads -----------------------------------------------------------------------------


async def test_large_payloads_go_by_shared_memory(make: MakeRig) -> None:
    rig = make([function()])
    (executor,) = rig.executors
    payload = b"p" * BLOB_THRESHOLD_BYTES
    rig.submit("r1", payload=payload)
    (sent,) = executor.sent(RunMessage)
    assert isinstance(sent.payload, Blob)
    assert ArenaReader(executor.child.arena_down._fd).read(sent.payload) == payload
    executor.say(Free(sent.payload.offset))
    output = ArenaWriter(executor.child.arena_up._fd).put(b"o" * BLOB_THRESHOLD_BYTES)
    executor.say(Result(sent.key, output))
    assert executor.sent(Free) == [], "it stays where it is until it is sent"
    assert rig.results()["r1"].output_payload == b"o" * BLOB_THRESHOLD_BYTES
    assert executor.sent(Free) == [], "it may have to be sent again"
    arrived(rig)
    assert executor.sent(Free) == [Free(output.offset)]


def arrived(rig: Rig) -> None:
    """The scheduler has read all that it was sent."""
    rig.dispatcher.outbox.stream_closed()
    rig.dispatcher.outbox.stream_read_to_end()


async def test_a_large_output_that_waits_outlives_its_executor(make: MakeRig) -> None:
    rig = make([function()])
    (executor,) = rig.executors
    rig.submit("r1")
    writer = ArenaWriter(os.dup(executor.child.arena_up._fd))
    executor.say(Result(executor.key_of("r1"), writer.put(b"o" * BLOB_THRESHOLD_BYTES)))
    writer.close()
    executor.child.arena_up.close()
    executor.die()
    assert rig.results()["r1"].output_payload == b"o" * BLOB_THRESHOLD_BYTES
    rig.dispatcher.outbox.stream_closed()
    assert rig.results()["r1"].output_payload == b"o" * BLOB_THRESHOLD_BYTES, "once more, whatever became of the first"
    arrived(rig)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(executor.child.arena_up._fd)
    executor.child.arena_up = ArenaReader(create_arena("up"))  # for the rig to close


@pytest.mark.parametrize("canceled", [True, False])
async def test_a_large_output_that_nobody_wants_is_given_back(make: MakeRig, canceled: bool) -> None:
    rig = make([function()])
    (executor,) = rig.executors
    rig.submit("r1")
    key = executor.key_of("r1") if canceled else 4711
    if canceled:
        rig.dispatcher.cancel("r1")
    output = ArenaWriter(executor.child.arena_up._fd).put(b"o" * BLOB_THRESHOLD_BYTES)
    executor.say(Result(key, output))
    assert executor.sent(Free) == [Free(output.offset)]


async def test_no_shared_memory_for_a_payload(make: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make([function()])

    def put(data: bytes) -> Blob:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(rig.executors[0].child.arena_down, "put", put)
    rig.submit("r1", payload=b"p" * BLOB_THRESHOLD_BYTES)
    result = rig.results()["r1"]
    assert said(result) == ("resource", "out of memory", False)
    assert "Cannot allocate memory" in result.error_message
    assert rig.executors[0].handle.load == 0


async def test_an_output_that_no_stream_takes(make: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executor_handle, "OUTPUT_CAP_BYTES", BLOB_THRESHOLD_BYTES)
    rig = make([function()])
    (executor,) = rig.executors
    rig.submit("r1")
    output = ArenaWriter(executor.child.arena_up._fd).put(b"o" * (BLOB_THRESHOLD_BYTES + 1))
    executor.say(Result(executor.key_of("r1"), output))
    assert said(rig.results()["r1"]) == ("validation", "output too large", False)
    assert executor.sent(Free) == [Free(output.offset)]


# -- who gets a run -----------------------------------------------------------------------------


async def test_runs_wait_for_the_first_executor(make: MakeRig) -> None:
    rig = make([function("f", "async")])
    (first,) = rig.executors
    first.handle.drain()
    rig.submit("r1")
    rig.submit("r2")
    assert first.runs == []
    second = rig.add_executor()
    assert second.runs == ["r1", "r2"]


async def test_tiny_runs_are_not_spread(make: MakeRig) -> None:
    rig = make([function("f"), function("g")], executors=2)
    first, second = rig.executors
    rig.submit("r0")
    first.say(Result(first.key_of("r0"), b"\x80", tiny=True))
    for number in range(1, TINY_RUNS + 3):
        rig.submit(f"r{number}")
    assert (first.handle.load, second.handle.load) == (TINY_RUNS, 2), "no more than that wait there"
    rig.submit("other", function="g")
    assert "other" in second.runs, "what is not tiny goes to the least loaded"
    first.succeed("r1")
    rig.submit("spread")
    assert "spread" in second.runs, "its executor takes the word back"


async def test_tiny_runs_go_elsewhere_when_their_executor_is_gone(make: MakeRig) -> None:
    rig = make([function("f")], executors=2)
    first, second = rig.executors
    rig.submit("r0")
    first.say(Result(first.key_of("r0"), b"\x80", tiny=True))
    first.die()
    rig.submit("r1")
    rig.submit("r2")
    assert second.runs == ["r1", "r2"]


async def test_the_least_loaded_gets_it(make: MakeRig) -> None:
    rig = make([function("f", "async")], executors=3)
    for number in range(9):
        rig.submit(f"r{number}")
    assert [each.handle.load for each in rig.executors] == [3, 3, 3]
    for run_id in rig.executors[1].runs:
        rig.executors[1].succeed(run_id)
    for number in range(9, 12):
        rig.submit(f"r{number}")
    assert [each.handle.load for each in rig.executors] == [3, 3, 3]


async def test_function_limits_hold_per_executor(make: MakeRig) -> None:
    rig = make([function("f", "async", limit=2), function("g", "async")], executors=2)
    for number in range(6):
        rig.submit(f"f{number}")
    assert [each.handle.load for each in rig.executors] == [2, 2]
    rig.submit("g0", "g")
    assert "g0" in rig.executors[0].runs, "another function passes"
    rig.executors[1].succeed(rig.executors[1].runs[0])
    assert rig.executors[1].runs[-1] == "f4"


async def test_thread_limits_hold_for_functions_that_take_a_thread(make: MakeRig) -> None:
    rig = make([function("s"), function("gen", "generator"), function("a", "async")], threads=2)
    (executor,) = rig.executors
    for run_id, name in [("s0", "s"), ("g0", "gen"), ("s1", "s"), ("g1", "gen"), ("a0", "a")]:
        rig.submit(run_id, name)
    assert executor.runs == ["s0", "g0", "a0"]
    executor.succeed("a0")
    assert executor.runs == ["s0", "g0", "a0"]
    executor.succeed("g0")
    assert executor.runs == ["s0", "g0", "a0", "s1"], "the one that came first"
    executor.succeed("s0")
    assert executor.runs[-1] == "g1"


async def test_a_lane_is_first_in_first_out(make: MakeRig) -> None:
    rig = make([function("f", limit=1)])
    (executor,) = rig.executors
    ids = [f"r{number}" for number in range(20)]
    for run_id in ids:
        rig.submit(run_id)
    for run_id in ids:
        assert executor.runs[-1] == run_id
        executor.succeed(run_id)
    assert list(rig.results()) == ids


async def test_an_executor_that_does_not_read_gets_nothing(make: MakeRig) -> None:
    rig = make([function("f", "async")], executors=2)
    rig.executors[0].child.writable = False
    for number in range(3):
        rig.submit(f"r{number}")
    assert [each.handle.load for each in rig.executors] == [0, 3]
    rig.executors[1].child.writable = False
    rig.submit("r3")
    assert [each.handle.load for each in rig.executors] == [0, 3]
    rig.executors[0].child.writable = True
    rig.executors[0].child.on_writable()
    assert rig.executors[0].runs == ["r3"]


# -- models -------------------------------------------------------------------------------------


async def test_a_run_waits_for_its_model_while_others_pass(models: MakeRig) -> None:
    rig = models()
    (executor,) = rig.executors
    rig.submit("f0", "f")
    rig.submit("f1", "f")
    assert [message.model_id for message in executor.sent(LoadModel)] == [A]
    rig.submit("p0", "plain")
    assert executor.runs == ["p0"]
    executor.load_done(A)
    assert executor.runs == ["p0", "f0"], "one at a time by WORKER_MODEL_CONCURRENCY"
    assert executor.sent(RunMessage)[-1].models == {"p0": A}
    executor.succeed("f0")
    assert executor.runs[-1] == "f1"
    assert len(executor.sent(LoadModel)) == 1


async def test_two_models(models: MakeRig) -> None:
    rig = models()
    (executor,) = rig.executors
    rig.submit("r", "fg")
    assert executor.loads == [A], "one at a time, so that each can be measured"
    executor.load_done(A)
    assert executor.loads == [A, B]
    assert executor.runs == []
    executor.load_done(B)
    assert executor.runs == ["r"]
    assert executor.sent(RunMessage)[0].models == {"p0": A, "p1": B}


async def test_the_executor_with_the_hot_model_goes_first(models: MakeRig) -> None:
    rig = models(executors=2)
    first, second = rig.executors
    rig.submit("f0", "f")
    first.load_done(A)
    first.succeed("f0")
    for number in range(5):
        rig.submit(f"p{number}", "plain")
    assert first.handle.load >= second.handle.load
    rig.submit("f1", "f")
    assert first.runs[-1] == "f1", "although it has more to do"
    assert second.sent(LoadModel) == []


async def test_a_second_executor_loads_only_on_demand(models: MakeRig) -> None:
    rig = models(executors=3)
    first, second, third = rig.executors
    rig.submit("f0", "f")
    first.load_done(A)
    first.succeed("f0")
    rig.submit("f1", "f")
    assert first.runs == ["f0", "f1"]
    assert second.sent(LoadModel) == [], "the first has room"
    rig.submit("f2", "f")
    assert [message.model_id for message in second.sent(LoadModel)] == [A], "the first may be busy for long"
    assert third.sent(LoadModel) == [], "the second is on its way, for the one that waits"
    rig.submit("f3", "f")
    assert [message.model_id for message in third.sent(LoadModel)] == [A]
    second.load_done(A)
    assert second.runs == ["f2"]
    first.succeed("f1")
    assert first.runs == ["f0", "f1", "f3"]


async def test_a_busy_executor_is_no_second_one(models: MakeRig) -> None:
    rig = models(executors=2)
    first, second = rig.executors
    rig.submit("p0", "plain")
    rig.submit("p1", "plain")
    first.succeed("p0")
    rig.submit("f0", "f")
    for number in range(1, 5):
        rig.submit(f"f{number}", "f")
    assert len(first.sent(LoadModel)) == 1
    assert second.sent(LoadModel) == [], "it has a run that the load would slow down"


async def test_required_models_have_lanes_of_their_own(models: MakeRig) -> None:
    rig = models(executors=2)
    first, second = rig.executors
    rig.submit("r0", "f")
    rig.submit("r1", "f", required_models=["b"])
    loads = [message.model_id for each in rig.executors for message in each.sent(LoadModel)]
    assert sorted(loads) == [A, B]
    holder = first if first.sent(LoadModel)[-1].model_id == B else second
    holder.load_done(B)
    assert holder.runs == ["r1"]
    assert holder.sent(RunMessage)[0].models == {"p0": B}


async def test_a_load_that_fails_answers_who_waits(models: MakeRig) -> None:
    rig = models()
    (executor,) = rig.executors
    for run_id, name in [("f0", "f"), ("fg0", "fg"), ("g0", "g"), ("f1", "f")]:
        rig.submit(run_id, name)
    executor.say(ModelLoaded(A, "t.T", 0, 0.1, Failure("resource", "out of memory", "weights of 90 GiB")))
    results = rig.results()
    assert {run_id: said(result) for run_id, result in results.items()} == dict.fromkeys(
        ["f0", "fg0", "f1"], ("resource", "out of memory", False)
    )
    assert results["f0"].error_message == "weights of 90 GiB"
    executor.load_done(B)
    assert executor.runs == ["g0"]
    rig.submit("f2", "f")
    assert [message.model_id for message in executor.sent(LoadModel)] == [A, B, A], "the next run tries again"


async def test_a_load_that_fails_where_it_was_not_needed_harms_no_run(models: MakeRig) -> None:
    rig = models(executors=2)
    first, second = rig.executors
    for number in range(3):
        rig.submit(f"f{number}", "f")
        if number == 0:
            first.load_done(A)
    assert len(second.sent(LoadModel)) == 1
    second.say(ModelLoaded(A, "t.T", 0, 0.1, Failure("resource", "out of memory")))
    assert rig.results() == {}
    assert len(second.sent(LoadModel)) == 1, "nor is it tried there again while another serves"
    for number in range(3):
        assert first.runs[-1] == f"f{number}"
        first.succeed(f"f{number}")
    assert sorted(rig.results()) == ["f0", "f1", "f2"]


async def test_an_executor_that_dies_while_it_loads(models: MakeRig) -> None:
    rig = models()
    rig.submit("f0", "f")
    rig.submit("g0", "g")
    rig.executors[0].die(-9)
    results = rig.results()
    assert {run_id: said(result) for run_id, result in results.items()} == {"f0": CRASHED}
    replacement = rig.add_executor()
    assert replacement.loads == [B], "its load had not begun: it goes on elsewhere"
    assert "killed by SIGKILL while it loaded" in results["f0"].error_message
    assert "line 2" in results["f0"].error_message


async def test_another_executor_takes_over_when_the_one_with_the_model_dies(models: MakeRig) -> None:
    rig = models(executors=2)
    first, second = rig.executors
    rig.submit("f0", "f")
    first.load_done(A)
    rig.submit("f1", "f")
    first.die()
    assert list(rig.results()) == ["f0"]
    assert [message.model_id for message in second.sent(LoadModel)] == [A]
    second.load_done(A)
    assert second.runs == ["f1"]


# -- load and unload commands -------------------------------------------------------------------


def answers(rig: Rig) -> list[tuple[str, str, str]]:
    """(kind, model_id, error) of what commands were answered."""
    found = []
    for message in rig.messages():
        kind = message.WhichOneof("msg")
        if kind in ("load_model_result", "unload_model_result"):
            answer = getattr(message, kind)
            assert answer.success is not bool(answer.error_message)
            found.append((kind.removesuffix("_model_result"), answer.model_id, answer.error_message))
    return found


async def test_load_command(models: MakeRig) -> None:
    rig = models(executors=2)
    rig.submit("p0", "plain")
    rig.dispatcher.commands.load("a")
    first, second = rig.executors
    assert first.sent(LoadModel) == []
    assert [message.model_id for message in second.sent(LoadModel)] == [A], "the least loaded"
    rig.dispatcher.commands.load("org/a")
    assert first.sent(LoadModel) == [], "it is under way"
    assert answers(rig) == []
    second.load_done(A)
    assert answers(rig) == [("load", "a", ""), ("load", "org/a", "")]
    rig.dispatcher.commands.load(A)
    assert answers(rig) == [("load", A, "")]
    assert len(second.sent(LoadModel)) == 1


async def test_load_command_for_a_model_of_several_types(make: MakeRig) -> None:
    from gen_worker.pipe.messages import FunctionInfo, InjectionInfo

    functions = [
        FunctionInfo(name, "sync", injections=(InjectionInfo("p", name, "deployment", "a"),)) for name in ("t.X", "t.Y")
    ]
    rig = make(functions, models=[A], labels=LABELS)
    (executor,) = rig.executors
    rig.dispatcher.commands.load("a")
    assert [message.type_name for message in executor.sent(LoadModel)] == ["t.X"]
    executor.load_done(A, "t.X")
    assert [message.type_name for message in executor.sent(LoadModel)] == ["t.X", "t.Y"]
    assert answers(rig) == []
    executor.load_done(A, "t.Y")
    assert answers(rig) == [("load", "a", "")]


async def test_load_commands_that_can_not_succeed(models: MakeRig, make: MakeRig) -> None:
    rig = models()
    rig.dispatcher.commands.load("cozy:org/absent")
    ((kind, name, error),) = answers(rig)
    assert (kind, name) == ("load", "cozy:org/absent")
    assert "is not on this host" in error
    rig.dispatcher.commands.load("a")
    rig.executors[0].say(ModelLoaded(A, "t.T", 0, 0.1, Failure("resource", "out of memory")))
    assert answers(rig) == [("load", "a", "out of memory")]
    rig.dispatcher.commands.load("a")
    rig.executors[0].die()
    ((_, _, error),) = answers(rig)
    assert "killed by SIGKILL while it loaded cozy:org/a:latest" in error
    rig.dispatcher.commands.load("a")
    assert answers(rig) == [("load", "a", "no executor is ready")]
    rig = make([function()], models=[A])
    rig.dispatcher.commands.load(A)
    assert answers(rig) == [("load", A, "no function of this worker takes a model")]


async def test_unload_command(models: MakeRig) -> None:
    rig = models(executors=2)
    for executor in rig.executors:
        rig.residency.load(executor.handle, [(A, "t.T")])
        executor.load_done(A)
    rig.dispatcher.commands.unload("a")
    rig.dispatcher.commands.unload(A)
    first, second = rig.executors
    assert first.sent(UnloadModel) == second.sent(UnloadModel) == [UnloadModel(A)]
    first.say(ModelUnloaded(A, 1000))
    assert answers(rig) == []
    second.say(ModelUnloaded(A, 1000))
    assert answers(rig) == [("unload", "a", ""), ("unload", A, "")]
    assert rig.residency.hot_models() == []
    rig.dispatcher.commands.unload("a")
    assert answers(rig) == [("unload", "a", "")], "nothing to do"


async def test_a_model_that_is_not_allowed_any_more_can_be_unloaded(models: MakeRig) -> None:
    rig = models()
    (executor,) = rig.executors
    rig.dispatcher.commands.load("a")
    executor.load_done(A)
    rig.residency.names.configure([B], {})
    assert answers(rig) == [("load", "a", "")]
    rig.dispatcher.commands.unload("a")
    assert executor.unloads == [A]
    executor.unload_done(A)
    assert answers(rig) == [("unload", "a", "")]
    rig.dispatcher.commands.unload("a")
    ((_, _, error),) = answers(rig)
    assert "is not on this deployment's allowlist" in error


async def test_unload_of_what_is_used_or_being_loaded(models: MakeRig) -> None:
    rig = models()
    (executor,) = rig.executors
    rig.submit("f0", "f")
    rig.submit("f1", "f")
    rig.dispatcher.commands.unload("a")
    assert answers(rig) == [], "it is being loaded"
    executor.load_done(A)
    assert executor.runs == ["f0"], "what waited for the load gets it"
    assert executor.unloads == []
    assert answers(rig) == [], "it is in use"
    executor.succeed("f0")
    assert executor.runs == ["f0"], "those that come meanwhile queue"
    assert executor.unloads == [A]
    assert rig.residency.hot_models() == []
    executor.unload_done(A)
    assert ("unload", "a", "") in answers(rig)
    assert executor.loads == [A, A], "for the one that queued"
    executor.load_done(A)
    assert executor.runs == ["f0", "f1"]


async def test_an_unload_that_fails_leaves_the_model(models: MakeRig) -> None:
    rig = models()
    (executor,) = rig.executors
    rig.dispatcher.commands.load("a")
    executor.load_done(A)
    rig.dispatcher.commands.unload("a")
    executor.say(ModelUnloaded(A, 0, Failure("internal", "internal error", "still used")))
    assert answers(rig) == [("load", "a", ""), ("unload", "a", "still used")]
    rig.submit("f1", "f")
    assert executor.runs == ["f1"], "it still has it"


async def test_a_failure_without_words_is_still_a_failure(models: MakeRig) -> None:
    rig = models()
    rig.dispatcher.commands.load("a")
    rig.executors[0].say(ModelLoaded(A, "t.T", 0, 0.1, Failure("internal", "")))
    assert answers(rig) == [("load", "a", "internal")]


async def test_a_run_that_comes_during_an_unload_gets_the_model_again(models: MakeRig) -> None:
    rig = models()
    (executor,) = rig.executors
    rig.dispatcher.commands.load("a")
    executor.load_done(A)
    rig.dispatcher.commands.unload("a")
    rig.submit("f0", "f")
    rig.dispatcher.commands.load("a")
    assert executor.runs == [], "the model is on its way out"
    answers(rig)
    executor.say(ModelUnloaded(A, 1000))
    assert len(executor.sent(LoadModel)) == 2
    executor.load_done(A)
    assert executor.runs == ["f0"]
    assert answers(rig) == [("unload", "a", ""), ("load", "a", "")]


async def test_the_only_executor_dies_during_an_unload(models: MakeRig) -> None:
    rig = models()
    (executor,) = rig.executors
    rig.dispatcher.commands.load("a")
    executor.load_done(A)
    rig.dispatcher.commands.unload("a")
    answers(rig)
    executor.die()
    assert answers(rig) == [("unload", "a", "")], "it is out of memory for sure"


# -- cancels and deadlines ----------------------------------------------------------------------


async def test_cancel_of_a_queued_run(make: MakeRig) -> None:
    rig = make([function("f", limit=1)])
    (executor,) = rig.executors
    for run_id in ("r0", "r1", "r2", "r3"):
        rig.submit(run_id)
    rig.dispatcher.cancel("r1")
    rig.dispatcher.cancel("r3")
    assert {run_id: said(result) for run_id, result in rig.results().items()} == {"r1": CANCELED, "r3": CANCELED}
    executor.succeed("r0")
    executor.succeed("r2")
    assert executor.runs == ["r0", "r2"]
    assert executor.sent(Cancel) == []


async def test_canceled_runs_are_kept_nowhere(make: MakeRig) -> None:
    rig = make([function("f", limit=1)])
    for number in range(100):
        rig.submit(f"r{number}")
    for number in range(1, 100):
        rig.dispatcher.cancel(f"r{number}")
    assert rig.dispatcher.active == 1
    assert [len(lane.waiting) for lane in rig.dispatcher.lanes._lanes.values()] == [0]


async def test_cancel_of_a_run_that_waits_for_its_model(models: MakeRig) -> None:
    rig = models()
    rig.submit("f0", "f")
    rig.dispatcher.cancel("f0")
    assert said(rig.results()["f0"]) == CANCELED
    rig.executors[0].load_done(A)
    assert rig.executors[0].runs == []


async def test_cancel_of_a_running_run_asks_the_executor(make: MakeRig) -> None:
    rig = make([function()])
    (executor,) = rig.executors
    rig.submit("r0")
    rig.dispatcher.cancel("r0")
    rig.dispatcher.cancel("r0")
    key = executor.key_of("r0")
    assert executor.sent(Cancel) == [Cancel(key, "canceled")]
    assert rig.results() == {}
    executor.say(Result(key, b"late but whole"))
    result = rig.results()["r0"]
    assert said(result) == CANCELED, "whatever its function made of it"
    assert executor.child.killed == []


async def test_cancel_of_an_unknown_run(make: MakeRig) -> None:
    rig = make([function()])
    rig.dispatcher.cancel("nobody")
    assert rig.messages() == []


async def test_a_run_that_ignores_its_cancel(make: MakeRig) -> None:
    rig = make([function()], limits=limits(cancel_grace_s=0.01))
    (executor,) = rig.executors
    rig.submit("r0")
    rig.submit("sibling")
    rig.dispatcher.cancel("r0")
    await until(lambda: bool(executor.child.killed))
    (reason,) = executor.child.killed
    assert reason == "run r0 of f did not end within 0.01 s of its cancel"
    assert executor.handle.state is HandleState.DRAINING
    result = rig.results()["r0"]
    assert said(result) == CANCELED
    assert "its executor was killed" in result.error_message
    rig.submit("r1")
    assert executor.runs == ["r0", "sibling"], "nothing goes to an executor that is being killed"
    executor.say(Result(executor.key_of("r0"), b"too late"))
    assert rig.results() == {}
    executor.die(-9, reason)
    result = rig.results()["sibling"]
    assert said(result) == CRASHED
    assert "killed by SIGKILL (run r0 of f did not end" in result.error_message


async def test_a_result_within_the_grace_time_saves_the_executor(make: MakeRig) -> None:
    rig = make([function()], limits=limits(cancel_grace_s=0.01))
    (executor,) = rig.executors
    rig.submit("r0")
    rig.dispatcher.cancel("r0")
    executor.succeed("r0")
    rig.submit("marker")
    rig.dispatcher.cancel("marker")
    await until(lambda: bool(executor.child.killed))
    assert "marker" in executor.child.killed[0], "the later timer fired, the first one did not"
    assert len(executor.child.killed) == 1


async def test_deadline_of_a_queued_run(make: MakeRig) -> None:
    rig = make([function("f", limit=1)])
    rig.submit("r0")
    rig.submit("r1", timeout_ms=5)
    await until(lambda: rig.dispatcher.active == 1)
    result = rig.results()["r1"]
    assert said(result) == TIMED_OUT
    assert "timeout_ms of 5" in result.error_message
    assert rig.executors[0].sent(Cancel) == []


async def test_deadline_of_a_run_that_waits_for_its_model(models: MakeRig) -> None:
    rig = models()
    rig.submit("f0", "f", timeout_ms=5)
    await until(lambda: rig.dispatcher.active == 0)
    assert said(rig.results()["f0"]) == TIMED_OUT


async def test_deadline_of_a_running_run(make: MakeRig) -> None:
    rig = make([function()], limits=limits(cancel_grace_s=0.01))
    (executor,) = rig.executors
    rig.submit("r0", timeout_ms=5)
    await until(lambda: bool(executor.sent(Cancel)))
    assert executor.sent(Cancel) == [Cancel(executor.key_of("r0"), "timeout")]
    rig.dispatcher.cancel("r0")
    await until(lambda: bool(executor.child.killed))
    assert "did not end within 0.01 s of its deadline" in executor.child.killed[0]
    assert said(rig.results()["r0"]) == TIMED_OUT, "the first cause stays"


async def test_the_executor_is_told_the_deadline_as_it_counts_from_arrival(make: MakeRig) -> None:
    rig = make([function("f", limit=1)])
    (executor,) = rig.executors
    rig.submit("r0")
    before = time.time()
    rig.submit("r1", timeout_ms=60_000)
    after = time.time()
    await asyncio.sleep(0.02)
    executor.succeed("r0")
    (_, sent) = executor.sent(RunMessage)
    assert before + 60 - 0.005 <= sent.deadline <= after + 60 + 0.005
    assert sent.timeout_ms == 60_000


@pytest.mark.parametrize("timeout_ms", [-5, 0, 2**63 - 1])
async def test_extreme_timeouts(make: MakeRig, timeout_ms: int) -> None:
    rig = make([function()])
    rig.submit("r0", timeout_ms=timeout_ms)
    await asyncio.sleep(0)
    assert rig.executors[0].runs == ["r0"]
    assert rig.executors[0].sent(RunMessage)[0].timeout_ms == max(0, timeout_ms)
    rig.executors[0].succeed("r0")
    assert rig.results()["r0"].success


async def test_a_deadline_that_passed_after_the_end_does_nothing(make: MakeRig) -> None:
    rig = make([function()])
    rig.submit("r0", timeout_ms=5)
    rig.executors[0].succeed("r0")
    rig.submit("r1", timeout_ms=10)
    await until(lambda: len(rig.executors[0].sent(Cancel)) == 1)
    assert rig.executors[0].sent(Cancel)[0].key == rig.executors[0].key_of("r1")
    assert list(rig.results()) == ["r0"]


# -- the end of an executor ---------------------------------------------------------------------


async def test_an_executor_that_dies_answers_each_run_once(make: MakeRig) -> None:
    rig = make([function("f", "async")], executors=2)
    first, second = rig.executors
    for number in range(6):
        rig.submit(f"r{number}")
    assert first.runs == ["r0", "r2", "r4"]
    rig.dispatcher.cancel("r2")
    first.succeed("r4")
    first.die(-11)
    results = rig.results()
    assert results.pop("r4").success
    assert {run_id: said(result) for run_id, result in results.items()} == {"r0": CRASHED, "r2": CANCELED}
    assert results["r0"].error_message == (
        "executor 0 (pid 4711) killed by SIGSEGV while it ran f; last lines:\nline 1\nline 2"
    )
    first.die(-11)
    assert rig.results() == {}
    assert second.handle.load == 3
    assert rig.changes >= 3


@pytest.mark.parametrize("end", ["dies", "canceled", "had not started", "says it itself", "is no stream"])
async def test_a_stream_that_its_executor_can_not_end_is_ended_for_it(make: MakeRig, end: str) -> None:
    mode: FunctionMode = "sync" if end == "is no stream" else "generator"
    rig = make([function(mode=mode, limit=1)], limits=Limits(0, 1, 0.0, 0))
    (executor,) = rig.executors
    rig.submit("r0")
    rig.submit("r1")
    key = executor.key_of("r0")
    executor.say(Event(key, "output.delta", b"{}"))
    if end == "had not started":
        rig.dispatcher.cancel("r1")
    elif end == "canceled":
        rig.dispatcher.cancel("r0")
        await until(lambda: rig.dispatcher.active < 2)
    elif end == "says it itself":
        executor.say(Event(key, "output.error", b'{"its":"own"}'))
        executor.say(Result(key, failure=Failure("validation", "no")))
    else:
        executor.die()
    said = rig.messages()
    (run_id,) = {message.run_result.run_id for message in said if message.HasField("run_result")}
    own = [m for m in said if run_id in {m.run_result.run_id, m.worker_event.run_id}]
    assert own[-1].HasField("run_result")
    errors = [m.worker_event.payload_json for m in own if m.worker_event.event_type == "output.error"]
    expected = {
        "dies": [b'{"error_type":"retryable","message":"worker process crashed"}'],
        "canceled": [b'{"error_type":"canceled","message":"canceled"}'],
        "had not started": [b'{"error_type":"canceled","message":"canceled"}'],
        "says it itself": [b'{"its":"own"}'],
        "is no stream": [],
    }
    assert errors == expected[end]


async def test_messages_of_the_dead_and_of_ended_runs_reach_no_one(make: MakeRig) -> None:
    rig = make([function("f", "async")], executors=2)
    first, second = rig.executors
    rig.submit("r0")
    key = first.key_of("r0")
    second.say(Result(key, b"not mine"))
    second.say(Event(key, "job.log", b"{}"))
    assert rig.messages() == [], "an executor speaks of its own runs only"
    first.say(Result(key, b"1"))
    first.say(Result(key, b"2"))
    first.say(Event(key, "job.log", b"{}"))
    first.say(Result(99, b"3"))
    assert [message.run_result.output_payload for message in rig.messages()] == [b"1"]


@pytest.mark.parametrize("frame", [b"", b"\xc1", b"\x92\x16\x01\x02", b"\x94\x15\x01\xa2\xff\xff\xc4\x00"])
async def test_a_message_that_is_none_kills_its_executor_only(make: MakeRig, frame: bytes) -> None:
    rig = make([function("f", "async")], executors=2)
    first, second = rig.executors
    first.child.on_frame(frame)
    (reason,) = first.child.killed
    assert reason.startswith("it sent a message that is not one: ")
    for number in range(3):
        rig.submit(f"r{number}")
    assert second.runs == ["r0", "r1", "r2"]


async def test_blobs_that_are_none_kill_the_executor(make: MakeRig) -> None:
    rig = make([function("f", "async")])
    (executor,) = rig.executors
    rig.submit("r0")
    executor.say(Result(executor.key_of("r0"), Blob(0, 100)))
    executor.say(Free(0))
    assert all(reason.startswith("it broke its shared memory: ") for reason in executor.child.killed)
    assert len(executor.child.killed) == 2
    executor.die()
    assert said(rig.results()["r0"]) == CRASHED


async def test_a_ready_that_comes_twice_or_in_another_protocol(make: MakeRig) -> None:
    rig = make([function()], executors=2, ready=False)
    first, second = rig.executors
    first.say(Ready(PIPE_PROTOCOL + 1, rig.functions, {}))
    assert "speaks pipe protocol" in first.child.killed[0]
    second.say(Ready(PIPE_PROTOCOL, rig.functions, {}))
    second.say(Ready(PIPE_PROTOCOL, rig.functions, {}))
    assert second.child.killed == ["it said twice that it is ready"]


async def test_an_executor_that_was_killed_before_it_was_ready_gets_no_runs(make: MakeRig) -> None:
    rig = make([function()], ready=False)
    (executor,) = rig.executors
    executor.handle.kill("the worker shuts down")
    rig.submit("r0")
    executor.say(Ready(PIPE_PROTOCOL, rig.functions, {}))
    assert executor.runs == []
    assert executor.handle.state is HandleState.DRAINING


async def test_fatal_takes_no_more_runs_and_is_followed_by_the_end(
    make: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executor_handle, "LEAVE_S", 0.01)
    rig = make([function("f", "async")])
    (executor,) = rig.executors
    rig.submit("r0")
    executor.say(Fatal("poisoned", "illegal memory access"))
    rig.submit("r1")
    assert executor.runs == ["r0"]
    assert executor.child.killed == []
    await until(lambda: bool(executor.child.killed))
    assert executor.child.killed == ["it stayed after it said that it leaves"]


# -- events and credits -------------------------------------------------------------------------


async def test_events_precede_the_result_and_are_credited_when_they_went_out(make: MakeRig) -> None:
    rig = make([function("f", "async_generator")])
    (executor,) = rig.executors
    rig.submit("r0")
    key = executor.key_of("r0")
    for number in range(3):
        executor.say(Event(key, "output.delta", b'{"n":%d}' % number))
    assert executor.sent(Credit) == []
    sent = rig.messages()
    assert [message.worker_event.payload_json for message in sent] == [b'{"n":0}', b'{"n":1}', b'{"n":2}']
    assert {(message.worker_event.run_id, message.worker_event.event_type) for message in sent} == {
        ("r0", "output.delta")
    }
    assert executor.sent(Credit) == [Credit(key, 3 * (7 + EVENT_OVERHEAD_BYTES))]
    executor.say(Event(key, "output.completed", b"{}"))
    executor.succeed("r0", b"")
    assert [message.WhichOneof("msg") for message in rig.messages()] == ["worker_event", "run_result"]
    assert len(executor.sent(Credit)) == 1, "a run that has ended needs no credit"


async def test_deltas_that_come_together_go_out_as_events_in_order(make: MakeRig) -> None:
    rig = make([function("f", "async_generator")])
    (executor,) = rig.executors
    rig.submit("r0")
    key = executor.key_of("r0")
    executor.say(Event(key, "output.delta", b"0"))
    executor.say(Deltas(key, (b"11", b"", b"2")))
    executor.say(Event(key, "job.log", b"{}"))
    executor.succeed("r0", b"")
    *events, result = rig.messages()
    assert [(message.worker_event.event_type, message.worker_event.payload_json) for message in events] == [
        ("output.delta", b"0"), ("output.delta", b"11"), ("output.delta", b""), ("output.delta", b"2"),
        ("job.log", b"{}"),
    ]  # fmt: skip
    assert {message.worker_event.run_id for message in events} == {"r0"}
    assert result.run_result.success


async def test_deltas_are_credited_like_events(make: MakeRig) -> None:
    rig = make([function("f", "async_generator")])
    (executor,) = rig.executors
    rig.submit("r0")
    key = executor.key_of("r0")
    executor.say(Deltas(key, (b"11", b"", b"2")))
    rig.messages()
    assert executor.sent(Credit) == [Credit(key, 3 + 3 * EVENT_OVERHEAD_BYTES)]


@pytest.mark.parametrize("count", [0, DELTAS_BYTES // EVENT_OVERHEAD_BYTES + 1])
async def test_more_deltas_at_once_than_there_may_be_end_their_executor(make: MakeRig, count: int) -> None:
    rig = make([function("f", "async_generator")])
    (executor,) = rig.executors
    rig.submit("r0")
    executor.say(Deltas(executor.key_of("r0"), (b"",) * count))
    assert executor.child.killed
    assert "a message that is not one" in executor.child.killed[0]
    assert rig.messages() == []


async def test_credits_go_to_the_executor_of_the_run(make: MakeRig) -> None:
    rig = make([function("f", "async_generator")], executors=2)
    rig.submit("r0")
    rig.submit("r1")
    for executor, payload in zip(rig.executors, (b"{}", b'{"a":1}'), strict=True):
        executor.say(Event(executor.key_of(executor.runs[0]), "x", payload))
    rig.messages()
    assert [executor.sent(Credit)[0].size for executor in rig.executors] == [
        2 + EVENT_OVERHEAD_BYTES,
        7 + EVENT_OVERHEAD_BYTES,
    ]


async def test_windows_shrink_with_the_load(make: MakeRig) -> None:
    rig = make([function("f", "async")])
    for number in range(2000):
        rig.submit(f"r{number}")
    windows = [message.window for message in rig.executors[0].sent(RunMessage)]
    assert windows == sorted(windows, reverse=True)
    assert windows[0] == WINDOW_BYTES
    assert windows[-1] == WINDOW_MIN_BYTES


# -- shutting down ------------------------------------------------------------------------------


async def test_drain_hands_back_what_waits_and_refuses_what_comes(models: MakeRig) -> None:
    rig = models(threads=1)
    for run_id, name in [("p0", "plain"), ("p1", "plain"), ("f0", "f")]:
        rig.submit(run_id, name)
    rig.dispatcher.drain()
    rig.submit("p2", "plain")
    assert {run_id: said(result) for run_id, result in rig.results().items()} == dict.fromkeys(["p1", "f0", "p2"], BUSY)
    idle = asyncio.ensure_future(rig.dispatcher.wait_idle(5))
    await asyncio.sleep(0)
    assert not idle.done()
    rig.executors[0].succeed("p0")
    assert await idle is True
    assert rig.results()["p0"].success


async def test_wait_idle(make: MakeRig) -> None:
    rig = make([function()])
    assert await rig.dispatcher.wait_idle(0) is True
    rig.submit("r0")
    assert await rig.dispatcher.wait_idle(0.001) is False


async def test_abandon_answers_what_still_runs(make: MakeRig) -> None:
    rig = make([function("f", "async")])
    (executor,) = rig.executors
    rig.submit("r0")
    rig.submit("r1")
    rig.dispatcher.cancel("r1")
    rig.dispatcher.abandon("the worker was shut down while it ran")
    results = rig.results()
    assert said(results["r0"]) == BUSY
    assert results["r0"].error_message == "the worker was shut down while it ran"
    assert said(results["r1"]) == CANCELED
    executor.succeed("r0")
    executor.die()
    assert rig.results() == {}


# -- anything at all ----------------------------------------------------------------------------


def idle_pairs(rig: Rig) -> Iterator[tuple[Executor, str]]:
    for executor in rig.executors:
        if executor.handle.state is not HandleState.DEAD:
            yield from ((executor, run.run_id) for run in executor.handle.runs.values())


@pytest.mark.parametrize("seed", range(20))
async def test_every_accepted_run_gets_exactly_one_result(  # noqa: C901, PLR0915  (one function per kind of step)
    models: MakeRig, seed: int
) -> None:
    """A random life: submits, cancels, results, loads, failed loads, unloads and deaths in any order.

    With an odd seed both models together do not fit, so that they take turns; a function that needs both is refused.
    """
    chance = random.Random(seed)
    size = 600 * 2**20 if seed % 2 else 1
    rig = models(executors=2, threads=3, limits=limits(model_concurrency=2, cancel_grace_s=60), weights=size)
    submitted: list[str] = []
    results: dict[str, pb.TaskExecutionResult] = {}

    def step_submit() -> None:
        submitted.append(f"r{len(submitted)}")
        rig.submit(submitted[-1], chance.choice(["f", "g", "fg", "plain", "unlimited"]))

    def step_cancel() -> None:
        if submitted:
            rig.dispatcher.cancel(chance.choice(submitted))

    def step_result() -> None:
        pairs = list(idle_pairs(rig))
        if pairs:
            executor, run_id = chance.choice(pairs)
            executor.succeed(run_id)

    def step_model() -> None:
        orders = [(each, each.order) for each in rig.executors if each.is_alive and each.order]
        if not orders:
            return
        executor, (model_id, type_name) = chance.choice(orders)
        if not type_name:
            executor.unload_done(model_id, size)
        elif chance.random() < 0.3:
            executor.say(ModelLoaded(model_id, type_name, 0, 0.1, Failure("resource", "out of memory")))
        else:
            executor.load_done(model_id, type_name, size)

    def step_unload() -> None:
        rig.dispatcher.commands.unload(chance.choice([A, B]))

    def step_die() -> None:
        executor = chance.choice(rig.executors)
        if executor.handle.state is not HandleState.DEAD:
            executor.die()
            rig.add_executor(threads=3)

    steps = [step_submit] * 5 + [step_result] * 4 + [step_model] * 3 + [step_cancel, step_unload, step_die]
    for _ in range(400):
        chance.choice(steps)()
        for run_id, result in rig.results().items():
            assert run_id not in results
            results[run_id] = result
    while rig.dispatcher.active:
        before = rig.dispatcher.active, len(rig.executors[-1].child.sent)
        step_result()
        step_model()
        results |= rig.results()
        if (rig.dispatcher.active, len(rig.executors[-1].child.sent)) == before:
            under_way = [each.order for each in rig.executors if each.is_alive and each.order]
            assert list(idle_pairs(rig)) or under_way, "runs wait and nothing is under way"
        await asyncio.sleep(0)  # what residency moves by itself it tells from the loop
    results |= rig.results()
    assert sorted(results) == sorted(submitted)
    for executor in rig.executors:
        assert executor.handle._thread_runs == 0
        assert not +executor.handle._running
