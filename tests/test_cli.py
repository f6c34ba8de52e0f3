from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from litlora.__main__ import main
from litlora.args import COMMANDS
from litlora.args.finetune import FinetuneLoraArgs
from litlora.cli.parser import Call, parse

NEEDED = ["--checkpoint_dir", "base", "--data_dir", "data"]
TOKEN = "hf_sEcReTsEcReTsEcReT"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    """Make an empty folder the present one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(text: str, name: str = "run.yaml") -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


def args_of(*arguments: str) -> Any:
    """Return the arguments that a command line gives its command."""
    call = parse(arguments)
    assert isinstance(call, Call)
    return call.args


def settings(*flags: str) -> FinetuneLoraArgs:
    """Return the arguments of finetune_lora with these flags."""
    return args_of("finetune_lora", *NEEDED, *flags)


@pytest.mark.parametrize(
    "flags",
    [
        ["--config", "run.yaml", "--lora_r", "5"],
        ["--lora_r", "5", "--config", "run.yaml"],
        ["--lora_r=5", "--config=run.yaml"],
        ["--config", "run.yaml", "--lora_r", "4", "--lora_r", "5"],
    ],
    ids=" ".join,
)
def test_flag_overrides_file_in_any_position(flags):
    write("lora_r: 3\nlora_alpha: 7\ntrain:\n  epochs: 2\n")
    args = settings(*flags)
    assert (args.lora_r, args.lora_alpha, args.train.epochs) == (5, 7, 2)


def test_config_before_the_command():
    write("lora_r: 3\n")
    assert args_of("--config", "run.yaml", "finetune_lora", *NEEDED).lora_r == 3
    assert args_of("--config=run.yaml", "finetune_lora", *NEEDED).lora_r == 3


def test_flag_of_a_section_overrides_one_key():
    write("train:\n  epochs: 2\n  max_steps: 9\n")
    args = settings("--train.epochs", "4", "--config", "run.yaml")
    assert (args.train.epochs, args.train.max_steps) == (4, 9)


def test_last_of_several_files_wins():
    files = ["--config", write("lora_r: 3\nlora_alpha: 7\n", "a.yaml"), "--config", write("lora_r: 4\n", "b.yaml")]
    args = settings(*files)
    assert (args.lora_r, args.lora_alpha) == (4, 7)


@pytest.mark.parametrize("text", ["", "# lora_r: 3\n", "train:\n  # epochs: 3\n"])
def test_empty_file_changes_nothing(text):
    assert settings("--config", write(text)) == settings()


SGD = {"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9, "nesterov": False}}


@pytest.mark.parametrize(
    "flags",
    [
        ["--optimizer.class_path", "torch.optim.SGD", "--optimizer.init_args.momentum", "0.9",
         "--optimizer.init_args.nesterov", "false"],
        ["--optimizer.class_path=torch.optim.SGD", "--optimizer.init_args.momentum=0.9",
         "--optimizer.init_args.nesterov=False"],
        ["--optimizer.init_args.momentum=9e-1", "--optimizer.init_args.nesterov=no", "--optimizer.class_path",
         "torch.optim.SGD"],
        ["--optimizer", "torch.optim.SGD", "--optimizer.init_args.momentum", "0.9", "--optimizer.init_args.nesterov",
         "false"],
        ["--optimizer=torch.optim.SGD", "--lora_r", "4", "--optimizer.init_args.momentum", ".9",
         "--optimizer.init_args.nesterov", "false"],
        ["--optimizer", '{"class_path": "torch.optim.SGD", "init_args": {"momentum": 0.9, "nesterov": false}}'],
        ["--optimizer={class_path: torch.optim.SGD, init_args: {momentum: 9e-1, nesterov: false}}"],
    ],
    ids=" ".join,
)  # fmt: skip
@pytest.mark.parametrize(
    "text",
    ["lora_r: 4", "optimizer: Adam", "optimizer:\n  class_path: torch.optim.SGD\n  init_args: {momentum: 0.5}"],
)
def test_spellings_of_an_optimizer_are_equivalent(text, flags):
    assert settings("--config", write(text), *flags).optimizer == SGD


@pytest.mark.parametrize(
    ("text", "optimizer"),
    [
        ("optimizer: SGD", "SGD"),
        ("optimizer: {class_path: SGD, init_args: {dampening: 1e-3, momentum: 1}}",
         {"class_path": "SGD", "init_args": {"dampening": 0.001, "momentum": 1}}),
        ("lora_r: 4", "AdamW"),
    ],
)  # fmt: skip
def test_optimizer_in_file_is_name_or_mapping(text, optimizer):
    assert settings("--config", write(text)).optimizer == optimizer


def test_optimizer_flags_extend_the_file():
    text = "optimizer:\n  class_path: torch.optim.AdamW\n  init_args:\n    eps: 1e-7\n    betas: [0.9, 0.99]\n"
    optimizer = settings("--optimizer.init_args.weight_decay", "1e-2", "--config", write(text)).optimizer
    assert optimizer["init_args"] == {"eps": 1e-7, "betas": [0.9, 0.99], "weight_decay": 1e-2}


def test_optimizer_flags_apply_to_the_default():
    optimizer = settings("--optimizer.init_args.weight_decay", "0.1").optimizer
    assert optimizer == {"class_path": "AdamW", "init_args": {"weight_decay": 0.1}}


def test_texts_of_an_optimizer_are_not_converted():
    text = "optimizer: {class_path: '1', init_args: {a: 'null', b: '1e-3', c: 1e-3, d: null}}"
    init_args = {"a": "null", "b": "1e-3", "c": 1e-3, "d": None}
    assert settings("--config", write(text)).optimizer == {"class_path": "1", "init_args": init_args}


@pytest.mark.parametrize("text", ["# x", "1e3", "no", "Null", "012", "", "'q'", "[1]", "{a: 1}", "2020-01-01"])
def test_text_stays_as_it_was_typed(text):
    args = args_of("generate", "base", f"--prompt_style={text}", f"--base_dir={text}")
    assert (args.prompt_style, args.base_dir) == (text, Path(text))
    assert settings(f"--prompt_style={text}").prompt_style == text


def test_null_in_quotes_is_a_text():
    assert settings("--prompt_style", "null").prompt_style == "null"
    assert args_of("generate", "base", "--config", write("prompt: 'null'")).prompt == "null"
    for text in ("null", "~", "# a", "[1]", "2024-01-01"):
        assert args_of("generate", "base", "--prompt", text, "--input", text, "--system", text).prompt == text


def test_prompt_with_syntax_of_flags_or_yaml():
    for prompt in ("a=b", "--config is a flag", "optimizer=1", "{instruction}", "123", "yes", " a\nb: c"):
        assert args_of("generate", "--checkpoint_dir", "base", f"--prompt={prompt}").prompt == prompt


@pytest.mark.parametrize("command", COMMANDS)
def test_print_config_is_a_config_again(command, capsys):
    needed = {"download": ["--repo_id", "a/b"], "prepare_json": ["--destination_path", "to", "--source", "x.json"]}
    flags = {
        "finetune_lora": [*NEEDED, "--lora_r=4", "--train.max_norm=null", "--optimizer.class_path=SGD",
                          "--optimizer.init_args.momentum=0.9", "--resume=true", "--prompt_style={instruction}: yes"],
        "generate": ["--checkpoint_dir", "base", "--prompt", "a: b\n 'c' # d", "--top_k", "null"],
        "chat": ["--checkpoint_dir", "base"],
        "merge_lora": ["--checkpoint_dir", "adapter", "--out_dir", "out"],
        "report": ["out/one", "out/two"],
        "export": ["--checkpoint_dir", "adapter", "--out_dir", "out"],
        "verify": ["--checkpoint_dir", "adapter"],
        "upload": ["--checkpoint_dir", "adapter", "--repo_id", "a/b"],
        "sweep": ["--search", "{lora_r: [8, 16], lora_alpha: {times: lora_r, values: [2]}}", "--seeds", "1,2"],
        "evaluate": [*NEEDED, "--metrics", "loss,accuracy", "--choices", "yes,no", "--fail_below", "loss=2"],
        "check_data": NEEDED,
    }.get(command, needed.get(command, ["--source", "x.json"]))  # fmt: skip
    first = printed(capsys, command, *flags)
    assert printed(capsys, command, "--config", write(first)) == first


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main([*arguments, "--print_config"]) == 0
    return capsys.readouterr().out


def test_print_config_holds_every_setting(capsys):
    config = yaml.safe_load(printed(capsys, "finetune_lora", *NEEDED))
    assert config["train"]["max_steps"] is None
    assert config["optimizer"] == "AdamW"
    assert config.keys() == {field.name for field in fields(FinetuneLoraArgs)}


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["download", "--help"],
        ["prepare_lima", "--help"],
        ["download", "--repo_id", "a/b", "--print_config"],
        ["download", "--repo_id", "a/b", "--access_token", TOKEN, "--print_config"],
        ["download", "--config", "token.yaml", "--print_config"],
        ["prepare_lima", f"--access_token={TOKEN}", "--print_config"],
        ["download", "--repo_id", "a/b", "--access_token", TOKEN, "--tokenizer_only", "maybe"],
        ["download", "--repo_id", "a/b", "--acess_token", TOKEN],
        ["download", "--repo_id", "a/b", f"--acess_token={TOKEN}"],
        ["download", "--repo_id", "a/b", TOKEN],
        ["download", "--config", "token.yaml", "--revision"],
        ["download", "--config", "misspelt.yaml"],
        ["download", "--config", "twice.yaml"],
        ["download", "--config", "broken.yaml"],
        ["download", "--config", "list.yaml"],
    ],
    ids=" ".join,
)
def test_access_token_is_never_printed(arguments, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    write(f"repo_id: a/b\naccess_token: {TOKEN}\n", "token.yaml")
    write(f"repo_id: a/b\nacess_token: {TOKEN}\n", "misspelt.yaml")
    write(f"access_token: {TOKEN}\naccess_token: {TOKEN}\n", "twice.yaml")
    write(f"access_token: {TOKEN}: {TOKEN}\n", "broken.yaml")
    write(f"repo_id: a/b\naccess_token: [{TOKEN}]\n", "list.yaml")
    main(arguments)
    printed = capsys.readouterr()
    assert printed.out + printed.err
    assert TOKEN not in printed.out + printed.err


def test_checkpoint_needs_no_flag():
    for arguments in (
        ["finetune_lora", "base", "--data_dir", "data"],
        ["finetune_lora", "--data_dir", "data", "base"],
        ["finetune_lora", "base", "--data_dir", "data", "--checkpoint_dir", "base"],
    ):
        assert args_of(*arguments).checkpoint_dir == Path("base")
    assert args_of("generate", "base").checkpoint_dir == Path("base")
    assert args_of("merge_lora", "adapter", "--out_dir", "out").checkpoint_dir == Path("adapter")
    assert args_of("download", "org/name").repo_id == "org/name"


def test_boolean_flag_needs_no_value():
    assert settings("--dry_run", "--overwrite", "--resume").dry_run
    assert settings("--resume").resume is True
    assert settings("--resume", "false").resume is False
    assert settings("--resume", "out/step-1").resume == Path("out/step-1")


def test_numbers_and_words_of_yaml_are_read():
    args = settings("--train.learning_rate", "1e-3", "--train.max_norm", "null", "--seed", "7", "--lora_mlp", "yes")
    assert (args.train.learning_rate, args.train.max_norm, args.seed, args.lora_mlp) == (1e-3, None, 7, True)


@pytest.mark.parametrize("flag", ["--acess_token", "--token", "--key", "-t"])
@pytest.mark.parametrize("token", [TOKEN, "ghp_aBcDeF0123456789", "sk-proj-aBcDeF0123456789", "0123456789abcdef"])
def test_value_of_an_unknown_flag_is_never_printed(flag, token, capsys):
    assert main(["download", "org/name", flag, token]) == 2
    assert main(["download", "org/name", f"{flag}={token}"]) == 2
    assert main(["download", "org/name", token]) == 2
    write(f"{flag.strip('-')}: {token}\n", "misspelt.yaml")
    assert main(["download", "org/name", "--config", "misspelt.yaml"]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 4
    assert token not in printed.out + printed.err
