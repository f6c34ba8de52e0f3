import re
import subprocess
import sys

import pytest

from litlora.__main__ import main
from litlora.args import COMMANDS
from litlora.cli.settings import settings_of

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
}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in COMMANDS)])
def test_help_waits_for_no_heavy_import(arguments):
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout
    modules = {name.split(".")[0] for name in done.stderr.split()}
    assert "litlora" in modules
    assert not modules & HEAVY


def test_a_mistake_in_the_flags_waits_for_no_heavy_import_either():
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
def test_what_is_not_compiled_waits_for_no_compiler(adapter, tmp_path, arguments):
    command = [sys.executable, "-c", PROBE, *arguments, "--checkpoint_dir", str(adapter)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    modules = done.stderr.splitlines()[-1].split()
    assert "torch" in modules
    assert "torch._dynamo" not in modules


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_every_flag(command, capsys):
    assert main([command, "--help"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    for name in settings_of(COMMANDS[command]):
        assert f" --{name} " in words or f" --{name}." in words
    assert not re.findall(r"--[\w.]+ \S+ \((?:required|default)", words), "flags that nothing explains"
    assert not re.findall(r"<class|type:|Optional|\| None|null\)", words), "types as only Python writes them"
    assert words.split("examples: ")[1].count("litlora") == 2
