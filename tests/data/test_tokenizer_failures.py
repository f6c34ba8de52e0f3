"""Tokenizer files that have the tokenizers library fail, by a panic of Rust or otherwise: one sentence."""

import base64
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from litlora.data.prompts.rendered import Rendered
from litlora.data.tokenizer import Tokenizer
from litlora.data.tokenizer_backend import limits
from litlora.data.tokenizer_backend.sentencepiece_model import SentencePieceModel
from litlora.errors import LitLoraError
from litlora.utils import resource_limits
from litlora.utils.console import without_panics

UNIGRAM, BPE = 1, 2  # types of a sentencepiece model
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


def changed(tiny: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """Return a copy of a checkpoint with another tokenizer.json."""
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    file = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    change(file)
    (base / "tokenizer.json").write_text(json.dumps(file), encoding="utf-8")
    return base


@pytest.mark.parametrize("name", FAULTS)
def test_tokenizer_that_fails_is_one_sentence(tiny, tmp_path, name, capfd):
    base = changed(tiny, tmp_path, FAULTS[name])
    for encode in (lambda: Tokenizer(base).encode(TEXT), lambda: Tokenizer(base).encode_rendered([Rendered.of(TEXT)])):
        with pytest.raises(LitLoraError, match="tokenizer") as failed:
            encode()
        assert "\n" not in str(failed.value)
        assert "download the checkpoint again" in str(failed.value)
    assert not capfd.readouterr().err  # of a panic, which prints lines of its own


def replacing(*pairs: tuple[str, str]) -> dict[str, Any]:
    steps = [{"type": "Replace", "pattern": {"String": old}, "content": new} for old, new in pairs]
    return {"type": "Sequence", "normalizers": steps}


def split(expression: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def charsmap(entry: bytes) -> str:
    return base64.b64encode((0).to_bytes(4, "little") + entry + b"\0").decode()


EXPENSIVE: dict[str, Callable[[dict[str, Any]], None]] = {
    "nested replacements": lambda file: file.update(normalizer=replacing(*[("a", "aa")] * 40)),
    "long replacement": lambda file: file.update(normalizer=replacing(("a", "b" * 5_000))),
    "huge replacement": lambda file: file.update(normalizer=replacing(("a", "b" * 50_000))),
    "prefixes": lambda file: file.update(
        normalizer={"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "aaa"}] * 40}
    ),
    "character map": lambda file: file.update(
        normalizer={"type": "Precompiled", "precompiled_charsmap": charsmap(b"x" * 500_000)}
    ),
    "replacing decoder": lambda file: file.update(
        decoder={"type": "Sequence", "decoders": replacing(*[("x", "xx")] * 40)["normalizers"]}
    ),
    "many steps": after({"type": "Sequence", "pretokenizers": [split(r"\d")] * 200}),
    "long expression": after(split("a|" * 20_000)),
    "long words": lambda file: file["model"].update(continuing_subword_prefix="x" * 10**6),
}


@pytest.mark.parametrize("name", EXPENSIVE)
def test_tokenizer_that_asks_for_too_much_is_refused_before_it_is_built(tiny, tmp_path, name, monkeypatch):
    base = changed(tiny, tmp_path, EXPENSIVE[name])
    monkeypatch.setattr("tokenizers.Tokenizer.from_str", None)
    with pytest.raises(LitLoraError, match=r"tokenizer\.json asks for too much: ") as refused:
        Tokenizer(base)
    assert "\n" not in str(refused.value)


def test_expression_that_a_text_holds_up_is_given_up(tiny, tmp_path, monkeypatch):
    """What takes long on some texts alone shows when they come; the library itself gives up on one match only."""
    tokenizer = Tokenizer(changed(tiny, tmp_path, after(split(r"(?:a{1,400}){1,3}b"))))
    monkeypatch.setattr(resource_limits, "MAX_SECONDS", 0.1)
    monkeypatch.setattr(limits, "SLOWEST", 10**9)
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_rendered([Rendered.of(text)])):
        with pytest.raises(LitLoraError, match=r"takes more than .* seconds for 3,000 characters"):
            encode("a" * 3_000)


def long_pieces(kind: int) -> bytes:
    """Return a sentencepiece model each of whose pieces begins with all shorter ones."""
    model = ModelProto()
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = kind, True
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{byte:02X}>", 6) for byte in range(256)), ("▁", 1)]
    for number, (piece, type) in enumerate(pieces + [("a" * length, 1) for length in range(1, 1000)]):
        model.pieces.add(piece=piece, type=type, score=-number)
    return model.SerializeToString()


@pytest.mark.parametrize("kind", [UNIGRAM, BPE])
def test_sentencepiece_ends_within_the_limit(tiny, tmp_path, monkeypatch, kind):
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.model").write_bytes(long_pieces(kind))
    tokenizer = Tokenizer(base)
    monkeypatch.setattr(resource_limits, "MAX_SECONDS", 0.05)
    monkeypatch.setattr(resource_limits, "POLL_INTERVAL", 0.01)
    monkeypatch.setattr(limits, "SLOWEST", 10**9)
    for encode in (tokenizer.encode, lambda text: tokenizer.encode_rendered([Rendered.of(text)])):
        with pytest.raises(LitLoraError, match=r"takes more than .* seconds for 200,000 characters"):
            encode("a" * 200_000)
    monkeypatch.setattr(resource_limits, "MAX_SECONDS", -1)
    with pytest.raises(LitLoraError, match=r"tokenizer\.model asks for too much: it takes more than"):
        Tokenizer(base)


def test_added_tokens_of_a_sentencepiece_model_take_linear_time(tiny, tmp_path):
    """With blanks before a token, many blanks took the square of their number, in one call that holds all threads."""
    base = Path(shutil.copytree(tiny, tmp_path / "base"))
    (base / "tokenizer.json").unlink()
    (base / "tokenizer.model").write_bytes(long_pieces(BPE))
    declared: dict[str, Any] = {"1259": {"content": "<x>", "lstrip": True, "rstrip": True, "special": True}}
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "added_tokens_decoder": declared}))
    tokenizer = Tokenizer(base)
    assert tokenizer.encode("a  <x> \n <x>a").ids == tokenizer.encode("a<x><x>a").ids
    model, before = tokenizer._backend, time.process_time()
    assert isinstance(model, SentencePieceModel)
    assert len(list(model._segments(" " * 300_000 + "a<"))) == 1
    assert time.process_time() - before < 30  # which was a minute and more
    declared["1260"] = {"content": "y" * 500_001}
    (base / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "added_tokens_decoder": declared}))
    with pytest.raises(LitLoraError, match="the added tokens have more than 500,000 characters"):
        Tokenizer(base)


def test_what_others_print_beside_a_panic_is_kept(capfd):
    with without_panics():
        os.write(2, b"before\n")
        with without_panics():
            os.write(2, b"\nthread '<unnamed>' (7) panicked at src/a.rs:1:2:\nOnig: \x1b[31m\nnote: run with\n")
    os.write(2, b"after\n")
    assert capfd.readouterr().err == "before\nafter\n"


def test_ordinary_steps_are_tried_once(tiny, tmp_path, monkeypatch):
    base, asked = changed(tiny, tmp_path, after(split(r"\p{N}{1,3}"))), []
    ask = limits.PROCESS.ask
    monkeypatch.setattr(limits.PROCESS, "ask", lambda request: asked.append(1) or ask(request))
    expected = Tokenizer(base).encode(TEXT)
    assert Tokenizer(base).encode(TEXT) == expected
    assert len(asked) == 1
