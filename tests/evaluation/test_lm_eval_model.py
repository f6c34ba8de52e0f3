"""Tasks of lm-eval give the numbers of its own `hf` model; no task is fetched from the Hub."""

import json
import sys
from pathlib import Path

import pytest
import torch
from helpers.reference import hugging_face
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from litlora.__main__ import main
from litlora.args.inference import EvaluateArgs
from litlora.data.prompts.styles import StyleSettings
from litlora.evaluation.lm_eval_model import LitLoraLM
from litlora.evaluation.rows import Subject
from litlora.evaluation.scoring import load_model

TASK = """
task: two_choices
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}, train: {rows}}}}}
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{label}}}}"
doc_to_choice: ["hot", "cold and wet"]
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def merged(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the checkpoint into which the adapter is merged."""
    out_dir = tmp_path_factory.mktemp("lm-eval") / "merged"
    assert main(["merge_lora", str(adapter), "--out_dir", str(out_dir)]) == 0
    return out_dir


@pytest.fixture(scope="module")
def ours(adapter: Path) -> LitLoraLM:
    args = EvaluateArgs(adapter, tasks=("some",), precision="32-true")
    subject = Subject.find(args, None, StyleSettings("none"))
    return LitLoraLM(load_model(subject), subject.tokenizer)


@pytest.fixture(scope="module")
def theirs(merged: Path) -> HFLM:
    return HFLM(hugging_face(merged), tokenizer=AutoTokenizer.from_pretrained(merged), batch_size=2, device="cpu")


def requests(kind: str, *arguments: tuple[object, ...]) -> list[Instance]:
    return [Instance(kind, {}, each, n) for n, each in enumerate(arguments)]


def test_loglikelihoods_equal_hf(ours, theirs):
    pairs = [("Say hello", " to all"), ("Add ", "2 and 3"), ("", "Name a fruit"), ("Close the door. " * 60, " Done")]
    found, expected = (model.loglikelihood(requests("loglikelihood", *pairs)) for model in (ours, theirs))
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


def test_greedy_continuation_is_reported(ours):
    ids = ours.tok_encode("Say hello")
    with torch.no_grad():
        best = int(ours.gpt.logits(ours.gpt(torch.tensor(ids), [len(ids)])[-1:]).argmax())
    (greedy,), (other,) = (ours._loglikelihood_tokens([(None, ids, [token])]) for token in (best, best - 1))
    assert greedy[1] and not other[1]
    assert greedy[0] > other[0]


def test_rolling_loglikelihoods_equal_hf(ours, theirs):
    texts = [("Say hello in three ways.",), ("Which is heavier, a feather or a stone? " * 30,)]
    assert len(ours.tok_encode(texts[1][0])) > ours.gpt.config.positions  # several windows
    found, expected = (
        model.loglikelihood_rolling(requests("loglikelihood_rolling", *texts)) for model in (ours, theirs)
    )
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-4)


def test_completions_equal_hf(ours, theirs):
    settings = {"until": ["e"], "max_gen_toks": 12}
    contexts = [("Say hello", settings), ("Add the numbers", {"max_gen_toks": 8}), ("Close the door. " * 60, settings)]
    found, expected = (model.generate_until(requests("generate_until", *contexts)) for model in (ours, theirs))
    assert found == expected


def test_task_of_one_s_own_runs(adapter, tmp_path, capfd, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    rows = tmp_path / "rows.jsonl"
    lines = [
        json.dumps({"question": question, "label": n % 2}) for n, question in enumerate(["Fire is", "Rain is"] * 3)
    ]
    rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (tmp_path / "two_choices.yaml").write_text(TASK.format(rows=rows), encoding="utf-8")
    out = tmp_path / "results.json"
    flags = ["--tasks", "two_choices", "--task_dir", tmp_path, "--precision", "32-true", "--out_file", out]
    assert main(["evaluate", *map(str, [adapter, *flags])]) == 0
    metrics = json.loads(out.read_text(encoding="utf-8"))["metrics"]
    assert set(metrics) == {"two_choices/acc", "two_choices/acc_norm"}
    assert (
        metrics["two_choices/acc"]["low"] <= metrics["two_choices/acc"]["value"] <= metrics["two_choices/acc"]["high"]
    )
    assert [line.split()[0] for line in capfd.readouterr().out.splitlines()] == ["metric", *metrics]


def test_unknown_task_is_refused(tiny, capfd):
    assert main(["evaluate", str(tiny), "--tasks", "no_such_task"]) == 1
    hint = "look it up with: lm-eval ls tasks, or name the folder of its YAML file with --task_dir"
    sentence = f"litlora: --tasks (no_such_task) is not a task of lm-eval: {hint}"
    assert capfd.readouterr().err.splitlines()[-1] == sentence


def test_missing_lm_eval_is_reported(tiny, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["evaluate", str(tiny), "--tasks", "hellaswag"]) == 1
    sentence = "litlora: --tasks needs lm-eval: install it with: pip install 'litlora[lm-eval]'"
    assert capfd.readouterr().err.splitlines()[-1] == sentence
