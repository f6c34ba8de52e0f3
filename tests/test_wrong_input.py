"""Every mistake is one sentence on stderr, exit 1 (or 2 for what the parser refuses), and leaves the disk as it was."""

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.families import FAMILIES
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from litlora import __version__
from litlora.__main__ import main
from litlora.nn.nf4 import Quantization
from litlora.utils import resource_limits

Spoil = Callable[[], object]

FINETUNE = ["finetune_lora", "--checkpoint_dir", "base", "--data_dir", "data", "--out_dir", "out"]
GENERATE = ["generate", "--checkpoint_dir", "base", "--prompt", "Say hello"]
ANSWER = ["generate", "--checkpoint_dir", "adapter", "--prompt", "Say hello"]
MERGE = ["merge_lora", "--checkpoint_dir", "adapter", "--out_dir", "out"]
ROW = '{"instruction": "a", "input": "", "output": "b"}\n'
SHAPE = (
    'a row must look like {"instruction": "...", "input": "...", "output": "..."}, '
    '{"prompt": "...", "completion": "..."} or '
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
)
ANOTHER_MODEL = "use config.json and weights of the same model"
WEIGHTS, SHARD = "base/model.safetensors", "sharded/model-00002-of-00006.safetensors"
INDEX = "sharded/model.safetensors.index.json"
CUT = "is truncated or not a safetensors file; replace it with an intact copy"
STYLES = "must be auto, alpaca, none, chat, or a text with {instruction} and, if wanted, {input}"


@pytest.fixture(scope="session")
def originals(tiny, checkpoints, make_checkpoint, data_dir, adapter) -> dict[str, Path]:
    """Return the folders of a world in which all is well, by the names they have there."""
    sharded = make_checkpoint(FAMILIES[0], max_shard_size="20KB")
    other = checkpoints("mistral")
    return {"base": tiny, "other": other, "sharded": sharded, "data": data_dir, "adapter": adapter}


@pytest.fixture(autouse=True)
def world(originals, tmp_path, monkeypatch) -> None:
    """Lay out checkpoints, data and an adapter in the present folder, for each test anew."""
    for name, folder in originals.items():
        shutil.copytree(folder, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    change("adapter/adapter_config.json", base_model_name_or_path="base")


def write(path: str, content: str | bytes = "") -> None:
    Path(path).write_bytes(content.encode() if isinstance(content, str) else content)


def remove(path: str) -> None:
    shutil.rmtree(path) if Path(path).is_dir() else Path(path).unlink()


def change(path: str, **keys: object) -> None:
    """Change keys of a JSON file."""
    write(path, json.dumps(json.loads(Path(path).read_text()) | keys))


def weigh(**tensors: Tensor | None) -> None:
    """Change tensors of the base, or take them away."""
    changed = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    others = {name: tensor for name, tensor in load_file(WEIGHTS).items() if name not in changed}
    save_file(others | {name: t for name, t in changed.items() if t is not None}, WEIGHTS, metadata={"format": "pt"})


def lie() -> None:
    """Make the header of the base's weights promise a tensor of another size than its bytes have."""
    content = Path(WEIGHTS).read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    write(WEIGHTS, content[:8] + content[8 : 8 + length].replace(b"[300,32]", b"[301,32]", 1) + content[8 + length :])


def point(name: str) -> None:
    """Make the index of the shards name another file for one of its tensors."""
    weight_map = json.loads(Path(INDEX).read_text())["weight_map"]
    change(INDEX, weight_map=weight_map | {"model.norm.weight": name})


def nothing() -> None:
    """Leave the world as it is."""


def everything() -> dict[str, bytes | None]:
    """Return all files and folders below the present one, with their contents."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in Path().rglob("*")}


WAY_OUT = "merge the adapter in PEFT, or train one without it"
OTHER = (
    "(lm_head.weight, model.embed_tokens.weight, model.layers.0.mlp.down_proj.weight and 13 more differ); "
    "name the one that it was trained on"
)


def check(capsys: pytest.CaptureFixture[str], command: list[str], sentence: str, code: int = 1) -> None:
    """Run a command that must fail with this sentence alone, and leave nothing behind."""
    before = everything()
    capsys.readouterr()
    actual = main(command)
    assert capsys.readouterr() == ("", f"litlora: {sentence}\n")
    assert actual == code
    assert everything() == before


def case(name: str, spoil: Spoil, *rest: object) -> object:
    return pytest.param(spoil, *rest, id=name)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        case("missing", lambda: remove("base"),
             "there is no checkpoint folder base; fetch one with: litlora download --repo_id ORG/NAME"),
        case("file", lambda: (remove("base"), write("base")),
             "there is no checkpoint folder base; fetch one with: litlora download --repo_id ORG/NAME"),
        case("empty", lambda: (remove("base"), Path("base").mkdir()),
             "base has no config.json, so it is not a checkpoint of the Hub: "
             "pass the folder that has it beside the weights"),
        case("no config", lambda: remove("base/config.json"),
             "base has no config.json, so it is not a checkpoint of the Hub: "
             "pass the folder that has it beside the weights"),
        case("empty config", lambda: write("base/config.json"),
             "base/config.json is not valid JSON: Expecting value: line 1 column 1 (char 0)"),
        case("config of a list", lambda: write("base/config.json", "[]"),
             "base/config.json must hold a JSON object, not a list"),
        case("config of another kind", lambda: change("base/config.json", hidden_act="mish"),
             'base: config.json has "hidden_act": "mish", which litlora does not support: '
             "implemented are silu, swish, gelu, gelu_new, gelu_fast, gelu_pytorch_tanh"),
        case("no weights", lambda: remove(WEIGHTS),
             "base has no safetensors weights (expected model.safetensors); "
             "fetch a repository that has them with: litlora download --repo_id ORG/NAME"),
        case("only pickled weights", lambda: Path(WEIGHTS).rename("base/pytorch_model.bin"),
             "base has no safetensors weights (pickled ones are never read, since a pickle can run code); "
             "fetch a repository that has them with: litlora download --repo_id ORG/NAME"),
        case("cut weights", lambda: os.truncate(WEIGHTS, 30_000), f"{WEIGHTS} {CUT}"),
        case("weights cut in the header", lambda: os.truncate(WEIGHTS, 300), f"{WEIGHTS} {CUT}"),
        case("empty weights", lambda: os.truncate(WEIGHTS, 0), f"{WEIGHTS} {CUT}"),
        case("header of a wrong length", lambda: write(WEIGHTS, b"\xff" * 7 + b"\x7f" + Path(WEIGHTS).read_bytes()[8:]),
             f"{WEIGHTS} {CUT}"),
        case("header of a wrong shape", lie, f"{WEIGHTS} {CUT}"),
        case("tensor of another shape", lambda: weigh(model__norm__weight=torch.ones(33)),
             f"base: model.norm.weight has the shape (33,), but config.json implies (32,); {ANOTHER_MODEL}"),
        case("tensor too many", lambda: weigh(model__layers__2__mlp__up_proj__weight=torch.ones(48, 32)),
             "base: the weights have model.layers.2.mlp.up_proj.weight, which the model of config.json does not have; "
             f"{ANOTHER_MODEL}"),
        case("tensor whose name writes to the terminal", lambda: weigh(**{"\x1b[2J\n": torch.ones(1)}),
             f"base: the weights have \\x1b[2J\\n, which the model of config.json does not have; {ANOTHER_MODEL}"),
        case("tensor too few", lambda: weigh(model__norm__weight=None),
             f"base: the weights lack model.norm.weight; {ANOTHER_MODEL}"),
        case("layers without end", lambda: change("base/config.json", num_hidden_layers=1_000_000),
             'base: config.json has "num_hidden_layers": 1000000, but the weights have only 21 tensors; '
             f"{ANOTHER_MODEL}"),
        case("size beyond any model", lambda: change("base/config.json", hidden_size=2**40),
             'base: config.json has "hidden_size": 1099511627776, which litlora does not support: '
             "it must be at most 1048576"),
        case("layer too few", lambda: change("base/config.json", num_hidden_layers=3),
             "base: the weights lack model.layers.2.input_layernorm.weight, model.layers.2.mlp.down_proj.weight, "
             f"model.layers.2.mlp.gate_proj.weight and 6 more; {ANOTHER_MODEL}"),
        case("quantized", lambda: change("base/config.json", quantization_config={"quant_method": "gptq"}),
             'base: config.json has "quantization_config": {"quant_method": "gptq"}, which litlora does not support: '
             "use the checkpoint that it was made from, which --quantize can quantize"),
        case("quantized tensor", lambda: weigh(model__norm__weight=torch.ones(32, dtype=torch.int8)),
             "base: model.norm.weight is stored as I8, but only F64, F32, F16, BF16 are supported; "
             "use a checkpoint that is not quantized"),
        case("no tokenizer", lambda: remove("base/tokenizer.json"),
             "no tokenizer in base (expected tokenizer.json or tokenizer.model); "
             "fetch it with: litlora download --repo_id ORG/NAME --tokenizer_only true"),
    ],
)  # fmt: skip
def test_invalid_checkpoint_is_refused(spoil, sentence, capsys):
    spoil()
    check(capsys, FINETUNE, sentence)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        case("missing", lambda: remove(SHARD),
             f"{INDEX} lists model-00002-of-00006.safetensors, missing from sharded; download it again"),
        case("elsewhere", lambda: (write("x"), point("../x")),
             f"{INDEX} lists ../x, missing from sharded; download it again"),
        case("absolute", lambda: point("/etc/passwd"),
             f"{INDEX} lists /etc/passwd, missing from sharded; download it again"),
        case("pickled", lambda: (write("sharded/x.bin"), point("x.bin")),
             f"{INDEX} lists x.bin, missing from sharded; download it again"),
        case("very long name", lambda: point("x" * 300),
             f"{INDEX} lists {'x' * 300}, missing from sharded; download it again"),
        case("cut", lambda: os.truncate(SHARD, 5_000), f"{SHARD} {CUT}"),
        case("empty index", lambda: write(INDEX, "{}"), f"{INDEX} has no weight_map that lists its files"),
        case("no index", lambda: remove(INDEX),
             "sharded has no safetensors weights (expected model.safetensors); "
             "fetch a repository that has them with: litlora download --repo_id ORG/NAME"),
    ],
)  # fmt: skip
def test_invalid_shard_is_refused(spoil, sentence, capsys):
    spoil()
    check(capsys, [*FINETUNE, "--checkpoint_dir", "sharded"], sentence)


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        case("missing folder", lambda: remove("data"),
             "no train.jsonl in data; prepare one with: litlora prepare_json --source FILE --destination_path data"),
        case("no train.jsonl", lambda: remove("data/train.jsonl"),
             "no train.jsonl in data; prepare one with: litlora prepare_json --source FILE --destination_path data"),
        case("no val.jsonl", lambda: remove("data/val.jsonl"),
             "no val.jsonl in data; prepare one with: litlora prepare_json --source FILE --destination_path data"),
        case("file for a folder", lambda: (remove("data"), write("data")),
             "--data_dir (data) is a file; prepare a folder of it with: "
             "litlora prepare_json --source data --destination_path FOLDER"),
        case("folder for a file", lambda: (remove("data/val.jsonl"), Path("data/val.jsonl").mkdir()),
             "cannot read data/val.jsonl: Is a directory"),
        case("empty", lambda: write("data/train.jsonl"), f"data/train.jsonl holds no rows; {SHAPE}"),
        case("blank", lambda: write("data/val.jsonl", "\n\n"), f"data/val.jsonl holds no rows; {SHAPE}"),
        case("row without output", lambda: write("data/train.jsonl", ROW + '{"instruction": "a", "input": ""}\n'),
             f'data/train.jsonl line 2: there is no "output"; {SHAPE}'),
        case("row with a null", lambda: write("data/train.jsonl", ROW + '{"instruction": "a", "output": null}\n'),
             f'data/train.jsonl line 2: "output" is null, not a string; {SHAPE}'),
        case("row that is no JSON", lambda: write("data/train.jsonl", ROW + "hello\n" + ROW),
             f"data/train.jsonl line 2: this is not valid JSON (Expecting value at column 1); {SHAPE}"),
        case("cut row", lambda: write("data/val.jsonl", ROW + ROW[:-3]),
             f"data/val.jsonl line 2: this is not valid JSON (Unterminated string starting at at column 45); {SHAPE}"),
        case("row that is a list", lambda: write("data/train.jsonl", "[1]\n2\n"),
             f"data/train.jsonl line 1: this is a list, not an object (invalid rows after it: 1); {SHAPE}"),
        case("bytes that are no UTF-8", lambda: write("data/train.jsonl", ROW.encode() + b'{"x": "\xff"}\n'),
             f"data/train.jsonl line 2: the byte 0xff is not valid UTF-8; save the file as UTF-8, or "
             f"prepare it with its encoding, such as --encoding cp1252; {SHAPE}"),
    ],
)  # fmt: skip
def test_invalid_data_is_refused(spoil, sentence, capsys):
    spoil()
    check(capsys, FINETUNE, sentence)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--lora_r 0", "--lora_r (0) must be at least 1"),
        ("--lora_alpha 0", "--lora_alpha (0) must be at least 1"),
        ("--lora_dropout 1", "--lora_dropout (1.0) must be at least 0 and below 1"),
        ("--lora_init fisher", "--lora_init fisher compensates for the error of --quantize, which is not set: "
         "give --quantize as well, or leave it out"),
        ("--devices 0", "--devices (0) must be at least 1"),
        ("--quantize bnb.nf4 --precision bf16-mixed",
         "--quantize bnb.nf4 does not go with --precision bf16-mixed: choose bf16-true or 32-true, in which the "
         "adapter is float32 as well"),
        ("--lora_query false --lora_key false --lora_value false --lora_projection false --lora_mlp false",
         "nothing would be trained: set at least one of --lora_query, --lora_key, --lora_value, --lora_projection, "
         "--lora_mlp and --lora_head to true"),
        ("--train.micro_batch_size -1", "--train.micro_batch_size (-1) must be at least 1, or null"),
        ("--train.global_batch_size=-16", "--train.global_batch_size (-16) must be at least 1"),
        ("--train.micro_batch_tokens 0", "--train.micro_batch_tokens (0) must be at least 1, or null"),
        ("--train.epochs 0", "--train.epochs (0) must be at least 1"),
        ("--train.max_steps 0", "--train.max_steps (0) must be at least 1, or null"),
        ("--train.lr_warmup_steps -1", "--train.lr_warmup_steps (-1) must be 0 or more, or null"),
        ("--train.lr_warmup_fraction 2", "--train.lr_warmup_fraction (2.0) must be between 0 and 1"),
        ("--train.learning_rate 0", "--train.learning_rate (0.0) must be above 0"),
        ("--train.min_lr 1 --train.learning_rate 2e-4",
         "--train.min_lr (1.0) must be between 0 and learning_rate (0.0002)"),
        ("--train.max_norm 0", "--train.max_norm (0.0) must be above 0, or null for no clipping"),
        ("--train.max_seq_length 257",
         "--train.max_seq_length (257) must be at most the checkpoint's number of positions (256)"),
        ("--eval.interval 0", "--eval.interval (0) must be at least 1"),
        ("--eval.evaluate_example 3",
         "--eval.evaluate_example (3) must be below the number of rows in val.jsonl (3)"),
        ("--eval.evaluate_example -1", "--eval.evaluate_example (-1) must be 0 or more"),
        ("--prompt_style nonsense", f"--prompt_style (nonsense) {STYLES}"),
        ("--prompt_style chat",
         "--prompt_style chat needs a checkpoint with a chat template (chat_template.jinja, or chat_template in "
         "tokenizer_config.json), and this one has none; use alpaca, none, or a text with {instruction}"),
        ("--optimizer Foo", "--optimizer Foo is not a torch optimizer: name one, such as AdamW or torch.optim.SGD"),
        ("--optimizer torch.nn.Linear",
         "--optimizer torch.nn.Linear is not a torch optimizer: name one, such as AdamW or torch.optim.SGD"),
        ("--optimizer no.such.Thing", "--optimizer no.such.Thing cannot be imported: No module named 'no'"),
        ("--optimizer AdamW8bit --optimizer.init_args.foo 1",
         "--optimizer AdamW8bit refuses its init_args: AdamW8bit.__init__() got an unexpected keyword argument 'foo'"),
        ("--optimizer LBFGS", "--optimizer LBFGS evaluates the loss several times a step, which is not supported"),
        ("--optimizer.init_args.foo 1",
         "--optimizer AdamW refuses its init_args: AdamW.__init__() got an unexpected keyword argument 'foo'"),
        ("--optimizer.init_args.betas [2,3]",
         "--optimizer AdamW refuses its init_args: Invalid beta parameter at index 0: 2"),
        ('--optimizer {"init_args":{"eps":1}}',
         "--optimizer has init_args only: give its class_path as well, such as torch.optim.AdamW"),
        ("--optimizer.foo 1", "--optimizer.foo is not a setting: there are class_path and init_args.NAME"),
        ("--optimizer.init_args.lr 1 --train.learning_rate 2",
         "--train.learning_rate (2.0) and --optimizer.init_args.lr (1) are the same setting: give one of them"),
        ("--optimizer ..x",
         "--optimizer ..x cannot be imported: the 'package' argument is required to perform a relative import for '.'"),
        ("--optimizer SparseAdam", "--optimizer SparseAdam cannot take a step: SparseAdam does not support dense "
         "gradients, please consider Adam instead"),
        ("--optimizer.init_args.lr fast", "--optimizer.init_args.lr (fast) must be a number"),
        ("--optimizer.init_args.lr true", "--optimizer.init_args.lr (True) must be a number"),
        ("--optimizer.init_args.lr null", "--optimizer.init_args.lr (None) must be a number"),
        ("--optimizer.init_args.lr -1", "--train.learning_rate (-1) must be above 0"),
        ("--out_dir base", "--out_dir (base) is --checkpoint_dir as well: choose another"),
        ("--out_dir ./data", "--out_dir (data) is --data_dir as well: choose another"),
        ("--out_dir base/../data", "--out_dir (base/../data) is --data_dir as well: choose another"),
        ("--seed -1", "--seed (-1) must be 0 or more, and below 2^63"),
        ("--seed 9223372036854775808", "--seed (9223372036854775808) must be 0 or more, and below 2^63"),
        ("--resume true", "--resume: there is no checkpoint in out; start without --resume"),
        ("--resume nowhere", "--resume: there is no checkpoint in nowhere; start without --resume"),
        ("--config nowhere.yaml", "--config nowhere.yaml cannot be read: No such file or directory"),
        ("--config base", "--config base cannot be read: Is a directory"),
    ],
)  # fmt: skip
def test_invalid_setting_is_refused(flags, sentence, capsys):
    check(capsys, [*FINETUNE, *flags.split(" ")], sentence)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--nonsense 1", "unrecognized --nonsense"),
        ("--train.nonsense 1", "unrecognized --train.nonsense"),
        ("--out_dir", "--out_dir needs a value"),
        ("--data_dir --seed 1", "--data_dir needs a value"),
        ("--config", "--config needs a value"),
        ("--optimizer.class_path", "--optimizer.class_path needs a value"),
        ("--lora_r abc", "--lora_r (abc) must be a whole number"),
        ("--lora_r 1.5", "--lora_r (1.5) must be a whole number"),
        ("--lora_r null", "--lora_r (null) must be a whole number"),
        ("--lora_query maybe", "--lora_query (maybe) must be true or false"),
        ("--train.max_steps many", "--train.max_steps (many) must be a whole number or null"),
        ("--train.learning_rate nan", "--train.learning_rate (nan) must be auto or a number"),
        ("--train.learning_rate .inf", "--train.learning_rate (.inf) must be auto or a number"),
        ("--train.learning_rate 1e400", "--train.learning_rate (1e400) must be auto or a number"),
        ("--train.max_steps #", "--train.max_steps (#) must be a whole number or null"),
        ("--precision int3", "--precision (int3) must be bf16-true, bf16-mixed or 32-true"),
        ("--quantize gptq", "--quantize (gptq) must be bnb.nf4, bnb.nf4-dq, the path of a .gguf file or null"),
        (
            "--lora_rank_pattern q_proj=4",
            "--lora_rank_pattern (q_proj=4) must be a mapping such as {q_proj: 4} or null",
        ),
        (
            "--lora_rank_pattern {q_proj:x}",
            "--lora_rank_pattern ({q_proj:x}) must be a mapping such as {q_proj: 4} or null",
        ),
        ('--lora_rank_pattern {"q_proj":2.5}', "--lora_rank_pattern, q_proj (2.5) must be a whole number"),
        ('--lora_alpha_pattern {"q_proj":x}', "--lora_alpha_pattern, q_proj (x) must be a number"),
        (
            r'--lora_alpha_pattern {"layers\.1\..*":32}',
            r'--lora_alpha_pattern ({"layers\.1\..*":32}) is not valid YAML: '
            "put the expression in single quotes, or double each backslash",
        ),
        (
            "--modules_to_save lm_head",
            "unrecognized --modules_to_save: not implemented, since adapters hold LoRA weights alone",
        ),
        ("one two", "finetune_lora takes one CHECKPOINT, but 2 words stand without a flag"),
        ("other", "CHECKPOINT (other) and --checkpoint_dir (base) are the same setting: give one of them"),
    ],
)
def test_unknown_flag_or_wrong_type_exits_with_2(flags, sentence, capsys):
    check(capsys, [*FINETUNE, *flags.split()], f"{sentence}; see litlora finetune_lora --help", code=2)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("lora_r: 4\nlora_r: 8\n", "line 2 gives lora_r a second time: remove one of them"),
        ("train:\n  epochs: 4\n  epochs: 8\n", "line 3 gives epochs a second time: remove one of them"),
        ("lora_r: [4\n",
         "line 2 is not valid YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
        ("lora_r: 4: 5\n", "line 1 is not valid YAML: mapping values are not allowed here"),
        ("lora_r: 4\n---\nlora_r: 5\n",
         "line 2 is not valid YAML: expected a single document in the stream, but found another document"),
        (b"out_dir: \xff\n",
         "is not valid YAML: 'utf-8' codec can't decode byte 0xff in position 9: invalid start byte"),
    ],
    ids=str,
)  # fmt: skip
def test_invalid_yaml_is_refused(content, sentence, capsys):
    write("run.yaml", content)
    check(capsys, [*FINETUNE, "--config", "run.yaml"], f"--config run.yaml {sentence}")


@pytest.mark.parametrize("flags", [["--train", "train.yaml"], ["--train=train.yaml"]], ids=["two words", "one word"])
def test_yaml_file_of_a_section_is_checked(flags, capsys):
    write("train.yaml", "epochs: 4\nepochs: 8\n")
    check(capsys, [*FINETUNE, *flags], "--train train.yaml line 2 gives epochs a second time: remove one of them")


def test_yaml_of_a_section_on_the_command_line_is_checked(capsys):
    sentence = "--eval {interval: 4, interval: 8} line 1 gives interval a second time: remove one of them"
    check(capsys, [*FINETUNE, "--eval", "{interval: 4, interval: 8}"], sentence)


@pytest.mark.parametrize("content", ["lora_r: &a [*a]\n", "lora_r: &a {x: *a}\n", "&a seed: *a\nlora_r: &b {<<: *b}\n"])
def test_recursive_yaml_is_refused(content, capsys):
    write("run.yaml", content)
    assert main([*FINETUNE, "--config", "run.yaml"]) == 1
    assert capsys.readouterr().err.startswith("litlora: --config run.yaml ")


def test_exponential_yaml_aliases_are_refused(capsys):
    write(
        "run.yaml",
        "a: &a [1, 1]\n" + "".join(f"{y}: &{y} [{', '.join([f'*{x}'] * 9)}]\n" for x, y in pairwise("abcdefghijk")),
    )
    check(
        capsys,
        [*FINETUNE, "--config", "run.yaml"],
        "--config run.yaml holds more than 10,000 values, or an alias of itself: shorten it",
    )


def test_masked_token_is_not_accepted_as_a_token(capsys):
    assert not (main(["download", "--repo_id", "org/name", "--access_token", "hf_aBcDeFgHiJ", "--print_config"]))
    printed = capsys.readouterr().out
    assert "hf_" not in printed
    write("run.yaml", printed)
    check(
        capsys,
        ["download", "--config", "run.yaml"],
        "--access_token (**********) is printed in place of a token: give the token itself, or leave the setting out",
        code=2,
    )


def test_word_without_a_flag_is_taken_for_the_source(capsys):
    sentence = "prepare_json has flags only, but 1 word stands without a flag: did you mean --source rows.jsonl?"
    check(capsys, ["prepare_json", "rows.jsonl", "--destination_path", "out"], sentence, code=2)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("xyz: 4\n", " line 1: unrecognized xyz; see litlora finetune_lora --help"),
        ("lora_r: 4\ntrain:\n  nonsense: 1\n",
         " line 3: unrecognized nonsense; see litlora finetune_lora --help"),
        ("lora_r: 4\nlearning_rate: 1e-4\n",
         " line 2: unrecognized learning_rate: it belongs under train:; see litlora finetune_lora --help"),
        ("train:\n  lora_r: 4\n",
         " line 2: unrecognized lora_r: it belongs at the top level; see litlora finetune_lora --help"),
        ("lr: 1e-4\n", " line 1: unrecognized lr: did you mean learning_rate under train:?"),
        ("train:\n  num_epochs: 4\n", " line 2: unrecognized num_epochs: did you mean epochs under train:?"),
        ("lora_rank: 4\n", " line 1: unrecognized lora_rank: did you mean lora_r?"),
        ("load_in_4bit: true\n", " line 1: unrecognized load_in_4bit: did you mean quantize: bnb.nf4?"),
        ("precision: bf16\n",
         " line 1: precision (bf16) must be bf16-true, bf16-mixed or 32-true: did you mean bf16-true?"),
        ("lora_r: four\n", " line 1: lora_r (four) must be a whole number; see litlora finetune_lora --help"),
        ("lora_r: 4.0\n", " line 1: lora_r (4.0) must be a whole number; see litlora finetune_lora --help"),
        ("lora_rank_pattern: {v_proj: 2, q_proj: 2.5}\n",
         " line 1: lora_rank_pattern, q_proj (2.5) must be a whole number; see litlora finetune_lora --help"),
        ("bias: none\n",
         " line 1: unrecognized bias: not implemented, since adapters hold LoRA weights alone; "
         "see litlora finetune_lora --help"),
        ("lora_r: true\n", " line 1: lora_r (true) must be a whole number; see litlora finetune_lora --help"),
        ("lora_r: [4]\n", " line 1: lora_r ([4]) must be a whole number; see litlora finetune_lora --help"),
        ("- lora_r\n", " must hold settings, one a line, such as NAME: VALUE; see litlora finetune_lora --help"),
        ("lora_r: 4\ntrain: 3\n",
         " line 2: train must hold settings of its own; see litlora finetune_lora --help"),
        ("lora_r: 4\ntrain:\n  epochs:\n",
         " line 3: epochs (null) must be a whole number; see litlora finetune_lora --help"),
        ("resume: null\n",
         " line 1: resume (null) must be auto, true or false or a path; see litlora finetune_lora --help"),
        ("optimizer: [SGD]\n",
         " line 1: optimizer (['SGD']) must be a mapping or a text; see litlora finetune_lora --help"),
        ("prompt_style:\n", " line 1: prompt_style (null) must be a text; see litlora finetune_lora --help"),
    ],
    ids=str,
)  # fmt: skip
def test_unknown_key_or_wrong_type_exits_with_2(content, sentence, capsys):
    write("run.yaml", content)
    check(capsys, [*FINETUNE, "--config", "run.yaml"], f"--config run.yaml{sentence}", code=2)


@pytest.mark.parametrize(
    ("spoil", "out_dir", "sentence"),
    [
        case("file", lambda: write("out"), "out", "--out_dir (out) cannot be written: Not a directory"),
        case("below a file", lambda: write("out"), "out/a/b", "--out_dir (out/a/b) cannot be written: Not a directory"),
        case("where none can be made", nothing, "/proc/litlora/run",
             "--out_dir (/proc/litlora/run) cannot be written: No such file or directory"),
        case("run", lambda: (Path("out").mkdir(), write("out/metrics.csv")), "out",
             "--out_dir (out) holds a run already: choose another, resume it by --resume true, "
             "or replace it by --overwrite true"),
        case("very long name", nothing, "o" * 300, f"--out_dir ({'o' * 300}) cannot be written: File name too long"),
        case("finished run", lambda: Path("out/final").mkdir(parents=True), "out",
             "--out_dir (out) holds a finished run: choose another, or replace it by --overwrite true"),
    ],
)  # fmt: skip
def test_unwritable_out_dir_is_refused(spoil, out_dir, sentence, capsys):
    spoil()
    check(capsys, [*FINETUNE, "--out_dir", out_dir], sentence)


def test_truncated_examples_are_counted_and_reported(capsys):
    flags = ["--train.max_seq_length", "150", "--train.max_steps", "1", "--precision", "32-true"]
    assert main([*FINETUNE, *flags]) == 0
    limit, hint = "--train.max_seq_length (150)", "201 would leave 99 % of the rows whole"
    assert [line for line in capsys.readouterr().err.splitlines() if limit in line and "train.jsonl" in line] == [
        f"warning: 6 rows dropped, since their response begins behind {limit}, "
        f"the first at data/train.jsonl line 2: {hint}",
        f"warning: 6 rows whose response is cut by {limit}, its end token lost, "
        f"the first at data/train.jsonl line 1: {hint}",
    ]
    assert Path("out/final/report.json").is_file()


def test_length_without_any_response_token_is_refused(capsys):
    before = everything()  # the tokens of another run among it, so that none are made
    assert main([*FINETUNE, "--train.max_seq_length", "20"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "litlora: train.jsonl has no example with a response within --train.max_seq_length (20): raise it"
    )
    assert everything() == before


def test_token_beyond_the_vocabulary_is_refused(capsys):
    tokenizer = Tokenizer.from_file("base/tokenizer.json")
    tokenizer.add_tokens([f"<{number}>" for number in range(100)])
    tokenizer.save("base/tokenizer.json")
    check(capsys, [*GENERATE[:-1], "Say <99>"], f"the prompt has {beyond(tokenizer)}")
    assert main([*FINETUNE, "--train.max_steps", "1", "--precision", "32-true"]) == 0  # as none of them occurs
    write("data/val.jsonl", ROW.replace('"a"', '"<99>"'))
    capsys.readouterr()
    assert main([*FINETUNE, "--overwrite", "true"]) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "litlora: 1 row with token ids that the model does not have (its vocabulary ends at 300), "
        "the first at data/val.jsonl line 1: use tokenizer files and weights of the same model"
    )


def beyond(tokenizer: Tokenizer) -> str:
    hint = "use tokenizer files and weights of the same model"
    return f"the token {tokenizer.token_to_id('<99>')}, but the checkpoint's vocab_size is 300: {hint}"


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--memory 8XB", "--memory (8XB) must be a number with a unit, such as 8GB or 7.5GiB; the units are B, KB, MB, "
         "GB, TB, KiB, MiB, GiB, TiB"),
        ("--memory 8", "--memory (8) must be a number with a unit, such as 8GB or 7.5GiB; the units are B, KB, MB, "
         "GB, TB, KiB, MiB, GiB, TiB"),
        ("--memory 0GB", "--memory (0GB) must be above 0"),
        ("--memory 8GB --train.micro_batch_tokens 512",
         "--memory 8GB does not go with --train.micro_batch_tokens 512, which fixes the micro-batches: "
         "leave one of them out"),
    ],
)  # fmt: skip
def test_wrong_memory_is_refused(flags, sentence, capsys):
    check(capsys, [*FINETUNE, *flags.split()], sentence)


def test_a_budget_that_no_plan_fits_is_refused_with_what_would_help(capsys):
    flags = "--memory 20MB --train.activation_checkpointing false --precision 32-true --overwrite true"
    assert main([*FINETUNE, *flags.split()]) == 1
    sentence = capsys.readouterr().err.splitlines()[-1]
    needs = r"\(\d+\.\d\d? GB\)"
    ways = rf"--train.activation_checkpointing true {needs}, --quantize bnb.nf4 {needs}, "
    ways += rf"--strategy fsdp --devices 2, on each {needs}"  # half of the longest row has no label
    fault = r"litlora: no plan fits in --memory \(20MB\): the smallest, \d+ tokens per micro-batch, no checkpointing, "
    assert re.fullmatch(rf"{fault}needs \d\.\d\d? GB; what would help: {ways}", sentence), sentence


def test_a_budget_beyond_the_machine_is_a_warning(capsys):
    assert main([*FINETUNE, "--memory", "900TB", "--dry_run", "true"]) == 0
    warning = r"--memory \(900TB\) is beyond the [\d.]+ GB that there are: the plan takes the [\d.]+ GB that are free"
    assert re.search(warning, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["PagedAdamW", "PagedAdamW8bit", "bitsandbytes.optim.PagedAdamW8bit"])
def test_paged_optimizer_needs_a_gpu(name, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    hint = "and there is none here; choose AdamW8bit or AdamW"
    check(capsys, [*FINETUNE, "--optimizer", name], f"--optimizer {name} moves its state out of a full GPU, {hint}")


def test_wrong_settings_are_reported_before_tokenization(capsys):
    remove("data/tokenized")
    for flags in ("--optimizer Foo", "--resume true", "--eval.evaluate_example 3", "--train.max_seq_length 257"):
        before = everything()
        assert main([*FINETUNE, *flags.split()]) == 1
        assert everything() == before


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--checkpoint_dir nowhere",
         "there is no checkpoint folder nowhere; fetch one with: litlora download --repo_id ORG/NAME"),
        ("--checkpoint_dir checkpoints/org/model",
         "there is no checkpoint folder checkpoints/org/model; fetch one with: litlora download --repo_id org/model"),
        (f"--checkpoint_dir {'x' * 300}",
         f"{'x' * 300}/adapter_config.json cannot be read or written: File name too long"),
        ("--prompt=", "the prompt is empty: give one with --prompt or on standard input"),
        ("--temperature -1", "--temperature (-1.0) must be 0 or more"),
        ("--top_p 0", "--top_p (0.0) must be above 0 and at most 1"),
        ("--top_p 1.1", "--top_p (1.1) must be above 0 and at most 1"),
        ("--top_k 0", "--top_k (0) must be at least 1, or null for all"),
        ("--max_new_tokens 0", "--max_new_tokens (0) must be at least 1"),
        ("--num_samples 0", "--num_samples (0) must be at least 1"),
        ("--max_new_tokens 255",
         "the prompt's 2 tokens and --max_new_tokens (255) are more than the checkpoint's 256 positions: "
         "shorten one of them"),
        ("--base_dir base", "--base_dir (base) goes with an adapter, but base has no adapter_config.json"),
        ("--prompt_style nonsense", f"--prompt_style (nonsense) {STYLES}"),
    ],
)  # fmt: skip
def test_generate_refuses_invalid_arguments(flags, sentence, capsys):
    check(capsys, [*GENERATE, *flags.split()], sentence)


PROMPTS = ["generate", "--checkpoint_dir", "base", "--prompts", "rows.jsonl", "--out_file", "answers.jsonl"]
PROMPT_SHAPE = (
    'a row must look like {"prompt": "..."}, {"instruction": "...", "input": "..."} or '
    '{"messages": [{"role": "user", "content": "..."}]}'
)


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ("\n\n", f"rows.jsonl holds no rows; {PROMPT_SHAPE}"),
        ('{"prompt": "a"}\n{"question"',
         f"rows.jsonl line 2: this is not valid JSON (Expecting ':' delimiter at column 12); {PROMPT_SHAPE}"),
        ('{"prompt": "a"}\n[]\n{"prompt": 1}',
         f"rows.jsonl line 2: this is a list, not an object (invalid rows after it: 1); {PROMPT_SHAPE}"),
        ('{"prompt": ""}', f"rows.jsonl line 1: the prompt is empty; {PROMPT_SHAPE}"),
        ('{"text": "a"}', f"rows.jsonl line 1: a plain text has no prompt; {PROMPT_SHAPE}"),
        ('{"messages": [{"role": "user", "content": ""}]}', f"rows.jsonl line 1: the prompt is empty; {PROMPT_SHAPE}"),
        ('{"prompt": "a", "completion": "b"}',
         'rows.jsonl line 1: the row has a "completion", which would be lost: rename it'),
        ('{"prompt": "a"}\n{"prompt": "' + 250 * "a " + '"}',
         "rows.jsonl line 2: the prompt's 251 tokens and --max_new_tokens (50) are more than the checkpoint's 256 "
         "positions: shorten one of them"),
    ],
)  # fmt: skip
def test_generate_refuses_a_file_of_prompts(rows, sentence, capsys):
    write("rows.jsonl", rows)
    check(capsys, PROMPTS, sentence)


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        (PROMPTS, "there is no file rows.jsonl for --prompts"),
        ([*PROMPTS, "--out_file", "data"], "--out_file (data) is there already: choose another, or remove it"),
        ([*PROMPTS, "--batch_size", "0"], "--batch_size (0) must be at least 1"),
        ([*PROMPTS, "--num_samples", "2"],
         "--num_samples goes with one prompt, and --prompts with many: leave one of them out"),
        ([*PROMPTS, "--prompt", "a"], "--prompt goes with one prompt, and --prompts with many: leave one of them out"),
        (PROMPTS[:-2], "--prompts needs --out_file, for the completions"),
        ([*GENERATE, "--out_file", "x"], "--out_file is for the completions of --prompts: add these"),
        (["chat", "base"], "chat needs a terminal: for a prompt, or a file of them, use litlora generate"),
    ],
)  # fmt: skip
def test_generate_refuses_flags_of_a_file_of_prompts(command, sentence, capsys):
    check(capsys, command, sentence)


@pytest.mark.parametrize("command", [ANSWER, MERGE], ids=["generate", "merge_lora"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of an alarm that a callback took
@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        case("base gone", lambda: remove("base"),
             "the base of the adapter adapter is not there (base); say where it is with --base_dir"),
        case("base of other weights", lambda: weigh(model__norm__weight=torch.full((32,), 2.0)),
             "the adapter in adapter was trained on a base other than base (model.norm.weight differs); "
             "name the one that it was trained on"),
        case("base of another shape", lambda: (remove("base"), shutil.copytree("other", "base")),
             f"the adapter in adapter was trained on a base other than base {OTHER}"),
        case("cut base", lambda: os.truncate(WEIGHTS, 30_000), f"{WEIGHTS} {CUT}"),
        case("cut matrices", lambda: os.truncate("adapter/adapter_model.safetensors", 2_000),
             f"adapter/adapter_model.safetensors {CUT}"),
        case("other matrices", lambda: change("adapter/adapter_config.json", r=4),
             "the adapter adapter does not fit the base base: "
             "model.layers.0.self_attn.q_proj.lora_A.weight is (8, 32), not (4, 32)"),
        case("pattern that is none", lambda: change("adapter/adapter_config.json", target_modules="("),
             'adapter/adapter_config.json has "target_modules": \'(\', '
             "but it must be a list of layer names or a regular expression"),
        case("rank beyond any matrix", lambda: change("adapter/adapter_config.json", r=10**12),
             f'adapter/adapter_config.json has "r": {10**12}, '
             "but no matrix in adapter_model.safetensors has that many rows or columns"),
        case("rank in quotes", lambda: change("adapter/adapter_config.json", r="8"),
             "adapter/adapter_config.json has \"r\": '8', but it must be a whole number above 0, without quotes"),
        case("scale that is no number", lambda: change("adapter/adapter_config.json", lora_alpha=float("nan")),
             'adapter/adapter_config.json has "lora_alpha": nan, but it must be a number above 0'),
        case("pattern that takes years", lambda: change("adapter/adapter_config.json", target_modules="(.|.)*!"),
             "the layers that match (.|.)*! cannot be looked for: it takes more than 0.3 seconds"),
        case("another kind of adapter", lambda: change("adapter/adapter_config.json", use_qalora=True),
             'adapter/adapter_config.json has "use_qalora": True, which litlora does not implement: ' + WAY_OUT),
    ],
)  # fmt: skip
def test_adapter_that_does_not_match_its_base_is_refused(command, spoil, sentence, capsys, monkeypatch):
    monkeypatch.setattr(resource_limits, "MAX_SECONDS", 0.3)
    spoil()
    check(capsys, command, sentence)


@pytest.mark.parametrize(
    ("spoil", "flags", "sentence"),
    [
        case("rank", nothing, "--init_adapter adapter --lora_r 4",
             "--lora_r (4) is for a new adapter, but --init_adapter brings its own: leave one of them out"),
        case("switch", nothing, "--init_adapter adapter --lora_head true",
             "--lora_head (True) is for a new adapter, but --init_adapter brings its own: leave one of them out"),
        case("initialization", nothing, "--init_adapter adapter --lora_init fisher",
             "--lora_init (fisher) is for a new adapter, but --init_adapter brings its own: leave one of them out"),
        case("no adapter", nothing, "--init_adapter base",
             "no adapter in base (expected adapter_config.json); "
             "it is a checkpoint: name the folder of an adapter on it"),
        case("key", lambda: change("adapter/adapter_config.json", bias="all"), "--init_adapter adapter",
             "adapter/adapter_config.json has \"bias\": 'all', which litlora does not implement: " + WAY_OUT),
        case("another base", nothing, "--init_adapter adapter --checkpoint_dir other",
             f"the adapter in adapter was trained on a base other than other {OTHER}"),
        case("shape", lambda: change("adapter/adapter_config.json", r=4), "--init_adapter adapter",
             "the adapter adapter does not fit the base base: "
             "model.layers.0.self_attn.q_proj.lora_A.weight is (8, 32), not (4, 32)"),
        case("adapter as base", nothing, "--checkpoint_dir adapter",
             "--checkpoint_dir (adapter) is an adapter, not its base; "
             "to continue from it on new data, pass --init_adapter adapter"),
        case("run as base", lambda: shutil.move("adapter", "run/final"), "--checkpoint_dir run",
             "--checkpoint_dir (run) is an adapter, not its base; "
             "to continue from it on new data, pass --init_adapter run/final"),
        case("run to resume", lambda: shutil.move("adapter", "run/final"), "--resume run",
             "--resume: run is a finished adapter, not a checkpoint of a run; "
             "to continue from it on new data, pass --init_adapter run/final"),
        case("run with checkpoints", lambda: shutil.move("adapter", "run/step-000002"), "--resume run",
             "--resume: run is the folder of a run; did you mean run/step-000002?"),
        case("adapter to resume", nothing, "--resume adapter",
             "--resume: adapter is a finished adapter, not a checkpoint of a run; "
             "to continue from it on new data, pass --init_adapter adapter"),
    ],
)  # fmt: skip
def test_continuing_from_an_adapter_is_refused(spoil, flags, sentence, capsys):
    spoil()
    check(capsys, [*FINETUNE, *flags.split()], sentence)


def test_adapter_without_its_base_is_refused(capsys):
    change("adapter/adapter_config.json", base_model_name_or_path="org/name")
    hint = "say where it is with --checkpoint_dir"
    command = ["finetune_lora", "--init_adapter", "adapter", "--data_dir", "data"]
    check(capsys, command, f"the base of the adapter adapter is not there (org/name); {hint}")


def copy_adapter(**keys: object) -> None:
    """Copy the adapter, and change keys of the copy's adapter_config.json."""
    shutil.copytree("adapter", "second")
    change("second/adapter_config.json", **keys)


@pytest.mark.parametrize("command", [["generate", "--prompt", "Say"], ["merge_lora", "--out_dir", "out"]], ids=str)
@pytest.mark.parametrize(
    ("spoil", "flags", "sentence"),
    [
        case("weights missing", nothing, "--adapters adapter,adapter --adapter_weights 0.7",
             "--adapter_weights (0.7) must have one weight for each of --adapters (2), or be left out for 1 each"),
        case("weights alone", nothing, "--checkpoint_dir adapter --adapter_weights 0.7,0.3",
             "--adapter_weights (0.7,0.3) needs --adapters: name the adapters there"),
        case("zero weights", nothing, "--adapters adapter,adapter --adapter_weights 0,0",
             "--adapter_weights (0.0,0.0) leaves the base alone: give a weight other than 0"),
        case("infinite weight", lambda: write("settings.yaml", "adapters: [adapter]\nadapter_weights: [.inf]\n"),
             "--config settings.yaml", "--adapter_weights (inf) must be finite numbers"),
        case("no adapter", nothing, "--adapters adapter,base",
             "no adapter in base (expected adapter_config.json); "
             "it is a checkpoint: name the folder of an adapter on it"),
        case("adapter as base", nothing, "--checkpoint_dir adapter --adapters adapter",
             "--checkpoint_dir (adapter) is an adapter: add it to --adapters, and name their base or leave it out"),
        case("two bases", nothing, "--checkpoint_dir base --base_dir base --adapters adapter",
             "--checkpoint_dir and --base_dir both name the base of --adapters: leave one of them out"),
        case("bases that differ", lambda: copy_adapter(base_model_name_or_path="other"), "--adapters adapter,second",
             "adapter and second name different bases (base, other): say which it is with --checkpoint_dir"),
        case("another base", copy_adapter, "--checkpoint_dir other --adapters adapter,second",
             f"the adapter in adapter was trained on a base other than other {OTHER}"),
        case("variant", lambda: copy_adapter(use_qalora=True), "--adapters adapter,second",
             'second/adapter_config.json has "use_qalora": True, which litlora does not implement: ' + WAY_OUT),
    ],
)  # fmt: skip
def test_adapters_that_have_no_sum_are_refused(command, spoil, flags, sentence, capsys):
    spoil()
    check(capsys, [*command, *flags.split()], sentence)


def test_adapters_of_different_prompt_styles_need_a_choice(capsys):
    copy_adapter()
    write("second/prompt_style.yaml", "prompt_style: none\n")
    command = ["generate", "--prompt", "Say", "--adapters", "adapter,second"]
    fault = "adapter and second were trained on different prompt styles (alpaca, none)"
    check(capsys, command, f"{fault}: choose one with --prompt_style")
    assert main([*command, "--prompt_style", "none", "--max_new_tokens", "1"]) == 0


def test_adapters_of_different_quantization_need_a_choice(capsys):
    copy_adapter(auto_mapping={"quantization_config": Quantization("bnb.nf4", torch.float32).hub})
    command = ["generate", "--prompt", "Say", "--adapters", "adapter,second"]
    fault = "adapter and second were trained on bases of different quantization"
    check(capsys, command, f"{fault}: choose one with --quantize")
    assert main([*command, "--quantize", "none", "--max_new_tokens", "1"]) == 0
    hint = "merge them one by one, or leave --dequantized_base out"
    merge = ["merge_lora", "--out_dir", "out", "--adapters", "adapter,second"]
    check(capsys, [*merge, "--dequantized_base", "true"], f"{fault}: {hint}")
    assert main(merge) == 0


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("", "missing --checkpoint_dir or --adapters"),
        ("--adapters adapter --adapter_weights 1,x",
         "--adapter_weights (1,x) must be a list, each item a number; see litlora generate --help"),
        ("--adapters", "--adapters needs a value; see litlora generate --help"),
    ],
)  # fmt: skip
def test_lists_of_adapters_are_checked_by_the_parser(flags, sentence, capsys):
    check(capsys, ["generate", "--prompt", "Say", *flags.split()], sentence, code=2)


def test_folder_of_a_run_is_no_adapter(capsys):
    Path("run").mkdir()
    Path("adapter").rename("run/final")
    check(capsys, [*GENERATE, "--checkpoint_dir", "run"], "run is the folder of a run; did you mean run/final?")
    sentence = "no adapter in run (expected adapter_config.json); did you mean run/final?"
    check(capsys, [*MERGE, "--checkpoint_dir", "run"], sentence)


@pytest.mark.parametrize(
    ("spoil", "flags", "sentence"),
    [
        case("no adapter", nothing, "--checkpoint_dir base",
             "no adapter in base (expected adapter_config.json); "
             "it is a checkpoint: name the folder of an adapter on it"),
        case("missing", nothing, "--checkpoint_dir runs/nowhere",
             "no adapter in runs/nowhere (expected adapter_config.json); "
             "train one with: litlora finetune_lora --out_dir runs/nowhere"),
        case("missing final", nothing, "--checkpoint_dir runs/final",
             "no adapter in runs/final (expected adapter_config.json); "
             "train one with: litlora finetune_lora --out_dir runs"),
        case("not quantized", nothing, "--dequantized_base true",
             "--dequantized_base: adapter was not trained on a quantized base; leave the flag out"),
        case("quantized in a way unknown",
             lambda: change("adapter/adapter_config.json", auto_mapping={"quantization_config": {"bits": 8}}),
             "--dequantized_base true",
             "adapter was trained on a base that litlora cannot make: {'bits': 8}"),
        case("base_dir gone", nothing, "--base_dir nowhere",
             "there is no base at --base_dir (nowhere)"),
        case("out_dir there", lambda: Path("out").mkdir(), "",
             "--out_dir (out) is there already: choose another, or remove it"),
        case("out_dir below a file", lambda: write("file"), "--out_dir file/x",
             "--out_dir (file/x) cannot be written: Not a directory"),
        case("no tokenizer", lambda: remove("base/tokenizer.json"), "",
             "no tokenizer in base (expected tokenizer.json or tokenizer.model); "
             "fetch it with: litlora download --repo_id ORG/NAME --tokenizer_only true"),
    ],
)  # fmt: skip
def test_merge_lora_refuses_invalid_arguments(spoil, flags, sentence, capsys):
    spoil()
    check(capsys, [*MERGE, *flags.split()], sentence)


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        ([*FINETUNE, "--eval.evaluate_example", "9"], 1,
         "--eval.evaluate_example (9) must be below the number of rows in val.jsonl (3)"),
        ([*FINETUNE, "--nonsense", "1"], 2, "unrecognized --nonsense; see litlora finetune_lora --help"),
        ([*ANSWER, "--base_dir", "nowhere"], 1,
         "there is no base at --base_dir (nowhere)"),
        ([*MERGE, "--out_dir", "data"], 1, "--out_dir (data) is there already: choose another, or remove it"),
        (["finetune_lora"], 2,
         "missing --checkpoint_dir and --data_dir; see litlora finetune_lora --help"),
    ],
    ids=["setting", "flag", "generate", "merge_lora", "required"],
)  # fmt: skip
def test_process_prints_one_sentence(arguments, code, sentence, litlora):
    before = everything()
    done = litlora(*arguments)
    started = f"litlora {__version__}: {arguments[0]}\n" if code == 1 else ""  # the flags are fine
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"{started}litlora: {sentence}\n")
    assert everything() == before
