"""Whatever a file holds, reading it ends well or in one sentence: no other exception, no hang, little memory.

A few cases of each kind run always; `--hypothesis-profile thorough` runs a thousand of each.
"""

import io
import json
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from helpers.copies import edit_json
from helpers.families import FAMILIES
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from litlora.__main__ import main
from litlora.data import token_cache
from litlora.data.batching import Samples
from litlora.data.dataset import read_file
from litlora.data.encoding import encode
from litlora.data.examples import Example, Turn
from litlora.data.prompts.styles import ChatStyle, StyleSettings
from litlora.data.prompts.template_process import IsolatedTemplate
from litlora.data.readers.raw_files import RawFile
from litlora.data.readers.row_formats import ALPACA, ANY, ParsedRow
from litlora.data.readers.row_store import to_line
from litlora.data.split_encoder import SplitEncoder
from litlora.data.token_cache import ABOUT, FIRST_LABELS, FOLDER, IDS, OFFSETS, find_split, open_splits
from litlora.data.tokenizer import Tokenizer
from litlora.data.tokenizer_backend.special_tokens import SpecialTokens
from litlora.errors import LitLoraError
from litlora.export.gguf.writer import encoded, type_of
from litlora.lora.adapter_config import read_settings
from litlora.lora.adapter_folder import find_base, read_prompt_style
from litlora.lora.checkpoint import load_with_adapters, read_adapter
from litlora.lora.layer import lora_parameters
from litlora.lora.selection import Weighted
from litlora.models.checkpoint import Checkpoint
from litlora.models.gguf.tensors import GGUFTensor
from litlora.train.optimizers import build_optimizer
from litlora.train.resume import COUNTERS, METRICS, RUN, Identity, intact
from litlora.train.run_dir import rows_until
from litlora.train.train_state import TENSORS, restore_state
from litlora.utils import resource_limits
from litlora.utils.files import read_json
from litlora.utils.manifest import MANIFEST, find_corruption, write_manifest

SPARE = 64_000_000  # bytes that reading may take: what is spoiled are files of less than two million
CPU = torch.device("cpu")
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
CONVERSATION = Example.of(Turn("a", "b"), Turn("c", "d"), system="e")
NUMBERS = [0, -1, 1, 2, 2**31, 2**63, 2**64, -(2**63), 10**30, 10**400, 1e308, 5e-324, float("nan"), float("inf")]
PATTERNS = ["(", "(.*.*)*x", "[[:x:]]", "a{99999999999}", "(?i:.*)", "((((.*)*)*)*)*y"]
TEXTS = ["", "\ud800", "\0", "../../x", "/etc/passwd", "x" * 5000, "</s>", "*" * 10, *PATTERNS]
VALUES = st.recursive(
    st.none() | st.booleans() | st.sampled_from(NUMBERS) | st.floats() | st.sampled_from(TEXTS) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
ROW = {"instruction": "a", "input": "b", "output": "c", "prompt": "d", "completion": "e"}
CALL = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": {"a": 1}}}]}
SHAREGPT = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "<think>b</think>c", "weight": 0}]
MESSAGES = [{"role": role, "content": role} for role in ("system", "user", "assistant", "user", "assistant")]
ROWS = [
    ROW, {"messages": MESSAGES}, {"conversations": SHAREGPT, "system": "s"}, {"text": "a"},
    {"messages": [MESSAGES[1], CALL, {"role": "tool", "content": [{"type": "text", "text": "b"}]}, MESSAGES[2]],
     "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"question": "a", "answer": "b", "history": [["c", "d"]], "thinking": "e", "input": "f"},
]  # fmt: skip
SETTINGS = {
    "lora_r": 8, "lora_dropout": 0.1, "precision": "32-true", "prompt_style": "alpaca", "seed": 1, "resume": False,
    "train": {"epochs": 1, "max_steps": None, "learning_rate": 1e-3}, "eval": {"interval": 5},
    "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3, "betas": [0.9, 0.99]}},
}  # fmt: skip
TEMPLATE_PARTS = [
    "{% for m in messages %}", "{% endfor %}", "{{ m.role }}", "{{ m['content'] }}", "</s>", "{% if m %}",
    "{% endif %}", "{{ m | tojson(indent=9**9) }}",
    "{% set ns = namespace(x='a') %}", "{% for i in range(99999) %}", "{% set ns.x = ns.x ~ ns.x %}", "{{ ns.x }}",
    "{{ 'a' * 10**11 }}", "{{ 10 ** (10 ** 9) }}", "{{ '%99999999999d' % 1 }}", "{{ 'a'.center(10**11) }}",
    "{{ range(10**9) }}", "{{ ().__class__.__mro__ }}", "{{ messages.append(1) }}", "{% include 'x' %}",
    "{{ raise_exception('no') }}", "{% macro f() %}{{ f() }}{% endmacro %}", "{{ f() }}",
    "{% generation %}", "{% endgeneration %}", "{% break %}", "{{ strftime_now('%Y') }}", "{{ bos_token }}",
]  # fmt: skip


YAML_PARTS = ["&a ", "*a", "[", "]", "{", "}", ": ", "- ", "\n", "  ", "!!python/object:os.system ",
              "!!binary ", "!!int ", "!!timestamp ", "!!set ", "? ", "| ", "> ", "---", "%TAG", "lora_r", "train", "<<",
              "012", "1e3", "on", "'", '"', "#"]  # fmt: skip
YAML = st.lists(st.sampled_from(YAML_PARTS), max_size=12).map(lambda parts: "".join(parts).encode())


@st.composite
def spoiled(draw: st.DrawFn, document: Any) -> Any:
    """Draw a JSON document with a few of its values replaced or taken away."""
    for _ in range(draw(st.integers(1, 3))):
        document = _spoil(draw, document)
    return document


def _spoil(draw: st.DrawFn, node: Any) -> Any:
    if not isinstance(node, dict | list) or not node or draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    copy = node.copy()
    key = draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
    if draw(st.integers(0, 4)):
        copy[key] = _spoil(draw, node[key])
    else:
        del copy[key]
    return copy


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Draw bytes with a stretch of them replaced."""
    at = draw(st.integers(0, len(content)))
    end = at + draw(st.sampled_from([0, 1, 2, 8, 100, len(content)]))
    return content[:at] + draw(st.binary(max_size=20)) + content[end:]


def spoiled_json(path: Path) -> st.SearchStrategy[bytes]:
    content = path.read_bytes()
    return spoiled(json.loads(content)).map(as_json) | damaged(content)


@st.composite
def spoiled_safetensors(draw: st.DrawFn, path: Path) -> bytes:
    """Draw a safetensors file whose header lies, or whose bytes are others."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    if draw(st.booleans()):
        return draw(damaged(content[: start + 100])) + content[start + 100 :]
    header = as_json(draw(spoiled(json.loads(content[8:start]))))
    length = draw(st.just(len(header)) | st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 10**8, 2**63, 2**64 - 1]))
    return length.to_bytes(8, "little") + header + content[start:]


def as_json(document: Any) -> bytes:
    return json.dumps(document).encode()


def holds(reading: Callable[[], object]) -> None:
    """Assert that reading ends well or in one sentence, in little time and memory."""
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(resource_limits, "MAX_MEMORY", SPARE)
            with resource_limits.limited_resources():
                reading()
    except LitLoraError as error:
        assert str(error).strip()
    except OSError as error:
        assert error.filename  # of which a sentence is made


@pytest.fixture
def base(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "base"))


@given(data=st.data())
def test_config(base: Path, tiny: Path, data: st.DataObject):
    (base / "config.json").write_bytes(data.draw(spoiled_json(tiny / "config.json")))
    holds(lambda: Checkpoint.open(base))


@given(data=st.data())
def test_weights(base: Path, tiny: Path, data: st.DataObject):
    (base / "model.safetensors").write_bytes(data.draw(spoiled_safetensors(tiny / "model.safetensors")))
    holds(lambda: Checkpoint.open(base).load(torch.float32, CPU))


@pytest.fixture(scope="module")
def sharded(make_checkpoint: Callable[..., Path]) -> Path:
    return make_checkpoint(FAMILIES[0], max_shard_size="20KB")


@given(data=st.data())
def test_index(sharded: Path, tmp_path: Path, data: st.DataObject):
    folder = Path(shutil.copytree(sharded, tmp_path / "sharded", dirs_exist_ok=True))
    path = folder / "model.safetensors.index.json"
    path.write_bytes(data.draw(spoiled_json(sharded / path.name)))
    holds(lambda: Checkpoint.open(folder).load(torch.float32, CPU))


def load_either(folder: Path, base_dir: Path | None) -> None:
    base, adapter = find_base(folder, base_dir)
    load_with_adapters(Checkpoint.open(base), [Weighted(adapter)] if adapter else [], torch.float32, CPU)


@given(data=st.data())
def test_adapter_config(tiny: Path, adapter: Path, tmp_path: Path, data: st.DataObject):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter", dirs_exist_ok=True))
    (folder / "adapter_config.json").write_bytes(data.draw(spoiled_json(adapter / "adapter_config.json")))
    given_base = data.draw(st.sampled_from([None, tiny]))
    holds(lambda: load_either(folder, given_base))


@given(data=st.data())
def test_adapter_weights(tiny: Path, adapter: Path, tmp_path: Path, data: st.DataObject):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter", dirs_exist_ok=True))
    path = folder / "adapter_model.safetensors"
    path.write_bytes(data.draw(spoiled_safetensors(adapter / path.name)))
    holds(lambda: load_with_adapters(Checkpoint.open(tiny), [Weighted(folder)], torch.float32, CPU))


@pytest.fixture(scope="module")
def saved(tiny: Path, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of a run, with the best adapter among its state, beside the run's metrics.csv."""
    out_dir = tmp_path_factory.mktemp("saved") / "out"
    folders = ["--checkpoint_dir", tiny, "--data_dir", data_dir, "--out_dir", out_dir, "--precision", "32-true"]
    steps = "--train.global_batch_size 8 --train.save_interval 2 --eval.interval 1 --eval.keep_best true"
    assert main(["finetune_lora", *map(str, folders), *steps.split()]) == 0
    return out_dir / "step-000002"


def copied(saved: Path, tmp_path: Path) -> Path:
    """Return a checkpoint to spoil, in a folder of a run."""
    shutil.copytree(saved.parent, tmp_path / "out", dirs_exist_ok=True)
    return tmp_path / "out" / saved.name


def restored(tiny: Path, folder: Path) -> int:
    """Resume from a checkpoint, and return its step."""
    gpt = Checkpoint.open(tiny).load(torch.float32, CPU)
    read_adapter(intact(folder, find_corruption), Checkpoint.open(tiny)).add_to(gpt)
    return restore_state(folder, build_optimizer("AdamW", lora_parameters(gpt).values(), 1e-3)).step


def test_intact_training_state_is_read(tiny: Path, saved: Path):
    assert restored(tiny, saved) == 2


@given(data=st.data(), name=st.sampled_from([TENSORS, COUNTERS]))
def test_training_state(tiny: Path, saved: Path, tmp_path: Path, data: st.DataObject, name: str):
    folder = copied(saved, tmp_path)
    spoil = spoiled_safetensors if name == TENSORS else spoiled_json
    (folder / name).write_bytes(data.draw(spoil(saved / name)))
    (folder / MANIFEST).unlink()
    write_manifest(folder)  # which only chance would keep right otherwise
    holds(lambda: restored(tiny, folder))


@given(data=st.data(), name=st.sampled_from([MANIFEST, RUN]))
def test_manifest_and_identity(saved: Path, tmp_path: Path, data: st.DataObject, name: str):
    folder = copied(saved, tmp_path)
    (folder / name).write_bytes(data.draw(spoiled_json(saved / name)))
    same = Identity(**json.loads((saved / RUN).read_bytes()))
    holds(lambda: find_corruption(folder))
    holds(lambda: same.check(folder))


@given(data=st.data())
def test_metrics(saved: Path, tmp_path: Path, data: st.DataObject):
    folder = copied(saved, tmp_path)
    lines = st.sampled_from([b"9" * 5000, "²".encode(), b"1,,,,,,,,", b"-1,1,1,1,1,1,1,1,1", b"\n", b"\r"])
    content = (saved.parent / METRICS).read_bytes()
    (folder.parent / METRICS).write_bytes(data.draw(damaged(content) | st.lists(lines).map(b",".join)))
    holds(lambda: rows_until(folder, 1))


@pytest.fixture(scope="module")
def encoder(tiny: Path) -> SplitEncoder:
    return SplitEncoder(Tokenizer(tiny), StyleSettings("alpaca"), mask_prompt=True)


@given(data=st.data(), name=st.sampled_from([IDS, OFFSETS, FIRST_LABELS, ABOUT, MANIFEST]), listed=st.booleans())
def test_tokens(data_dir: Path, tmp_path: Path, encoder: SplitEncoder, data: st.DataObject, name: str, listed: bool):
    shutil.copytree(data_dir, tmp_path / "data", ignore=shutil.ignore_patterns(FOLDER), dirs_exist_ok=True)
    split = find_split(tmp_path / "data/train.jsonl", encoder)
    open_splits([split], encoder)
    path = split.folder / name
    path.write_bytes(data.draw(spoiled_json(path) if name == MANIFEST else damaged(path.read_bytes())))
    if listed:
        path.with_name(MANIFEST).write_text(json.dumps(token_cache.hash_files(split.folder)), encoding="utf-8")
    holds(lambda: read_all(Samples(open_splits([split], encoder)[0], 512)))


def read_all(samples: Samples) -> None:
    for number in range(len(samples)):
        assert len(samples[number].tokens) == samples.lengths[number]


@given(data=st.data())
def test_prompt_style(tmp_path: Path, data: st.DataObject):
    content = as_json({"prompt_style": "alpaca"})
    (tmp_path / "prompt_style.yaml").write_bytes(
        data.draw(spoiled({"prompt_style": "a"}).map(as_json) | damaged(content) | YAML)
    )
    holds(lambda: read_prompt_style(tmp_path))


def use_tokenizer(folder: Path) -> None:
    tokenizer = Tokenizer(folder)
    style = tokenizer.prompt_style("alpaca")
    encode([CONVERSATION], tokenizer, style, mask_prompt=True)
    ids = tokenizer.encode_prompt(style, style.prompt("</s> Fluß 🦙\n"))
    tokenizer.decode(ids)
    assert tokenizer.fingerprint
    tokenizer.prompt_style("chat").render(CONVERSATION)


@given(data=st.data())
def test_tokenizer(base: Path, tiny: Path, data: st.DataObject):
    (base / "tokenizer.json").write_bytes(data.draw(spoiled_json(tiny / "tokenizer.json")))
    holds(lambda: use_tokenizer(base))


@pytest.fixture(scope="module")
def pieces() -> bytes:
    """Return a small sentencepiece model of the kind that is supported."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["Name a fruit that is green.", "A pear is green, and so is a lime."]),
        model_writer=model,
        model_type="bpe",
        vocab_size=300,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return model.getvalue()


@given(data=st.data())
def test_sentencepiece_model(base: Path, pieces: bytes, data: st.DataObject):
    (base / "tokenizer.json").unlink(missing_ok=True)
    (base / "tokenizer.model").write_bytes(data.draw(st.just(pieces) | damaged(pieces)))
    holds(lambda: use_tokenizer(base))


def test_intact_sentencepiece_model_is_read(base: Path, pieces: bytes):
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.model").write_bytes(pieces)
    assert Tokenizer(base).decode(Tokenizer(base).encode("a pear").ids) == "a pear"


TOKENIZER_SETTINGS: dict[str, dict[str, Any]] = {
    "tokenizer_config.json": {
        "bos_token": "<s>", "eos_token": {"content": "</s>", "special": True}, "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True, "add_prefix_space": True, "legacy": False, "additional_special_tokens": ["<x>"],
        "chat_template": [{"name": "default", "template": "{{ messages }}"}],
        "added_tokens_decoder": {"300": {"content": "<x>", "special": True, "lstrip": False}},
    },
    "special_tokens_map.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "unk_token": "<unk>"},
    "added_tokens.json": {"<x>": 300},
    "generation_config.json": {"eos_token_id": [1, 2]},
    "config.json": {"model_type": "llama", "eos_token_id": 1},
}  # fmt: skip


def write_tokenizer_settings(folder: Path) -> None:
    for file, settings in TOKENIZER_SETTINGS.items():
        (folder / file).write_bytes(as_json(settings))


def test_intact_tokenizer_settings_are_read(base: Path):
    write_tokenizer_settings(base)
    assert Tokenizer(base).chat_template == "{{ messages }}"


@pytest.mark.parametrize("template", [True, 5, {"name": "default"}, ["x"], [{"name": "default", "template": 5}]])
def test_chat_template_that_is_no_text_is_refused(base: Path, template: object):
    (base / "tokenizer_config.json").write_bytes(as_json({"eos_token": "</s>", "chat_template": template}))
    with pytest.raises(LitLoraError, match="must be a text or a list of names and templates"):
        Tokenizer(base)


@given(data=st.data(), name=st.sampled_from(sorted(TOKENIZER_SETTINGS)))
def test_tokenizer_settings(base: Path, data: st.DataObject, name: str):
    write_tokenizer_settings(base)
    (base / name).write_bytes(data.draw(spoiled_json(base / name)))
    holds(lambda: use_tokenizer(base))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of an alarm that a callback took
@given(template=st.lists(st.sampled_from(TEMPLATE_PARTS) | st.text(max_size=5), max_size=8).map("".join))
def test_chat_template(template: str):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resource_limits, "MAX_SECONDS", 0.5)
        holds(
            lambda: ChatStyle(IsolatedTemplate(template, NAMED), SpecialTokens(NAMED.values()), "</s>").render(
                CONVERSATION
            )
        )


@given(data=st.data(), suffix=st.sampled_from([".jsonl", ".json", ".csv", ".tsv"]))
def test_rows(data: st.DataObject, suffix: str):
    rows = data.draw(st.lists(st.one_of(map(spoiled, ROWS)), max_size=3))
    lines = as_json(rows) if suffix == ".json" else b"\n".join(map(as_json, rows))
    content = data.draw(st.just(lines) | damaged(lines) | damaged(b'instruction,input,output\na,"b\nb",c\nd,,e\n'))
    for shape in (ANY, ALPACA):
        holds(lambda shape=shape: written(read_file(RawFile.from_bytes("data", suffix, content), shape)))


def written(rows: list[tuple[str, ParsedRow]]) -> None:
    """Check that what train.jsonl holds of each row is the same example."""
    for _, row in rows:
        assert ANY.parse(json.loads(to_line(row.example))) == (row.example, False, ())


@given(content=spoiled(SETTINGS).map(as_json) | damaged(as_json(SETTINGS)) | YAML)
def test_settings(tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "run.yaml").write_bytes(content)
    flags = ["--checkpoint_dir", tmp_path / "nowhere", "--data_dir", tmp_path / "nowhere"]
    capsys.readouterr()
    try:
        code = main(["finetune_lora", *map(str, flags), "--config", str(tmp_path / "run.yaml")])
    except SystemExit as done:
        code = done.code
    assert code in (1, 2)
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("litlora: ")


def change_adapter(folder: Path, tensors: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any) -> None:
    """Change the tensors of an adapter, and keys of its adapter_config.json."""
    stored = load_file(folder / "adapter_model.safetensors")
    save_file(tensors(stored), folder / "adapter_model.safetensors")
    edit_json(folder / "adapter_config.json", **config)


@pytest.mark.parametrize(
    ("change", "config"),
    [
        (lambda stored: stored, {"lora_alpha": 1e308}),
        (lambda stored: stored, {"lora_alpha": 1e30}),
        (lambda stored: {name: tensor * float("nan") for name, tensor in stored.items()}, {}),
        (lambda stored: {name: tensor + 1e30 for name, tensor in stored.items()}, {}),
        (lambda stored: {name: tensor + float("inf") for name, tensor in stored.items()}, {}),
    ],
    ids=["infinite scaling", "overflow of alpha", "nan", "overflow of weights", "infinity"],
)
def test_merging_writes_no_number_that_is_none(tiny, adapter, tmp_path, capsys, change, config):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    weights = load_file(base / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in weights.items()}, base / "model.safetensors")
    content = (folder / "adapter_model.safetensors").read_bytes()
    assert b"base_sha256" in content  # which change_adapter leaves out, since the base is in float16
    change_adapter(folder, change, **config)
    merge = ["merge_lora", str(folder), "--base_dir", str(base), "--out_dir", str(tmp_path / "merged")]
    assert main(merge) == 1
    expected = f"litlora: merging {folder} would write NaN or infinity to model.layers.0.self_attn.q_proj.weight: "
    assert capsys.readouterr().err.startswith(expected)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("outtype", "value"),
    [("f32", float("nan")), ("f32", float("inf")), ("f16", 1e5), ("q8_0", 1e8), ("q4_0", 1e6)],
)
def test_exporting_writes_no_number_that_is_none(outtype, value):
    tensor = GGUFTensor("blk.0.attn_q.weight", (32, 32), lambda: torch.full((32, 32), value))
    with pytest.raises(LitLoraError, match=r"blk\.0\.attn_q\.weight has (NaN or infinity|values beyond those of)"):
        encoded(tensor, type_of(tensor, outtype))


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_proj.lora_A", "model.layers.0.self_attn.q_proj.base_layer"]
)
def test_rank_of_an_empty_tensor_takes_no_memory(tiny, adapter, tmp_path, name):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    empty = {f"base_model.model.{name}.weight": torch.zeros(10**9, 0)}
    change_adapter(folder, lambda stored: stored | empty, r=10**9)
    with pytest.raises(LitLoraError, match='"r": 1000000000, but no matrix in'):
        read_adapter(folder, Checkpoint.open(tiny))


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern", "rank_pattern"])
def test_expression_that_compiles_for_minutes_is_refused(adapter, tmp_path, monkeypatch, key):
    monkeypatch.setattr(resource_limits, "MAX_SECONDS", 0.2)
    expression = "(?i)" + "[\0-\U0010ffff]" * 1800  # a second of CPU time for every few hundred
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    change_adapter(folder, lambda stored: stored, **{key: {expression: 4} if key == "rank_pattern" else expression})
    with pytest.raises(LitLoraError, match=key):
        read_settings(folder)


@pytest.mark.parametrize("expression", [r"(.*.*)*x", "(?:(?:a+)+)+b", "a" * 20_000 + "+"])
def test_expression_that_matches_for_years_ends_in_a_process_of_its_own(adapter, tmp_path, monkeypatch, expression):
    """Also in a thread, where no alarm is heard."""
    monkeypatch.setattr(resource_limits, "MAX_SECONDS", 0.2)
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    change_adapter(folder, lambda stored: stored, target_modules=expression)
    with ThreadPoolExecutor(1) as pool, pytest.raises(LitLoraError, match=r"target_modules|cannot be looked for"):
        pool.submit(lambda: read_settings(folder).adapted(["a" * 5000])).result()


def test_more_expressions_than_layers_are_refused(adapter, tmp_path):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    change_adapter(folder, lambda stored: stored, rank_pattern={f"layer{n}": 4 for n in range(5001)})
    with pytest.raises(LitLoraError, match="with at most 5,000 keys"):
        read_settings(folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("use_rslora", "yes"), ("use_rslora", 1), ("use_dora", "false"), ("fan_in_fan_out", "no"),
        ("inference_mode", 0),
        ("lora_dropout", "0.1"), ("lora_dropout", True), ("lora_dropout", -1), ("lora_dropout", None),
        ("base_model_name_or_path", 5), ("revision", ["a"]), ("task_type", {}), ("peft_version", 1.0),
        ("auto_mapping", "x"), ("auto_mapping", {"lora_init": 5}), ("rank_pattern", []), ("alpha_pattern", False),
        ("r", "8"), ("r", 8.5), ("r", True), ("lora_alpha", "16"), ("lora_alpha", [16]),
        ("layers_to_transform", "1"), ("layers_to_transform", [1.5]), ("layers_pattern", 0), ("layers_pattern", [1]),
        ("target_modules", 0), ("target_modules", [1]), ("exclude_modules", False), ("exclude_modules", {"a": 1}),
    ],
)  # fmt: skip
def test_value_of_another_type_is_refused(adapter, tmp_path, key, value):
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    change_adapter(folder, lambda stored: stored, **{key: value})
    with pytest.raises(LitLoraError, match=f'"{key}": .* must be '):
        read_settings(folder)


def test_aliases_of_a_prompt_style_do_not_multiply(tmp_path):
    lines = ["prompt_style: chat", "prompt_style_variables:", "  a0: &a0 [x, x]"]
    lines += [f"  a{n}: &a{n} [*a{n - 1}, *a{n - 1}]" for n in range(1, 40)]
    (tmp_path / "prompt_style.yaml").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(LitLoraError, match="holds more than 10,000 values, or an alias of itself"):
        read_prompt_style(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "model.safetensors.index.json"])
def test_device_in_place_of_a_file_is_refused(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(LitLoraError, match="not a file but a device or a pipe"):
        read_json(tmp_path / name)


def test_pipe_and_huge_file_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    with pytest.raises(LitLoraError, match="not a file but a device or a pipe"):
        read_json(tmp_path / "pipe.json")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(10**12)
    with pytest.raises(LitLoraError, match="1,000,000 MB, more than any file of its kind"):
        read_json(tmp_path / "huge.json")


@pytest.mark.parametrize(
    ("field", "value"),
    [("line", 0), ("line", -5), ("flags", 2**31), ("last_label", 10**6), ("last_label", -2), ("labels", -1),
     ("labels", 10**6)],
)  # fmt: skip
def test_tokens_with_impossible_facts_are_tokenized_again(data_dir, tmp_path, encoder, field, value):
    shutil.copytree(data_dir, tmp_path / "data", ignore=shutil.ignore_patterns(FOLDER), dirs_exist_ok=True)
    split = find_split(tmp_path / "data/train.jsonl", encoder)
    expected = open_splits([split], encoder)[0].about.copy()
    about = expected.copy()
    about[field][0] = value
    (split.folder / ABOUT).write_bytes(about.tobytes())
    (split.folder / MANIFEST).write_text(json.dumps(token_cache.hash_files(split.folder)), encoding="utf-8")
    assert (open_splits([split], encoder)[0].about == expected).all()


def test_tokens_beyond_the_vocabulary_are_one_sentence(tiny, data_dir, tmp_path, capsys):
    data = Path(shutil.copytree(data_dir, tmp_path / "data", ignore=shutil.ignore_patterns(FOLDER)))
    command = ["finetune_lora", str(tiny), "--data_dir", str(data), "--out_dir", str(tmp_path / "out")]
    assert main([*command, "--train.max_steps", "1"]) == 0
    for folder in (data / FOLDER).iterdir():
        (folder / IDS).write_bytes(b"\xff\xff\xff\x7f" * (len((folder / IDS).read_bytes()) // 4))
        (folder / MANIFEST).write_text(json.dumps(token_cache.hash_files(folder)), encoding="utf-8")
    capsys.readouterr()
    assert main([*command, "--overwrite", "true", "--dry_run"]) == 1
    assert "with token ids that the model does not have" in capsys.readouterr().err.splitlines()[-1]
