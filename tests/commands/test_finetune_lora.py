import csv
import json
import re
from pathlib import Path

import pytest
import yaml
from helpers.reference import hugging_face
from helpers.runs import QUERY_VALUE
from peft import PeftModel
from safetensors.torch import load_file

from litlora.__main__ import main
from litlora.train.report import perplexity


@pytest.fixture(scope="module")
def run(tiny, data_dir, tmp_path_factory) -> Path:
    """Return the folder that a run of a few steps left."""
    out_dir = tmp_path_factory.mktemp("out") / "run"
    folders = ["--checkpoint_dir", tiny, "--data_dir", data_dir, "--out_dir", out_dir]
    flags = ["--train.max_steps", 3, "--train.global_batch_size", 5, "--train.save_interval", 2, "--lora_r", 4]
    assert main(["finetune_lora", *map(str, folders), *QUERY_VALUE, *map(str, flags)]) == 0
    return out_dir


def test_a_run_leaves_what_it_promises(run):
    expected = {"hyperparameters.yaml", "metrics.csv", "samples.jsonl", "step-000002", "final"}
    assert {path.name for path in run.iterdir()} == expected
    adapter = {"adapter_config.json", "adapter_model.safetensors", "prompt_style.yaml"}
    tokenizer = {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (run / "final").iterdir()} == adapter | tokenizer | {
        "report.json",
        "report.html",
        "README.md",
        "receipt.json",
    }
    state = {"training_state.json", "training_state.safetensors", "run.json", "manifest.json"}
    assert {path.name for path in (run / "step-000002").iterdir()} == adapter | tokenizer | state


def test_a_loss_has_a_perplexity_as_far_as_floats_go():
    assert perplexity(2.0) == pytest.approx(7.38905609893065)
    assert perplexity(1e3) is None


def test_the_report_says_what_was_done(run):
    report = json.loads((run / "final" / "report.json").read_text())
    expected = "train_loss val_loss val_perplexity steps supervised_tokens tokens seconds tokens_per_second "
    expected += "peak_memory_gb trainable_parameters frozen_parameters versions findings template_date adapter "
    expected += "start_val_loss warning data highest_losses val_loss_by_source plan estimated_memory_gb"
    assert set(report) == set(expected.split())
    assert report["steps"] == 3
    assert report["trainable_parameters"] == 2 * 2 * 4 * (32 + 32)
    assert report["frozen_parameters"] == sum(p.numel() for p in hugging_face_parameters(run))
    assert set(report["versions"]) == {"litlora", "torch", "bitsandbytes"}
    assert 0 < report["supervised_tokens"] < report["tokens"]


def hugging_face_parameters(run: Path):
    base = json.loads((run / "final" / "adapter_config.json").read_text())["base_model_name_or_path"]
    return hugging_face(Path(base)).parameters()


def test_metrics_have_the_promised_columns(run):
    with (run / "metrics.csv").open() as file:
        header = next(csv.reader(file))
    promised = "step, epoch, loss, val_loss, learning_rate, grad_norm, tokens, tokens_per_second, memory_gb"
    assert header == promised.split(", ")


def test_the_hyperparameters_repeat_the_run(run, tmp_path):
    settings = yaml.safe_load((run / "hyperparameters.yaml").read_text())
    assert settings["lora_r"] == 4
    again = tmp_path / "again"
    config = ["--config", str(run / "hyperparameters.yaml")]
    assert main(["finetune_lora", "--out_dir", str(again), *config]) == 0
    ours, theirs = (load_file(folder / "final" / "adapter_model.safetensors") for folder in (run, again))
    assert all((ours[name] == theirs[name]).all() for name in ours)


def test_the_adapter_loads_in_peft_and_names_its_base(run, tiny):
    PeftModel.from_pretrained(hugging_face(tiny), run / "final")
    assert json.loads((run / "final" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny)


def test_progress_goes_to_stderr_with_loss_speed_and_time_left(litlora, tiny, data_dir, tmp_path):
    folders = ["--checkpoint_dir", tiny, "--data_dir", data_dir, "--out_dir", tmp_path / "out"]
    done = litlora("finetune_lora", *folders, "--train.epochs", 2)
    assert done.returncode == 0
    assert done.stdout == ""
    assert "Warning" not in done.stderr
    figures = r"loss \d+\.\d{4}, val \d+\.\d{4}, [\d,]+ tokens/s, \d+\.\d\d GB"
    assert re.search(rf"^training: 2/2 \(100 %\), {figures}, in \d+:\d\d$", done.stderr, re.MULTILINE)
    assert "\r" not in done.stderr
    assert "\x1b" not in done.stderr
    assert re.search(r"^step 0: validation loss \d", done.stderr, re.MULTILINE)
    sample = r"^  question: Name a fruit that is green\.\n  expected: A pear is green, and so is a lime\.\n  -> "
    assert re.search(sample, done.stderr, re.MULTILINE)
