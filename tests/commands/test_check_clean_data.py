"""Data without a fault has neither an error nor a warning: data sets of packages, and generated ones."""

import csv
import inspect
import json
import random
import shutil
import statistics
import string
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from sklearn import datasets

from litlora.__main__ import main

Row = dict[str, Any]
CHAT = "{{ bos_token }}{{ tools | tojson if tools else '' }}{% for m in messages %}<|{{ m.role }}|>"
CHAT += "{{ m.reasoning_content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
CHAT += "{{ c.function.arguments | tojson }}{% endfor %}{{ m.content }}{{ eos_token }}{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|assistant|>{% endif %}"
SENTENCES = 200  # characters of a paragraph from which on it is prose


def descriptions() -> Iterator[Row]:
    """Yield a question for each paragraph of the data sets that scikit-learn describes."""
    for name in ("iris", "wine", "breast_cancer", "diabetes", "digits", "linnerud"):
        text = getattr(datasets, f"load_{name}")().DESCR
        prose = [part.strip() for part in text.split("\n\n") if len(part) > SENTENCES]
        yield from ({"question": f"Describe {name}, {n}.", "answer": part} for n, part in enumerate(prose))


def wine() -> Iterator[Row]:
    data = datasets.load_wine()
    for values, target in zip(data.data, data.target, strict=True):
        measured = ", ".join(f"{name} {value:g}" for name, value in zip(data.feature_names, values, strict=True))
        answer = f"This is {data.target_names[target]}."
        yield {"instruction": "Which cultivar is this wine?", "input": measured, "output": answer}


def docstrings() -> Iterator[Row]:
    for module in (textwrap, statistics, random, shutil, json, csv, string):
        for name, value in inspect.getmembers(module, callable):
            if value.__doc__ and inspect.getmodule(value) is module:
                yield {"prompt": f"Document {module.__name__}.{name}.", "completion": inspect.getdoc(value)}


def chats() -> Iterator[Row]:
    """Yield conversations with a system message, reasoning and calls of a tool."""
    tools = [{"type": "function", "function": {"name": "add", "description": "Add two numbers.", "parameters": {}}}]
    draw = Random(0)
    for number in range(100):
        a, b = draw.randrange(100, 999), number
        call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": json.dumps({"a": a, "b": b})}}
        messages = [
            {"role": "system", "content": "You add numbers with the tool."},
            {"role": "user", "content": f"What is {a} and {b}?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "c1", "content": f"{a + b}"},
            {"role": "assistant", "content": f"They make {a + b}.", "reasoning_content": "The tool has added them."},
            {"role": "user", "content": "Are you sure?"},
            {"role": "assistant", "content": f"Yes, it is {a + b}."},
        ]
        yield {"messages": messages, "tools": tools}


def write_jsonl(folder: Path, rows: Iterator[Row]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_german_csv(folder: Path) -> Path:
    """Write what a German Excel saves: cp1252, semicolons, and line breaks in quoted cells."""
    path = folder / "fragen.csv"
    things = {"Tür": "groß", "Straße": "schön", "Öl": "grün", "Maß": "süß", "Brücke": "weiß"}
    with path.open("w", encoding="cp1252", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(["Frage", "Antwort"])
        for number in range(20):
            writer.writerows(
                [
                    f"Wie ist die Sache {number} namens „{thing}“?",
                    f"Sie ist {how}; so viel ist klar.\nEs sind {number} €.",
                ]
                for thing, how in things.items()
            )
    return path


SETS: dict[str, tuple[Callable[[Path], Path], tuple[str, ...], int]] = {
    "sklearn descriptions": (lambda folder: write_jsonl(folder, descriptions()), (), 20),
    "wine": (lambda folder: write_jsonl(folder, wine()), (), 178),
    "docstrings": (lambda folder: write_jsonl(folder, docstrings()), (), 60),
    "chats": (lambda folder: write_jsonl(folder, chats()), (), 100),
    "german csv": (write_german_csv, ("--encoding", "cp1252", "--columns", "instruction=Frage,output=Antwort"), 100),
}


@pytest.mark.parametrize("name", SETS)
def test_data_sets_without_a_fault_have_no_error_and_no_warning(tiny, tmp_path, name, capsys):
    write, flags, rows = SETS[name]
    base, data = Path(shutil.copytree(tiny, tmp_path / "base")), tmp_path / "data"
    (base / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    assert main(["prepare_json", "--source", str(write(tmp_path)), "--destination_path", str(data), *flags]) == 0
    assert len(capsys.readouterr().err.splitlines()) <= 3  # the command, the count of rows, and the next command
    about = json.loads((data / "dataset.json").read_text(encoding="utf-8"))
    assert about["rows"] >= rows
    checked = ["--data_dir", str(data), "--max_seq_length", "100000", "--strict", "true"]
    assert main(["check_data", str(base), *checked]) == 0
    findings = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("error", "warning"))]
    assert not findings
