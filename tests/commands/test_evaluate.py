import json
import math
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.reference import hugging_face, with_peft
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import confusion_matrix, f1_score
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from litlora.__main__ import main
from litlora.data.prompts.styles import ALPACA, ALPACA_WITH_INPUT

THRESHOLD = "NAME=VALUE with one of the reported metrics (loss, perplexity) and a number"
CLAIMS = [("Fire is", "hot"), ("Ice is", "cold"), ("The sun is", "hot"), ("Snow is", "cold")]


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def prompt(row: dict[str, str]) -> str:
    return (ALPACA_WITH_INPUT if row["input"] else ALPACA).format(**row)


@pytest.fixture
def evaluate(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that runs the command in float32 and returns what it wrote to --out_file."""

    def run(*arguments: object) -> dict[str, Any]:
        out = tmp_path / "results.json"
        flags = ["--precision", "32-true", "--out_file", out]
        assert main(["evaluate", *map(str, [*arguments, *flags])]) == 0
        return json.loads(out.read_text(encoding="utf-8"))

    return run


@pytest.fixture
def refused(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs the command and returns the sentence with which it is refused."""

    def run(*arguments: object, code: int = 1) -> str:
        capfd.readouterr()
        assert main(["evaluate", *map(str, arguments)]) == code
        last = capfd.readouterr().err.splitlines()[-1]
        return last.removeprefix("litlora: ")

    return run


def log_likelihood(model: torch.nn.Module, checkpoint: Path, before: str, after: str) -> tuple[float, int]:
    """Return the summed log-likelihood of a response with its end token, and the number of its tokens."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    encoding = tokenizer(before + after + "</s>", return_offsets_mapping=True, return_tensors="pt")
    ids, ends = encoding.input_ids, encoding.offset_mapping[0, :, 1]
    supervised = (ends > len(before))[1:]
    with torch.no_grad():
        losses = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    return -float(losses[supervised].sum()), int(supervised.sum())


def test_perplexity_of_an_adapter_equals_transformers_and_peft(adapter, tiny, data_dir, evaluate, capfd):
    rows, model = read_rows(data_dir / "val.jsonl"), with_peft(tiny, adapter)
    expected = [log_likelihood(model, tiny, prompt(row), row["output"]) for row in rows]
    loss = -sum(total for total, _ in expected) / sum(count for _, count in expected)
    found = evaluate(adapter, "--data_dir", data_dir)
    assert found["metrics"]["loss"]["value"] == pytest.approx(loss, abs=1e-5)
    assert found["metrics"]["perplexity"]["value"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert [row["tokens"] for row in found["rows"]] == [count for _, count in expected]
    assert [row["loss_sum"] for row in found["rows"]] == pytest.approx([-total for total, _ in expected], abs=1e-3)
    table = capfd.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["metric", "loss", "perplexity"]
    trained = json.loads((adapter / "report.json").read_text(encoding="utf-8"))
    assert found["metrics"]["loss"]["value"] == pytest.approx(trained["val_loss"], abs=1e-5)


def test_completions_equal_transformers(tiny, data_dir, evaluate, capfd):
    rows = read_rows(data_dir / "val.jsonl")
    model, tokenizer = hugging_face(tiny), AutoTokenizer.from_pretrained(tiny)
    completions = []
    for row in rows:
        ids = tokenizer(prompt(row), return_tensors="pt").input_ids
        tokens = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)[0, ids.shape[1] :]
        completions.append(tokenizer.decode(tokens, skip_special_tokens=True))
    data = write_rows(tiny.parent / "completed.jsonl", [rows[0] | {"output": completions[0]}, *rows[1:]])
    flags = ["--metrics", "exact_match,rouge", "--max_new_tokens", 12, "--show", 1]
    found = evaluate(tiny, "--data_dir", data, *flags)
    assert [row["completion"] for row in found["rows"]] == completions
    assert found["metrics"]["exact_match"]["value"] == pytest.approx(1 / 3)
    scorer = RougeScorer(["rougeL"])
    answers = [completions[0], *(row["output"] for row in rows[1:])]
    scores = [scorer.score(*pair)["rougeL"].fmeasure for pair in zip(answers, completions, strict=True)]
    assert found["metrics"]["rougeL"]["value"] == pytest.approx(sum(scores) / 3, abs=1e-6)
    shown = capfd.readouterr().out.splitlines()
    assert shown[0] == f"  {rows[0]['instruction']}"
    assert shown[1].startswith("    expected: ")


def test_choices_have_the_likelihood_of_transformers(tiny, tmp_path, evaluate):
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in CLAIMS]
    data = write_rows(tmp_path / "claims.jsonl", rows)
    model = hugging_face(tiny)
    found = evaluate(tiny, "--data_dir", data, "--metrics", "accuracy", "--choices", "hot,cold")
    for row, measured in zip(rows, found["rows"], strict=True):
        expected = [log_likelihood(model, tiny, prompt(row), choice)[0] for choice in ("hot", "cold")]
        assert measured["log_likelihoods"] == pytest.approx(expected, abs=1e-3)
        assert measured["predicted"] == ("hot", "cold")[expected.index(max(expected))]


def test_classification_is_learned_and_scored_as_by_scikit_learn(tiny, tmp_path, evaluate, capfd):
    """The baseline is the base alone; the paired differences are those of the two."""
    rows = [{"instruction": question, "input": "", "output": answer} for _ in range(5) for question, answer in CLAIMS]
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "val"):
        write_rows(data / f"{split}.jsonl", rows)
    training = ["--checkpoint_dir", tiny, "--data_dir", data, "--out_dir", tmp_path / "run", "--precision", "32-true"]
    speed = [
        "--train.epochs",
        10,
        "--prompt_style",
        "{instruction} ",
        "--train.global_batch_size",
        5,
        "--train.learning_rate",
        "1e-2",
    ]
    assert main(["finetune_lora", *map(str, training + speed), "--lora_mlp", "true", "--eval.max_new_tokens", "0"]) == 0
    flags = ["--metrics", "loss,accuracy", "--choices", "hot,cold", "--baseline", tiny]
    capfd.readouterr()
    found = evaluate(tmp_path / "run/final", "--data_dir", data, *flags)
    base = found["baseline"]
    for each in (found, base):
        expected, predicted = ([row[key] for row in each["rows"]] for key in ("expected", "predicted"))
        assert each["metrics"]["accuracy"]["value"] == pytest.approx(
            sum(map(str.__eq__, expected, predicted)) / len(rows), abs=1e-12
        )
        f1 = f1_score(expected, predicted, average="weighted", zero_division=0)
        assert each["metrics"]["weighted_f1"]["value"] == pytest.approx(f1, abs=1e-12)
        if each is found:
            matrix = confusion_matrix(expected, predicted, labels=["hot", "cold"])
            assert found["confusion_matrix"] == matrix.tolist()
    for name, change in base["differences"].items():
        assert change["value"] == pytest.approx(found["metrics"][name]["value"] - base["metrics"][name]["value"])
    assert found["metrics"]["accuracy"]["value"] >= 0.9
    assert base["metrics"]["accuracy"]["value"] <= 0.75
    assert base["differences"]["loss"]["high"] < 0
    printed = capfd.readouterr().out.splitlines()
    assert printed[0].split() == [
        "metric",
        "value",
        "95",
        "%",
        "interval",
        "baseline",
        "difference",
        "95",
        "%",
        "interval",
    ]
    assert [line.split()[0] for line in printed[-2:]] == ["hot", "cold"]


def test_adapters_are_summed_by_weight(adapter, tiny, data_dir, evaluate):
    halves = ["--adapters", f"{adapter},{adapter}", "--adapter_weights", "0.25,0.75"]
    one, sum_ = (evaluate(*flags, "--data_dir", data_dir)["metrics"] for flags in ([adapter], [tiny, *halves]))
    assert sum_["loss"]["value"] == pytest.approx(one["loss"]["value"], abs=1e-5)


def test_fail_below_exits_with_1_after_the_results(tiny, data_dir, tmp_path, capfd):
    out, flags = tmp_path / "results.json", ["--precision", "32-true", "--data_dir", data_dir]
    command = [str(word) for word in ("evaluate", tiny, *flags, "--out_file", out, "--fail_below")]
    assert main([*command, "loss=1000,perplexity=1e9"]) == 0
    out.unlink()
    capfd.readouterr()
    assert main([*command, "loss=0.5"]) == 1
    loss = json.loads(out.read_text(encoding="utf-8"))["metrics"]["loss"]["value"]
    printed = capfd.readouterr()
    assert printed.err.splitlines()[-1] == f"litlora: --fail_below: loss is {loss:.4f}, above 0.5"
    assert printed.out.startswith("metric")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--metrics", "loss,bleu"], "--metrics (bleu) must be some of loss, exact_match, rouge, accuracy"),
        (["--metrics", "accuracy"], "--metrics accuracy needs --choices: name the answers"),
        (["--choices", "a,b"], "--choices is for accuracy: add it to --metrics, or leave --choices out"),
        (["--metrics", "accuracy", "--choices", "a"], "--choices (a) must be two or more different answers"),
        (["--metrics", "accuracy", "--choices", "a,a"], "--choices (a,a) must be two or more different answers"),
        (["--fail_below", "f1=1"], f"--fail_below (f1=1) must be {THRESHOLD}"),
        (["--fail_below", "loss"], f"--fail_below (loss) must be {THRESHOLD}"),
        (["--show", 1], "--show needs answers: add exact_match, rouge or accuracy to --metrics"),
    ],
)  # fmt: skip
def test_wrong_flags_are_refused_in_a_sentence(tiny, data_dir, refused, flags, sentence):
    assert refused(tiny, "--data_dir", data_dir, *flags) == sentence


def test_missing_data_is_refused(tiny, tmp_path, refused):
    assert refused(tiny, code=2) == "missing --data_dir or --tasks"
    assert refused(tiny, "--data_dir", tmp_path).startswith(f"no val.jsonl in {tmp_path}; prepare one with: ")
    (tmp_path / "rows.csv").write_text("instruction,output\n", encoding="utf-8")
    sentence = refused(tiny, "--data_dir", tmp_path / "rows.csv")
    assert sentence.startswith(
        f"--data_dir ({tmp_path}/rows.csv) must be a folder or a .jsonl file; prepare one with: "
    )


def test_rows_that_cannot_be_scored_are_named(tiny, tmp_path, refused):
    row = {"instruction": "Fire is", "input": "", "output": "hot"}
    data = write_rows(tmp_path / "rows.jsonl", [row, row | {"output": "warm"}])
    flags = ["--data_dir", data, "--metrics", "accuracy", "--choices", "hot,cold"]
    fault = "its answer 'warm' is not among --choices (hot,cold): add it, or leave the row out"
    assert refused(tiny, *flags) == f"{data} line 2: {fault}"
    write_rows(data, [{"text": "Once upon a time"}])
    fault = "it does not end with a response to compare with: leave it out, or measure --metrics loss alone"
    assert refused(tiny, "--data_dir", data, "--metrics", "exact_match") == f"{data} line 1: {fault}"
    write_rows(data, [row, row | {"instruction": "long " * 3000}])
    assert refused(tiny, *flags).startswith(f"{data} line 2: its prompt and answer need ")


def test_results_replace_only_results(tiny, data_dir, tmp_path, refused):
    out = tmp_path / "val.jsonl"
    for content, is_refused in ((b'{"instruction": "a"}', True), (b'{\n  "metrics": {}}', False)):
        out.write_bytes(content)
        code = 1 if is_refused else 0
        sentence = refused(tiny, "--data_dir", data_dir, "--out_file", out, code=code)
        assert (out.read_bytes() == content) == is_refused
        assert is_refused == (
            sentence == f"--out_file ({out}) was not written by this command: choose another, or remove it"
        )


def test_losses_of_other_tokens_are_not_compared(tiny, pico, data_dir, refused):
    rows = f"has other tokens in 3 of the rows, the first at {data_dir}/val.jsonl line 1"
    hint = "so that losses differ in meaning: compare it by exact_match, rouge or accuracy, without loss"
    assert refused(tiny, "--data_dir", data_dir, "--baseline", pico) == f"--baseline ({pico}) {rows}, {hint}"


def test_baseline_may_differ_in_tokens_that_no_row_has(tiny, tmp_path, evaluate, refused):
    other, data = Path(shutil.copytree(tiny, tmp_path / "other")), tmp_path / "rows.jsonl"
    (other / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    backend = Tokenizer.from_file(str(other / "tokenizer.json"))
    steps = [pre_tokenizers.Split("green", "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.save(str(other / "tokenizer.json"))
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "Which colour?", "output": "That is green."}]
    write_rows(data, rows[:1])
    found = evaluate(tiny, "--data_dir", data, "--baseline", other)
    assert found["baseline"]["differences"]["loss"]["value"] == 0
    write_rows(data, rows)
    sentence = refused(tiny, "--data_dir", data, "--baseline", other)
    assert f"has other tokens in 1 of the rows, the first at {data} line 2, " in sentence


def test_missing_rouge_score_is_reported(tiny, data_dir, refused, monkeypatch):
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    sentence = "--metrics rouge needs rouge-score: install it with: pip install 'litlora[evaluate]'"
    assert refused(tiny, "--data_dir", data_dir, "--metrics", "rouge") == sentence


def test_cut_rows_are_counted(tiny, data_dir, capfd):
    command = ["evaluate", str(tiny), "--data_dir", str(data_dir), "--max_seq_length"]
    assert main([*command, "150"]) == 0
    assert "3 rows are cut to --max_seq_length, and 1 have no response left" in capfd.readouterr().err
    assert main([*command, "40"]) == 1
    sentence = "litlora: no row has a response within --max_seq_length (40): raise it"
    assert capfd.readouterr().err.splitlines()[-1] == sentence
