"""Sentence embeddings with MiniLM: an injected model, a stream of tokens, and a function that crashes.

The worker loads model and tokenizer once per executor from the files of the label `minilm` and passes them in.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from typing import Annotated

import msgspec
import torch
from transformers import BertModel, BertTokenizerFast

from gen_worker import ActionContext, worker_function
from gen_worker.errors import ValidationError
from gen_worker.injection import ModelRef, ModelRefSource

MAX_SENTENCES = 64

Model = Annotated[BertModel, ModelRef(ModelRefSource.DEPLOYMENT, "minilm")]
Tokenizer = Annotated[BertTokenizerFast, ModelRef(ModelRefSource.DEPLOYMENT, "minilm")]


class EmbedInput(msgspec.Struct):
    sentences: list[str]


class EmbedOutput(msgspec.Struct):
    vectors: list[list[float]]
    device: str
    pid: int


@worker_function()
def embed(ctx: ActionContext, model: Model, tokenizer: Tokenizer, payload: EmbedInput) -> EmbedOutput:
    """One unit vector per sentence."""
    if not 0 < len(payload.sentences) <= MAX_SENTENCES:
        raise ValidationError(f"sentences: give 1 to {MAX_SENTENCES} of them, not {len(payload.sentences)}")
    ctx.progress(0.1, stage="tokenize")
    batch = tokenizer(payload.sentences, padding=True, truncation=True, return_tensors="pt").to(ctx.device)
    ctx.progress(0.3, stage="encode")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    vectors = _sentence_vectors(hidden, batch["attention_mask"])
    ctx.progress(1.0, stage="done")
    return EmbedOutput(vectors=vectors.tolist(), device=str(ctx.device), pid=os.getpid())


class TokensInput(msgspec.Struct):
    text: str


class Token(msgspec.Struct):
    token: str
    weight: float
    """How close the token's own vector is to the whole sentence's: what the sentence is about."""


@worker_function()
def tokens(ctx: ActionContext, model: Model, tokenizer: Tokenizer, payload: TokensInput) -> Iterator[Token]:
    """The tokens of a text, one delta each."""
    batch = tokenizer(payload.text, truncation=True, return_tensors="pt").to(ctx.device)
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    sentence = _sentence_vectors(hidden, batch["attention_mask"])[0]
    words = torch.nn.functional.normalize(hidden[0], dim=-1)
    for token, vector in zip(tokenizer.convert_ids_to_tokens(batch["input_ids"][0]), words, strict=True):
        yield Token(token=token, weight=float(vector @ sentence))


class CrashInput(msgspec.Struct):
    pass


class CrashOutput(msgspec.Struct):
    pass


@worker_function()
def crash(ctx: ActionContext, payload: CrashInput) -> CrashOutput:
    """Dies as a broken native library would."""
    print("about to read address 0", flush=True)
    ctypes.string_at(0)
    return CrashOutput()


def _sentence_vectors(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the tokens that are not padding, at unit length: how this model was trained to be read."""
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return torch.nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)
