"""What llama.cpp answers from an exported file is what litlora answers."""

import json
import shutil
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from string import ascii_lowercase

import gguf
import pytest
import sentencepiece
import torch
from helpers.exported import CPU, PROMPTS, TOKENS, check, load, random_adapter, round_activations
from helpers.families import LONGROPE, MATRIX, YARN, Case
from helpers.llama_cpp import answers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from litlora.__main__ import main
from litlora.data.tokenizer import Tokenizer as LitLoraTokenizer
from litlora.models.checkpoint import Checkpoint
from litlora.models.checkpoint_files import CheckpointFiles

PLAIN_ROPE = {"rope_type": "default", "rope_theta": 5000.0}
LONG = 300  # tokens, more than those of the prompts
WIDE_WINDOW = {"sliding_window": 200}
PLAIN_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16}
FOUR_LAYERS = {"num_hidden_layers": 4, "no_rope_layer_interval": 4}
# What llama.cpp lacks of a first config of the matrix, which the issue of a family is not about.
CHANGED = {
    "gemma2-0": PLAIN_GEMMA,
    "gemma3_text-0": PLAIN_GEMMA,
    "gemma3": PLAIN_GEMMA,
    "smollm3-0": FOUR_LAYERS,
    "stablelm-0": {"qk_layernorm": False},
    "exaone4-0": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "olmo3-1": {"rope_parameters": {"full_attention": YARN["rope_parameters"], "sliding_attention": PLAIN_ROPE}},
    "phi3-0": {
        "rope_parameters": LONGROPE["rope_parameters"] | {"original_max_position_embeddings": LONG},
        "original_max_position_embeddings": LONG,
        "max_position_embeddings": 2 * LONG,
    },
    "qwen2-0": {"rope_parameters": PLAIN_ROPE},
}
NAMES = [case.name for case in MATRIX if case.name.endswith("-0") or case.name in ("gemma3", "mistral3")]
MORE = ["llama-1", "llama-2", "mistral-1", "mistral-2", "olmo3-1", "granite-1", "glm4-2", "ministral3-2", "phi3-1"]


WITHOUT_WINDOW = "mistral", "starcoder2", "phi3", "ministral3"


def changed(name: str) -> Case:
    case = next(case for case in MATRIX if case.name == name)
    window = WIDE_WINDOW if name.startswith(WITHOUT_WINDOW) and "sliding_window" in case.keys else {}
    return replace(case, keys=case.keys | window | CHANGED.get(name, {}))


@dataclass
class Exported:
    """A checkpoint with an adapter, and its files."""

    base: Path
    adapter: Path
    merged: Path
    alone: Path
    plain: Path


def export(source: Path, out_dir: Path, *flags: str) -> Path:
    assert main(["export", str(source), "--out_dir", str(out_dir), *flags]) == 0
    return next(out_dir.glob("*.gguf"))


@pytest.fixture(scope="module")
def ascii_tokenizer(tmp_path_factory) -> Path:
    """Return a tokenizer in which each token is text: llama.cpp's server leaves out tokens that end in a character."""
    folder = tmp_path_factory.mktemp("ascii")
    texts = ["<s>", "</s>", *ascii_lowercase, *map("".join, product(ascii_lowercase, repeat=2))]
    bpe = Tokenizer(models.BPE({text: token for token, text in enumerate(texts[:300])}, [("a", "a")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(["<s>", "</s>"])
    bpe.save(str(folder / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory, ascii_tokenizer) -> dict[str, Exported]:
    files = {}
    for name in [*NAMES, *MORE]:
        folder = tmp_path_factory.mktemp(name)
        changed(name).write(base := folder / "base", ascii_tokenizer)
        adapter = random_adapter(base, folder / "adapter")
        merged = export(adapter, folder / "merged", "--outtype", "f32")
        plain = export(base, folder / "plain", "--outtype", "f32")
        alone = export(adapter, folder / "alone", "--format", "gguf-lora")
        files[name] = Exported(base, adapter, merged, alone, plain)
    return files


REBUILT = {"llama", "mistral", "mistral3", "qwen2", "qwen3", "smollm3", "gemma", "gemma2", "gemma3", "gemma3_text"}
REBUILT |= {"phi3", "granite", "olmo2", "glm4", "seed_oss"}


@pytest.mark.parametrize("name", [name for name in (*NAMES, *MORE) if changed(name).model_type in REBUILT])
def test_model_of_the_file_alone_is_that_of_the_checkpoint(name, exported, tmp_path):
    """What it lacks of a config.json is in the file: llama.cpp has the same network, as other tests show."""
    files = CheckpointFiles.find(tmp_path, exported[name].plain)
    models = [Checkpoint.open(each).load(torch.float32, CPU) for each in (exported[name].base, files)]
    tokens = torch.tensor([token for prompt in PROMPTS for token in prompt])
    with torch.no_grad():
        expected, actual = (model.logits(model(tokens, [len(tokens)])) for model in models)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def answered(exported) -> dict[str, list]:
    """Return what llama.cpp answers: with the merged file, and with the adapter on the base's."""
    requests = []
    for its in exported.values():
        common = {"prompts": PROMPTS, "tokens": TOKENS}
        requests.append({"model": str(its.merged), **common})
        requests.append({"model": str(its.plain), "adapter": str(its.alone), **common})
    found = answers(requests)
    return dict(zip(exported, zip(found[::2], found[1::2], strict=True), strict=True))


@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_merged_model_answers_alike(name, exported, answered):
    check(load(exported[name].base, exported[name].adapter), answered[name][0])


@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_base_with_adapter_answers_alike(name, exported, answered):
    check(load(exported[name].base, exported[name].adapter), answered[name][1])


@pytest.mark.parametrize("name", [*NAMES, *MORE])
def test_file_reads_back_as_the_checkpoint(name, exported):
    """Names, permuted rows, stacked norms and what is added to a norm's weight are undone."""
    its = exported[name]
    expected, actual = Checkpoint.open(its.base), Checkpoint.open(CheckpointFiles.find(its.base, its.plain))
    assert actual.outline().state_dict().keys() == expected.outline().state_dict().keys()
    for tensor in expected.outline().state_dict():
        torch.testing.assert_close(actual.read(tensor), expected.read(tensor).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("outtype", ["f16", "bf16", "q8_0", "q4_0"])
def test_types_hold_the_weights(outtype, exported, tmp_path):
    """Each type has as many bits as its name says, and the weights are close to those of the checkpoint."""
    its = exported["llama-0"]
    reader = gguf.GGUFReader(export(its.base, tmp_path / outtype, "--outtype", outtype))
    tensor = next(tensor for tensor in reader.tensors if tensor.name == "blk.0.ffn_down.weight")
    assert tensor.tensor_type.name == outtype.upper()
    expected = Checkpoint.open(its.base).read("model.layers.0.mlp.down_proj.weight").numpy()
    error = abs(gguf.quants.dequantize(tensor.data, tensor.tensor_type) - expected).max() / abs(expected).max()
    assert error < {"f16": 1e-3, "bf16": 4e-3, "q8_0": 0.01, "q4_0": 0.15}[outtype]


def test_scales_of_all_layers_are_exact(exported, tmp_path):
    """llama.cpp knows one alpha: rsLoRA and patterns of ranks and scales go into B."""
    base = exported["llama-0"].base
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 11}, "use_rslora": True}
    adapter = random_adapter(base, tmp_path / "adapter", **patterns)
    alone = export(adapter, tmp_path / "alone", "--format", "gguf-lora")
    request = {"model": str(exported["llama-0"].plain), "adapter": str(alone), "prompts": PROMPTS, "tokens": TOKENS}
    check(load(base, adapter), answers([request])[0])


def test_families_answer_alike_in_f16(exported, tmp_path_factory):
    """In f16 llama.cpp rounds the input of each product as well, and computes nothing else in another way."""
    requests, files = [], {}
    for name in NAMES:
        files[name] = export(exported[name].base, tmp_path_factory.mktemp("f16") / "out", "--outtype", "f16")
        common = {"model": str(files[name]), "adapter": str(exported[name].alone)}
        requests.append({**common, "prompts": PROMPTS, "tokens": TOKENS})
    for name, found in zip(NAMES, answers(requests), strict=True):
        its = exported[name]
        check(round_activations(load(its.base, its.adapter, files[name])), found, atol=2e-3)


def test_pico_answers_alike_in_f16(pico, tmp_path):
    file = export(pico, tmp_path / "out", "--outtype", "f16")
    [found] = answers([{"model": str(file), "prompts": PROMPTS, "tokens": TOKENS}])
    check(round_activations(load(pico, None, file)), found)


@pytest.mark.parametrize(("outtype", "atol"), [("q8_0", 0.1), ("q4_0", 0.2)])
def test_pico_answers_nearly_alike_in_a_quantized_type(outtype, atol, pico, tmp_path):
    """GGML rounds the input of each product to 8 bits, and a value that is rounded otherwise changes all after it."""
    file = export(pico, tmp_path / "out", "--outtype", outtype)
    [found] = answers([{"model": str(file), "prompts": PROMPTS, "tokens": TOKENS}])
    check(load(pico, None, file), found, atol)


def test_pico_answers_alike_in_f32(pico, tmp_path):
    file = export(pico, tmp_path / "out", "--outtype", "f32")
    [found] = answers([{"model": str(file), "prompts": PROMPTS, "tokens": TOKENS}])
    check(load(pico, None), found)


def test_llama_cpp_splits_text_alike(checkpoints, tmp_path):
    """A prompt as text gives the same answer as its tokens."""
    base = checkpoints("llama")
    texts = ["Name a fruit that is green.", "Add 2 and  3:\n\nit's 5!"]
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    ids = [tokenizer.encode(text).ids for text in texts]
    common = {"model": str(export(base, tmp_path / "out", "--outtype", "f32")), "tokens": 3}
    as_text, as_ids = answers([{**common, "prompts": texts}, {**common, "prompts": ids}])
    assert as_text == as_ids


def test_llama_cpp_splits_text_as_sentencepiece(checkpoints, tmp_path):
    base = Path(shutil.copytree(checkpoints("llama"), tmp_path / "base"))
    (base / "tokenizer.json").unlink()
    texts = ["Name a fruit that is green.", " A pear  is green,\nand so is 🍐."]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(base / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    settings = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}
    (base / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    ids = [LitLoraTokenizer(base).encode(text).ids for text in texts]
    common = {"model": str(export(base, tmp_path / "out", "--outtype", "f32")), "tokens": 3}
    as_text, as_ids = answers([{**common, "prompts": texts}, {**common, "prompts": ids}])
    assert as_text == as_ids


@pytest.mark.parametrize(("name", "refusal"), [("qwen2-0", "rope_type"), ("gemma2-0", "query_pre_attn_scalar")])
def test_other_networks_are_refused(name, refusal, tmp_path, ascii_tokenizer, capfd):
    """A network that llama.cpp would compute otherwise is refused before a file is written."""
    next(case for case in MATRIX if case.name == name).write(tmp_path / "base", ascii_tokenizer)
    assert main(["export", str(tmp_path / "base"), "--out_dir", str(tmp_path / "out")]) == 1
    assert refusal in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_dora_alone_is_refused(exported, tmp_path, capfd):
    adapter = random_adapter(exported["llama-0"].base, tmp_path / "dora", use_dora=True)
    command = ["export", str(adapter), "--format", "gguf-lora", "--out_dir", str(tmp_path / "out")]
    assert main(command) == 1
    assert "has no DoRA" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_modelfile_has_the_template_that_was_trained(exported):
    text = (exported["llama-0"].merged.parent / "Modelfile").read_text(encoding="utf-8")
    assert "### Instruction:\n{{ if .System }}{{ .System }}\n\n{{ end }}{{ .Prompt }}\n\n### Response:\n" in text
    assert 'PARAMETER stop "</s>"' in text
    assert text.startswith("FROM ./model.gguf\n")
