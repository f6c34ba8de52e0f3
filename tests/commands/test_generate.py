import json
import shutil
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from helpers.reference import hugging_face, with_peft
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from litlora import __version__
from litlora.__main__ import main
from litlora.args.inference import GenerateArgs
from litlora.data.prompts.styles import ALPACA
from litlora.lora.checkpoint import storage
from litlora.nn.nf4 import Quantization
from litlora.torch_private import inductor_cache

STARTED = f"litlora {__version__}: generate"


@pytest.fixture
def generate(capfd):
    """Return a function that runs the command in float32 and returns what it wrote to stdout."""

    def run(directory: Path, *flags: object) -> str:
        command = ["generate", "--checkpoint_dir", directory, "--precision", "32-true", *flags]
        capfd.readouterr()
        assert main([*map(str, command)]) == 0
        return capfd.readouterr().out

    return run


def greedy(model: torch.nn.Module, checkpoint: Path, prompt: str, count: int) -> str:
    """Return transformers' completion."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    inputs = tokenizer(prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=count, do_sample=False, pad_token_id=0)[0]
    return tokenizer.decode(ids[inputs.input_ids.shape[1] :], skip_special_tokens=True)


def test_greedy_completion_equals_transformers(checkpoint, generate):
    ours = generate(checkpoint, "--prompt", "Say hello to", "--max_new_tokens", 30, "--temperature", 0)
    assert ours == greedy(hugging_face(checkpoint), checkpoint, "Say hello to", 30) + "\n"


def test_adapter_uses_its_base_and_prompt_style(adapter, tiny, generate):
    ours = generate(adapter, "--prompt", "Close the door.", "--max_new_tokens", 20, "--temperature", 0)
    prompt = ALPACA.format(instruction="Close the door.")
    assert ours == greedy(with_peft(tiny, adapter), tiny, prompt, 20) + "\n"
    assert ours != generate(tiny, "--prompt", prompt, "--max_new_tokens", 20, "--temperature", 0)


def test_adapters_are_summed_by_weight_with_their_base_and_prompt_style(adapter, tiny, generate):
    flags = ["--prompt", "Close the door.", "--max_new_tokens", 20, "--temperature", 0]
    halves = ["--adapters", f"{adapter},{adapter}", "--adapter_weights", "0.25,0.75"]
    expected = generate(adapter, *flags)
    assert generate(tiny, *flags, *halves) == expected
    assert main([*map(str, ["generate", *flags, *halves])]) == 0  # their base is found
    assert generate(tiny, *flags, *halves[:2]) != expected  # 1 each


ROWS = [
    {"prompt": "Say hello to", "id": [7]},
    {"instruction": "Add the numbers.", "input": "2 and 3", "output": "5"},
    {"messages": [{"role": "user", "content": "Close the door."}]},
    {"messages": [{"role": "user", "content": "Sag «ja» 🚪"}, {"role": "assistant", "content": "ja"}]},
]
ALONE = [["Say hello to"], ["Add the numbers.", "--input", "2 and 3"], ["Close the door."], ["Sag «ja» 🚪"]]


def test_completions_of_a_file_are_those_of_each_prompt(adapter, tmp_path, generate, capfd):
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    flags, out_file = ["--max_new_tokens", 12, "--temperature", 0], tmp_path / "new" / "answers.jsonl"
    files = ["--prompts", tmp_path / "rows.jsonl", "--out_file", out_file]
    assert generate(adapter, *files, "--batch_size", 3, *flags) == ""
    answered = [json.loads(line) for line in out_file.read_text(encoding="utf-8").splitlines()]
    expected = [generate(adapter, "--prompt", *prompt, *flags).removesuffix("\n") for prompt in ALONE]
    assert answered == [{**row, "completion": text} for row, text in zip(ROWS, expected, strict=True)]


def test_prompt_from_stdin(litlora, tiny):
    flags = ["generate", "--checkpoint_dir", tiny, "--temperature", 0, "--precision", "32-true"]
    piped = litlora(*flags, stdin="Say hello\n")
    assert piped.returncode == 0
    assert piped.stdout == litlora(*flags, "--prompt", "Say hello").stdout
    assert piped.stderr == f"{STARTED}\n"


def test_every_stop_id_ends_the_completion(tiny, tmp_path, generate):
    prompt = ["--prompt", "Say hello to", "--max_new_tokens", 12, "--temperature", 0]
    complete = generate(tiny, *prompt)
    tokenizer = AutoTokenizer.from_pretrained(tiny)
    ids = tokenizer("Say hello to", return_tensors="pt").input_ids
    tokens = hugging_face(tiny).generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    path = copy / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [1, int(tokens[5])]}))
    expected = tokens[: tokens.tolist().index(int(tokens[5]))]
    stopped = generate(copy, *prompt)
    assert stopped == tokenizer.decode(expected) + "\n"
    assert complete.startswith(stopped[:-1])


def test_seed_determines_the_samples(tiny, generate):
    flags = ["--prompt", "Say", "--max_new_tokens", 8, "--num_samples", 3, "--temperature", 1.5, "--top_k", "null"]
    first, again, other = (generate(tiny, *flags, "--seed", seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert len(generate(tiny, *flags).splitlines()) >= 3


@pytest.mark.parametrize("limit", [["--top_k", 1], ["--top_p", 1e-6]], ids=["top_k", "top_p"])
def test_top_k_1_and_tiny_top_p_are_greedy(tiny, generate, limit):
    flags = ["--prompt", "Say", "--max_new_tokens", 20]
    assert generate(tiny, *flags, *limit, "--temperature", 2) == generate(tiny, *flags, "--temperature", 0)


def test_adapter_of_a_4_bit_base_is_generated_from_4_bit(tiny, data_dir, tmp_path, capfd):
    folders = ["--checkpoint_dir", tiny, "--data_dir", data_dir, "--out_dir", tmp_path]
    training = ["--precision", "32-true", "--quantize", "bnb.nf4", "--train.learning_rate", "1e-2"]
    assert main([*map(str, ["finetune_lora", *folders, *training, "--lora_mlp", "true"])]) == 0
    prompt = ["--prompt", "Say hello to", "--max_new_tokens", 30, "--temperature", 0]
    completions = []
    for flags in ([], ["--precision", "32-true", "--quantize", "bnb.nf4"], ["--quantize", "none"]):
        capfd.readouterr()
        assert main([*map(str, ["generate", "--checkpoint_dir", tmp_path / "final", *prompt, *flags])]) == 0
        completions.append(capfd.readouterr().out)
    assert completions[0] == completions[1] != completions[2]


@pytest.mark.parametrize(
    ("flags", "trained", "expected"),
    [
        ({}, None, (torch.bfloat16, None)),
        ({}, ("bnb.nf4", torch.float32), (torch.float32, "bnb.nf4")),
        ({"quantize": "none"}, ("bnb.nf4", torch.float32), (torch.float32, None)),
        ({"quantize": "bnb.nf4-dq"}, ("bnb.nf4", torch.bfloat16), (torch.bfloat16, "bnb.nf4-dq")),
        ({"precision": "bf16-true"}, ("bnb.nf4", torch.float32), (torch.bfloat16, "bnb.nf4")),
        ({"precision": "32-true", "quantize": "bnb.nf4"}, None, (torch.float32, "bnb.nf4")),
    ],
)
def test_flags_override_the_adapter_s_base_settings(flags, trained, expected):
    dtype, quantization = storage(GenerateArgs(Path("x"), **flags), trained and Quantization(*trained))
    assert (dtype, quantization and quantization.name) == expected
    assert quantization is None or quantization.dtype is dtype


def test_compile_leaves_the_completion_unchanged(adapter, generate):
    flags = ["--prompt", "Close the door.", "--max_new_tokens", 20, "--temperature", 0]
    truncated = inductor_cache() / "of-tests" / f"{uuid4()}.main.so"  # as a compiler that is killed leaves it
    truncated.parent.mkdir(exist_ok=True)
    truncated.write_bytes(b"\x7fELF")
    assert generate(adapter, *flags, "--compile", "true") == generate(adapter, *flags)
    assert not truncated.exists()


def test_missing_compiler_is_reported_before_any_token(tiny, tmp_path, litlora):
    nothing = {"CXX": "no-such-compiler", "PATH": str(tmp_path), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run = litlora("generate", "--checkpoint_dir", tiny, "--prompt", "Say", "--compile", "true", **nothing)
    assert (run.returncode, run.stdout) == (1, "")
    started, sentence = run.stderr.splitlines()
    assert started == STARTED
    assert sentence.startswith("litlora: --compile needs a C++ compiler: install g++, or leave --compile out (torch")


@pytest.mark.parametrize("temperature", ["1e-320", "1e-40", "1e-30"])
def test_temperatures_near_0_are_greedy(tiny, generate, temperature):
    prompt = [tiny, "--prompt", "x", "--max_new_tokens", 5]
    assert generate(*prompt, "--temperature", temperature) == generate(*prompt, "--temperature", 0)


@pytest.mark.parametrize("temperature", [0, 1])
def test_nan_weights_are_reported_in_a_sentence(tiny, tmp_path, capfd, temperature):
    copy = Path(shutil.copytree(tiny, tmp_path / "copy"))
    weights = load_file(copy / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, copy / "model.safetensors")
    command = ["generate", "--checkpoint_dir", str(copy), "--prompt", "Say", "--temperature", str(temperature)]
    assert main(command) == 1
    assert capfd.readouterr() == (
        "",
        "litlora: the model's scores for the next token are NaN or infinite: its weights are corrupt, "
        "or too large for this --precision (try 32-true)\n",
    )
