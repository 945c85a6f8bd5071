"""Model memory: who is loaded where, who leaves for it, what is measured, and what becomes of runs meanwhile."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gen_worker.pipe.messages import Failure, LoadModel, ModelLoaded, Result, UnloadModel
from gen_worker.wire import worker_scheduler_pb2 as pb
from supervisor import lanes
from supervisor.device_meter import MemoryLimits
from supervisor.executor_handle import HandleState
from supervisor.model_sizes import ModelSizes
from supervisor.observer import EvictionReason, Observer
from supervisor.residence import Residence, Room
from tests.support.rig import Executor, Rig, function, until, use_recording_children

GIB = 2**30
A, B, C, BIG = "a", "b", "c", "big"
WEIGHTS = {A: 4 * GIB, B: 4 * GIB, C: 4 * GIB, BIG: 30 * GIB}
KEY_A, KEY_B = (A, "t.T"), (B, "t.T")
MakeRig = Callable[..., Rig]


@pytest.fixture
async def make(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Executors with GPUs of 10 GiB, of which 1 is the margin; functions named as the model that each needs."""
    use_recording_children(monkeypatch.setattr)
    rigs: list[Rig] = []

    def make_rig(**kwargs: Any) -> Rig:
        functions = [function(name, models=[name]) for name in WEIGHTS]
        functions += [function("ab", models=[A, B]), function("plain"), function("many", models=[A], limit=9)]
        options = {"memory": 10 * GIB, "memory_limits": MemoryLimits(None, 1.0), "models": WEIGHTS, **kwargs}
        rigs.append(Rig(functions, **options))
        return rigs[-1]

    yield make_rig
    for rig in rigs:
        rig.close()


def load(rig: Rig, executor: Executor, model: str, size: int = 4 * GIB) -> None:
    """Have a run bring a model, and end it."""
    rig.submit(f"bring-{model}-{len(executor.loads)}", model)
    executor.load_done(model, device_bytes=size)
    executor.succeed(executor.runs[-1])
    rig.results()


def events(rig: Rig) -> dict[str, list[tuple[str, float]]]:
    """(stage, progress) of the events per run since the last call."""
    found: dict[str, list[tuple[str, float]]] = {}
    for message in rig.messages():
        if message.WhichOneof("msg") == "worker_event":
            payload = json.loads(message.worker_event.payload_json)
            assert message.worker_event.event_type == "job.progress"
            assert payload["timestamp"] > 0
            found.setdefault(message.worker_event.run_id, []).append((payload["stage"], payload["progress"]))
    return found


def said(result: pb.TaskExecutionResult) -> tuple[str, bool]:
    assert not result.success
    return result.error_type, result.retryable


# -- states -------------------------------------------------------------------------------------


async def test_states_of_a_model(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    residency, handle = rig.residency, executor.handle
    assert residency.state(handle, [KEY_A]) is None
    assert residency.load(handle, [KEY_A, KEY_B])
    assert not residency.load(handle, [(C, "t.T")]), "one thing at a time"
    assert executor.sent(LoadModel) == [LoadModel(A, "t.T", "/models/a", {}, {})]
    assert residency.state(handle, [KEY_A]) is Residence.LOADING
    executor.load_done(A)
    assert residency.state(handle, [KEY_A]) is Residence.HOT
    assert residency.state(handle, [KEY_A, KEY_B]) is Residence.LOADING
    assert residency.loading(handle) == {KEY_B}
    assert residency.is_loading(B)
    assert not residency.is_loading(A)
    executor.say(ModelLoaded(B, "t.T", 0, 0.1, Failure("internal", "internal error")))
    assert residency.state(handle, [KEY_A, KEY_B]) is None
    assert residency.has_failed(handle, [KEY_A, KEY_B])
    assert (residency.hot_models(), residency.disk_models()) == ([A], [B, BIG, C])
    residency.load(handle, [KEY_B])
    executor.load_done(B, device_bytes=0)
    assert not residency.has_failed(handle, [KEY_B])
    residency.unload(handle, A)
    assert executor.sent(UnloadModel) == [UnloadModel(A)]
    assert residency.state(handle, [KEY_A]) is Residence.UNLOADING
    assert residency.holders(A) == [handle]
    executor.unload_done(A)
    assert residency.state(handle, [KEY_A]) is None
    assert residency.holders(A) == []


async def test_files_are_held_while_a_model_is_there(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    rig.submit("r", A)
    assert +rig.source.holds == {A: 1}
    executor.load_done(A)
    rig.submit("s", B)
    assert +rig.source.holds == {A: 1, B: 1}
    executor.say(ModelLoaded(B, "t.T", 0, 0.1, Failure("internal", "internal error")))
    assert +rig.source.holds == {A: 1}
    executor.die()
    assert +rig.source.holds == {}


async def test_an_answer_that_nobody_asked_for_changes_nothing(make: MakeRig, caplog: pytest.LogCaptureFixture) -> None:
    rig = make()
    (executor,) = rig.executors
    executor.load_done(A)
    executor.unload_done(B)
    assert rig.residency.hot_models() == []
    assert "loaded a, which nobody asked for" in caplog.text
    assert "dropped b, which nobody asked for" in caplog.text


# -- room ---------------------------------------------------------------------------------------


async def test_the_least_recently_used_idle_model_leaves_first(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    load(rig, executor, A)
    load(rig, executor, B)
    rig.submit("again", A)
    executor.succeed("again")
    rig.submit("r", C)
    assert executor.unloads == [B], "a was used after it"
    assert executor.loads == [A, B], "not before the memory is back"
    assert rig.residency.hot_models() == [A]
    executor.unload_done(B, 4 * GIB)
    assert executor.loads == [A, B, C]
    executor.load_done(C, device_bytes=4 * GIB)
    assert executor.runs[-1] == "r"
    assert rig.residency.hot_models() == [A, C]


async def test_what_the_device_shows_decides_not_what_was_recorded(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    load(rig, executor, A)
    rig.probe.others["GPU-0"] = 2 * GIB  # somebody else came
    rig.submit("r", B)
    assert executor.unloads == [A]
    executor.held = 2 * GIB  # a smaller part of it came back so far than was recorded: still too little
    rig.probe.others["GPU-0"] = 0
    executor.unload_done(A, 2 * GIB)
    assert executor.loads == [A, B]


async def test_the_cap_counts_as_well(make: MakeRig) -> None:
    rig = make(memory_limits=MemoryLimits(6.0, 1.0))
    (executor,) = rig.executors
    load(rig, executor, A)
    rig.submit("r", B)
    assert executor.unloads == [A], "10 GiB are there, 6 may be used"


async def test_a_model_in_use_is_never_evicted(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    load(rig, executor, A)
    load(rig, executor, B)
    rig.submit("long-a", A)
    rig.submit("long-b", B)
    rig.submit("r", C)
    assert executor.unloads == []
    assert rig.results() == {}
    executor.succeed("long-b")
    assert executor.unloads == [B]
    executor.unload_done(B, 4 * GIB)
    executor.load_done(C, device_bytes=4 * GIB)
    assert executor.runs[-1] == "r"


async def test_runs_on_hot_models_go_on_for_a_while_and_then_let_the_other_in(
    make: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make(models={**WEIGHTS, A: 8 * GIB})
    (executor,) = rig.executors
    load(rig, executor, A, 8 * GIB)
    rig.submit("a0", A)
    rig.submit("b0", B)
    rig.submit("a1", A)
    executor.succeed("a0")
    assert executor.runs[-1] == "a1", "a swap for each run would cost more than it gives"
    rig.submit("a2", A)
    monkeypatch.setattr(lanes, "PATIENCE_S", 0.0)
    rig.dispatcher.lanes.pump()
    executor.succeed("a1")
    assert executor.unloads == [A], "b0 has waited long enough"
    assert executor.runs[-1] == "a1"
    executor.unload_done(A, 8 * GIB)
    executor.load_done(B, device_bytes=4 * GIB)
    assert executor.runs[-1] == "b0"
    executor.succeed("b0")
    executor.unload_done(B, 4 * GIB)
    executor.load_done(A, device_bytes=8 * GIB)
    assert executor.runs[-1] == "a2"
    assert not rig.dispatcher.lanes._reserved


async def test_patience_ends_by_itself(make: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "PATIENCE_S", 0.02)
    rig = make(models={**WEIGHTS, A: 8 * GIB})
    (executor,) = rig.executors
    load(rig, executor, A, 8 * GIB)
    rig.submit("a0", "many")
    rig.submit("b0", B)
    await until(lambda: bool(rig.dispatcher.lanes._reserved))
    rig.submit("a1", "many")
    assert executor.runs[-1] == "a0", "it runs empty for b0"
    rig.dispatcher.cancel("b0")
    assert executor.runs[-1] == "a0"
    rig.dispatcher.lanes.pump()
    assert executor.runs[-1] == "a1", "and is free again when b0 does not want it any more"


async def test_two_models_of_one_run_stay_together(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    load(rig, executor, B)
    load(rig, executor, C)
    rig.submit("r", "ab")
    assert executor.unloads == [C], "although b is older: the run needs it"
    executor.unload_done(C, 4 * GIB)
    executor.load_done(A, device_bytes=4 * GIB)
    assert executor.runs[-1] == "r"


async def test_an_executor_with_room_goes_before_one_where_models_must_leave(make: MakeRig) -> None:
    rig = make(executors=2)
    first, second = rig.executors
    load(rig, first, A)
    load(rig, first, B)
    assert second.loads == []
    rig.submit("p", "plain")
    assert first.runs[-1] == "p"
    rig.submit("q", "plain")
    assert second.runs == ["q"]
    first.succeed("p")
    rig.submit("r", C)
    assert (first.loads, second.loads) == ([A, B], [C]), "although it has a run and the other has none"


async def test_a_run_that_waits_for_room_takes_another_executor_that_gets_idle(make: MakeRig) -> None:
    rig = make(executors=2, models={**WEIGHTS, A: 8 * GIB, B: 8 * GIB})
    first, second = rig.executors
    rig.submit("a0", A)
    first.load_done(A, device_bytes=8 * GIB)
    rig.submit("b0", B)
    second.load_done(B, device_bytes=8 * GIB)
    rig.submit("c0", C)
    assert first.unloads == second.unloads == []
    second.succeed("b0")
    assert second.unloads == [B]
    second.unload_done(B, 8 * GIB)
    second.load_done(C, device_bytes=4 * GIB)
    assert second.runs[-1] == "c0"


# -- what can't be ------------------------------------------------------------------------------


async def test_a_model_larger_than_any_gpu_says_both_sizes(make: MakeRig) -> None:
    rig = make(executors=2)
    rig.submit("r", BIG)
    result = rig.results()["r"]
    assert said(result) == ("resource", False)
    for words in ("30.00 GiB", "10.00 GiB"):
        assert words in result.safe_message
        assert words in result.error_message
    assert "9.00 GiB (WORKER_MAX_VRAM_GB, WORKER_VRAM_SAFETY_MARGIN_GB)" in result.error_message
    rig.dispatcher.commands.load(BIG)
    (answer,) = rig.messages()
    assert "30.00 GiB" in answer.load_model_result.error_message
    assert all(executor.loads == [] for executor in rig.executors)


async def test_two_models_that_never_fit_together(make: MakeRig) -> None:
    rig = make(models={A: 5 * GIB, B: 5 * GIB, C: 0, BIG: 0})
    rig.submit("r", "ab")
    result = rig.results()["r"]
    assert said(result) == ("resource", False)
    assert "a and b needs 10.00 GiB" in result.error_message


@pytest.mark.parametrize("first", ["t.Model", "t.Tokenizer"])
async def test_the_weights_of_a_model_and_its_tokenizer_count_once(make: MakeRig, first: str) -> None:
    rig = make(models={**WEIGHTS, A: 8 * GIB})
    (executor,) = rig.executors
    second = "t.Tokenizer" if first == "t.Model" else "t.Model"
    keys = [(A, first), (A, second)]
    assert rig.residency.room(executor.handle, keys) is Room.FREE
    assert rig.residency.refusal(keys) is None
    rig.residency.load(executor.handle, keys)
    for name in (first, second):
        executor.load_done(A, name, device_bytes=8 * GIB if name == "t.Model" else 0)
    assert rig.residency.state(executor.handle, keys) is Residence.HOT
    rig.dispatcher.commands.unload(A)
    executor.unload_done(A, 8 * GIB)
    assert rig.residency.room(executor.handle, keys) is Room.FREE, "now that both are measured, too"


async def test_memory_that_others_hold(make: MakeRig) -> None:
    rig = make()
    rig.probe.others["GPU-0"] = 8 * GIB
    rig.add_executor()
    rig.executors[0].die()
    rig.submit("r", A)
    assert rig.executors[1].loads == [A]
    rig.probe.others["GPU-1"] = 8 * GIB
    rig.executors[1].load_done(A, device_bytes=0)
    rig.submit("s", B)
    assert rig.results() == {}, "the first executor may come back"


async def test_no_room_at_all_says_what_is_free(make: MakeRig) -> None:
    rig = make(executors=0)
    rig.probe.others["GPU-0"] = 8 * GIB
    rig.add_executor()
    rig.submit("r", A)
    result = rig.results()["r"]
    assert said(result) == ("resource", False)
    assert "GPU has 2.00 GiB free of 10.00 GiB" in result.error_message
    assert "4.00 GiB" in result.safe_message


async def test_a_model_without_weights_needs_no_room(make: MakeRig) -> None:
    rig = make(models={**WEIGHTS, A: 0})
    rig.probe.others["GPU-0"] = 10 * GIB
    rig.submit("r", A)
    assert rig.executors[0].loads == [A]


# -- measuring ----------------------------------------------------------------------------------


async def test_what_was_measured_is_the_next_estimate(make: MakeRig, tmp_path: Path) -> None:
    sizes = ModelSizes(tmp_path)
    rig = make(sizes=sizes)
    (executor,) = rig.executors
    load(rig, executor, A, 8 * GIB)  # its weights said 4
    assert rig.residency.ledger(executor.handle).size_gb(A) == 8
    await until(lambda: sizes._writing is None)
    again = make(sizes=ModelSizes(tmp_path))
    load(again, again.executors[0], B)
    again.submit("r", A)
    assert again.executors[0].unloads == [B], "with 4 GiB there would have been room"


async def test_a_load_that_takes_more_than_expected_restores_the_margin(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    load(rig, executor, A)
    rig.submit("r", B)
    executor.load_done(B, device_bytes=5 * GIB + GIB // 2)
    assert executor.runs[-1] == "r"
    assert executor.unloads == [A], "only half a GiB was left free"


async def test_out_of_memory_while_loading_evicts_and_tries_again(make: MakeRig) -> None:
    rig = make(models={**WEIGHTS, B: 0})  # of a kind whose size no file tells
    (executor,) = rig.executors
    load(rig, executor, A)
    load(rig, executor, C)
    rig.submit("r", B)
    oom = ModelLoaded(B, "t.T", 0, 0.1, Failure("resource", "out of memory", "CUDA out of memory"))
    for leaving in (A, C):
        executor.say(oom)
        assert executor.unloads[-1] == leaving
        executor.unload_done(leaving, 4 * GIB)
        assert executor.loads[-1] == B
    assert rig.results() == {}
    executor.say(oom)
    assert said(rig.results()["r"]) == ("resource", False), "nothing is left to leave"


async def test_memory_that_torch_does_not_know_is_measured_by_the_probe(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    rig.submit("r", A)
    executor.held = 3 * GIB
    executor.say(ModelLoaded(A, "t.T", 0, 0.1))
    assert rig.residency.ledger(executor.handle).size_gb(A) == 3


# -- receipts -----------------------------------------------------------------------------------


class Evictions(Observer):
    """What is reported of them, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, EvictionReason]] = []

    def model_evicted(self, model_id: str, reason: EvictionReason) -> None:
        self.told.append((model_id, reason))


async def test_an_executor_that_keeps_memory_is_recycled(make: MakeRig, caplog: pytest.LogCaptureFixture) -> None:
    evictions = Evictions()
    rig = make(observer=evictions)
    (executor,) = rig.executors
    load(rig, executor, A)
    load(rig, executor, B)
    rig.submit("r", C)
    executor.unload_done(A, GIB)  # of 4
    assert executor.handle.state is HandleState.DRAINING
    assert "expected 4.00 GiB back, GPU shows 1.00 GiB" in caplog.text
    assert "is recycled" in caplog.text
    assert type(executor.child.sent[-1]).__name__ == "Shutdown", "it has no run left"
    assert executor.loads == [A, B]
    assert rig.results() == {}, "the run waits for the replacement"
    executor.die(0)
    assert evictions.told == [(A, "room"), (B, "recycled")]
    replacement = rig.add_executor()
    assert replacement.loads == [C]
    replacement.die(-9)
    assert len(evictions.told) == 2, "a crash is no eviction"


async def test_a_recycled_executor_ends_its_runs_first(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    load(rig, executor, A)
    rig.submit("long", "plain")
    executor.handle.recycle("a test")
    rig.submit("r", "plain")
    assert executor.runs[-1] == "long"
    assert type(executor.child.sent[-1]).__name__ != "Shutdown"
    executor.succeed("long")
    assert type(executor.child.sent[-1]).__name__ == "Shutdown"
    assert rig.results()["long"].success


async def test_a_small_rest_is_no_leak(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    load(rig, executor, A)
    rig.dispatcher.commands.unload(A)
    executor.unload_done(A, 4 * GIB - 200 * 2**20)
    assert executor.handle.state is HandleState.READY


async def test_no_judgement_while_runs_allocate(make: MakeRig, caplog: pytest.LogCaptureFixture) -> None:
    rig = make()
    (executor,) = rig.executors
    load(rig, executor, A)
    rig.submit("long", "plain")
    rig.dispatcher.commands.unload(A)
    with caplog.at_level("INFO"):
        executor.unload_done(A, 0)
    assert executor.handle.state is HandleState.READY
    assert "while runs went on" in caplog.text


async def test_memory_nobody_accounts_for_costs_an_idle_executor_its_place(
    make: MakeRig, caplog: pytest.LogCaptureFixture
) -> None:
    rig = make()
    (executor,) = rig.executors
    load(rig, executor, A)
    rig.dispatcher.commands.unload(A)
    executor.unload_done(A, 4 * GIB)
    executor.held = 7 * GIB  # leaked by runs, bit by bit
    rig.submit("r", B)
    assert executor.handle.state is HandleState.DRAINING
    assert "7.00 GiB more are in use since it started" in caplog.text
    assert rig.results() == {}
    executor.die(0)
    replacement = rig.add_executor()
    assert replacement.loads == [B]


# -- host memory --------------------------------------------------------------------------------


async def test_evicted_models_stay_in_host_memory_and_return(make: MakeRig) -> None:
    rig = make(memory_limits=MemoryLimits(None, 1.0, host_gb=5.0))
    (executor,) = rig.executors
    load(rig, executor, A)
    load(rig, executor, B)
    rig.submit("r", C)
    assert executor.sent(UnloadModel) == [UnloadModel(A, to_host=True)]
    executor.unload_done(A, 4 * GIB, host_bytes=4 * GIB)
    ledger = rig.residency.ledger(executor.handle)
    assert ledger.get_host_models() == [A]
    executor.load_done(C, device_bytes=4 * GIB)
    executor.succeed("r")
    assert rig.residency.hot_models() == [B, C]
    assert A in rig.residency.disk_models()
    rig.submit("s", A)
    assert executor.sent(UnloadModel)[-1] == UnloadModel(B), "there is room for one copy, and a is to return from it"
    executor.unload_done(B, 4 * GIB)
    assert executor.loads[-1] == A
    executor.load_done(A, device_bytes=4 * GIB)
    assert executor.runs[-1] == "s"
    assert ledger.get_host_models() == []
    executor.succeed("s")


async def test_the_oldest_copy_goes_for_a_newer_one(make: MakeRig) -> None:
    evictions = Evictions()
    rig = make(memory_limits=MemoryLimits(None, 1.0, host_gb=5.0), observer=evictions)
    (executor,) = rig.executors
    load(rig, executor, A)
    load(rig, executor, B)
    rig.submit("r", C)
    executor.unload_done(A, 4 * GIB, host_bytes=4 * GIB)
    executor.load_done(C, device_bytes=4 * GIB)
    executor.succeed("r")
    rig.source.models["new"] = 4 * GIB
    rig.submit("s", C, required_models=["new"])
    assert executor.unloads == [A, A], "the copy of a makes room for b's"
    executor.unload_done(A, 0)
    assert executor.sent(UnloadModel)[-1] == UnloadModel(B, to_host=True)
    executor.unload_done(B, 4 * GIB, host_bytes=4 * GIB)
    assert rig.residency.ledger(executor.handle).get_host_models() == [B]
    assert evictions.told == [(A, "room"), (B, "room")], "a copy that goes leaves no device"


async def test_a_command_drops_the_copy_in_host_memory_too(make: MakeRig) -> None:
    rig = make(memory_limits=MemoryLimits(None, 1.0, host_gb=5.0))
    (executor,) = rig.executors
    load(rig, executor, A)
    load(rig, executor, B)
    rig.submit("r", C)
    executor.unload_done(A, 4 * GIB, host_bytes=4 * GIB)
    executor.load_done(C, device_bytes=4 * GIB)
    rig.messages()
    rig.dispatcher.commands.unload(A)
    assert executor.sent(UnloadModel)[-1] == UnloadModel(A)
    executor.unload_done(A, 0)
    assert [message.unload_model_result.success for message in rig.messages()] == [True]
    assert rig.residency.ledger(executor.handle).get_host_models() == []


# -- fetching -----------------------------------------------------------------------------------


async def test_a_cold_model_is_fetched_and_its_runs_hear_of_it(make: MakeRig) -> None:
    rig = make(executors=2)
    rig.source.cold = {A}
    rig.submit("r0", A)
    rig.submit("r1", A)
    rig.submit("other", "plain")
    assert rig.source.fetches == [A], "once"
    assert [executor.loads for executor in rig.executors] == [[], []]
    assert rig.dispatcher._active["r0"].state.value == "waiting_model"
    news = rig.dispatcher.news
    news.fetch_progress(A, 1, 4, 100.0)
    news.fetch_progress(A, 2, 4, 100.0)  # too soon to be told
    assert rig.residency.downloads.get_download_progress(A) == 0.5
    assert events(rig) == {"r0": [("download", 0.25)], "r1": [("download", 0.25)]}
    rig.source.cold.clear()
    news.model_fetched(A)
    assert [executor.loads for executor in rig.executors] == [[], [A]], "the first is busy"
    await asyncio.sleep(0)
    rig.executors[1].load_done(A)
    assert rig.executors[1].runs == ["r0"]
    told = events(rig)
    assert told["r1"] == [("download", 1.0), ("load", 0.0), ("load", 1.0)]


async def test_a_fetch_that_fails_is_its_runs_answer(make: MakeRig) -> None:
    rig = make()
    rig.source.cold = {A, B}
    rig.submit("r", A)
    rig.submit("both", "ab")
    rig.submit("other", B)
    rig.dispatcher.commands.load(A)
    assert sorted(rig.source.fetches) == [A, B]
    rig.dispatcher.news.fetch_failed(A, Failure("auth", "the hub refused the token", "401 of https://hub/x"))
    answers = [message for message in rig.messages() if message.WhichOneof("msg") != "worker_event"]
    results = {message.run_result.run_id: message.run_result for message in answers if message.HasField("run_result")}
    assert sorted(results) == ["both", "r"]
    assert said(results["r"]) == ("auth", False)
    (command,) = (message.load_model_result for message in answers if message.HasField("load_model_result"))
    assert command.error_message == "401 of https://hub/x"
    rig.submit("again", A)
    assert rig.source.fetches.count(A) == 2, "the next run tries again"


async def test_a_load_command_fetches_first(make: MakeRig) -> None:
    rig = make()
    rig.source.cold = {A}
    rig.dispatcher.commands.load(A)
    assert rig.source.fetches == [A]
    rig.source.cold.clear()
    rig.dispatcher.news.model_fetched(A)
    assert rig.executors[0].loads == [A]
    rig.executors[0].load_done(A)
    assert [message.load_model_result.success for message in rig.messages()] == [True]


async def test_files_that_vanish_before_the_load_are_fetched_again(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    load(rig, executor, A)
    load(rig, executor, B)
    rig.submit("r", C)
    rig.source.cold = {C}
    executor.unload_done(A, 4 * GIB)
    await until(lambda: rig.source.fetches == [C])
    assert executor.loads == [A, B]
    rig.source.cold.clear()
    rig.dispatcher.news.model_fetched(C)
    executor.load_done(C, device_bytes=4 * GIB)
    assert executor.runs[-1] == "r"


async def test_what_is_said_to_the_scheduler_changes_with_each_move(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    seen: list[tuple[list[str], list[str]]] = []

    async def expect(change: Callable[[], object], vram: list[str]) -> None:
        """The registration is due, at once, and says the new truth."""
        before = rig.changes
        change()
        await asyncio.sleep(0)
        assert rig.changes > before
        assert rig.residency.hot_models() == vram
        seen.append((rig.residency.hot_models(), rig.residency.disk_models()))

    rig.submit("r", A)
    await expect(lambda: executor.load_done(A, device_bytes=4 * GIB), [A])
    executor.say(Result(executor.key_of("r"), b"\x80"))
    await expect(lambda: rig.dispatcher.commands.unload(A), [])
    await expect(lambda: executor.unload_done(A, 4 * GIB), [])
    rig.source.models["new"] = 0
    await expect(rig.dispatcher.news.disk_changed, [])
    assert seen[0][1] == [B, BIG, C]
    assert seen[-1][1] == [A, B, BIG, C, "new"]


async def test_a_load_that_costs_the_context_costs_the_next_run_nothing(make: MakeRig) -> None:
    rig = make()
    (executor,) = rig.executors
    rig.submit("r", A)
    rig.submit("s", B)
    failure = Failure("retryable", "try again", "an illegal memory access", retryable=True)
    executor.say(ModelLoaded(A, "t.T", 0, 0.1, failure, poisoned=True))
    assert said(rig.results()["r"]) == ("retryable", True)
    assert executor.handle.state is HandleState.DRAINING
    rig.submit("next", "plain")
    assert executor.runs == []
    assert executor.loads == [A]


@pytest.mark.parametrize(
    ("held", "room"), [(0, Room.FREE), (4, Room.FREE), (6, Room.EVICT)], ids=["empty", "beside", "full"]
)
async def test_room(make: MakeRig, held: int, room: Room) -> None:
    rig = make()
    (executor,) = rig.executors
    if held:
        load(rig, executor, B, held * GIB)
    assert rig.residency.room(executor.handle, [KEY_A]) is room
    assert rig.residency.room(executor.handle, [(BIG, "t.T")]) is Room.NONE
    rig.residency.load(executor.handle, [(C, "t.T")])
    assert rig.residency.room(executor.handle, [KEY_A]) is Room.BUSY


# -- anything at all ----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(12))
async def test_no_device_is_overfull_and_nothing_in_use_leaves(  # noqa: C901  (one function per kind of step)
    make: MakeRig, seed: int
) -> None:
    """A random life on two GPUs whose models do not all fit; the executors do what they are told, in any order."""
    chance = random.Random(seed)
    weights = {name: chance.choice([0, 1, 3, 5]) * GIB for name in WEIGHTS}
    rig = make(executors=2, models=weights, memory_limits=MemoryLimits(None, 1.0, host_gb=chance.choice([0.0, 4.0])))
    results: dict[str, pb.TaskExecutionResult] = {}
    submitted: list[str] = []
    seen: dict[Executor, int] = {}

    def check_orders(executor: Executor) -> None:
        in_use = {model for run in executor.handle.runs.values() for _, model in run.models}
        for message in executor.child.sent[seen.get(executor, 0) :]:
            if isinstance(message, UnloadModel):
                assert message.model_id not in in_use
        seen[executor] = len(executor.child.sent)

    def step_submit() -> None:
        submitted.append(f"r{len(submitted)}")
        rig.submit(submitted[-1], chance.choice([*WEIGHTS, "ab", "many", "plain"]))

    def step_answer() -> None:
        executor = chance.choice(rig.executors)
        if executor.order is None:
            return
        model, type_name = executor.order
        if type_name:
            executor.load_done(model, device_bytes=weights[model])
            assert executor.held + GIB <= 10 * GIB, "the margin is kept"
            return
        sent = executor.sent(UnloadModel)[-1]
        in_vram = round(rig.residency.ledger(executor.handle).size_gb(model) * GIB)
        executor.unload_done(model, in_vram, host_bytes=in_vram if sent.to_host else 0)

    def step_end() -> None:
        executor = chance.choice(rig.executors)
        if executor.handle.runs:
            executor.succeed(chance.choice(list(executor.handle.runs.values())).run_id)

    def step_command() -> None:
        model = chance.choice(list(WEIGHTS))
        chance.choice([rig.dispatcher.commands.load, rig.dispatcher.commands.unload])(model)

    async def step(do: Callable[[], None]) -> None:
        do()
        await asyncio.sleep(0)
        for executor in rig.executors:
            check_orders(executor)
            ledger = rig.residency.ledger(executor.handle)
            assert ledger.host_used_gb <= ledger.max_host_gb
        for message in rig.messages():
            if message.WhichOneof("msg") == "run_result":
                assert message.run_result.run_id not in results
                results[message.run_result.run_id] = message.run_result

    for _ in range(300):
        await step(
            chance.choice([step_submit, step_submit, step_answer, step_answer, step_end, step_end, step_command])
        )
    for _ in range(5000):
        if not rig.dispatcher.active:
            break
        await step(chance.choice([step_answer, step_end]))
    assert not rig.dispatcher.active, "a run waits for ever"
    assert sorted(results) == sorted(submitted)
    refused = {result.error_type for result in results.values() if not result.success}
    assert refused <= {"resource"}, "what needs more than there is"
    for executor in rig.executors:
        assert executor.handle.state is HandleState.READY, "nobody leaks"
