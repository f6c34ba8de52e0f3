"""Training over a GGUF file, and the commands that follow: the network that trained is the one that answers."""

import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from helpers.copies import ADAPTER_FAULTS, DIFFERENT, changed, edit_json
from helpers.families import WHOLE_BLOCKS
from helpers.llama_cpp import answers
from helpers.runs import QUERY_VALUE

from litlora.__main__ import main
from litlora.args.finetune import FinetuneLoraArgs
from litlora.lora.checkpoint import load_with_adapters
from litlora.lora.selection import Weighted
from litlora.models.checkpoint import Checkpoint, block_linears
from litlora.models.checkpoint_files import CheckpointFiles
from litlora.nn import gguf_weight
from litlora.nn.gguf_weight import GGUFWeight
from litlora.nn.quantization import quantization_of
from litlora.train.planned_run import PlannedRun

CPU = torch.device("cpu")
TOKENS = torch.arange(3, 43)
PROMPTS = [[0, 45, 200, 7, 31, 102, 250], [3, 140, 21], [9, 80]]


def run(*words: object) -> int:
    return main([*map(str, words)])


@pytest.fixture(scope="module")
def base(make_checkpoint) -> Path:
    return make_checkpoint(WHOLE_BLOCKS)


@pytest.fixture(scope="module")
def files(base, tmp_path_factory) -> dict[str, Path]:
    """Return the base as a GGUF file of each type."""
    found = {}
    for outtype in ("q4_0", "f16"):
        out = tmp_path_factory.mktemp("gguf") / outtype
        assert run("export", base, "--out_dir", out, "--outtype", outtype) == 0
        found[outtype] = out / "model.gguf"
    return found


@pytest.fixture(scope="module")
def q4(files) -> Path:
    return files["q4_0"]


def training(base: Path, data_dir: Path, out_dir: Path, gguf: Path) -> list[object]:
    folders = ["--checkpoint_dir", base, "--data_dir", data_dir, "--out_dir", out_dir, "--quantize", gguf]
    flags = ["--precision", "32-true", "--train.max_steps", 4, "--train.global_batch_size", 5, "--train.epochs", 3]
    flags += ["--train.learning_rate", "1e-2", "--train.save_interval", 2]
    return ["finetune_lora", *folders, *QUERY_VALUE, *flags]


@pytest.fixture(scope="module")
def trained(base, q4, data_dir, tmp_path_factory) -> Path:
    """Return the folder of a run over the q4_0 file; the checkpoint that it names has no weights at all."""
    folder = tmp_path_factory.mktemp("bare") / "checkpoint"
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    out_dir = folder.parent / "run"
    assert run(*training(folder, data_dir, out_dir, q4)) == 0
    return out_dir


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.logits(model(TOKENS, [len(TOKENS)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("outtype", ["q4_0", "f16"])
def test_model_has_the_values_of_the_file(base, files, outtype, dtype):
    checkpoint = Checkpoint.open(CheckpointFiles.find(base, files[outtype]))
    model = checkpoint.load(dtype, CPU)
    for name in block_linears(checkpoint.outline()):
        weight = model.get_submodule(name).weight
        assert isinstance(weight, GGUFWeight)
        assert torch.equal(weight.to_dense(), checkpoint.read(f"{name}.weight").to(dtype)), name
    stored = sum(module.nbytes for module in model.modules() if isinstance(module, GGUFWeight))
    assert checkpoint.quantized_bytes == stored
    assert quantization_of(model).name == "gguf"


def test_adapter_loads_on_the_file_that_it_names(base, trained, q4):
    config = json.loads((trained / "final/adapter_config.json").read_text(encoding="utf-8"))
    recorded = config["auto_mapping"]
    assert recorded["gguf_path"] == str(q4)
    assert recorded["quantization_config"] == {"quant_method": "gguf", "compute_dtype": "float32"}
    assert run("generate", trained / "final", "--prompt", "a", "--max_new_tokens", 2) == 0


def test_adapter_is_verified_over_its_file(trained, capfd):
    assert run("verify", trained / "final") == 0
    assert "the same" in capfd.readouterr().out


def test_merged_checkpoint_answers_alike(base, trained, q4, tmp_path):
    """The dequantized weights with the adapter are the network that was trained."""
    checkpoint = Checkpoint.open(CheckpointFiles.find(base, q4))
    expected = logits(load_with_adapters(checkpoint, [Weighted(trained / "final")], torch.float32, CPU))
    assert (expected - logits(checkpoint.load(torch.float32, CPU))).abs().max() > 0.05
    assert run("merge_lora", trained / "final", "--out_dir", tmp_path / "merged") == 0
    merged = logits(Checkpoint.open(tmp_path / "merged").load(torch.float32, CPU))
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=0)
    assert run("verify", tmp_path / "merged") == 0


def test_exported_adapter_answers_alike_on_the_file(base, trained, q4, tmp_path):
    """llama.cpp rounds activations to 8 bits where weights are quantized: with the same values in f32 it agrees."""
    assert run("export", trained / "final", "--format", "gguf-lora", "--out_dir", tmp_path / "alone") == 0
    assert run("verify", tmp_path / "alone", "--base_dir", q4) == 0
    assert run("export", base, "--quantize", q4, "--outtype", "f32", "--out_dir", tmp_path / "f32") == 0
    adapter, whole = str(tmp_path / "alone/adapter.gguf"), str(tmp_path / "f32/model.gguf")
    common = {"prompts": PROMPTS, "tokens": 1, "adapter": adapter}
    checkpoint = Checkpoint.open(CheckpointFiles.find(base, q4))
    model = load_with_adapters(checkpoint, [Weighted(trained / "final")], torch.float32, CPU)
    for found, tolerance in zip(answers([{"model": m, **common} for m in (whole, str(q4))]), (1e-3, 0.2), strict=True):
        for prompt, [(token, logprob)] in zip(PROMPTS, found, strict=True):
            with torch.no_grad():
                own = model.logits(model(torch.tensor(prompt), [len(prompt)]))[-1].log_softmax(0)
            assert abs(float(own[token]) - logprob) < tolerance


def test_exported_adapter_is_verified_over_the_file(trained, q4, files, tmp_path, capfd):
    """llama.cpp computes what the receipt has over the file of the training, and not over another one."""
    assert run("export", trained / "final", "--format", "gguf-lora", "--out_dir", tmp_path / "alone") == 0
    assert "for q4_0 weights: the same" in capfd.readouterr().err
    assert run("verify", tmp_path / "alone", "--base_dir", files["f16"]) == 1
    assert "above the tolerance" in capfd.readouterr().err


@pytest.mark.parametrize("fault", ["scale ignored", "rsLoRA", "one layer zero"])
def test_a_fault_of_an_adapter_on_a_file_in_4_bits_is_found(fault, trained, q4, tmp_path, capfd):
    adapter = changed(trained / "final", tmp_path / "final", ADAPTER_FAULTS[fault].change)
    assert run("export", adapter, "--format", "gguf-lora", "--out_dir", tmp_path / "alone") == 1
    assert DIFFERENT in capfd.readouterr().err
    assert run("verify", tmp_path / "alone", "--base_dir", q4) == 1


def test_run_resumes_over_the_file_in_another_place(base, trained, q4, data_dir, tmp_path):
    moved = Path(shutil.copy(q4, tmp_path / "moved.gguf"))
    again = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(again / "final")
    shutil.rmtree(again / "step-000004")
    assert run(*training(base, data_dir, again, moved), "--resume", "true") == 0
    weights = "final/adapter_model.safetensors"
    assert (again / weights).read_bytes() == (trained / weights).read_bytes()


def test_run_does_not_resume_over_other_weights(base, trained, files, data_dir, tmp_path, capfd):
    again = Path(shutil.copytree(trained, tmp_path / "run"))
    shutil.rmtree(again / "final")
    assert run(*training(base, data_dir, again, files["f16"]), "--resume", "true") == 1
    assert "the base's weights have changed" in capfd.readouterr().err


def test_other_bases_of_an_adapter_are_refused(base, trained, files, capfd):
    final = trained / "final"
    for quantize in (files["f16"], "none", "bnb.nf4"):
        command = ["generate", final, "--base_dir", base, "--quantize", quantize, "--prompt", "a"]
        assert run(*command) == 1
        assert f"the adapter in {final} was trained on a base other than" in capfd.readouterr().err


def test_a_file_that_is_gone_is_named(base, trained, tmp_path, capfd):
    final = Path(shutil.copytree(trained / "final", tmp_path / "final"))
    config = json.loads((final / "adapter_config.json").read_text(encoding="utf-8"))
    config["auto_mapping"]["gguf_path"] = "gone.gguf"
    (final / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert run("merge_lora", final, "--out_dir", tmp_path / "merged") == 1
    hint = "is not there (gone.gguf): name it with --quantize"
    assert f"the GGUF file over which {final} was trained {hint}" in capfd.readouterr().err
    del config["auto_mapping"]["gguf_path"]
    (final / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert run("generate", final, "--prompt", "a") == 1
    assert f"{final} was trained over a GGUF file and does not say where it is" in capfd.readouterr().err


OTHER_MODELS = {
    "another family": ({"model_type": "qwen2"}, "it is for llama.cpp's llama, not qwen2"),
    "more layers": ({"num_hidden_layers": 3}, "its llama.block_count is 2, and config.json implies 3"),
    "another base of the rotary embedding": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        "its llama.rope.freq_base is 10000.0, and config.json implies 500.0",
    ),
    "a rotary scaling": (
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
        "its llama.rope.scaling.type is none, and config.json implies linear",
    ),
    "another width": ({"intermediate_size": 96}, "its llama.feed_forward_length is 128, and config.json implies 96"),
    "a larger vocabulary": (
        {"vocab_size": 301},
        "model.embed_tokens.weight has the shape (300, 64), but config.json implies (301, 64)",
    ),
    "biases": ({"attention_bias": True}, "the weights lack model.layers.0.self_attn.k_proj.bias"),
}


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_file_of_another_model_is_refused(name, base, q4, data_dir, tmp_path, capfd):
    keys, fault = OTHER_MODELS[name]
    folder = changed(base, tmp_path / "checkpoint", lambda f: edit_json(f / "config.json", **keys))
    assert run(*training(folder, data_dir, tmp_path / "out", q4)) == 1
    err = capfd.readouterr().err
    assert fault in err
    assert str(q4) in err
    assert not (tmp_path / "out").exists()


def retyped(file: bytes, number: int) -> bytes:
    """Return a file in which a tensor has another of GGML's types."""
    name = b"blk.0.ffn_up.weight"
    start = file.index(struct.pack("<Q", len(name)) + name) + 8 + len(name) + 4 + 2 * 8
    return file[:start] + struct.pack("<I", number) + file[start + 4 :]


WRONG_FILES = {
    "truncated": (lambda file: file[:-100], "is truncated or corrupt:", "replace it with an intact copy"),
    "cut in its header": (lambda file: file[:3000], "is truncated or corrupt:", "replace it with an intact copy"),
    "a text": (lambda file: b"model", "is not a GGUF file: it does not start with GGUF", ""),
    "a type that is not dequantized": (lambda file: retyped(file, 20), "is stored as IQ4_NL, but only", "quantize it"),
    "a type of later times": (lambda file: retyped(file, 4096), "is stored as type 4096", "quantize it again"),
}


@pytest.mark.parametrize("fault", WRONG_FILES)
def test_a_wrong_file_is_refused_in_one_sentence(fault, base, q4, data_dir, trained, tmp_path, capfd):
    change, sentence, hint = WRONG_FILES[fault]
    (wrong := tmp_path / "wrong.gguf").write_bytes(change(q4.read_bytes()))
    out = ["--out_dir", tmp_path / "out"]
    for command in (
        training(base, data_dir, tmp_path / "out", wrong),
        ["export", base, "--quantize", wrong, *out],
        ["export", trained / "final", "--quantize", wrong, "--format", "gguf-lora", *out],
        ["merge_lora", trained / "final", "--quantize", wrong, *out],
        ["generate", trained / "final", "--quantize", wrong, "--prompt", "a"],
    ):
        capfd.readouterr()
        assert run(*command) == 1
        [err] = capfd.readouterr().err.splitlines()
        assert err.startswith(f"litlora: {wrong}")
        assert sentence in err
        assert hint in err
        assert [*tmp_path.iterdir()] == [wrong]


def test_an_adapter_in_place_of_a_base_is_refused(base, trained, data_dir, tmp_path, capfd):
    assert run("export", trained / "final", "--format", "gguf-lora", "--out_dir", tmp_path / "alone") == 0
    assert run(*training(base, data_dir, tmp_path / "out", tmp_path / "alone/adapter.gguf")) == 1
    assert "adapter.gguf is an adapter: name the GGUF file of its base" in capfd.readouterr().err


@pytest.mark.parametrize("start", ["fisher", "pissa"])
def test_a_start_that_changes_the_base_is_refused(start, base, q4, data_dir, tmp_path, capfd):
    assert run(*training(base, data_dir, tmp_path / "out", q4), "--lora_init", start) == 1
    assert f"--lora_init {start} changes the base" in capfd.readouterr().err


def test_python_takes_a_path_or_a_text():
    for value in ("model.gguf", Path("model.gguf")):
        assert FinetuneLoraArgs(Path("a"), Path("b"), quantize=value).gguf == Path("model.gguf")


def test_completions_dequantize_once_where_a_step_leaves_room(base, q4, data_dir, tmp_path, monkeypatch):
    calls, own = [], gguf_weight.dequantize
    monkeypatch.setattr(gguf_weight, "dequantize", lambda *given: calls.append(given) or own(*given))
    counts, texts = [], []
    for out in (tmp_path / "kept", tmp_path / "not"):
        assert run(*training(base, data_dir, out, q4), "--train.max_steps", 1, "--eval.max_new_tokens", 9) == 0
        counts.append(len(calls))
        texts.append((out / "samples.jsonl").read_text(encoding="utf-8"))
        calls.clear()
        monkeypatch.setattr(PlannedRun, "spare", 0)
    assert texts[0] == texts[1]
    assert counts[0] < counts[1]


def test_estimate_counts_the_file(base, q4, data_dir, tmp_path, capfd):
    assert run(*training(base, data_dir, tmp_path / "out", q4), "--dry_run", "true") == 0
    size = Checkpoint.open(CheckpointFiles.find(base, q4)).quantized_bytes
    row = next(line for line in capfd.readouterr().out.splitlines() if "linear layers, GGUF" in line)
    assert float(row.split()[-1]) == round(size / 1e9, 3)
