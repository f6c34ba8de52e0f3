"""llama.cpp makes of a text the tokens that the checkpoint's tokenizer makes, here with a sentencepiece model."""

import io
import json
import shutil
from pathlib import Path

import gguf
import pytest
import sentencepiece

from litlora.__main__ import main
from litlora.data.tokenizer import Tokenizer
from litlora.export.engines.llama_cpp import LlamaCppEngine

SENTENCES = [
    "Name a fruit that is green.",
    "Add two and three, please.",
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.",
]
TEXTS = ["Name a fruit that is green.", " two  and\n\nthree", "naïve 東京, please!", "completes</s>"]


@pytest.fixture(scope="module")
def base(tiny, tmp_path_factory) -> Path:
    """Return a checkpoint whose tokenizer is a small sentencepiece model with byte fallback."""
    folder = Path(shutil.copytree(tiny, tmp_path_factory.mktemp("sentencepiece") / "base"))
    (folder / "tokenizer.json").unlink()
    with io.BytesIO() as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(SENTENCES * 5), model_writer=model, vocab_size=300, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
            hard_vocab_limit=False, minloglevel=2,
        )  # fmt: skip
        (folder / "tokenizer.model").write_bytes(model.getvalue())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "legacy": False, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def test_llama_cpp_makes_the_tokens_of_sentencepiece(base, tmp_path):
    assert main(["export", str(base), "--out_dir", str(tmp_path / "out")]) == 0
    engine = LlamaCppEngine(tmp_path / "out/model.gguf", None, tuple(TEXTS))
    assert engine([], []) == []
    tokenizer = Tokenizer(base)
    assert engine.tokens == [tokenizer.encode(text).ids for text in TEXTS]


def test_scores_and_kinds_are_those_of_the_model(base, tmp_path):
    assert main(["export", str(base), "--out_dir", str(tmp_path / "out")]) == 0
    values = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "out/model.gguf").fields.items()}
    model = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model"))
    kinds = values["tokenizer.ggml.token_type"]
    assert values["tokenizer.ggml.model"] == "llama"
    assert values["tokenizer.ggml.scores"] == pytest.approx([model.get_score(token) for token in range(len(model))])
    assert kinds[0] == gguf.TokenType.UNKNOWN
    assert {gguf.TokenType(kinds[token]) for token in (1, 2)} == {gguf.TokenType.CONTROL}
    assert [model.is_byte(token) for token in range(len(model))] == [kind == gguf.TokenType.BYTE for kind in kinds]
