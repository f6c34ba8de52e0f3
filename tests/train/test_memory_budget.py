"""A run under --memory stays within it: real runs in processes that the system lets take little more."""

import json
from collections.abc import Iterator

import pytest
import torch
from conftest import Runs
from helpers.families import Family
from helpers.runs import adapter, report
from transformers import MistralConfig

from litlora.cpu.environment import allocator_settings

DEEP = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 7, "head_dim": 32, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 16384, "sliding_window": 128,
}  # fmt: skip
WORDS = 2100
"""Numbers in the long row, which are more than 8,000 tokens."""
GROWTH = 220_000_000
"""Bytes that a run may take beside those of a process that has imported torch: with activation checkpointing, the long
row needs 170 million, and without it 450."""
SETTINGS = """
    --precision 32-true --prompt_style alpaca --lora_dropout 0 --train.max_steps 1 --receipt false
    --eval.max_new_tokens 0 --eval.initial_validation false --eval.final_validation false --eval.highest_losses 0
"""


def row(words: int) -> dict[str, str]:
    return {"instruction": "Say it.", "input": "", "output": " ".join(str(n * n % 977) for n in range(words))}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Iterator[Runs]:
    """Return what runs a command under the settings of the allocator with which the command line trains."""
    runs = Runs(tmp_path_factory.mktemp("limited"), **allocator_settings())
    yield runs
    runs.close()


@pytest.fixture(scope="module")
def command(tmp_path_factory, make_checkpoint) -> list[str]:
    """Return a run on short rows and one of 8,000 tokens, without its --out_dir."""
    base, data = make_checkpoint(Family("mistral-deep", MistralConfig, DEEP)), tmp_path_factory.mktemp("data")
    short = [row(20 + n) for n in range(17)]
    for split, rows in {"train": [*short[:8], row(WORDS), *short[8:15]], "val": short[15:]}.items():
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ["finetune_lora", "--checkpoint_dir", str(base), "--data_dir", str(data), *SETTINGS.split()]


def test_long_row_trains_within_the_memory_that_is_given(runs, command, tmp_path):
    """The system refuses memory beyond 5 % more than --memory."""
    runs.start_all([*command, "--out_dir", str(tmp_path / "out")], [{"GROWTH": str(GROWTH)}])
    assert runs.wait() == 0, runs.stderr.read_text()
    done = report(tmp_path / "out/final")
    assert done["plan"]["activation_checkpointing"]
    assert done["peak_memory_gb"] <= 1.05 * done["plan"]["memory_gb"]


def test_without_a_plan_the_same_rows_exceed_the_same_memory(runs, command, tmp_path):
    fixed = ["--train.micro_batch_tokens", "null", "--out_dir", str(tmp_path / "out")]
    runs.start_all([*command, *fixed], [{"GROWTH": str(GROWTH), "PLANLESS": "1"}])
    assert runs.wait() == 1
    *_, sentence = runs.stderr.read_text().splitlines()
    assert sentence.startswith("litlora: there is too little memory for the longest micro-batch, examples: 4")


def test_plan_too_bold_is_lowered_to_the_same_result(runs, command, tmp_path):
    """The estimate is too small, as it is where the allocator's constants do not fit the machine."""
    # Not AdamW, whose first steps are as long for a gradient that is nothing but rounding as for any other
    flags = ["--train.max_seq_length", "2000", "--optimizer", "SGD", "--train.learning_rate", "0.1"]
    adapters = {}
    for name, variables in {"bold": {"FRAGMENTATION": "-0.5", "GROWTH": "90000000"}, "right": {}}.items():
        runs.start_all([*command, *flags, "--out_dir", str(tmp_path / name)], [variables])
        assert runs.wait() == 0, runs.stderr.read_text()
        lowered = "GB: the one before took more than its estimate" in runs.stderr.read_text()
        assert lowered is (name == "bold"), runs.stderr.read_text()
        adapters[name] = adapter(tmp_path / name / "final")
        done = report(tmp_path / name / "final")
        assert sum(done["estimated_memory_gb"].values()) == pytest.approx(done["plan"]["needed_gb"], rel=0.05)
    assert report(tmp_path / "bold/final")["plan"]["activation_checkpointing"]
    assert not report(tmp_path / "right/final")["plan"]["activation_checkpointing"]
    for name, matrix in adapters["right"].items():
        torch.testing.assert_close(adapters["bold"][name], matrix, atol=1e-6, rtol=0)
