"""Real transformers models, saved by the library itself and loaded as they would be for a function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from executor.loaders import load_object
from gen_worker.injection import ModelArtifacts

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny BERT in half precision with its tokenizer."""
    root = tmp_path_factory.mktemp("model")
    config = transformers.BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    transformers.BertModel(config).to(torch.bfloat16).save_pretrained(root)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]
    (root / "vocab.txt").write_text("\n".join(vocabulary))
    transformers.BertTokenizer(str(root / "vocab.txt")).save_pretrained(root)
    return root


@pytest.mark.parametrize("name", ["BertModel", "AutoModel"])
def test_a_model_comes_in_the_files_dtype_ready_to_run(saved: Path, name: str) -> None:
    loaded: Any = load_object(getattr(transformers, name), ModelArtifacts("m", saved), "cpu")
    assert isinstance(loaded, transformers.BertModel)
    assert loaded.dtype == torch.bfloat16
    assert not loaded.training
    assert str(loaded.device) == "cpu"


@pytest.mark.parametrize("name", ["AutoTokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_comes_without_a_dtype(saved: Path, name: str) -> None:
    loaded: Any = load_object(getattr(transformers, name), ModelArtifacts("m", saved), "cpu")
    assert loaded("hello world")["input_ids"]


def test_a_missing_config_is_the_librarys_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="config"):
        load_object(transformers.BertModel, ModelArtifacts("m", tmp_path), "cpu")
