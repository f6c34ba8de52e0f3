"""A folder gets the config and the tokenizer that it lacks from a GGUF file; what could differ is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
from helpers.families import LINEAR, LONGROPE, ORIGINAL, WHOLE_BLOCKS, YARN, Case, Family, rope
from hypothesis import given
from hypothesis import strategies as st
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
from litlora.models.gguf.reader import GGUFHeader, read_gguf
from litlora.models.gguf.rebuilt.folder import complete_folder

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
    "another type": ({"tokenizer.ggml.model": "bert"}, "it is of the type bert, and only gpt2 and llama can be"),
    "no scores": ({"tokenizer.ggml.model": "llama"}, "tokenizer.ggml.scores is missing or of another type"),
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
    "a rotary scaling": ({"llama.rope.scaling.type": "dynamic"}, "its rotary scaling is dynamic"),
    "no rotary divisors": ({"llama.rope.scaling.type": "longrope"}, "it has no rope_factors_long.weight"),
    "no factor": ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": -1.0}, "scaling.factor is -1.0"),
    "heads of layers": ({"llama.attention.head_count": [4, 4]}, "its llama.attention.head_count is [4, 4]"),
    "more layers than tensors": ({"llama.block_count": 10**12}, "its llama.block_count is 1000000000000"),
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


SCALINGS = {
    "linear": LINEAR,
    "yarn": YARN,
    "yarn of its own": rope("yarn", factor=4.0, attention_factor=1.5, beta_fast=30.0, beta_slow=2.0, **ORIGINAL),
    "longrope": LONGROPE,
}


@pytest.mark.parametrize("kind", SCALINGS)
def test_rotary_scaling_of_a_file_alone_is_that_of_the_checkpoint(kind, tokenizer_files, tmp_path):
    Case(kind, "llama", SCALINGS[kind]).write(tmp_path / "base", tokenizer_files)
    path = export(tmp_path / "base", tmp_path / "out")
    (folder := tmp_path / "folder").mkdir()
    files = CheckpointFiles.find(folder, path)
    assert files.config.positions == read_config(tmp_path / "base")[1].positions
    checkpoints, tokens = map(Checkpoint.open, (tmp_path / "base", files)), torch.arange(3, 60)
    models = [checkpoint.load(torch.float32, torch.device("cpu")) for checkpoint in checkpoints]
    with torch.no_grad():
        expected, actual = (model.logits(model(tokens, [len(tokens)])) for model in models)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", ["linear", "longrope"])
def test_scaling_without_a_type_is_known_by_its_factor_or_divisors(kind, tokenizer_files, tmp_path):
    Case(kind, "llama", SCALINGS[kind]).write(tmp_path / "base", tokenizer_files)
    header = read_gguf(export(tmp_path / "base", tmp_path / "out"))
    silent = {key: value for key, value in header.metadata.items() if key != "llama.rope.scaling.type"}
    (folder := tmp_path / "folder").mkdir()
    complete_folder(folder, replace(header, metadata=silent))
    hub_config, config = read_config(tmp_path / "base")
    assert not [*differences(replace(header, metadata=silent), hub_config, config)]
    actual, expected = (each.ropes[0] for each in (read_config(folder)[1], config))
    assert type(actual.scaling) is type(expected.scaling)
    assert actual.attention_factor == pytest.approx(expected.attention_factor)


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


@pytest.fixture(scope="module")
def pieces(make_checkpoint, tmp_path_factory) -> GGUFHeader:
    """Return a file with a sentencepiece tokenizer; a special and a user-defined token have no piece in its model."""
    base = Path(shutil.copytree(make_checkpoint(WHOLE_BLOCKS), tmp_path_factory.mktemp("pieces") / "base"))
    (base / "tokenizer.json").unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*TEXTS[:2], "aaaa  aaa    a\n\n\n"] * 3), model_prefix=str(base / "tokenizer"),
        model_type="bpe", vocab_size=297, hard_vocab_limit=False, byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    size = sentencepiece.SentencePieceProcessor(model_file=str(base / "tokenizer.model")).get_piece_size()
    added = {"<|user|>": True, "<think>": False}
    tokens = {size + n: {"content": text, "special": special} for n, (text, special) in enumerate(added.items())}
    settings = {"add_bos_token": True, "legacy": True, "added_tokens_decoder": tokens}
    (base / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return read_gguf(export(base, base / "out"))


def test_sentencepiece_of_a_file_alone_is_that_of_the_checkpoint_and_of_llama_cpp(pieces, tmp_path):
    texts = [*TEXTS, "aaaaa a    aaa\n\n", "<|user|>green<think> green</s>  "]
    complete_folder(tmp_path, pieces)
    expected, actual = LitLoraTokenizer(pieces.path.parents[1]), LitLoraTokenizer(tmp_path)
    ids = [expected.encode(text).ids for text in texts]
    assert [actual.encode(text).ids for text in texts] == ids
    assert [actual.encode(text).spans for text in texts] == [expected.encode(text).spans for text in texts]
    assert [*map(actual.decode, ids)] == [*map(expected.decode, ids)]
    for attribute in ("bos_id", "eos_id", "stop_ids", "adds_bos"):
        assert getattr(actual, attribute) == getattr(expected, attribute)
    (engine := LlamaCppEngine(pieces.path, None, tuple(texts)))([], [])
    assert engine.tokens == ids


def test_keys_that_a_sentencepiece_tokenizer_lacks_are_those_of_llama_cpp(pieces, tmp_path):
    names = "add_bos_token", "add_space_prefix", "bos_token_id", "eos_token_id", "unknown_token_id"
    silent = {f"tokenizer.ggml.{name}" for name in names}
    metadata = {key: value for key, value in pieces.metadata.items() if key not in silent}
    complete_folder(tmp_path, replace(pieces, metadata=metadata))
    expected, actual = LitLoraTokenizer(pieces.path.parents[1]), LitLoraTokenizer(tmp_path)
    assert [actual.encode(text).ids for text in TEXTS] == [expected.encode(text).ids for text in TEXTS]
    assert (actual.bos_id, actual.eos_id) == (expected.bos_id, expected.eos_id)


def test_blanks_behind_special_tokens_of_phi_3_are_dropped(pieces, tmp_path):
    """As llama.cpp does by the model's name alone."""
    complete_folder(tmp_path, replace(pieces, metadata={**pieces.metadata, "general.name": "Phi-3 mini"}))
    tokenizer = LitLoraTokenizer(tmp_path)
    assert tokenizer.encode("<|user|>  green").ids == tokenizer.encode("<|user|>green").ids
    assert tokenizer.encode("<s>  green").ids != tokenizer.encode("<s>green").ids


PIECES = {
    "a score that is none": ("scores", lambda scores: [float("nan"), *scores[1:]], "not a finite score for each token"),
    "scores that lack": ("scores", lambda scores: scores[1:], "it has not a finite score for each token"),
    "a byte that lacks": ("token_type", lambda kinds: [1 if kind == 6 else kind for kind in kinds], "for each byte"),
    "no token for what is unknown": ("token_type", lambda kinds: [1, *kinds[1:]], "its unknown token is an ordinary"),
    "an empty token": ("tokens", lambda tokens: [*tokens[:-1], ""], "it has an empty token"),
}


@pytest.mark.parametrize("name", PIECES)
def test_a_sentencepiece_tokenizer_that_could_differ_is_refused(name, pieces, tmp_path):
    key, change, fault = PIECES[name]
    key = f"tokenizer.ggml.{key}"
    with pytest.raises(LitLoraError, match=f"cannot be rebuilt exactly .*{fault}"):
        complete_folder(tmp_path, replace(pieces, metadata={**pieces.metadata, key: change(pieces.metadata[key])}))
    assert not [*tmp_path.iterdir()]


# What a GGUF file can hold.
ATOMS = [st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=9)]
VALUES = st.one_of(*ATOMS, *(st.lists(atom, max_size=3) for atom in ATOMS))


@given(data=st.data())
def test_whatever_the_metadata_is_the_folder_is_completed_or_the_file_refused(data, header, pieces, tmp_path_factory):
    file = data.draw(st.sampled_from([header, pieces]))
    metadata = dict(file.metadata)
    names = "tokenizer.ggml.pre", "tokenizer.ggml.eot_token_id", "llama.rope.scaling.type", "llama.rope.scaling.factor"
    for key in data.draw(st.lists(st.sampled_from([*metadata, *names]), min_size=1, max_size=3)):
        old = metadata.get(key)
        if isinstance(old, list) and data.draw(st.booleans()):
            metadata[key] = [data.draw(VALUES), *old[1:]]
        else:
            metadata[key] = data.draw(VALUES)
    folder = tmp_path_factory.mktemp("rebuilt")
    try:
        complete_folder(folder, replace(file, metadata=metadata))
    except LitLoraError:
        assert not [*folder.iterdir()]
    else:
        read_config(folder)
