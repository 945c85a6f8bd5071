"""What is taken of a repo, on listings of real ones."""

from __future__ import annotations

import dataclasses
import json

import pytest

from gen_worker.errors import FatalError, ResourceError
from supervisor.transfers.hf_selection import LIMIT_BYTES, Selection, precision_of, reads, select, survey
from supervisor.transfers.messages import HuggingFaceOptions
from tests.support.hf_listings import BIN_ONLY, FLUX1, MB, QWEN_VL, SD15, SDXL, SHARDED, WHISPER, Listing, index, shards

DEFAULT = HuggingFaceOptions()
ALL_PRECISIONS = HuggingFaceOptions(precisions=("fp16", "bf16", "fp32"))


def plan(listing: Listing, options: HuggingFaceOptions = DEFAULT) -> Selection:
    assert set(reads(listing.files)) == set(listing.contents), "what must be read is what decides"
    found = survey(listing.repo, listing.files, listing.contents, options)
    dtypes = {path: listing.dtypes[path] for path in found.probes if path in listing.dtypes}
    return select(listing.repo, listing.files, found, dtypes, options)


def weights(selection: Selection) -> list[str]:
    return [path for path in selection.files if path.endswith(".safetensors")]


def test_stable_diffusion_15() -> None:
    selection = plan(SD15)
    assert selection.files == (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    )
    assert selection.size_bytes == sum(SD15.files[path] for path in selection.files)
    assert set(selection.precisions.values()) == {"fp16"}


def test_optional_components_and_fp32_only_when_asked_for() -> None:
    more = plan(SD15, HuggingFaceOptions(include_optional=True))
    assert "safety_checker/model.fp16.safetensors" in more.files
    assert "feature_extractor/preprocessor_config.json" in more.files
    single = plan(SD15, HuggingFaceOptions(precisions=("fp32",)))
    assert "unet/diffusion_pytorch_model.safetensors" in single.files, "not the non_ema one, of the same precision"
    assert weights(plan(SD15, ALL_PRECISIONS)) == weights(plan(SD15)), "fp16 comes first"


def test_stable_diffusion_xl() -> None:
    selection = plan(SDXL)
    assert weights(selection) == [
        "text_encoder/model.fp16.safetensors",
        "text_encoder_2/model.fp16.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    assert not [path for path in selection.files if path.startswith(("vae_1_0", "vae_decoder", "vae_encoder", "sd_xl"))]
    assert not [path for path in selection.files if path.endswith((".xml", ".bin", ".msgpack", ".onnx", ".onnx_data"))]


def test_flux_is_over_the_limit_until_one_says_otherwise() -> None:
    size = r"31\.4 GB, over the limit of 30 GB"
    with pytest.raises(ResourceError, match=rf"{size}; COZY_HF_COMPONENTS .*COZY_HF_FULL_REPO_DOWNLOAD=1"):
        plan(FLUX1)
    names = ("transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
    selection = plan(FLUX1, HuggingFaceOptions(components=names))
    assert selection.size_bytes > LIMIT_BYTES
    assert len([path for path in selection.files if path.startswith("transformer/")]) == 5
    assert "text_encoder_2/model.safetensors.index.json" in selection.files
    assert "flux1-schnell.safetensors" not in selection.files
    assert set(selection.precisions.values()) == {"bf16"}
    some = plan(FLUX1, HuggingFaceOptions(components=("vae", "tokenizer")))
    assert {path.partition("/")[0] for path in some.files} == {"model_index.json", "vae", "tokenizer"}
    full = plan(FLUX1, HuggingFaceOptions(full_repo=True))
    assert full.files == tuple(sorted(FLUX1.files))


@pytest.mark.parametrize("listing", [QWEN_VL, SHARDED], ids=lambda listing: str(listing.repo))
def test_a_plain_transformers_repo(listing: Listing) -> None:
    selection = plan(listing)
    expected = [
        path
        for path in sorted(listing.files)
        if "/" not in path and path.endswith((".safetensors", ".json", "merges.txt"))
    ]
    assert selection.files == tuple(expected)
    assert selection.precisions == {"model": "bf16"}


def test_whisper_takes_one_of_its_precisions() -> None:
    selection = plan(WHISPER)
    assert weights(selection) == ["model.safetensors"]
    assert not [path for path in selection.files if "index" in path]
    assert {"normalizer.json", "added_tokens.json", "preprocessor_config.json"} <= set(selection.files)
    single = plan(WHISPER, HuggingFaceOptions(precisions=("fp32",)))
    assert weights(single) == ["model.fp32-00001-of-00002.safetensors", "model.fp32-00002-of-00002.safetensors"]
    assert "model.safetensors.index.fp32.json" in single.files


def test_only_other_formats() -> None:
    with pytest.raises(FatalError, match=r"the root has neither .* such as flax_model\.msgpack"):
        plan(BIN_ONLY)
    vae = {path: size for path, size in SD15.files.items() if not (path.startswith("vae/") and "safetensors" in path)}
    with pytest.raises(FatalError, match=r"vae has neither a safetensors .* such as vae/diffusion_pytorch_model\.bin"):
        plan(dataclasses.replace(SD15, files=vae))


def test_a_plain_repo_in_fp32_is_better_than_nothing_but_a_component_is_not() -> None:
    plain = Listing("hf:a/minilm", {"config.json": 1, "model.safetensors": 90 * MB}, {}, {"model.safetensors": "F32"})
    assert weights(plan(plain)) == ["model.safetensors"]
    only = {path: size for path, size in SD15.files.items() if path != "vae/diffusion_pytorch_model.fp16.safetensors"}
    with pytest.raises(
        FatalError, match="vae has weights as fp32 only, not as fp16 or bf16; COZY_HF_WEIGHT_PRECISIONS=fp16,bf16,fp32"
    ):
        plan(dataclasses.replace(SD15, files=only))


def test_the_header_decides_and_else_the_name() -> None:
    lying = {
        **SD15.dtypes,
        "unet/diffusion_pytorch_model.safetensors": "F16",
        "unet/diffusion_pytorch_model.fp16.safetensors": "F32",
    }
    selection = plan(dataclasses.replace(SD15, dtypes=lying))
    assert "unet/diffusion_pytorch_model.safetensors" in selection.files
    assert weights(plan(dataclasses.replace(SD15, dtypes={}))) == weights(plan(SD15))
    unknown = Listing("hf:a/b", {"unet/config.json": 1, "unet/model.safetensors": 5})
    assert plan(unknown).precisions == {"unet": ""}


def test_without_an_index_known_folders_count() -> None:
    files = {path: size for path, size in SD15.files.items() if path != "model_index.json"}
    no_index = dataclasses.replace(SD15, files=files, contents={})
    assert set(plan(SD15).files) - set(plan(no_index).files) == {"model_index.json"}
    without_unet = {path: size for path, size in files.items() if not path.startswith("unet/")}
    with pytest.raises(FatalError, match=r"is of no known form.*COZY_HF_COMPONENTS"):
        plan(dataclasses.replace(no_index, files=without_unet))


def test_overrides() -> None:
    with pytest.raises(FatalError, match="no folder 'lora', which COZY_HF_COMPONENTS names"):
        plan(SD15, HuggingFaceOptions(components=("unet", "lora")))
    extra = dataclasses.replace(SD15, files={**SD15.files, "extra.json": 5})
    assert "extra.json" not in plan(extra).files
    assert "extra.json" in plan(extra, HuggingFaceOptions(allow_root_json=True)).files
    assert "safety_checker/config.json" in plan(SD15, HuggingFaceOptions(components=("safety_checker",))).files


@pytest.mark.parametrize(
    ("contents", "words"),
    [
        ({"model_index.json": b"{"}, "model_index.json is broken"),
        ({"model_index.json": b"[]"}, "model_index.json is broken"),
        ({"text_encoder_2/model.safetensors.index.json": b"{}"}, "is no index of shards"),
        ({"text_encoder_2/model.safetensors.index.json": json.dumps({"weight_map": {"a": 1}}).encode()}, "no index"),
        ({"text_encoder_2/model.safetensors.index.json": shards("model", 3)}, "names the shard 'model-00001-of-00003"),
        (
            {"text_encoder_2/model.safetensors.index.json": json.dumps({"weight_map": {"a": "../../x"}}).encode()},
            r"names the shard '\.\./\.\./x', which is not there",
        ),
    ],
)
def test_broken_small_files(contents: dict[str, bytes], words: str) -> None:
    with pytest.raises(FatalError, match=words):
        plan(dataclasses.replace(FLUX1, contents={**FLUX1.contents, **contents}))


def test_shards_that_the_index_does_not_name_are_left() -> None:
    files = {**QWEN_VL.files, "model-00001-of-00002.safetensors": MB, "consolidated.safetensors": MB}
    assert weights(plan(dataclasses.replace(QWEN_VL, files=files))) == weights(plan(QWEN_VL))


def test_shards_without_an_index_are_no_weights() -> None:
    files = {path: size for path, size in QWEN_VL.files.items() if not path.endswith("index.json")}
    with pytest.raises(FatalError, match=r"shards with their index, .* such as model-00001-of-00005\.safetensors"):
        plan(dataclasses.replace(QWEN_VL, files=files, contents={}))


def test_a_component_in_a_pipeline_that_the_index_leaves_out() -> None:
    listing = Listing(
        "hf:a/b",
        {"model_index.json": 5, "unet/config.json": 1, "vae/config.json": 1},
        {"model_index.json": index({"unet": ["diffusers", "X"], "gone": ["diffusers", "Y"]})},
    )
    assert plan(listing).files == ("model_index.json", "unet/config.json")


def test_what_a_header_says() -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
        "b": {"dtype": "F16", "shape": [100], "data_offsets": [4, 204]},
    }
    assert precision_of(header) == "F16"
    assert precision_of({}) == ""
