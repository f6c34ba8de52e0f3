"""Folders and texts made to be expensive or to lead elsewhere: links in every position, and constructs that take long.

A few cases of each kind run always; `--hypothesis-profile thorough` runs a thousand of each.
"""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers.hub_server import Fault, HubServer, reachable_hub
from hypothesis import given, settings
from hypothesis import strategies as st
from test_untrusted_files import CONVERSATION, NAMED, as_json, damaged, holds, spoiled, spoiled_json, use_tokenizer

from litlora.__main__ import main
from litlora.data.dataset import read_file
from litlora.data.prompts.chat_style import ChatStyle
from litlora.data.prompts.template_process import IsolatedTemplate
from litlora.data.readers.raw_files import RawFile
from litlora.data.readers.row_formats import ANY
from litlora.data.tokenizer_backend import limits
from litlora.data.tokenizer_backend.special_tokens import SpecialTokens
from litlora.errors import LitLoraError
from litlora.export.receipt import RECEIPT, Receipt
from litlora.hub import client
from litlora.hub.client import Repo
from litlora.hub.download import fetch_checkpoint
from litlora.lora.adapter_config import read_settings
from litlora.utils import resource_limits

FEW = settings(max_examples=settings().max_examples if settings().max_examples > 100 else 8)
SECRET = b'{"secret": "TOPSECRET"}'
LINKS: dict[str, Callable[[Path, Path], object]] = {
    "file": lambda path, outside: path.symlink_to(outside / "secret.json"),
    "folder": lambda path, outside: path.symlink_to(outside),
    "nowhere": lambda path, outside: path.symlink_to(outside / "nowhere"),
    "itself": lambda path, _: path.symlink_to(path),
    "parent": lambda path, _: path.symlink_to(".."),
    "device": lambda path, _: path.symlink_to("/dev/zero"),
    "pipe": lambda path, _: os.mkfifo(path),
    "proc": lambda path, _: path.symlink_to("/proc/self/environ"),
}
QUICK = ["--precision", "32-true", "--train.max_steps", "2", "--eval.max_new_tokens", "0"]
COMMANDS = {
    "base": [
        ["merge_lora", "run/final", "--base_dir", "base", "--out_dir", "made"],
        ["export", "base", "--outtype", "f32", "--out_dir", "made"],
        ["finetune_lora", "base", "--data_dir", "data", "--out_dir", "made", *QUICK],
    ],
    "run": [
        ["merge_lora", "run/final", "--base_dir", "base", "--out_dir", "made"],
        ["export", "run/final", "--base_dir", "base", "--format", "gguf-lora", "--out_dir", "made"],
        ["report", "run", "--out_file", "made.html"],
        ["verify", "run/final", "--base_dir", "base"],
        ["finetune_lora", "base", "--data_dir", "data", "--out_dir", "run", *QUICK, "--resume", "true"],
        ["finetune_lora", "base", "--data_dir", "data", "--out_dir", "run", *QUICK, "--overwrite", "true"],
    ],
    "data": [
        ["finetune_lora", "base", "--data_dir", "data", "--out_dir", "made", *QUICK],
        ["check_data", "base", "--data_dir", "data"],
        ["prepare_json", "--source", "rows.jsonl", "--destination_path", "data"],
    ],
    "root": [["download", "org/name", "--checkpoint_root", "root"]],
}  # fmt: skip


@pytest.fixture(scope="module")
def world(tiny, adapter, data_dir, tmp_path_factory) -> Path:
    """Return a folder with one of each: a checkpoint, a run, prepared data, and what a download has left."""
    folder = tmp_path_factory.mktemp("world")
    for name, source in {"base": tiny, "run": adapter.parent, "data": data_dir}.items():
        shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("tokenized"))
    (folder / "base/LICENSE").write_text("free")
    (folder / "base/generation_config.json").write_text("{}")
    rows = [json.dumps({"prompt": f"a {n}", "completion": f"b {n}"}) + "\n" for n in range(20)]
    (folder / "rows.jsonl").write_text("".join(rows))
    (folder / "data/dataset.json").write_text('{"rows": 2, "train": 1, "val": 1}')
    for name in (".pending/train.jsonl", "tokenized/train-0/ids.int32", ".train.jsonl.0a1b2c3d.partial"):
        (folder / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "data" / name).write_text("x")
    for name in ("config.json", ".download/0a1b", "origin.json", "model.safetensors"):
        (folder / "root/org/name" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "root/org/name" / name).write_text("{}")
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    with reachable_hub(monkeypatch, tmp_path) as server:
        monkeypatch.setattr(client, "WAITS", ())
        server.add("org/name", {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights"})
        yield server


@FEW
@given(data=st.data())
def test_links_in_every_position(world, hub, tmp_path, capsys, data):
    for name in ("own", "outside"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    own, outside = Path(shutil.copytree(world, tmp_path / "own")), tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.json").write_bytes(SECRET)
    kind = data.draw(st.sampled_from(sorted(COMMANDS)))
    command = data.draw(st.sampled_from(COMMANDS[kind]))
    positions = [path.relative_to(own) for path in (own / kind).rglob("*") if path.name not in ("org", "name")]
    position = data.draw(st.sampled_from(sorted(positions)))  # but not of the user's own folders of checkpoints
    link = data.draw(st.sampled_from(sorted(LINKS)))
    path = own / position
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    LINKS[link](path, outside)
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(own)
        code = main(command)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("litlora: ")]
    assert (code, len(lines)) in ((0, 0), (1, 1)), (command, position, link, lines)
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == {"secret.json": SECRET}
    for made in (own / "made").rglob("*"):
        assert not made.is_symlink()
        assert kind == "data" or not made.is_file() or b"TOPSECRET" not in made.read_bytes(), (command, position)


LISTED = {"rfilename": "config.json", "size": 2, "blobId": "0", "lfs": {"size": 2, "sha256": "0", "pointerSize": 130}}
LISTING = {"id": "org/name", "sha": "abc", "siblings": [LISTED, LISTED | {"rfilename": "tokenizer.json"}],
           "cardData": {"license": "mit", "configs": [{"config_name": "a", "data_files": [{"split": "train"}]}]},
           }  # fmt: skip


@given(body=spoiled(LISTING).map(as_json) | damaged(as_json(LISTING)), is_model=st.booleans())
def test_hub_listing(hub, tmp_path, body, is_model):
    hub.faults[:] = [Fault("/revision/main", status=200, body=body)]
    if is_model:
        repo = Repo("org/name", "model", "main", None)
        holds(lambda: fetch_checkpoint(repo, tmp_path / "root", tokenizer_only=False))
    else:
        hub.add("datasets/org/name", {"train.jsonl": b"{}"})
        assert main(["prepare_json", "--source", "org/name", "--destination_path", str(tmp_path / "out")]) in (0, 1)


@given(data=st.data())
def test_receipt(adapter, tmp_path, data):
    (tmp_path / RECEIPT).write_bytes(data.draw(spoiled_json(adapter / RECEIPT)))
    holds(lambda: Receipt.read(tmp_path))


@FEW
@given(data=st.data())
def test_verifying_by_any_receipt(world, tiny, tmp_path, data, capsys):
    folder = Path(shutil.copytree(world / "run/final", tmp_path / "final", dirs_exist_ok=True))
    (folder / RECEIPT).write_bytes(
        as_json(data.draw(spoiled(json.loads((world / "run/final" / RECEIPT).read_bytes()))))
    )
    assert main(["verify", str(folder), "--base_dir", str(tiny)]) in (0, 1)
    assert "Traceback" not in capsys.readouterr().err


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("table") / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["a", "b"] * 9, "completion": ["c", "d"] * 9}), path)
    return path.read_bytes()


@given(data=st.data())
def test_parquet(table, data):
    content = data.draw(damaged(table))
    holds(lambda: read_file(RawFile.from_bytes("data", ".parquet", content), ANY))


VALUES = st.recursive(
    st.sampled_from(
        ["messages", "'a'", "m", "x", "0", "-10**9", "10**6", "'ab' * 10**6", "range(10**7)", "[1] * 10**7"]
    ),
    lambda inner: st.one_of(
        st.builds(
            "({} {} {})".format, inner, st.sampled_from(["+", "-", "*", "//", "%", "**", "~", "in", "<", "=="]), inner
        ),
        st.builds("[{}, {}]".format, inner, inner),
        st.builds("({}) | {}".format, inner, st.sampled_from(
            ["sort", "unique|list", "join", "length", "round(-10**9)", "tojson(indent=10**6)", "reverse|list", "string",
             "replace('a', 'a' * 1000)", "center(10**8)", "batch(1)|list", "groupby('role')", "wordwrap(1)", "xmlattr",
             "indent(10**7)", "list|sum", "map('upper')|list", "urlize", "striptags", "format(1)", "filesizeformat"])),
        st.builds("({}).{}".format, inner, st.sampled_from(
            ["split('')", "replace('', 'b' * 999)", "format(a=1)", "zfill(10**9)", "ljust(10**9)", "__class__",
             "encode()", "join(['a'] * 10**6)", "items()", "translate({})"])),
    ),
    max_leaves=5,
)  # fmt: skip
STATEMENTS = st.recursive(
    VALUES.map("{{{{ {} }}}}".format),
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("{{% for x in {} %}}{}{{% endfor %}}".format, VALUES, inner),
        st.builds("{{% if {} %}}{}{{% endif %}}".format, VALUES, inner),
        st.builds("{{% set x = {} %}}{}".format, VALUES, inner),
        st.builds("{{% macro m() %}}{}{{{{ m() }}}}{{% endmacro %}}{{{{ m() }}}}".format, inner),
        st.builds("{{% set n = namespace(x={}) %}}{{% for i in range(99) %}}{{% set n.x = n.x ~ n.x %}}{{% endfor %}}{}"
                  .format, VALUES, inner),
    ),
    max_leaves=4,
)  # fmt: skip
EXPRESSIONS = st.recursive(
    st.sampled_from(
        ["a", ".", r"\w", "[^b]", r"\d", "", "[a-z]", "(?i:k)", r"\s", "(?=a)", r"\b", "x{1000}", "[\0-\uffff]"]
    ),
    lambda inner: st.one_of(
        st.builds("(?:{}){}".format, inner, st.sampled_from(["*", "+", "?", "*?", "{2,50}", "{1,400}", "{0,999}"])),
        st.builds("(?:{}|{})".format, inner, inner),
        st.builds("{}{}".format, inner, inner),
        st.builds("({})\\1*".format, inner),
        st.builds("(?={})".format, inner),
    ),
    max_leaves=6,
)  # fmt: skip
SPARE = 5  # seconds of CPU time beyond a limit: the kernel counts whole ones, and a process has to start again


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let limits end early."""
    monkeypatch.setattr(resource_limits, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(resource_limits, "POLL_INTERVAL", 0.02)
    monkeypatch.setattr(limits, "SLOWEST", 10**6)


def ends(work: Callable[[], object]) -> None:
    """Assert that work ends within its limit, well or in one sentence."""
    before = time.process_time()
    try:
        work()
    except LitLoraError as error:
        assert str(error).strip()
        assert "\n" not in str(error)
    assert time.process_time() - before < SPARE


@FEW
@given(template=STATEMENTS)
def test_expensive_template(hasty, template):
    special = SpecialTokens(NAMED.values())
    ends(lambda: ChatStyle(IsolatedTemplate(template, NAMED), special, "</s>").render(CONVERSATION))


@FEW
@given(expression=EXPRESSIONS, key=st.sampled_from(["target_modules", "exclude_modules", "rank_pattern"]))
def test_expensive_expression_of_an_adapter(hasty, adapter, tmp_path, expression, key):
    config = json.loads((adapter / "adapter_config.json").read_bytes())
    config |= {"target_modules": "a+", key: {expression: 4} if key == "rank_pattern" else expression}
    (tmp_path / "adapter_config.json").write_bytes(as_json(config))
    ends(lambda: read_settings(tmp_path).adapted(["model.layers.0.self_attn.q_proj" + "a" * 3000]))


STEPS = st.one_of(
    st.builds(lambda regex, way: {"type": "Split", "pattern": {"Regex": regex}, "behavior": way, "invert": False},
              EXPRESSIONS, st.sampled_from(["Isolated", "Removed", "MergedWithNext", "Contiguous"])),
    st.builds(lambda length: {"type": "FixedLength", "length": length}, st.sampled_from([0, 1, 2**63])),
    st.just({"type": "ByteLevel", "add_prefix_space": True, "use_regex": True, "trim_offsets": False}),
    st.just({"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}),
    st.just({"type": "Punctuation", "behavior": "Isolated"}),
)  # fmt: skip
NORMALIZERS = st.one_of(
    st.builds(lambda regex, content: {"type": "Replace", "pattern": {"Regex": regex}, "content": content},
              EXPRESSIONS, st.sampled_from(["", "a", "aa", "a" * 50, "\0"])),
    st.builds(lambda prefix: {"type": "Prepend", "prepend": prefix}, st.sampled_from(["", "a", "a" * 90])),
    st.sampled_from([{"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Nmt"}, {"type": "StripAccents"}]),
    st.builds(
        lambda text: {"type": "Precompiled", "precompiled_charsmap": text}, st.sampled_from(["AAAAAA==", "", "AQ=="])
    ),
)  # fmt: skip


@FEW
@given(steps=st.lists(STEPS, max_size=3), normalizers=st.lists(NORMALIZERS, max_size=3))
def test_expensive_tokenizer(hasty, tiny, tmp_path, capfd, steps, normalizers):
    file = json.loads((tiny / "tokenizer.json").read_bytes())
    file["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, file["pre_tokenizer"]]}
    file["normalizer"] = {"type": "Sequence", "normalizers": normalizers}
    shutil.copytree(tiny, tmp_path / "base", dirs_exist_ok=True)
    (tmp_path / "base/tokenizer.json").write_bytes(as_json(file))
    capfd.readouterr()
    ends(lambda: use_tokenizer(tmp_path / "base"))
    assert not capfd.readouterr().err


def test_clock_that_goes_backwards(world, tmp_path, monkeypatch, capsys):
    """By a day with each look at it: locks, caches, progress and limits of time do not notice."""
    days = count()
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now - 86_400 * next(days))
    monkeypatch.chdir(shutil.copytree(world, tmp_path / "own", ignore=shutil.ignore_patterns(".*")))
    train = ["finetune_lora", "base", "--data_dir", "data", "--out_dir", "made", *QUICK]
    train += ["--train.save_interval", "1", "--train.global_batch_size", "5"]
    assert main([*train, "--train.max_time", "0.001"]) == 124
    assert main([*train, "--resume", "true"]) == 0
    merge, *_ = COMMANDS["base"]
    prepare = ["prepare_json", "--source", "rows.jsonl", "--destination_path", "prepared"]
    for command in (prepare, [*merge[:-1], "merged"], ["report", "made"], COMMANDS["data"][1]):
        assert main(command) == 0
    assert "Traceback" not in capsys.readouterr().err
