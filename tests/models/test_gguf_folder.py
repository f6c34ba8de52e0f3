"""A folder gets the config and the tokenizer that it lacks from a GGUF file; what could differ is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
from helpers.families import LINEAR, LONGROPE, ORIGINAL, WHOLE_BLOCKS, YARN, Case, Family, rope
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from transformers import LlamaConfig, Qwen2Config, Qwen3Config, SmolLM3Config

from litlora.__main__ import main
from litlora.data.tokenizer import Tokenizer as LitLoraTokenizer
from litlora.errors import LitLoraError
from litlora.export.engines.llama_cpp import LlamaCppEngine
from litlora.models.checkpoint import Checkpoint
from litlora.models.checkpoint_files import CheckpointFiles, read_config
from litlora.models.gguf.comparison import differences
from litlora.models.gguf.folder import complete_folder
from litlora.models.gguf.reader import GGUFHeader, read_gguf

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
SPLITS = {
    "gpt-2": ByteLevel(add_prefix_space=False),
    "smollm": Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]),
    "llama-bpe": Sequence([Split(Regex(LLAMA_3), "isolated"), BYTES]),
    "qwen2": Sequence([Split(Regex(LLAMA_3.replace(r"{1,3}", "")), "isolated"), BYTES]),
}
TEXTS = [
    "Name a fruit that is green.",
    "Add 2 and  34567:\n\n\tit's 5!  'LL ½ 3½\r\n (x[1])  ",
    "naïve 東京 мир 🍐👍🏽 e\u0301\u00a0…",
    "<|user|>hi </s>\n<think> x </think>",
    "",
]
CONFIGS = {
    "llama": WHOLE_BLOCKS,
    "llama-biases": Family("llama-biases", LlamaConfig, {"attention_bias": True, "mlp_bias": True}),
    "llama-3.1": Family(
        "llama-3.1",
        LlamaConfig,
        {
            "tie_word_embeddings": True,
            "num_key_value_heads": 2,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 500000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        },
    ),
    "qwen2": Family("qwen2", Qwen2Config, {"num_key_value_heads": 2, "rope_theta": 1e6}),
    "qwen3": Family("qwen3", Qwen3Config, {"head_dim": 16, "tie_word_embeddings": True}),
    "smollm3": Family("smollm3", SmolLM3Config, {"num_hidden_layers": 4, "pad_token_id": 0}),
}


def export(base: Path, out_dir: Path) -> Path:
    assert main(["export", str(base), "--out_dir", str(out_dir), "--outtype", "f32"]) == 0
    return out_dir / "model.gguf"


def bpe(split: pre_tokenizers.PreTokenizer, folder: Path, *, ignores_merges: bool) -> None:
    """Write a small tokenizer with special tokens at the start of its vocabulary, and one that is plain text."""
    alphabet = sorted(ByteLevel.alphabet())
    pairs = [("Ġ", "t"), ("i", "n"), ("Ġ", "a"), ("r", "e"), ("1", "2"), ("Ġa", "n"), ("Ġan", "d"), ("Ċ", "Ċ")]
    texts = ["<s>", "</s>", "<|user|>", *alphabet, *map("".join, pairs), "Ġgreen"]  # which no merge makes
    vocabulary = {text: number for number, text in enumerate(texts)}
    backend = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=ignores_merges))
    backend.pre_tokenizer, backend.decoder = split, decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|user|>"])
    backend.add_tokens(["<think>"])
    if ignores_merges:
        backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    backend.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages[0]['content'] }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize("name", SPLITS)
def test_tokenizer_is_that_of_the_checkpoint_and_of_llama_cpp(name, make_checkpoint, tmp_path):
    base = Path(shutil.copytree(make_checkpoint(WHOLE_BLOCKS), tmp_path / "base"))
    bpe(SPLITS[name], base, ignores_merges=name == "llama-bpe")
    (folder := tmp_path / "rebuilt").mkdir()
    path = export(base, tmp_path / "out")
    assert read_gguf(path).metadata["tokenizer.ggml.pre"] == name
    CheckpointFiles.find(folder, path)
    expected, actual = LitLoraTokenizer(base), LitLoraTokenizer(folder)
    ids = [expected.encode(text).ids for text in TEXTS]
    assert [actual.encode(text).ids for text in TEXTS] == ids
    assert [actual.encode(text).spans for text in TEXTS] == [expected.encode(text).spans for text in TEXTS]
    assert [*map(actual.decode, ids)] == [*map(expected.decode, ids)]
    for attribute in ("bos_id", "eos_id", "stop_ids", "chat_template", "added_ids"):
        assert getattr(actual, attribute) == getattr(expected, attribute)
    (engine := LlamaCppEngine(path, None, tuple(TEXTS)))([], [])
    assert engine.tokens == ids


def test_bos_is_added_where_llama_cpp_does_unasked(make_checkpoint, tmp_path):
    base = Path(shutil.copytree(make_checkpoint(WHOLE_BLOCKS), tmp_path / "base"))
    bpe(SPLITS["llama-bpe"], base, ignores_merges=True)
    header = read_gguf(export(base, tmp_path / "out"))
    silent = {key: value for key, value in header.metadata.items() if "add_bos" not in key}
    (folder := tmp_path / "rebuilt").mkdir()
    complete_folder(folder, replace(header, metadata=silent))
    assert LitLoraTokenizer(folder).adds_bos


@pytest.mark.parametrize("name", CONFIGS)
def test_config_is_that_of_the_checkpoint(name, make_checkpoint, tmp_path):
    base = make_checkpoint(CONFIGS[name])
    (folder := tmp_path / "rebuilt").mkdir()
    rebuilt = CheckpointFiles.find(folder, export(base, tmp_path / "out"))
    expected, config = read_config(base)
    assert rebuilt.config == config
    assert {key: rebuilt.hub_config[key] for key in ("model_type", "eos_token_id")}.items() <= expected.items()


@pytest.fixture(scope="module")
def header(make_checkpoint, tmp_path_factory) -> GGUFHeader:
    return read_gguf(export(make_checkpoint(WHOLE_BLOCKS), tmp_path_factory.mktemp("gguf") / "out"))


def test_files_that_are_there_stay(header, make_checkpoint, tmp_path):
    base = make_checkpoint(WHOLE_BLOCKS)
    for name in ("config.json", "tokenizer_config.json"):
        shutil.copy(base / name, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    complete_folder(tmp_path, header)
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() - before.keys() == {"tokenizer.json"}
    assert before.items() <= after.items()


def test_training_over_a_file_alone_is_that_with_its_checkpoint(header, make_checkpoint, data_dir, tmp_path, capfd):
    (folder := tmp_path / "folder").mkdir()
    weights = []
    for base, out in ((make_checkpoint(WHOLE_BLOCKS), "a"), (folder, "b")):
        command = [
            "finetune_lora",
            base,
            "--data_dir",
            data_dir,
            "--out_dir",
            tmp_path / out,
            "--quantize",
            header.path,
        ]
        assert main([*map(str, command), "--train.max_steps", "1", "--precision", "32-true"]) == 0
        weights.append((tmp_path / out / "final/adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert f"config.json, tokenizer.json, tokenizer_config.json in {folder}: written from" in capfd.readouterr().err
    assert main(["generate", str(tmp_path / "b/final"), "--prompt", "a", "--max_new_tokens", "2"]) == 0


TOKENIZER = {
    "sentencepiece": ({"tokenizer.ggml.model": "llama"}, "it is of the type llama, and only gpt2 can be"),
    "unknown": ({"tokenizer.ggml.pre": "viking"}, "its way to split a text is viking"),
    "not llama.cpp's": ({"litlora.tokenizer.other_splitting": True}, "llama.cpp has nothing that splits a text as it"),
    "a merge of no token": ({"tokenizer.ggml.merges": ["a qq"]}, "its merge 'a qq' is not of its tokens"),
    "no merges": ({"tokenizer.ggml.merges": 3}, "tokenizer.ggml.merges is missing or of another type"),
    "no kinds": ({"tokenizer.ggml.token_type": [1]}, "the kinds of its tokens are not those of byte-level BPE"),
    "a token twice": (
        {"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]},
        "it has a token twice",
    ),
    "no end": ({"tokenizer.ggml.eos_token_id": None}, "it has no end-of-text token"),
    "an end beyond": ({"tokenizer.ggml.eos_token_id": 300}, "its eos token is 300"),
    "no start": (
        {"tokenizer.ggml.bos_token_id": None, "tokenizer.ggml.add_bos_token": True},
        "it adds a special token that it does not name",
    ),
}
CONFIG = {
    "another architecture": ({"general.architecture": "bert"}, "its architecture is bert, and only llama, qwen2"),
    "experts": ({"llama.expert_count": 8}, "llama.expert_count is 8, which is not known"),
    "a rotary scaling": ({"llama.rope.scaling.type": "linear"}, "its rotary scaling is linear"),
    "a factor alone": ({"llama.rope.scaling.factor": 4.0}, "its rotary scaling is linear"),
    "heads of layers": ({"llama.attention.head_count": [4, 4]}, "its llama.attention.head_count is [4, 4]"),
    "no layers": ({"llama.block_count": 0}, "its llama.block_count is 0"),
    "half a rotary embedding": ({"llama.rope.dimension_count": 8}, "heads of keys, values and rotary embedding differ"),
}


@pytest.mark.parametrize("name", [*TOKENIZER, *CONFIG])
def test_what_could_differ_is_refused(name, header, tmp_path):
    keys, fault = (TOKENIZER | CONFIG)[name]
    what = "the tokenizer in" if name in TOKENIZER else "config.json cannot be rebuilt exactly from"
    with pytest.raises(LitLoraError) as refused:
        complete_folder(tmp_path, replace(header, metadata={**header.metadata, **keys}))
    assert fault in str(refused.value)
    assert str(refused.value).startswith(f"{what} {header.path}")
    assert "to the folder of --checkpoint_dir" in str(refused.value)
    assert not [*tmp_path.iterdir()]


SCALINGS = {"linear": LINEAR, "yarn": YARN, "longrope": LONGROPE}


@pytest.mark.parametrize("kind", SCALINGS)
def test_a_file_with_a_rotary_scaling_needs_the_config_of_its_model(kind, tokenizer_files, tmp_path, capfd):
    """The file alone is refused; with config.json beside it, the network is that of the checkpoint."""
    Case(kind, "llama", SCALINGS[kind]).write(tmp_path / "base", tokenizer_files)
    path = export(tmp_path / "base", tmp_path / "out")
    (folder := tmp_path / "folder").mkdir()
    assert main(["finetune_lora", str(folder), "--quantize", str(path), "--data_dir", str(folder)]) == 1
    refusal = (
        f"litlora: config.json cannot be rebuilt exactly from {path} (its rotary scaling is {kind}): add the model's"
    )
    assert capfd.readouterr().err.splitlines()[-1].startswith(refusal)
    assert not [*folder.iterdir()]
    shutil.copy(tmp_path / "base/config.json", folder)
    checkpoint, tokens = Checkpoint.open(CheckpointFiles.find(folder, path)), torch.arange(3, 60)
    models = [
        each.load(torch.float32, torch.device("cpu")) for each in (Checkpoint.open(tmp_path / "base"), checkpoint)
    ]
    with torch.no_grad():
        expected, actual = (model.logits(model(tokens, [len(tokens)])) for model in models)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


def test_keys_that_a_file_lacks_are_those_of_llama_cpp(tokenizer_files, tmp_path):
    """Without its key, llama.cpp takes a base of 10000 and no factor of YaRN's attention."""
    keys = rope("yarn", factor=4.0, attention_factor=2.0, beta_fast=30.0, beta_slow=2.0, **ORIGINAL)
    Case("yarn", "llama", keys).write(tmp_path / "base", tokenizer_files)
    header = read_gguf(export(tmp_path / "base", tmp_path / "out"))
    hub_config, config = read_config(tmp_path / "base")
    assert not [*differences(header, hub_config, config)]
    names = "freq_base", "scaling.attn_factor", "scaling.yarn_beta_fast", "scaling.yarn_beta_slow", "scaling.type"
    for name in names:
        metadata = {key: value for key, value in header.metadata.items() if key != f"llama.rope.{name}"}
        [fault] = differences(replace(header, metadata=metadata), hub_config, config)
        assert fault.startswith(f"its llama.rope.{name} is ")


def test_a_file_with_a_sentencepiece_tokenizer_needs_that_of_its_model(make_checkpoint, tmp_path, capfd):
    base = Path(shutil.copytree(make_checkpoint(WHOLE_BLOCKS), tmp_path / "base"))
    (base / "tokenizer.json").unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS[:2]), model_prefix=str(base / "tokenizer"), model_type="bpe", vocab_size=300,
        hard_vocab_limit=False, byte_fallback=True, normalization_rule_name="identity", minloglevel=2,
        remove_extra_whitespaces=False,
    )  # fmt: skip
    path = export(base, tmp_path / "out")
    (folder := tmp_path / "folder").mkdir()
    assert main(["finetune_lora", str(folder), "--quantize", str(path), "--data_dir", str(folder)]) == 1
    refusal = (
        f"litlora: the tokenizer in {path} cannot be rebuilt exactly (it is of the type llama, and only gpt2 can be): "
    )
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith(f"{refusal}add tokenizer.json or tokenizer.model")
    assert not [*folder.iterdir()]
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(base / name, folder)
    CheckpointFiles.find(folder, path)
    assert [LitLoraTokenizer(folder).encode(text).ids for text in TEXTS] == [
        LitLoraTokenizer(base).encode(text).ids for text in TEXTS
    ]
