"""README and docs/ are true: their commands and code run, their flags, links, modules and output exist."""

import json
import re
import runpy
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from helpers.families import Family
from helpers.hub_server import reachable_hub
from helpers.markdown import Block, blocks, shape
from torch.distributed.run import get_args_parser as get_torchrun_parser
from transformers import LlamaConfig

import litlora
from litlora.__main__ import main
from litlora.args import COMMANDS
from litlora.cli.help import command_help
from litlora.cli.parser import parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGES = {"bash", "python", "json", "yaml", "text"}
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
PREPARED = {f"litlora download {BASE}": f"checkpoints/{BASE}", "litlora prepare_alpaca": "data/alpaca"}
"""Commands of README whose results other pages presuppose, with the folder that each makes."""
# What replaces the internet, and what keeps a run short; a flag that the page gives itself stays.
ADDED = {
    "prepare_alpaca": {"--source": "archive.json"},
    "finetune_lora": {"--train.max_steps": "2", "--eval.max_iters": "1", "--eval.max_new_tokens": "4"},
}
FLAGS_OF_OTHERS = {"--index-url", "--lora", "--max-lora-rank", "--hypothesis-profile", "--lr"}


def named(pages: list[Path]) -> dict[str, Path]:
    return {str(page.relative_to(ROOT)): page for page in pages}


def of_language(language: str) -> list[tuple[Path, Block]]:
    return [(page, block) for page in PAGES for block in blocks(page) if block.language == language]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_checkpoint: Callable[..., Path]) -> Iterator[Path]:
    """Return a folder as a user has it, with a short run of pico, where the Hub serves a small model."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("config_hub", "scripts", "checkpoints/pico"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "data/pico", folder / "data/pico", ignore=shutil.ignore_patterns("tokenized"))
    for split, rows in {"train": 64, "val": 8}.items():
        path = folder / f"data/pico/{split}.jsonl"
        path.write_text("".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:rows]), encoding="utf-8")
    examples = "".join(block.text for _, block in of_language("json"))
    (folder / "my_data.jsonl").write_text(examples * 5, encoding="utf-8")
    (folder / "questions.jsonl").write_text('{"prompt": "What is 2 + 3?"}\n', encoding="utf-8")
    lengths = [*range(1, 60), *range(500, 620)]  # most are longer than the limit of config_hub
    rows = [{"instruction": f"Count to {n}.", "input": "", "output": " ".join(map(str, range(n)))} for n in lengths]
    (folder / "archive.json").write_text(json.dumps(rows), encoding="utf-8")
    small = make_checkpoint(Family("readme", LlamaConfig, {"max_position_embeddings": 1024, "hidden_size": 128}))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        pico = complete("litlora finetune_lora --config config_hub/finetune_lora/pico.yaml")
        with reachable_hub(patch, folder / "hub") as hub:
            hub.add(BASE, {path.name: path.read_bytes() for path in small.iterdir()})
            assert main(pico) == 0
            yield folder


def complete(line: str) -> list[str]:
    """Return the arguments of a litlora command, with what is added to it here."""
    arguments = shlex.split(line)[1:]
    added = {} if "--dry_run" in arguments else ADDED.get(arguments[0], {})
    return arguments + [word for flag, value in added.items() if flag not in arguments for word in (flag, value)]


def run(line: str, exit_code: int) -> None:
    """Run a command line in this process: litlora, or a Python script of the repository."""
    program, *arguments = shlex.split(line)
    if program == "litlora":
        assert main(complete(line)) == exit_code, line
        return
    assert program == "python", f"no test can run {line}: mark it with the reason"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", arguments)
        runpy.run_path(arguments[0], run_name="__main__")


def prepare_for(page: Path) -> None:
    """Provide what a page presupposes: no other page need run before it."""
    own = {line for block in blocks(page) for line in block.commands}
    for line, made in PREPARED.items():
        if line not in own and not Path(made).exists():
            run(line, 0)


@pytest.mark.parametrize("page", named(PAGES))
def test_commands_of_a_page_run(page, folder, capfd):
    """Run commands and code in their order; every line of the output shown is one of theirs, up to numbers."""
    prepare_for(ROOT / page)
    capfd.readouterr()  # what the page shows is printed by its own commands
    printed, tables = set(), []
    for block in blocks(ROOT / page):
        assert block.language in LANGUAGES, f"a block of {page} has the language {block.language!r}"
        if block.exempt:
            continue
        if block.language == "python":
            exec(block.text, {})
        elif block.language == "bash":
            for line in block.commands:
                run(line, block.exit_code)
                output = "".join(capfd.readouterr())
                printed |= {shape(line) for line in re.split(r"[\r\n]", output)}
                tables += [line for line in output.splitlines() if line.startswith("|")]
        elif block.language == "text":
            missing = {line for line in block.text.splitlines() if shape(line) not in printed}
            assert not missing, f"no command of {page} prints {missing}"
    text = (ROOT / page).read_text(encoding="utf-8").splitlines()
    assert set(tables) <= set(text), f"{page} shows other tables than the scripts print"


def test_most_commands_are_run():
    exempt = [line for _, block in of_language("bash") if block.exempt for line in block.commands]
    everything = [line for _, block in of_language("bash") for line in block.commands]
    assert len(exempt) <= len(everything) / 3


def test_flags_are_those_of_a_parser():
    helps = get_torchrun_parser().format_help() + "".join(command_help(name) for name in COMMANDS)
    scripts = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "scripts").rglob("*.py"))
    of_scripts = re.findall(r"add_argument\(\s*\"(--[\w.]+)\"", scripts)
    known = {*re.findall(r"--[\w.]+", helps), *of_scripts} | FLAGS_OF_OTHERS
    for page in [*PAGES, ROOT / "CHANGELOG.md"]:
        flags = re.findall(r"(?<![\w-])--[a-z](?:[\w.-]*\w)?", page.read_text(encoding="utf-8"))
        unknown = {flag for flag in flags if not flag.startswith("--optimizer.")} - known
        assert not unknown, f"{page.name} names flags that no command has"


def test_yaml_examples_parse(tmp_path):
    for _, block in of_language("yaml"):
        (tmp_path / "config.yaml").write_text(block.text, encoding="utf-8")
        command = "sweep" if "\nsearch:" in block.text else "finetune_lora"
        parse([command, "--config", str(tmp_path / "config.yaml"), "--print_config"])


@pytest.mark.parametrize("page", named(PAGES))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!https?:)([^)]*)\)", (ROOT / page).read_text(encoding="utf-8")):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in headings}, target


@pytest.mark.parametrize("page", named(PAGES))
def test_modules_and_scripts_exist(page):
    for name in re.findall(r"`([\w/.]+\.(?:py|sbatch|yaml|jsonl?))`", (ROOT / page).read_text(encoding="utf-8")):
        if "/" in name and not name.startswith("."):
            assert (ROOT / name).exists() or (ROOT / "litlora" / name).exists(), f"{page} names {name}"


def test_architecture_lists_every_package():
    packages = {path.parent.name for path in Path(litlora.__file__).parent.glob("*/__init__.py")}
    table = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    assert packages == set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE))


COMMAND_OF = {"finetune_lora": "finetune_lora", "experiments": "sweep"}
CONFIGS = named(sorted((ROOT / "config_hub").rglob("*.yaml")))


@pytest.mark.parametrize("name", CONFIGS)
def test_config_parses_and_repeats_no_default(name):
    path = CONFIGS[name]
    command = COMMAND_OF[path.relative_to(ROOT / "config_hub").parts[0]]
    configs = (parse([command, *flags, "--print_config"]) for flags in (["--config", str(path)], []))
    parsed, defaults = (dict(leaves(yaml.safe_load(config))) for config in configs)
    for key, _ in leaves(yaml.safe_load(path.read_text(encoding="utf-8"))):
        assert key not in defaults or parsed[key] != defaults[key], f"{key} is the default"


def leaves(node: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value
