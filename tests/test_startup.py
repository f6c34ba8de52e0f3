import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from litlora import __version__
from litlora.__main__ import main
from litlora.args import COMMANDS
from litlora.cli.settings import settings_of
from litlora.errors import LitLoraError
from litlora.train.optimizer_names import PAGED, UNSUITABLE, check_name, torch_names
from litlora.utils.manifest import write_manifest

PROBE = """
import sys
from litlora.__main__ import main
try:
    sys.exit(main(sys.argv[1:]))
finally:
    print(*sys.modules, file=sys.stderr)
"""
HEAVY = {
    "torch",
    "lightning",
    "lightning_fabric",
    "transformers",
    "bitsandbytes",
    "huggingface_hub",
    "tokenizers",
    "safetensors",
    "numpy",
    "jsonargparse",
    "rich",
}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_imports_nothing_heavy(arguments):
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout
    modules = {name.split(".")[0] for name in done.stderr.split()}
    assert "litlora" in modules
    assert not modules & HEAVY


def test_unknown_flag_imports_nothing_heavy():
    arguments = ["finetune_lora", "--checkpoint_dir", "base", "--data_dir", "data", "--nonsense", "1"]
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    sentence, modules = done.stderr.splitlines()
    assert sentence == "litlora: unrecognized --nonsense; see litlora finetune_lora --help"
    assert not set(modules.split()) & HEAVY


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--prompt", "2 + 2", "--precision", "bf16-true"],
        ["generate", "--prompt", "2 + 2", "--precision", "32-true"],
        ["generate", "--prompt", "2 + 2", "--precision", "32-true", "--num_samples", "3"],
        ["merge_lora", "--out_dir", "merged"],
    ],
)
def test_compiler_and_sharding_are_imported_only_for_use(adapter, tmp_path, arguments):
    command = [sys.executable, "-c", PROBE, *arguments, "--checkpoint_dir", str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    modules = done.stderr.splitlines()[-1].split()
    assert "torch" in modules
    assert not {"torch._dynamo", "torch.distributed.tensor"} & set(modules)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_flag(command, capsys):
    assert main([command, "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for name in settings_of(COMMANDS[command]):
        assert f" --{name} " in words or f" --{name}." in words
    assert not re.findall(r"--[\w.]+ \S+ \((?:required|default)", words), "flags without explanation"
    assert not re.findall(r"<class|type:|Optional|\| None|null\)", words), "types in Python syntax"
    assert words.split("examples: ")[1].count("litlora") == 2


FINETUNE = ["finetune_lora", "base", "--data_dir", "data", "--out_dir", "out"]
REFUSED = {
    "flag": [*FINETUNE, "--lr", "1"],
    "value": [*FINETUNE, "--precision", "bf16"],
    "epochs": [*FINETUNE, "--train.epochs", "0"],
    "config": [*FINETUNE, "--config", "nowhere.yaml"],
    "base": ["finetune_lora", "nowhere", "--data_dir", "data"],
    "no checkpoint": ["finetune_lora", "data", "--data_dir", "data"],
    "model_type": ["finetune_lora", "gpt2", "--data_dir", "data"],
    "parted head": ["finetune_lora", "tied", "--data_dir", "data", "--out_dir", "out", "--lora_init", "pissa",
                    "--lora_head", "--devices", "2", "--strategy", "fsdp"],
    "lora_layers": [*FINETUNE, "--lora_layers", "2-9"],
    "lora_targets": [*FINETUNE, "--lora_targets", "k_proj,nonsense"],
    "rank_pattern": [*FINETUNE, "--lora_rank_pattern", '{"nonsense": 4}'],
    "no weights": ["finetune_lora", "unweighted", "--data_dir", "data"],
    "no tokenizer": ["finetune_lora", "untokenized", "--data_dir", "data"],
    "data": ["finetune_lora", "base", "--data_dir", "nowhere"],
    "no val.jsonl": ["finetune_lora", "base", "--data_dir", "halved"],
    "bad row": ["finetune_lora", "base", "--data_dir", "bad"],
    "max_seq_length": [*FINETUNE, "--train.max_seq_length", "100000"],
    "evaluate_example": [*FINETUNE, "--eval.evaluate_example", "99"],
    "prompt_style": [*FINETUNE, "--prompt_style", "nonsense"],
    "chat": [*FINETUNE, "--prompt_style", "chat"],
    "optimizer": [*FINETUNE, "--optimizer", "adamw_torch"],
    "class_path": [*FINETUNE, "--optimizer.class_path", "no.such.Thing"],
    "init_args only": [*FINETUNE, "--optimizer", '{"init_args": {"eps": 1}}'],
    "rank": [*FINETUNE, "--lora_r", "100000000", "--dry_run"],
    "resume": [*FINETUNE, "--resume", "true"],
    "truncated": [*FINETUNE, "--out_dir", "cut", "--resume", "cut/step-000001"],
    "resume path": [*FINETUNE, "--resume", "nowhere"],
    "other settings": [*FINETUNE, "--out_dir", "run", "--resume", "true", "--lora_r", "4"],
    "run in out_dir": [*FINETUNE, "--out_dir", "run"],
    "finished run": [*FINETUNE, "--out_dir", "finished"],
    "unwritable out_dir": [*FINETUNE, "--out_dir", "/proc/litlora"],
    "generate": ["generate", "nowhere"],
    "empty prompt": ["generate", "base", "--prompt="],
    "long prompt": ["generate", "base", "--prompt", "a long prompt " * 100],
    "many new tokens": ["generate", "adapter", "--base_dir", "base", "--prompt", "a", "--max_new_tokens", "1000"],
    "run folder": ["generate", "finished"],
    "base of adapter": ["generate", "adapter", "--base_dir", "nowhere"],
    "base_dir": ["generate", "base", "--base_dir", "base"],
    "adapter key": ["generate", "strange"],
    "merged adapter key": ["merge_lora", "strange", "--out_dir", "merged"],
    "style": ["generate", "adapter", "--prompt_style", "nonsense"],
    "choices": ["evaluate", "base", "--data_dir", "data", "--metrics", "accuracy", "--choices", "yes,no"],
    "baseline": ["evaluate", "base", "--data_dir", "data", "--baseline", "nowhere"],
    "sweep": ["sweep", "base", "--data_dir", "nowhere", "--search", "{lora_r: [8]}"],
    "search": ["sweep", "base", "--data_dir", "data", "--search", "{lora_rr: [8]}"],
    "merge": ["merge_lora", "base", "--out_dir", "merged"],
    "out_dir": ["merge_lora", "adapter", "--out_dir", "data"],
    "destination": ["prepare_json", "--source", "data/train.jsonl", "--destination_path", "/proc/litlora"],
    "source": ["prepare_json", "--source", "nowhere.json", "--destination_path", "prepared"],
    "repository": ["download", "not a repository"],
}  # fmt: skip


@pytest.fixture(scope="module")
def refused(tiny, data_dir, adapter, tmp_path_factory) -> dict[str, tuple[object, str]]:
    """Run all command lines of REFUSED in one process without torch."""
    folder = tmp_path_factory.mktemp("refused")
    for name in ("base", "gpt2", "tied", "unweighted", "untokenized"):
        shutil.copytree(tiny, folder / name)
    (folder / "gpt2/config.json").write_text('{"model_type": "gpt2"}')
    tied = json.loads((tiny / "config.json").read_text()) | {"tie_word_embeddings": True}
    (folder / "tied/config.json").write_text(json.dumps(tied))
    (folder / "unweighted/model.safetensors").unlink()
    (folder / "untokenized/tokenizer.json").unlink()
    for name in ("data", "halved", "bad"):
        shutil.copytree(data_dir, folder / name, ignore=shutil.ignore_patterns("tokenized"))
    (folder / "halved/val.jsonl").unlink()
    with (folder / "bad/train.jsonl").open("a") as file:
        file.write('{"instruction": "a"}\n')
    run = Path(shutil.copytree(adapter.parent, folder / "run"))
    shutil.rmtree(run / "final")
    step = Path(shutil.copytree(adapter, run / "step-000001"))
    settings = {"settings": {"lora_r": 8}, "contents": {}}
    (step / "run.json").write_text(json.dumps(settings))
    write_manifest(step)
    cut = Path(shutil.copytree(run, folder / "cut"))
    os.truncate(cut / "step-000001/adapter_model.safetensors", 100)
    shutil.copytree(adapter.parent, folder / "finished")
    shutil.copytree(adapter, folder / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (folder / "strange").mkdir()
    (folder / "strange/adapter_config.json").write_text(json.dumps(config | {"trainable_token_indices": [1]}))
    command = [sys.executable, "-m", "tests.helpers.without_torch"]
    root = Path(__file__).parent.parent
    env = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(
        command, input=json.dumps(list(REFUSED.values())), capture_output=True, text=True, cwd=folder, env=env
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(REFUSED, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_torch_is_imported(refused, name):
    code, stderr = refused[name]
    assert code in (1, 2), stderr
    *before, sentence = stderr.splitlines()
    assert sentence.startswith("litlora: ")
    assert before in ([], [f"litlora {__version__}: {REFUSED[name][0]}"])


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("lora_layers", "--lora_layers: there is no block 2, only the blocks 0-1"),
        ("lora_targets", "--lora_targets: nonsense names no linear layer; there are q_proj, k_proj"),
        ("rank_pattern", "--lora_rank_pattern: nonsense applies to no adapted layer"),
    ],
)
def test_flags_that_name_no_layer_are_refused_before_torch_is_imported(refused, name, sentence):
    assert sentence in refused[name][1]


def test_head_that_cannot_be_parted_is_refused_before_processes_start(refused):
    _, stderr = refused["parted head"]  # of this process: those that it starts have another
    assert "--lora_init pissa cannot part a head from its embedding under --strategy fsdp: pass ddp" in stderr


@pytest.fixture(scope="module")
def run(tiny, data_dir, tmp_path_factory) -> list[str]:
    """Train for a step, and return the command; the run looks as if it had been killed after it."""
    folders = ["--data_dir", data_dir, "--out_dir", tmp_path_factory.mktemp("run") / "run"]
    limits = ["--train.global_batch_size", 5, "--train.save_interval", 1, "--train.max_steps", 1]
    command = ["finetune_lora", *map(str, [tiny, *folders, *limits, "--eval.max_new_tokens", 4])]
    assert main(command) == 0
    shutil.rmtree(Path(command[5]) / "final")
    return command


@pytest.mark.parametrize("command", ["generate", "merge_lora", "finetune_lora"])
def test_command_from_a_shell_reads_each_file_once(command, run, adapter, tiny, tmp_path):
    """The first line and all checks that need no torch come before it is imported, and nothing is read again."""
    commands = {
        "generate": ["generate", adapter, "--prompt", "x", "--max_new_tokens", "1"],
        "merge_lora": ["merge_lora", adapter, "--out_dir", tmp_path / "merged"],
        "finetune_lora": [*run, "--resume", "true", "--train.max_steps", "2", "--dry_run"],
    }
    record = tmp_path / "opened"
    program = [sys.executable, "-m", "tests.helpers.opened_files", *map(str, commands[command])]
    env = os.environ | {"OPENED": str(record), "PYTHONPATH": str(Path(__file__).parent.parent)}
    done = subprocess.run(program, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[0] == f"litlora {__version__}: {command}"
    opened = Counter(record.read_text().splitlines())
    step = Path(run[5]) / "step-000001"
    hashed = [step / "adapter_model.safetensors", step / "training_state.safetensors"]
    expected = [tiny / "config.json", *(hashed if command == "finetune_lora" else ())]
    assert {path: opened[str(path)] for path in expected} == dict.fromkeys(expected, 1)


def test_optimizers_are_known_without_torch():
    """No optimizer of torch's that can train an adapter is refused, whatever its release calls them."""
    names = torch_names()
    assert {name for name, kind in vars(torch.optim).items() if isinstance(kind, type)} <= names
    for name in UNSUITABLE:
        with pytest.raises(LitLoraError, match=f"^--optimizer torch.optim.{name} {UNSUITABLE[name]}$"):
            check_name(f"torch.optim.{name}")
    for name in names - UNSUITABLE.keys():
        check_name(name)
        check_name({"class_path": f"torch.optim.{name}"})
    for name in (*PAGED, "bitsandbytes.optim.Lion"):
        check_name(name)


@pytest.mark.parametrize(
    ("name", "near"),
    [("adamw", "AdamW"), ("adamw_torch", "AdamW"), ("paged_adamw_8bit", "PagedAdamW8bit"), ("torch.optim.sgd", "SGD")],
)
def test_misspelt_optimizer_is_answered_with_the_nearest(name, near):
    with pytest.raises(LitLoraError, match=f"^--optimizer {name} is not a torch optimizer: did you mean {near}\\?$"):
        check_name(name)


def test_settings_are_exported_without_torch():
    """What a Python program needs for litlora.finetune is found in litlora itself."""
    use = "litlora.TrainArgs, litlora.EvalArgs, litlora.FinetuneLoraArgs"
    program = f"import sys, litlora; {use}; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "False\n"
