"""Tokenizer files that have the tokenizers library fail, by a panic of Rust or otherwise: one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from litlora.data.rendered import Rendered
from litlora.data.tokenizer import Tokenizer
from litlora.errors import LitLoraError

TEXT = "banana " + "x" * 40


def after(step: dict[str, Any]) -> Callable[[dict[str, Any]], None]:
    """Return what puts a step before the pre-tokenizer of a file."""

    def change(file: dict[str, Any]) -> None:
        file["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [step, file["pre_tokenizer"]]}

    return change


def with_pair(file: dict[str, Any]) -> None:
    pair = {"single": [{"Sequence": {"id": "B", "type_id": 0}}], "pair": [{"Sequence": {"id": "A", "type_id": 0}}]}
    file["post_processor"] = {"type": "TemplateProcessing", "special_tokens": {}, **pair}


def with_large_ids(file: dict[str, Any]) -> None:
    vocabulary = file["model"]["vocab"]
    file["model"]["vocab"] = {token: id + 2**31 if id > 2 else id for token, id in vocabulary.items()}


FAULTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "charsmap": lambda file: file.update(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAA=="}),
    "length of 0": after({"type": "FixedLength", "length": 0}),
    "endless pattern": after(
        {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Isolated", "invert": False}
    ),
    "pair": with_pair,
    "large ids": with_large_ids,
    "no unk": lambda file: file.update(model={"type": "WordLevel", "vocab": {"</s>": 1}, "unk_token": "[UNK]"}),
}


@pytest.mark.parametrize("name", FAULTS)
def test_tokenizer_that_fails_is_one_sentence(tiny, tmp_path, name):
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    file = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    FAULTS[name](file)
    (base / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    for encode in (lambda: Tokenizer(base).encode(TEXT), lambda: Tokenizer(base).encode_rendered([Rendered.of(TEXT)])):
        with pytest.raises(LitLoraError, match="tokenizer") as failed:
            encode()
        assert "\n" not in str(failed.value)
        assert "download the checkpoint again" in str(failed.value)
