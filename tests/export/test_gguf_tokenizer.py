"""llama.cpp makes of a text the tokens that the checkpoint's tokenizer makes, here with a sentencepiece model."""

import io
import json
import shutil
from pathlib import Path

import gguf
import pytest
import sentencepiece
from helpers.copies import add_bos, edit_json, edit_tokenizer, export, verify
from helpers.runs import finetune

from litlora.__main__ import main
from litlora.data.tokenizer import Tokenizer
from litlora.export.engines.llama_cpp import LlamaCppEngine
from litlora.export.receipt import Receipt

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


@pytest.mark.parametrize(("adds_bos", "writes_bos"), [(True, True), (True, False), (False, True)])
def test_llama_cpp_starts_a_conversation_as_training_does(writes_bos, adds_bos, tiny, data_dir, tmp_path, capfd):
    """A template that writes no BOS was trained without one, although the tokenizer adds it to a text."""
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    if adds_bos:
        edit_tokenizer(base, add_bos)
    turn = "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    template = f"{{% for m in messages %}}{turn}{{% endfor %}}<|im_start|>assistant\n"
    (base / "chat_template.jinja").write_text("{{ bos_token }}" * writes_bos + template, encoding="utf-8")
    adapter = finetune(base, data_dir, tmp_path / "run", "--train.max_steps", 1, "--prompt_style", "chat")
    ids = {probe.ids[0] == 0 for probe in Receipt.read(adapter).prompts}
    assert ids == {writes_bos}
    assert verify(export(adapter, tmp_path / "out", "--outtype", "f32")) == 0
    file = gguf.GGUFReader(tmp_path / "out/model.gguf")
    assert file.fields["tokenizer.ggml.add_bos_token"].contents() == (adds_bos and writes_bos)


def test_llama_cpp_adds_no_bos_where_there_is_none(tiny, tmp_path):
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    edit_json(base / "tokenizer_config.json", bos_token=None)
    edit_json(base / "config.json", bos_token_id=None)
    export(base, tmp_path / "out")
    (engine := LlamaCppEngine(tmp_path / "out/model.gguf", None, ("Name a fruit.",)))([], [])
    assert engine.tokens == [Tokenizer(base).encode("Name a fruit.").ids]
