"""A real diffusers pipeline, saved by the library itself: loaded as for a function, used at once, evicted and back."""

from __future__ import annotations

import json
import queue
import threading
from pathlib import Path
from typing import Any

import pytest

from executor.device_memory import tensors_of
from executor.loaders import load_object
from executor.models import ModelStore
from gen_worker.errors import FatalError
from gen_worker.injection import ModelArtifacts
from gen_worker.pipe.messages import LoadModel, Memory, ModelLoaded, ModelUnloaded, UnloadModel, Upward
from gen_worker.weights import weight_bytes

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

pytestmark = [
    pytest.mark.timeout(300),  # importing both takes seconds, and many on a machine that does much else
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
]


def tiny_components() -> tuple[Any, Any, Any]:
    """UNet, VAE and text encoder of a Stable Diffusion with random weights, a few hundred kB."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, cross_attention_dim=16, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    config = transformers.CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=300,
        max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return unet, vae, transformers.CLIPTextModel(config)


def save_tokenizer(folder: Path) -> Any:
    folder.mkdir(parents=True)
    words = [
        "<|startoftext|>",
        "<|endoftext|>",
        *(chr(97 + n) for n in range(26)),
        *(f"{chr(97 + n)}</w>" for n in range(26)),
    ]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return transformers.CLIPTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline in half precision as a variant, whose index names a safety checker that is not there."""
    root = tmp_path_factory.mktemp("diffusers") / "pipeline"
    unet, vae, text_encoder = tiny_components()
    pipeline = diffusers.StableDiffusionPipeline(
        unet=unet, vae=vae, text_encoder=text_encoder, tokenizer=save_tokenizer(root.parent / "tokenizer"),
        scheduler=diffusers.DDIMScheduler(num_train_timesteps=20), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    pipeline.to(torch.float16).save_pretrained(root, variant="fp16")
    index = json.loads((root / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (root / "model_index.json").write_text(json.dumps(index))
    return root


class Store:
    """A ModelStore of the CPU and what it answers."""

    def __init__(self) -> None:
        types = {"t.Pipe": diffusers.StableDiffusionPipeline, "t.Bert": transformers.BertModel}
        self.answers: queue.SimpleQueue[Upward] = queue.SimpleQueue()
        self.store = ModelStore(types, "cpu", send=self.answers.put, on_poisoned=lambda *_: None)
        self.memory = Memory(0, 0, 0)

    def answer(self) -> Any:
        while isinstance(answer := self.answers.get(timeout=120), Memory):
            self.memory = answer
        return answer

    def load(self, root: Path, type_name: str = "t.Pipe") -> ModelLoaded:
        self.store.load(LoadModel("m", type_name, str(root), {}, {}))
        answer = self.answer()
        assert isinstance(answer, ModelLoaded)
        assert answer.failure is None, answer.failure
        return answer

    def unload(self, *, to_host: bool = False) -> ModelUnloaded:
        self.store.unload(UnloadModel("m", to_host))
        answer = self.answer()
        assert isinstance(answer, ModelUnloaded)
        assert answer.failure is None, answer.failure
        return answer


@pytest.fixture
def store() -> Store:
    return Store()


def draw(pipe: Any, steps: int = 2) -> Any:
    """A latent image; the same for the same steps."""
    generator = torch.Generator().manual_seed(1)
    embeddings = torch.zeros(1, 77, 16, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe(
        prompt_embeds=embeddings, negative_prompt_embeds=embeddings, num_inference_steps=steps, generator=generator,
        height=16, width=16, output_type="latent",
    ).images  # fmt: skip


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "DiffusionPipeline", "AutoPipelineForText2Image"])
def test_a_pipeline_comes_in_the_files_variant_and_dtype_without_what_is_missing(saved: Path, name: str) -> None:
    loaded: Any = load_object(getattr(diffusers, name), ModelArtifacts("m", saved), "cpu")
    assert isinstance(loaded, diffusers.StableDiffusionPipeline)
    assert {component.dtype for component in (loaded.unet, loaded.vae, loaded.text_encoder)} == {torch.float16}
    assert loaded.safety_checker is None
    assert loaded.feature_extractor is None
    assert str(loaded.unet.device) == "cpu"
    assert not loaded.unet.training


def test_a_component_alone_is_loaded_too(saved: Path) -> None:
    loaded: Any = load_object(diffusers.UNet2DConditionModel, ModelArtifacts("m", saved / "unet"), "cpu")
    assert (loaded.dtype, loaded.training) == (torch.float16, False)


def test_a_component_that_is_needed_is_missed(saved: Path, tmp_path: Path) -> None:
    for path in saved.iterdir():
        if path.name != "unet":
            (tmp_path / path.name).symlink_to(path)
    with pytest.raises((OSError, ValueError)):
        load_object(diffusers.StableDiffusionPipeline, ModelArtifacts("m", tmp_path), "cpu")


def test_a_pipeline_of_another_class_names_both(saved: Path) -> None:
    class Other(diffusers.DiffusionPipeline):  # type: ignore[misc, name-defined]
        @classmethod
        def from_pretrained(cls, root: str, **arguments: Any) -> Any:
            return diffusers.StableDiffusionPipeline.from_pretrained(root, **arguments)

    with pytest.raises(FatalError, match=r"made a diffusers\..*StableDiffusionPipeline, the parameter is a .*Other"):
        load_object(Other, ModelArtifacts("m", saved), "cpu")


def test_bytes_on_the_device_are_those_of_the_tensors(store: Store, saved: Path) -> None:
    loaded = store.load(saved)
    held = sum(tensor.nbytes for tensor in tensors_of(store.store.inject("m", "t.Pipe")))
    assert loaded.device_bytes == held == store.memory.device_bytes
    assert held <= weight_bytes(saved) < held * 1.5, "the headers are all that is more"
    assert store.unload().device_bytes == held
    assert store.memory == Memory(0, 0, 0)


def test_what_a_function_keeps_still_counts(store: Store, saved: Path) -> None:
    loaded = store.load(saved)
    kept: Any = store.store.inject("m", "t.Pipe")
    vae = kept.vae
    held = sum(tensor.nbytes for tensor in tensors_of(vae))
    del kept
    assert store.unload().device_bytes == loaded.device_bytes - held
    assert store.memory.device_bytes == held
    del vae
    store.load(saved)
    assert store.memory.device_bytes == loaded.device_bytes


def test_concurrent_calls_have_schedulers_of_their_own(store: Store, saved: Path) -> None:
    store.load(saved)
    held: Any = store.store._held["m", "t.Pipe"].value
    held.to(torch.float32)  # half precision is slow or missing on some CPUs
    alone = {steps: draw(store.store.inject("m", "t.Pipe"), steps) for steps in (2, 3, 5)}
    views: list[Any] = [store.store.inject("m", "t.Pipe") for _ in range(6)]
    assert len({id(view.scheduler) for view in views}) == 6
    assert len({id(view.unet) for view in views}) == 1
    images: dict[int, Any] = {}

    def work(number: int) -> None:
        images[number] = draw(views[number], [2, 3, 5][number % 3])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert sorted(images) == list(range(6))
    for number, image in images.items():
        assert torch.allclose(image, alone[[2, 3, 5][number % 3]], atol=1e-4)


def test_a_model_goes_to_host_memory_and_returns_unchanged(store: Store, saved: Path) -> None:
    loaded = store.load(saved)
    pipe: Any = store.store.inject("m", "t.Pipe")
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    unet = pipe.unet
    del pipe
    unloaded = store.unload(to_host=True)
    assert unloaded.device_bytes == loaded.device_bytes
    assert unloaded.host_bytes >= loaded.device_bytes
    assert store.memory.device_bytes == 0, "although the function still has the module"
    assert store.memory.host_bytes == unloaded.host_bytes
    with pytest.raises(KeyError):
        store.store.inject("m", "t.Pipe")
    again = store.load(saved)
    assert again.device_bytes == loaded.device_bytes
    assert store.memory == Memory(loaded.device_bytes, 0, 0)
    back: Any = store.store.inject("m", "t.Pipe")
    assert back.unet is unet, "the same object, whose tensors have moved"
    for name, tensor in back.unet.state_dict().items():
        assert torch.equal(tensor, before[name])
        assert tensor.stride() == before[name].stride()
    store.unload(to_host=True)
    assert store.unload().host_bytes == 0
    assert store.memory == Memory(0, 0, 0)
    store.load(saved)
    assert store.store._held["m", "t.Pipe"].value is not back, "from disk again"


def test_what_takes_nothing_does_not_stay(store: Store, tmp_path: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    model = transformers.BertModel(config)
    model.save_pretrained(tmp_path)
    loaded = store.load(tmp_path, "t.Bert")
    assert loaded.device_bytes == sum(tensor.nbytes for tensor in tensors_of(store.store.inject("m", "t.Bert")))
    bert: Any = store.store.inject("m", "t.Bert")
    bert.embeddings.register_buffer("odd", torch.empty(4, device="meta"))
    del bert
    assert store.unload(to_host=True).host_bytes == 0, "a tensor without data can't be moved"
