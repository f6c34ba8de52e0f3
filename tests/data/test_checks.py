"""Each check finds the row with its fault, and none finds anything in good data."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.copies import edit_json
from tokenizers import Tokenizer as Backend
from tokenizers import pre_tokenizers

from litlora.data.checks.findings import Finding, Severity
from litlora.data.checks.splits import CheckedData, CheckedSplit, length_of_most, refuse_errors, run_checks
from litlora.data.prompts.styles import StyleSettings
from litlora.data.split_encoder import SplitEncoder
from litlora.data.token_cache import find_split, open_splits
from litlora.data.tokenizer import Tokenizer
from litlora.data.transformers_ids import find_other_ids
from litlora.errors import LitLoraError

Row = dict[str, Any]
CUTS = ("response_lost", "response_cut", "end_cut")
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta"]
GOOD: list[Row] = [
    {"instruction": f"Name the letter of number {n} in this short list.", "output": f"It is {word}, of course."}
    for n, word in enumerate(WORDS)
]
VAL: list[Row] = [{"instruction": "Which one is the ninth?", "output": "That would be iota."}]
CHAT = "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}{% if "
CHAT += "add_generation_prompt %}<|assistant|>{% endif %}"


def chat(*contents: str, **last: Any) -> Row:
    roles = ("user", "assistant") * len(contents)
    messages: list[Row] = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    messages[-1] |= last
    return {"messages": messages}


@pytest.fixture
def opened(tiny, tmp_path) -> Callable[..., list[CheckedSplit]]:
    """Return a function that writes and tokenizes data."""

    def run(
        train: list[Row],
        val: list[Row] = VAL,
        style: str = "alpaca",
        template: str = CHAT,
        added: tuple[str, ...] = (),
    ) -> list[CheckedSplit]:
        base, data = (tmp_path / name for name in ("base", "data"))
        shutil.copytree(tiny, base)
        (base / "chat_template.jinja").write_text(template, encoding="utf-8")
        backend = Backend.from_file(str(base / "tokenizer.json"))
        backend.add_tokens(list(added))
        backend.save(str(base / "tokenizer.json"))
        data.mkdir()
        for name, rows in (("train", train), ("val", val)):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
            (data / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        encoder = SplitEncoder(Tokenizer(base), StyleSettings(style), mask_prompt=True)
        splits = [find_split(data / f"{name}.jsonl", encoder) for name in ("train", "val")]
        tokens = open_splits(splits, encoder)
        return [CheckedSplit(Path(split.path.name), each) for split, each in zip(splits, tokens, strict=True)]

    return run


@pytest.fixture
def check(opened) -> Callable[..., list[Finding]]:
    """Return a function that writes data and returns what the checks find about it."""

    def run(train: list[Row], *, limit: int = 10_000, **settings: Any) -> list[Finding]:
        return run_checks(CheckedData(opened(train, **settings), limit, embedding=300, vocabulary=300))

    return run


def test_good_data_has_no_findings(check):
    assert check(GOOD) == []


QUESTION = "Repeat this long question, word for word, please?"
STRIPS = CHAT.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT
WORDS_AT_THE_END = CHAT.replace("{{ eos_token }}", " over.\n")
FAULTS: dict[str, tuple[Row, dict[str, Any]]] = {
    "empty_answer": ({"instruction": "Say nothing.", "output": ""}, {}),
    "ends_with_question": (chat("Hi", "Hello, what can I do?", "Anything?"), {}),
    "keys_left_out": (GOOD[0] | {"instruction": "Another one.", "note": "x"}, {}),
    "answer_repeats_prompt": ({"instruction": QUESTION, "output": f"{QUESTION} No."}, {}),
    "undecodable": ({"instruction": "\ufffd" * 9, "output": "\ufffd" * 9 + "ab cd"}, {}),
    "special_tokens_in_text": ({"instruction": "What is </s>?", "output": "The end of a text."}, {}),
    "one_token_answer": ({"instruction": "Which letter?", "output": "Z"}, {}),
    "reasoning_lost": (
        chat("2+2?", "It is four.", reasoning_content="Two, two."), {"style": "chat", "template": STRIPS},
    ),
    "tools_lost": (chat("2+2?", "It is four.") | {"tools": [{"name": "adder"}]}, {"style": "chat"}),
    "system_moved": (
        {"messages": [{"role": "system", "content": "Be brief."}, *chat("2+2?", "It is four.")["messages"]]},
        {"style": "chat", "template": NO_SYSTEM},
    ),
    "no_label": (chat("Hi", "Hello, go away.", weight=0), {"style": "chat"}),
    "duplicate": (GOOD[2], {}),
    "near_duplicate": ({key: text.upper() for key, text in GOOD[2].items()}, {}),
    "leak": (VAL[0], {}),
    "near_leak": ({key: text.upper() for key, text in VAL[0].items()}, {}),
    "response_lost": ({"instruction": "word " * 500, "output": "A word, many times."}, {"limit": 1000}),
    "response_cut": ({"instruction": "Count.", "output": "one two three " * 100}, {"limit": 500}),
    "vocabulary": ({"instruction": "What is <new>?", "output": "It is new to me."}, {"added": ("<new>",)}),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_found_with_its_row(check, name):
    row, settings = FAULTS[name]
    rows = [*GOOD[:4], row, *GOOD[4:]]
    findings = {finding.check: finding for finding in check(rows, **settings)}
    line = "val.jsonl line 1" if "leak" in name else "train.jsonl line 5"
    assert (findings[name].count, findings[name].first) == (1, line)
    assert set(findings) == {name}


def test_words_in_place_of_an_end_token_are_found(check):
    (finding,) = check(GOOD, style="chat", template=WORDS_AT_THE_END)
    assert (finding.check, finding.count, finding.first) == ("no_end_token", 9, "train.jsonl line 1")


def test_style_that_ends_with_a_blank_is_found(check):
    row = {"instruction": "What is a lime?", "output": "and so it is green, and sour."}  # " and" is a token
    (finding,) = check([*GOOD, row], style="Q: {instruction}\nA: ")
    assert (finding.check, finding.count, finding.first) == ("prompt_not_prefix", 1, "train.jsonl line 9")


def test_bos_of_style_and_template_is_found_twice(check):
    (finding,) = check(GOOD, style="chat", template="{{ bos_token }}" + CHAT)
    assert (finding.check, finding.count, finding.first) == ("bos_twice", 9, "train.jsonl line 1")


def test_each_kind_of_truncation_is_told_from_the_others(opened):
    """The last token of a row is a label only, so that a limit of one token less keeps all."""
    row = {"instruction": "Count.", "output": "one two three " * 100}
    splits = opened([row])[:1]
    whole, first = int(splits[0].tokens.about["last_label"][0]) + 1, int(splits[0].tokens.first_labels[0])
    kinds = {
        whole: None,
        whole - 1: "end_cut",
        whole - 2: "response_cut",
        first + 1: "response_cut",
        first: "response_lost",
    }
    for limit, kind in kinds.items():
        found = [(f.check, f.count, f.first) for f in run_checks(CheckedData(splits, limit, 300))]
        assert found == ([(kind, 1, "train.jsonl line 1")] if kind else []), limit


def test_limit_that_leaves_99_percent_whole_is_named(opened):
    rows = [{"instruction": f"Say {n}.", "output": "x" * n} for n in range(1, 201)]
    splits = opened(rows)
    most = length_of_most(np.diff(splits[0].tokens.offsets) - 1)
    cut = {limit: sum(f.count for f in run_checks(CheckedData(splits, limit, 300)) if f.check in CUTS)
           for limit in (most, most - 1)}  # fmt: skip
    assert cut[most] <= 2 < cut[most - 1]
    (finding,) = [f for f in run_checks(CheckedData(splits, most, 300)) if f.check == "response_cut"]
    assert finding.consequence == f"{most:,} would leave 99 % of the rows whole"


def test_tokens_beyond_the_embedding_that_no_row_has_are_a_note(opened):
    splits = opened(GOOD, added=("<new>", "<newer>"))
    (finding,) = run_checks(CheckedData(splits, 10_000, embedding=300, vocabulary=302))
    assert str(finding) == (
        "note: the tokenizer has 2 more tokens than the model's embedding has rows (300): "
        "no row of the data has one of them"
    )


def test_a_row_of_several_sequences_counts_once(opened):
    """The template strips the reasoning from history, so that each answer is a sequence of its own."""
    stripped = "{{ m.content.split('</think>')[-1] if not loop.last else m.content }}"
    template = CHAT.replace("{{ m.content }}", stripped)
    answer = "<think>\nHm, a few words.\n</think>\n\nIt is a letter."
    splits = opened([chat("One?", answer, "Two?", answer)], style="chat", template=template)
    assert len(splits[0].tokens.about) == 2
    (finding,) = [f for f in run_checks(CheckedData(splits, 20, 300)) if f.first.startswith("train")]
    assert finding.count == 1


def test_rows_that_transformers_tokenizes_otherwise_are_found(tiny, tmp_path):
    """Of some classes, transformers rebuilds the pre-tokenizer and drops that of the file."""
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    backend = Backend.from_file(str(base / "tokenizer.json"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("green", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.save(str(base / "tokenizer.json"))
    edit_json(base / "tokenizer_config.json", tokenizer_class="GPT2Tokenizer")
    rows = [*GOOD[:4], {"instruction": "Which colour?", "output": "That is green."}, *GOOD[4:]]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    encoder = SplitEncoder(Tokenizer(base), StyleSettings("alpaca"), mask_prompt=True)
    (finding,) = find_other_ids(base, encoder, [path])
    assert (finding.check, finding.count, finding.first) == ("transformers_ids", 1, f"{path} line 5")


def test_data_without_a_label_is_an_error(check):
    rows = [chat("Hi", "Hello, go away.", weight=0)]
    findings = check(rows, style="chat")
    assert (findings[0].check, findings[0].severity) == ("no_label", Severity.ERROR)
    with pytest.raises(LitLoraError, match=r"without a supervised token, the first at train\.jsonl line 1"):
        refuse_errors(findings)
