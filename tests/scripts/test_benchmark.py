"""The benchmark: what litlora's part reports, what counts as the same work, and how the table is made of it."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import bitsandbytes
import pytest
import torch
from benchmarks import peft
from benchmarks.__main__ import measurement_of
from benchmarks.cases import LITGPT, LITLORA, Case
from benchmarks.environments import Environments, ProgramError, run_job
from benchmarks.inputs import prepare_inputs
from benchmarks.jobs import NEW_TOKENS, PROMPT_TOKENS, Job, Products, Result
from benchmarks.measuring import DisagreementError, Measurement, compare, measure
from benchmarks.table import section
from benchmarks.versions import CURRENT, PREVIOUS, Run, check_version, generate
from benchmarks.versions import section as version_section
from transformers import AutoModelForCausalLM

from litlora.data.batching import Samples, pack
from litlora.data.dataset import read_examples
from litlora.data.encoding import encode
from litlora.data.tokenizer import Tokenizer
from litlora.models.checkpoint import Checkpoint, block_linears
from litlora.models.transformer import GPT
from litlora.nn.loss import supervised_loss
from litlora.nn.nf4 import Quantization

ROOT = Path(__file__).parents[2]
PYTHON = Path(sys.executable)


@pytest.fixture
def work(tmp_path):
    prepare_inputs(tmp_path / "work", ROOT / "checkpoints/pico", ROOT / "data/pico", 8)
    return tmp_path / "work"


def result(seconds, **values):
    return Result(**{"seconds": seconds, "tokens": 100, "memory_gb": 1.0, "versions": {}} | values)


@pytest.mark.parametrize("quantized", [False, True])
def test_litlora_trains_in_the_order_of_the_file(work, quantized):
    job = Job("train", "32-true", str(work), rows=8, quantized=quantized)
    found = Result(**run_job(job, PYTHON, "litlora"))
    tokenizer = Tokenizer(work / "checkpoint")
    examples = read_examples(work / "data/train.jsonl")
    style = tokenizer.prompt_style("alpaca")
    samples = list(Samples(encode(examples, tokenizer, style, mask_prompt=True), max_seq_length=512))
    nf4 = Quantization("bnb.nf4", torch.float32) if quantized else None
    base = Checkpoint.open(work / "checkpoint").load(torch.float32, torch.device("cpu"), nf4)
    with torch.no_grad():
        batches = [pack(samples[:4]), pack(samples[4:])]
        sums = [supervised_loss(base(b.tokens, b.lengths), base.lm_head, b.labels) for b in batches]
    losses = [loss.item() / batch.supervised for loss, batch in zip(sums, batches, strict=True)]
    assert found.losses[0] == pytest.approx(losses[0], rel=1e-5)  # of the base, since the adapter is untrained
    assert found.losses[1] == pytest.approx(losses[1], rel=1e-2)
    assert (found.tokens, found.supervised) == (sum(len(s.tokens) for s in samples), sum(b.supervised for b in batches))
    assert found.seconds > 0
    assert found.memory_gb > 0.1
    assert found.versions["torch"] == torch.__version__


def test_case_continues_without_a_missing_program(work):
    case = Case("generate-32", "generate", "32-true", (LITLORA, LITGPT))
    environments = Environments({"litlora": PYTHON}, {"litgpt": "no such wheel"})
    measurement = measure(case, Job("generate", "32-true", str(work)), environments, repetitions=1)
    (found,) = measurement.results["litlora"]
    model = AutoModelForCausalLM.from_pretrained(work / "checkpoint", dtype=torch.float32)
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([found.ids[:PROMPT_TOKENS]])
    options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    assert found.ids == expected[0].tolist()
    assert measurement.missing == {"litgpt": "no such wheel"}
    assert "litgpt: no such wheel." in section(case.name, measurement)


def test_peft_has_the_same_4_bit_base(work):
    job = Job("train", "32-true", str(work), rows=8, quantized=True)
    nf4 = Quantization("bnb.nf4", torch.float32)
    base = Checkpoint.open(job.checkpoint).load(torch.float32, torch.device("cpu"), nf4)
    theirs = [m.weight for m in peft.load(job).modules() if isinstance(m, bitsandbytes.nn.Linear4bit)]
    ours = [base.get_submodule(name).weight for name in block_linears(GPT(base.config))]
    assert all(torch.equal(a.packed, b.data.flatten()) for a, b in zip(ours, theirs, strict=True))


def test_error_of_a_program_is_its_last_line(work):
    with pytest.raises(ProgramError, match="KeyError: 'convert'"):
        run_job(Job("convert", "32-true", str(work)), PYTHON, "products")


def test_programs_use_tokenizer_json_unchanged(work):
    settings = json.loads((work / "checkpoint/tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"


@pytest.mark.parametrize("rows", [0, 6, 100_000])
def test_rows_must_fill_micro_batches(rows, tmp_path):
    with pytest.raises(ProgramError, match=rf"--rows \({rows}\) must be a multiple of 4 and at most the rows of"):
        prepare_inputs(tmp_path / "work", ROOT / "checkpoints/pico", ROOT / "data/pico", rows)


@pytest.mark.parametrize(
    ("change", "precision", "complaint"),
    [
        ({"tokens": 101}, "bf16-true", "the number of tokens"),
        ({"supervised": 1}, "bf16-true", "the number of tokens"),
        ({"losses": [2.001, 1.0]}, "32-true", "the losses of the steps"),
        ({"losses": [2.0, 1.1]}, "32-true", "the losses of the steps"),
        ({"losses": [2.0, float("nan")]}, "32-true", "the losses of the steps"),
        ({"losses": [2.0]}, "32-true", "the losses of the steps"),
        ({"ids": [7] * 65}, "bf16-true", "the tokens of the prompt"),
        ({"ids": [1] * 64 + [7]}, "32-true", "the tokens that are generated"),
    ],
)
def test_programs_that_disagree_are_refused(change, precision, complaint):
    ours = result(1.0, supervised=50, losses=[2.0, 1.0], ids=[1] * 65)
    compare("litlora", ours, "litgpt", replace(ours, seconds=9.0), precision)
    with pytest.raises(DisagreementError, match=f"litlora and litgpt disagree on {complaint}"):
        compare("litlora", ours, "litgpt", replace(ours, **change), precision)


def test_rounding_differences_are_tolerated():
    ours = result(1.0, losses=[2.0, 1.0], ids=[1] * 65)
    compare("litlora", ours, "litgpt", replace(ours, losses=[2.01, 1.01], ids=[1] * 64 + [7]), "bf16-true")


def test_training_table():
    seconds = {"litlora": (2.0, 1.0, 4.0), "litgpt": (6.0, 8.0, 5.0)}
    results = {name: [result(s, supervised=50, losses=[1.0] * 4) for s in times] for name, times in seconds.items()}
    results["litgpt"] = [replace(r, memory_gb=m) for r, m in zip(results["litgpt"], (2, 3, 9), strict=True)]
    products = [Products(rate=1e3, block_parameters=2, head_parameters=1)]  # 4 * (2 * 100 + 1 * 50) / 1000 = 1 second
    text = section("train-32", Measurement("Training", "train", "32-true", 64, results, products))
    assert "64 rows with 100 tokens, 50 of them supervised, repetitions: 3; the limit is 1.0 s" in text
    assert "| litlora | 2.0 (1.0 to 4.0) | 1.00 | 50.0 (25.0 to 100.0) | 1.00 | 50% |" in text
    assert "| litgpt | 6.0 (5.0 to 8.0) | 3.00 | 16.7 (12.5 to 20.0) | 3.00 | 17% |" in text


def test_generation_table_counts_identical_tokens():
    ours, theirs = [5] * (PROMPT_TOKENS + 4), [5] * (PROMPT_TOKENS + 2) + [6, 5]
    results = {"litlora": [result(2.0, ids=ours)], "transformers": [result(4.0, ids=theirs)]}
    results["litlora --compile"] = [result(1.0, ids=ours, compile_seconds=9.0)]
    text = section("generate-bf16", Measurement("Generation", "generate", "bf16-true", 64, results))
    assert "| litlora | 50.0 (50.0 to 50.0) | 1.00 | 1.00 | 4 |" in text
    assert "| transformers | 25.0 (25.0 to 25.0) | 2.00 | 1.00 | 2 |" in text
    assert "first compiles for 9.0 s, which pays off after 900 tokens." in text  # 9 s / (1 s saved in 100 tokens)


def test_measurements_round_trip():
    measurement = Measurement("Training", "train", "32-true", 64, {"litlora": [result(1.0)]}, [Products(1.0, 2, 3)])
    assert measurement_of(json.loads(json.dumps(asdict(measurement)))) == measurement


def test_versions_table():
    times = {PREVIOUS: (2.0, 1.0, 4.0), CURRENT: (3.0, 2.5, 3.5)}
    runs = {name: [Run(s, s + 10, s / 10, "0.5 0.4") for s in seconds] for name, seconds in times.items()}
    text = version_section("train-32", runs)
    assert "| previous | 2.00 (1.00 to 4.00) | 1.000 | 12.0 (11.0 to 14.0) | 0.20 (0.10 to 0.40) | 1.000 |" in text
    assert "| this | 3.00 (2.50 to 3.50) | 1.500 | 13.0 (12.5 to 13.5) | 0.30 (0.25 to 0.35) | 1.500 |" in text
    assert "runs: identical." in text
    runs[CURRENT][0] = replace(runs[CURRENT][0], output="0.5 0.3")
    assert "runs: not identical (2 different ones)." in version_section("train-32", runs)


def test_command_of_a_worktree_runs_its_own_code(work, tmp_path):
    package = tmp_path / "other/litlora"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    source = "import time; print('one', flush=True); time.sleep(0.1); print('two')"
    (package / "__main__.py").write_text(source, encoding="utf-8")
    check_version(package.parent, PYTHON)
    run = generate(Job("generate", "32-true", str(work)), package.parent, PYTHON)
    assert run.output == "one\ntwo\n"
    assert run.command_seconds > run.seconds > 0
    assert run.memory_gb > 0


def test_folder_without_litlora_is_refused(tmp_path):
    with pytest.raises(ProgramError, match="must be a git worktree of litlora"):
        check_version(tmp_path, PYTHON)
