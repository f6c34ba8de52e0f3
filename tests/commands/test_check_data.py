"""check_data prints findings, lengths, and rows as they are learned."""

import json
import shutil
from pathlib import Path

import pytest

from litlora.__main__ import main


@pytest.fixture
def data(tmp_path) -> Path:
    rows = [{"instruction": f"Say {n}.", "output": f"number {n}"} for n in (1, 2, 3)] + [
        {"instruction": "Hm", "output": ""}
    ]
    for name, lines in (("train", rows), ("val", [{"instruction": "Say 9.", "output": "number 9"}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return tmp_path


def check(tiny: Path, data: Path, *flags: str) -> int:
    return main(["check_data", str(tiny), "--data_dir", str(data), "--prompt_style", "Q: {instruction}\\nA:", *flags])


def test_findings_and_lengths_are_printed(tiny, data, capsys):
    assert check(tiny, data, "--max_seq_length", "12") == 0
    out = capsys.readouterr().out
    empty = "with an empty output, the first at"
    assert f"warning: 1 row {empty} {data}/train.jsonl line 4: it teaches the model to stop at once\n" in out
    assert f"{data}/train.jsonl: 4 rows, " in out
    assert f"  {data}/train.jsonl line 1: " in out
    assert "cut at 12" in out


def test_sequences_of_a_row_are_shown_up_to_the_limit(tiny, tmp_path, capsys):
    """A template that writes history otherwise makes a sequence of each answer."""
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    each = "{{ m.role }}: {{ m.content if m.role == 'user' or loop.last else 'yes' }}</s>"
    template = "{% for m in messages %}" + each + "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    (base / "chat_template.jinja").write_text(template, encoding="utf-8")
    roles = ("user", "assistant", "user", "assistant")
    messages = [{"role": role, "content": text} for role, text in zip(roles, ("a?", "bb", "c?", "dd"), strict=True)]
    row = json.dumps({"messages": messages}) + "\n"
    for name in ("train", "val"):
        (tmp_path / f"{name}.jsonl").write_text(row * 2, encoding="utf-8")
    flags = ["--show", "1", "--max_seq_length", "25"]
    assert main(["check_data", str(base), "--data_dir", str(tmp_path), *flags]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path}/train.jsonl: 2 rows as 4 sequences, " in out
    titles = [line for line in out.splitlines() if line.startswith("--- ")]
    assert [title.partition(": ")[0] for title in titles[:2]] == [
        f"--- {tmp_path}/train.jsonl line 1 (sequence {n} of 2)" for n in (1, 2)
    ]
    assert "\nuser: a?</s>assistant: [[bb</s>]]\n" in out
    assert titles[2].endswith("more tokens are cut")
    assert "line 2 (sequence" not in out


def test_cells_break_at_the_width_of_the_terminal(tiny, data, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    row = {"instruction": "Say it in Japanese.", "output": "四と六です。" * 6}
    (data / "train.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert check(tiny, data, "--show", "1", "--tokens", "true") == 0
    *_, shown = capsys.readouterr().out.partition("supervised\n│")
    lines = shown.splitlines()
    assert len(lines) > 3
    assert max(map(len, lines)) <= 40
    assert all(line.startswith(("│", "[[│")) for line in lines[1:])
    assert "[[" in shown and shown.endswith("│]]\n")


def test_findings_are_broken_between_words_on_a_terminal_only(tiny, data, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert check(tiny, data) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert check(tiny, data) == 0
    *_, broken = capsys.readouterr().out.partition("\nwarning: ")
    assert broken.splitlines()[1].startswith("  ")
    assert all(len(each) < 60 for each in broken.splitlines() if str(data) not in each)
    assert " ".join(f"warning: {broken}".split()).startswith(line)


def test_strict_refuses_warnings(tiny, data, capsys):
    assert check(tiny, data, "--strict", "true") == 1
    sentence = f"litlora: the data in {data} has 1 errors or warnings: see the findings above\n"
    assert capsys.readouterr().err.endswith(sentence)


def test_rows_are_shown_as_they_are_learned(tiny, data, capsys):
    assert check(tiny, data, "--show", "1") == 0
    assert capsys.readouterr().out.endswith("\nQ: Say 1.\nA:[[number 1</s>]]\n")
    assert check(tiny, data, "--show", "1", "--tokens", "true") == 0
    cells = capsys.readouterr().out.splitlines()[-1]
    assert cells.endswith("│</s>│]]")
    assert "│\\n│" in cells


def test_learned_tokens_are_coloured_on_a_terminal(tiny, data, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert check(tiny, data, "--show", "1") == 0
    assert "A:\x1b[1;32mnumber 1</s>\x1b[0m" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert check(tiny, data, "--show", "1") == 0
    assert "\x1b" not in capsys.readouterr().out


FACTS = [(name, doc) for name in dir(str) if not name.startswith("_") and (doc := getattr(str, name).__doc__)][:24]


def turns(*texts):
    return [
        {"role": role, "content": text} for role, text in zip(("user", "assistant") * len(texts), texts, strict=False)
    ]


CLEAN = {
    "pairs": [{"question": f"What does {name} do?", "answer": doc} for name, doc in FACTS],
    "alpaca": [{"instruction": "Explain the method.", "input": name, "output": doc} for name, doc in FACTS],
    "history": [
        {"instruction": f"And {name}?", "output": doc, "system": "Be exact.", "history": [["Ready?", "Yes, ask."]]}
        for name, doc in FACTS
    ],
    "messages": [{"messages": turns("Ready?", "Yes, ask.", f"What does {name} do?", doc)} for name, doc in FACTS],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": name}, {"from": "gpt", "value": doc}]} for name, doc in FACTS
    ],
    "text": [{"text": doc} for _, doc in FACTS],
}


@pytest.mark.parametrize("rows", CLEAN.values(), ids=CLEAN)
def test_clean_data_has_no_error_and_no_warning(tiny, tmp_path, rows, capsys):
    source, out = tmp_path / "rows.json", tmp_path / "out"
    source.write_text(json.dumps(rows))
    assert main(["prepare_json", "--source", str(source), "--destination_path", str(out)]) == 0
    assert len(capsys.readouterr().err.splitlines()) <= 2  # the count of rows, and the next command
    assert main(["check_data", str(tiny), "--data_dir", str(out), "--max_seq_length", "10000", "--strict", "true"]) == 0
    assert not {"error", "warning"} & {line.split(":")[0] for line in capsys.readouterr().out.splitlines()}
