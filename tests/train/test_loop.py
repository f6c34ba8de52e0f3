import json
import math
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers.families import WHOLE_BLOCKS
from helpers.reference import in_4_bits, with_peft
from helpers.runs import adapter, finetune, metrics, report
from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel

from litlora.__main__ import main
from litlora.args.finetune import TrainArgs
from litlora.data.prompts.styles import ALPACA, ALPACA_WITH_INPUT
from litlora.nn.nf4 import Quantization
from litlora.train import loop
from litlora.train.optimizers import PAGED
from litlora.train.schedule import learning_rate, orders, total_steps

BASES = [[], ["--quantize", "bnb.nf4-dq"]]
INIT_ARGS = {
    "SGD": ["--optimizer.init_args.momentum", 0.9],
    "AdamW8bit": ["--optimizer.init_args.min_8bit_size", 1],  # or the state of matrices this small would be float32
}


def loss_by_peft(checkpoint: Path, adapter_dir: Path, rows: Path, base: PreTrainedModel | None = None) -> float:
    """Return the mean loss per response token that transformers and peft compute, row by row."""
    model = PeftModel.from_pretrained(base, adapter_dir) if base else with_peft(checkpoint, adapter_dir)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    total = count = 0
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        prompt = (ALPACA_WITH_INPUT if row["input"] else ALPACA).format(**row)
        ids = tokenizer(prompt + row["output"] + tokenizer.eos_token, return_tensors="pt").input_ids.to(model.device)
        start = len(tokenizer(prompt).input_ids)
        with torch.no_grad():
            logits = model(ids).logits[0]
        total += F.cross_entropy(logits[start - 1 : -1], ids[0, start:], reduction="sum").item()
        count += ids.shape[1] - start
    return total / count


@pytest.mark.parametrize("warmup", [0, 1, 7, 20, 50])
@pytest.mark.parametrize("min_lr", [0.0, 1e-4])
def test_learning_rate_peaks_after_warm_up_and_is_never_zero(warmup, min_lr):
    args = TrainArgs(learning_rate=1e-3, lr_warmup_steps=warmup, min_lr=min_lr)
    rates = [learning_rate(step, 20, args) for step in range(1, 21)]
    peak = min(max(warmup, 1), 20)
    assert rates[peak - 1] == max(rates) == 1e-3
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak - 1 :] == sorted(rates[peak - 1 :], reverse=True)
    assert min(rates) > 0
    assert min(rates[peak - 1 :]) >= min_lr


def test_learning_rate_follows_the_cosine():
    args = TrainArgs(learning_rate=1.0, lr_warmup_steps=4, min_lr=0.2)
    assert [learning_rate(step, 23, args) for step in (1, 2, 4, 14)] == pytest.approx([0.25, 0.5, 1.0, 0.6])


def test_warm_up_may_be_a_fraction_of_all_steps():
    args = TrainArgs(learning_rate=1.0, lr_warmup_fraction=0.5)
    assert learning_rate(10, 20, args) == 1.0
    assert learning_rate(9, 20, args) == 0.9


def test_smaller_last_global_batch_is_a_step():
    assert total_steps(17, TrainArgs(global_batch_size=8, epochs=2)) == 6
    assert total_steps(17, TrainArgs(global_batch_size=8, epochs=2, max_steps=4)) == 4


@pytest.mark.parametrize("after", [0, 1, 3, 4, 7, 8])
def test_run_resumes_after_any_step_with_the_remaining_samples(after):
    expected = [number for _, order in orders(10, 4, seed=1, after=0, total=8) for number in order]
    assert [sorted(expected[:10]), sorted(expected[10:20]), len(expected)] == [[*range(10)], [*range(10)], 28]
    left = [(epoch, number) for epoch, order in orders(10, 4, seed=1, after=after, total=8) for number in order]
    done = sum((4, 4, 2)[step % 3] for step in range(after))
    assert left == [(1 + index // 10, number) for index, number in enumerate(expected)][done:]


@pytest.mark.parametrize("base", BASES)
def test_adapter_is_independent_of_micro_batch_split(tiny, data_dir, tmp_path, base):
    flags = [*base, "--train.global_batch_size", 16, "--train.epochs", 5, "--train.max_steps", 5, "--lora_head", "true"]
    sizes = [("--train.micro_batch_size", size, "--train.micro_batch_tokens", "null") for size in (1, 2, 4, 16)]
    splits = [*sizes, ("--train.micro_batch_tokens", 300)]
    runs = [
        adapter(finetune(tiny, data_dir, tmp_path / str(n), *flags, *split, "--train.max_seq_length", 250))
        for n, split in enumerate(splits)
    ]
    for other in runs[1:]:
        for name, matrix in runs[0].items():
            torch.testing.assert_close(other[name], matrix, atol=1e-5, rtol=0)


def test_longest_micro_batch_of_a_step_comes_first(tiny, data_dir, tmp_path, monkeypatch):
    lengths, original = [], loop.loss_and_gradients

    def recording(engine, parameters, supervised, micro):
        lengths.append(len(micro.tokens))
        return original(engine, parameters, supervised, micro)

    monkeypatch.setattr(loop, "loss_and_gradients", recording)
    flags = ["--train.max_steps", 1, "--train.micro_batch_size", 1, "--train.parallel_micro_batches", 1]
    flags += ["--train.micro_batch_tokens", "null"]
    finetune(tiny, data_dir, tmp_path / "out", *flags)
    assert len(set(lengths)) > 1
    assert lengths == sorted(lengths, reverse=True)


@pytest.mark.parametrize("checkpointing", ["false", "true"])
def test_adapter_is_independent_of_concurrent_micro_batches(tiny, data_dir, tmp_path, checkpointing, four_threads):
    flags = ["--lora_dropout", 0.2, "--lora_mlp", "true", "--lora_head", "true", "--train.micro_batch_size", 2]
    flags += ["--train.micro_batch_tokens", "null", "--train.max_steps", 3]
    flags += ["--train.activation_checkpointing", checkpointing]
    runs = [
        adapter(finetune(tiny, data_dir, tmp_path / str(workers), *flags, "--train.parallel_micro_batches", workers))
        for workers in (1, 2, 3)
    ]
    for other in runs[1:]:
        for name, matrix in runs[0].items():
            torch.testing.assert_close(other[name], matrix, atol=1e-6, rtol=0)


@pytest.mark.parametrize("base", BASES)
def test_activation_checkpointing_leaves_the_adapter_unchanged(tiny, data_dir, tmp_path, base):
    flags = [*base, "--train.max_steps", 3, "--lora_dropout", 0.2, "--lora_mlp", "true"]
    flags += ["--train.activation_checkpointing"]
    with_it, without = (adapter(finetune(tiny, data_dir, tmp_path / on, *flags, on)) for on in ("true", "false"))
    assert all(torch.equal(with_it[name], without[name]) for name in without)


def test_same_command_gives_the_same_adapter_bit_for_bit(tiny, data_dir, tmp_path):
    flags = ["--lora_dropout", 0.2, "--train.max_steps", 3]
    first, again, other = (
        adapter(finetune(tiny, data_dir, tmp_path / name, *flags, "--seed", seed))
        for name, seed in (("first", 1), ("again", 1), ("other", 2))
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_validation_loss_equals_that_of_peft(checkpoint, data_dir, tmp_path, device):
    final = finetune(checkpoint, data_dir, tmp_path, "--train.epochs", 4, "--lora_mlp", "true")
    val_loss = report(final)["val_loss"]
    by_peft = loss_by_peft(checkpoint, final, data_dir / "val.jsonl")
    assert val_loss == pytest.approx(by_peft, abs=1e-5, rel=0 if device.type == "cpu" else 1e-5)
    assert report(final)["val_perplexity"] == pytest.approx(math.exp(val_loss))


def test_training_lowers_the_loss_and_logs_each_step(tiny, data_dir, tmp_path):
    final = finetune(
        tiny, data_dir, tmp_path, "--train.epochs", 5, "--train.global_batch_size", 8, "--eval.interval", 4
    )
    rows = metrics(tmp_path)
    assert [int(row["step"]) for row in rows] == list(range(11))
    assert [int(row["step"]) for row in rows if row["val_loss"]] == [0, 4, 8, 10]
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"]) - 0.3
    assert float(rows[-1]["val_loss"]) == report(final)["val_loss"]
    assert report(final)["steps"] == 10
    assert report(final)["tokens"] == int(rows[-1]["tokens"])


def test_validation_may_be_limited_to_its_first_micro_batches(tiny, data_dir, tmp_path):
    finetune(tiny, data_dir, tmp_path / "one", "--eval.max_iters", 1, "--train.micro_batch_size", 1)
    first = float(metrics(tmp_path / "one")[0]["val_loss"])
    (tmp_path / "val").mkdir()
    for name, limit in (("train.jsonl", None), ("val.jsonl", 1)):
        lines = (data_dir / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / "val" / name).write_text("".join(lines[:limit]), encoding="utf-8")
    finetune(tiny, tmp_path / "val", tmp_path / "short")
    assert float(metrics(tmp_path / "short")[0]["val_loss"]) == pytest.approx(first, abs=1e-6)


@pytest.mark.parametrize("base", BASES)
def test_validation_leaves_training_unchanged(tiny, data_dir, tmp_path, base):
    flags = [*base, "--lora_dropout", 0.2, "--eval.max_new_tokens", 5, "--train.max_steps", 3, "--train.epochs", 3]
    often, never = (
        adapter(finetune(tiny, data_dir, tmp_path / str(interval), *flags, "--eval.interval", interval))
        for interval in (1, 100)
    )
    assert all(torch.equal(often[name], never[name]) for name in never)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("optimizer", ["AdamW", "SGD", "AdamW8bit"])
def test_resumed_run_equals_the_unbroken_one_bit_for_bit(tiny, data_dir, tmp_path, optimizer, base):
    flags = ["--lora_dropout", 0.1, "--train.epochs", 3, "--train.global_batch_size", 4, "--train.save_interval", 5]
    flags += [*base, "--optimizer", optimizer, *INIT_ARGS.get(optimizer, [])]
    final = finetune(tiny, data_dir, tmp_path, *flags)
    unbroken, rows = adapter(final), metrics(tmp_path)
    final.rename(tmp_path / "away")
    (tmp_path / "step-000010").rename(tmp_path / "ahead")
    resumed = adapter(finetune(tiny, data_dir, tmp_path, *flags, "--resume", "true"))
    assert all(torch.equal(resumed[name], unbroken[name]) for name in unbroken)
    exact = ("step", "epoch", "loss", "val_loss", "learning_rate", "grad_norm", "tokens")
    assert [[row[k] for k in exact] for row in metrics(tmp_path)] == [[row[k] for k in exact] for row in rows]


def test_loss_that_is_not_finite_stops_the_run(tiny, data_dir, tmp_path, capsys):
    flags = ["--checkpoint_dir", tiny, "--data_dir", data_dir, "--out_dir", tmp_path, "--precision", "32-true"]
    assert main(["finetune_lora", *map(str, flags), "--train.learning_rate", "1e30", "--train.epochs", "9"]) == 1
    sentence = capsys.readouterr().err.splitlines()[-1]
    rows = ", ".join(map(str, range(1, 16)))
    fault = f"step 2 has the loss nan and a gradient norm of nan on train.jsonl rows {rows} (the first row is 1)"
    hint = "lower --train.learning_rate, or look at these rows; what is saved so far stays"
    assert sentence == f"litlora: {fault}: {hint}"
    assert not (tmp_path / "final").exists()


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_other_precisions_come_close_to_float32(tiny, data_dir, tmp_path, precision):
    exact = report(finetune(tiny, data_dir, tmp_path / "exact"))
    rough = report(finetune(tiny, data_dir, tmp_path / "rough", "--precision", precision))
    assert rough["val_loss"] == pytest.approx(exact["val_loss"], rel=0.01)
    assert rough["val_loss"] != exact["val_loss"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("precision", "base"),
    [*product(["32-true", "bf16-true"], [None, "bnb.nf4", "bnb.nf4-dq"]), ("bf16-mixed", None)],
)
@pytest.mark.parametrize("checkpointing", ["false", "true"], ids=["saved", "checkpointed"])
def test_loss_on_gpu_equals_that_of_peft_in_every_precision(
    make_checkpoint, data_dir, tmp_path, precision, base, checkpointing
):
    checkpoint = make_checkpoint(WHOLE_BLOCKS)
    flags = ["--precision", precision, "--train.activation_checkpointing", checkpointing, "--lora_mlp", "true"]
    final = finetune(checkpoint, data_dir, tmp_path, *flags, *(["--quantize", base] if base else []))
    stored = Quantization(base, torch.bfloat16 if precision == "bf16-true" else torch.float32) if base else None
    reference = in_4_bits(checkpoint, stored, torch.device("cuda")) if stored else None
    by_peft = loss_by_peft(checkpoint, final, data_dir / "val.jsonl", reference)
    assert report(final)["val_loss"] == pytest.approx(by_peft, rel=1e-5 if precision == "32-true" else 1e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("name", PAGED)
def test_gpu_has_every_optimizer_of_bitsandbytes(tiny, data_dir, tmp_path, name):
    flags = ["--train.epochs", 3, "--train.learning_rate", 1e-3]
    losses = [report(finetune(tiny, data_dir, tmp_path / n, *flags, "--optimizer", n)) for n in ("AdamW", name)]
    assert losses[1]["val_loss"] == pytest.approx(losses[0]["val_loss"], rel=1e-2)
