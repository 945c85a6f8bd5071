"""Listings of real repos on Hugging Face, as data: path -> bytes, and what the small files that matter say.

Sizes of weights are the real ones, to the MB where the exact number does not matter; other files have about their size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field

MB = 1_000_000


@dataclass(frozen=True)
class Listing:
    """`dtypes` is what the headers of the weights say."""

    repo: str
    files: dict[str, int]
    contents: dict[str, bytes] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)


def index(components: dict[str, list[str | None]]) -> bytes:
    return json.dumps({"_class_name": "Pipeline", "_diffusers_version": "0.30.0", **components}).encode()


def shards(stem: str, count: int) -> bytes:
    names = [f"{stem}-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    return json.dumps({"metadata": {}, "weight_map": {f"layer.{i}": name for i, name in enumerate(names)}}).encode()


_DIFFUSERS, _TRANSFORMERS = "diffusers", "transformers"

SD15 = Listing(
    "hf:stable-diffusion-v1-5/stable-diffusion-v1-5",
    {
        ".gitattributes": 1550, "README.md": 14_461, "model_index.json": 541, "v1-inference.yaml": 1873,
        "v1-5-pruned-emaonly.ckpt": 4265 * MB, "v1-5-pruned-emaonly.safetensors": 4265 * MB,
        "v1-5-pruned.ckpt": 7703 * MB, "v1-5-pruned.safetensors": 7703 * MB,
        "feature_extractor/preprocessor_config.json": 342,
        "safety_checker/config.json": 4723, "safety_checker/model.safetensors": 1216 * MB,
        "safety_checker/model.fp16.safetensors": 608 * MB, "safety_checker/pytorch_model.bin": 1216 * MB,
        "safety_checker/pytorch_model.fp16.bin": 608 * MB,
        "scheduler/scheduler_config.json": 308,
        "text_encoder/config.json": 617, "text_encoder/model.safetensors": 492 * MB,
        "text_encoder/model.fp16.safetensors": 246 * MB, "text_encoder/pytorch_model.bin": 492 * MB,
        "text_encoder/pytorch_model.fp16.bin": 246 * MB,
        "tokenizer/merges.txt": 525_000, "tokenizer/special_tokens_map.json": 472,
        "tokenizer/tokenizer_config.json": 806, "tokenizer/vocab.json": 1_060_000,
        "unet/config.json": 743, "unet/diffusion_pytorch_model.bin": 3438 * MB,
        "unet/diffusion_pytorch_model.fp16.bin": 1719 * MB, "unet/diffusion_pytorch_model.fp16.safetensors": 1719 * MB,
        "unet/diffusion_pytorch_model.non_ema.bin": 3438 * MB,
        "unet/diffusion_pytorch_model.non_ema.safetensors": 3438 * MB,
        "unet/diffusion_pytorch_model.safetensors": 3438 * MB,
        "vae/config.json": 547, "vae/diffusion_pytorch_model.bin": 335 * MB,
        "vae/diffusion_pytorch_model.fp16.bin": 167 * MB, "vae/diffusion_pytorch_model.fp16.safetensors": 167 * MB,
        "vae/diffusion_pytorch_model.safetensors": 335 * MB,
    },
    {
        "model_index.json": index(
            {
                "feature_extractor": [_TRANSFORMERS, "CLIPImageProcessor"],
                "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
                "scheduler": [_DIFFUSERS, "PNDMScheduler"],
                "text_encoder": [_TRANSFORMERS, "CLIPTextModel"],
                "tokenizer": [_TRANSFORMERS, "CLIPTokenizer"],
                "unet": [_DIFFUSERS, "UNet2DConditionModel"],
                "vae": [_DIFFUSERS, "AutoencoderKL"],
            }
        )
    },
    {
        "safety_checker/model.safetensors": "F32", "safety_checker/model.fp16.safetensors": "F16",
        "text_encoder/model.safetensors": "F32", "text_encoder/model.fp16.safetensors": "F16",
        "unet/diffusion_pytorch_model.fp16.safetensors": "F16", "unet/diffusion_pytorch_model.safetensors": "F32",
        "unet/diffusion_pytorch_model.non_ema.safetensors": "F32",
        "vae/diffusion_pytorch_model.fp16.safetensors": "F16", "vae/diffusion_pytorch_model.safetensors": "F32",
    },
)  # fmt: skip

SDXL = Listing(
    "hf:stabilityai/stable-diffusion-xl-base-1.0",
    {
        ".gitattributes": 1700, "LICENSE.md": 14_000, "README.md": 9000, "01.png": 4 * MB, "model_index.json": 609,
        "sd_xl_base_1.0.safetensors": 6938 * MB, "sd_xl_base_1.0_0.9vae.safetensors": 6938 * MB,
        "sd_xl_offset_example-lora_1.0.safetensors": 50 * MB,
        "scheduler/scheduler_config.json": 479,
        "text_encoder/config.json": 565, "text_encoder/flax_model.msgpack": 492 * MB,
        "text_encoder/model.fp16.safetensors": 246 * MB, "text_encoder/model.onnx": 492 * MB,
        "text_encoder/model.safetensors": 492 * MB, "text_encoder/openvino_model.bin": 492 * MB,
        "text_encoder/openvino_model.xml": 1_057_789,
        "text_encoder_2/config.json": 575, "text_encoder_2/flax_model.msgpack": 2779 * MB,
        "text_encoder_2/model.fp16.safetensors": 1390 * MB, "text_encoder_2/model.onnx": 1_041_992,
        "text_encoder_2/model.onnx_data": 2779 * MB, "text_encoder_2/model.safetensors": 2779 * MB,
        "text_encoder_2/openvino_model.bin": 2779 * MB, "text_encoder_2/openvino_model.xml": 2_790_191,
        "tokenizer/merges.txt": 524_619, "tokenizer/special_tokens_map.json": 472,
        "tokenizer/tokenizer_config.json": 737, "tokenizer/vocab.json": 1_059_962,
        "tokenizer_2/merges.txt": 524_619, "tokenizer_2/special_tokens_map.json": 460,
        "tokenizer_2/tokenizer_config.json": 725, "tokenizer_2/vocab.json": 1_059_962,
        "unet/config.json": 1680, "unet/diffusion_flax_model.msgpack": 10_270 * MB,
        "unet/diffusion_pytorch_model.fp16.safetensors": 5135 * MB,
        "unet/diffusion_pytorch_model.safetensors": 10_270 * MB, "unet/model.onnx": 7_293_842,
        "unet/model.onnx_data": 10_269 * MB, "unet/openvino_model.bin": 10_269 * MB,
        "unet/openvino_model.xml": 22_577_438,
        "vae/config.json": 642, "vae/diffusion_flax_model.msgpack": 335 * MB,
        "vae/diffusion_pytorch_model.fp16.safetensors": 167 * MB, "vae/diffusion_pytorch_model.safetensors": 335 * MB,
        "vae_1_0/config.json": 607, "vae_1_0/diffusion_pytorch_model.fp16.safetensors": 167 * MB,
        "vae_1_0/diffusion_pytorch_model.safetensors": 335 * MB,
        "vae_decoder/config.json": 607, "vae_decoder/model.onnx": 198 * MB, "vae_decoder/openvino_model.bin": 198 * MB,
        "vae_decoder/openvino_model.xml": 992_181,
        "vae_encoder/config.json": 607, "vae_encoder/model.onnx": 137 * MB,
    },
    {
        "model_index.json": index(
            {
                "force_zeros_for_empty_prompt": [None, None],
                "scheduler": [_DIFFUSERS, "EulerDiscreteScheduler"],
                "text_encoder": [_TRANSFORMERS, "CLIPTextModel"],
                "text_encoder_2": [_TRANSFORMERS, "CLIPTextModelWithProjection"],
                "tokenizer": [_TRANSFORMERS, "CLIPTokenizer"],
                "tokenizer_2": [_TRANSFORMERS, "CLIPTokenizer"],
                "unet": [_DIFFUSERS, "UNet2DConditionModel"],
                "vae": [_DIFFUSERS, "AutoencoderKL"],
            }
        )
    },
    {
        f"{folder}/{name}": dtype
        for folder, stem in (
            ("text_encoder", "model"), ("text_encoder_2", "model"),
            ("unet", "diffusion_pytorch_model"), ("vae", "diffusion_pytorch_model"),
        )
        for name, dtype in ((f"{stem}.safetensors", "F32"), (f"{stem}.fp16.safetensors", "F16"))
    },
)  # fmt: skip

_FLUX_TRANSFORMER = "transformer/diffusion_pytorch_model"
FLUX1 = Listing(
    "hf:black-forest-labs/FLUX.1-schnell",
    {
        ".gitattributes": 1650, "README.md": 5000, "ae.safetensors": 335 * MB,
        "flux1-schnell.safetensors": 23_782 * MB, "schnell_grid.jpeg": 3 * MB, "model_index.json": 536,
        "scheduler/scheduler_config.json": 274,
        "text_encoder/config.json": 613, "text_encoder/model.safetensors": 246 * MB,
        "text_encoder_2/config.json": 782, "text_encoder_2/model-00001-of-00002.safetensors": 4994 * MB,
        "text_encoder_2/model-00002-of-00002.safetensors": 4530 * MB,
        "text_encoder_2/model.safetensors.index.json": 19_900,
        "tokenizer/merges.txt": 524_619, "tokenizer/special_tokens_map.json": 588,
        "tokenizer/tokenizer_config.json": 705, "tokenizer/vocab.json": 1_059_962,
        "tokenizer_2/special_tokens_map.json": 2540, "tokenizer_2/spiece.model": 791_656,
        "tokenizer_2/tokenizer.json": 2_424_257, "tokenizer_2/tokenizer_config.json": 20_817,
        "transformer/config.json": 321, f"{_FLUX_TRANSFORMER}-00001-of-00003.safetensors": 9962 * MB,
        f"{_FLUX_TRANSFORMER}-00002-of-00003.safetensors": 9949 * MB,
        f"{_FLUX_TRANSFORMER}-00003-of-00003.safetensors": 3870 * MB,
        f"{_FLUX_TRANSFORMER}.safetensors.index.json": 121_000,
        "vae/config.json": 774, "vae/diffusion_pytorch_model.safetensors": 168 * MB,
    },
    {
        "model_index.json": index(
            {
                "scheduler": [_DIFFUSERS, "FlowMatchEulerDiscreteScheduler"],
                "text_encoder": [_TRANSFORMERS, "CLIPTextModel"],
                "text_encoder_2": [_TRANSFORMERS, "T5EncoderModel"],
                "tokenizer": [_TRANSFORMERS, "CLIPTokenizer"],
                "tokenizer_2": [_TRANSFORMERS, "T5TokenizerFast"],
                "transformer": [_DIFFUSERS, "FluxTransformer2DModel"],
                "vae": [_DIFFUSERS, "AutoencoderKL"],
            }
        ),
        "text_encoder_2/model.safetensors.index.json": shards("model", 2),
        f"{_FLUX_TRANSFORMER}.safetensors.index.json": shards("diffusion_pytorch_model", 3),
    },
    {
        "text_encoder/model.safetensors": "BF16", "text_encoder_2/model-00001-of-00002.safetensors": "BF16",
        f"{_FLUX_TRANSFORMER}-00001-of-00003.safetensors": "BF16",
        "vae/diffusion_pytorch_model.safetensors": "BF16",
    },
)  # fmt: skip

QWEN_VL = Listing(
    "hf:Qwen/Qwen2.5-VL-7B-Instruct",
    {
        ".gitattributes": 1519, "README.md": 18_574, "chat_template.json": 1050, "config.json": 1374,
        "generation_config.json": 216, "merges.txt": 1_671_839,
        "model-00001-of-00005.safetensors": 3900 * MB, "model-00002-of-00005.safetensors": 3864 * MB,
        "model-00003-of-00005.safetensors": 3864 * MB, "model-00004-of-00005.safetensors": 3864 * MB,
        "model-00005-of-00005.safetensors": 1089 * MB, "model.safetensors.index.json": 57_619,
        "preprocessor_config.json": 350, "tokenizer.json": 7_031_645, "tokenizer_config.json": 5702,
        "vocab.json": 2_776_833,
    },
    {"model.safetensors.index.json": shards("model", 5)},
    {"model-00001-of-00005.safetensors": "BF16"},
)  # fmt: skip

WHISPER = Listing(
    "hf:openai/whisper-large-v3",
    {
        ".gitattributes": 1519, "README.md": 21_300, "added_tokens.json": 34_648, "config.json": 1272,
        "flax_model.msgpack": 6174 * MB, "generation_config.json": 3903, "merges.txt": 493_869,
        "model.fp32-00001-of-00002.safetensors": 4994 * MB, "model.fp32-00002-of-00002.safetensors": 1180 * MB,
        "model.safetensors": 3087 * MB, "model.safetensors.index.fp32.json": 118_000, "normalizer.json": 52_666,
        "preprocessor_config.json": 340, "pytorch_model.bin": 3087 * MB,
        "pytorch_model.bin.index.fp32.json": 117_900, "pytorch_model.fp32-00001-of-00002.bin": 4994 * MB,
        "pytorch_model.fp32-00002-of-00002.bin": 1180 * MB, "special_tokens_map.json": 2072,
        "tokenizer.json": 2_480_617, "tokenizer_config.json": 282_843, "vocab.json": 1_036_558,
    },
    {"model.safetensors.index.fp32.json": shards("model.fp32", 2)},
    {"model.safetensors": "F16", "model.fp32-00001-of-00002.safetensors": "F32"},
)  # fmt: skip

SHARDED = Listing(
    "hf:meta-llama/Llama-3.1-8B-Instruct",
    {
        ".gitattributes": 1520, "LICENSE": 7630, "README.md": 44_000, "USE_POLICY.md": 4691, "config.json": 855,
        "generation_config.json": 184, "model-00001-of-00004.safetensors": 4976 * MB,
        "model-00002-of-00004.safetensors": 4999 * MB, "model-00003-of-00004.safetensors": 4915 * MB,
        "model-00004-of-00004.safetensors": 1168 * MB, "model.safetensors.index.json": 23_950,
        "original/consolidated.00.pth": 16_060 * MB, "original/params.json": 199,
        "original/tokenizer.model": 2_183_982, "special_tokens_map.json": 296, "tokenizer.json": 9_085_657,
        "tokenizer_config.json": 55_351,
    },
    {"model.safetensors.index.json": shards("model", 4)},
    {"model-00001-of-00004.safetensors": "BF16"},
)  # fmt: skip

BIN_ONLY = Listing(
    "hf:google/flan-t5-old",
    {
        ".gitattributes": 1477, "README.md": 10_782, "config.json": 662, "flax_model.msgpack": 990 * MB,
        "generation_config.json": 147, "pytorch_model.bin": 990 * MB, "special_tokens_map.json": 2201,
        "spiece.model": 791_656, "tf_model.h5": 1226 * MB, "tokenizer.json": 2_424_064, "tokenizer_config.json": 2539,
    },
)  # fmt: skip
