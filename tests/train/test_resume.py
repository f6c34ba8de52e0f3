"""Resuming a run: from which checkpoint, with which settings, and what it leaves."""

import json
import os
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from helpers.runs import QUERY_VALUE, WEIGHTS, metrics, report
from helpers.runs import same_adapter as same
from safetensors.torch import load_file, save_file

import litlora
from litlora.__main__ import main
from litlora.args.finetune import FinetuneLoraArgs, TrainArgs
from litlora.cli.parser import parse
from litlora.commands.early_checks import check_early
from litlora.errors import RESUME, LitLoraError
from litlora.report.files import read_settings
from litlora.train.resume import TOKENIZATION, Identity
from litlora.train.settled import automatic_rate
from litlora.utils.locks import locked


@pytest.fixture
def world(tiny, data_dir, tmp_path, monkeypatch) -> None:
    shutil.copytree(tiny, tmp_path / "base")
    shutil.copytree(data_dir, tmp_path / "data")
    monkeypatch.chdir(tmp_path)


OVERFITTING = ["--lora_head", "true", "--train.learning_rate", 0.1, "--eval.interval", 1]


@pytest.fixture
def contradicting(world) -> None:
    """Have the validation split contradict the training split.

    The sooner a model is sure of the responses to train on, the higher is the loss of the others: with OVERFITTING, it
    rises from that of a guess by several nats within the first epoch, whatever rounding does.
    """
    for name, response in (("train", "a"), ("val", "b")):
        rows = [{"instruction": f"Write {n}.", "input": "", "output": response * 12} for n in range(16)]
        Path(f"data/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def stopped(world) -> None:
    """Leave a run of two steps out of the four of an epoch, with both of its checkpoints."""
    assert run("--train.max_steps", 2) == 0
    shutil.rmtree("out/final")


def command(*flags: object, out: str = "out") -> list[str]:
    folders = ["--checkpoint_dir", "base", "--data_dir", "data", "--out_dir", out]
    settings = "--precision 32-true --lora_dropout 0.1 --train.learning_rate 1e-2 --eval.max_new_tokens 0"
    sizes = "--train.global_batch_size 4 --train.save_interval 1"
    return ["finetune_lora", *folders, *settings.split(), *sizes.split(), *map(str, flags)]


def run(*flags: object, out: str = "out") -> int:
    return main(command(*flags, out=out))


def steps(out_dir: str = "out") -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in Path(out_dir).glob("step-*"))


def refusal(capsys, *flags: object, out: str = "out") -> str:
    """Return the sentence that refuses a run, which must leave all files as they are."""
    before = {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")}
    capsys.readouterr()
    assert run(*flags, out=out) == 1
    assert {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")} == before
    return capsys.readouterr().err


def other_run(was: str, checkpoint: str = "out/step-000002") -> str:
    hint = "resume with the settings of that run, or start a new one in another --out_dir"
    return f"litlora: --resume {checkpoint} would not continue the same run: {was}; {hint}\n"


def test_changed_settings_are_refused_by_name(stopped, capsys):
    changed = ["--lora_alpha", 64, "--seed", 1, "--prompt_style", "none", "--eval.max_iters", 1]
    was = "--lora_alpha was 32 and is 64, --prompt_style was alpaca and is none, --eval.max_iters was null and is 1, "
    was += "--seed was 1337 and is 1, the rows or the tokenizer of train.jsonl have changed, "
    was += "the rows or the tokenizer of val.jsonl have changed"
    assert refusal(capsys, "--resume", "true", "--train.max_steps", 2, *changed) == other_run(was)


def test_an_automatic_rate_is_recorded_and_resumed_as_its_number(world, capsys):
    automatic = ["--train.learning_rate", "auto"]
    assert run("--train.max_steps", 1, *automatic) == 0
    hidden_size = json.loads(Path("base/config.json").read_text(encoding="utf-8"))["hidden_size"]
    rate = automatic_rate(hidden_size)
    assert f"--train.learning_rate auto is {rate:g}: " in capsys.readouterr().err
    assert read_settings(Path("out"))["train"]["learning_rate"] == rate
    shutil.rmtree("out/final")
    assert run("--resume", "true", "--train.max_steps", 2, "--train.learning_rate", rate) == 0
    shutil.rmtree("out/final")
    resumed = command("--resume", "true", "--train.max_steps", 3, *automatic)
    check_early(parse(resumed).args)
    assert main(resumed) == 0


def test_a_run_of_an_earlier_version_goes_on_with_its_defaults(world, capsys):
    former = [*QUERY_VALUE, "--train.learning_rate", 2e-4]
    assert run("--train.max_steps", 1, *former) == 0
    shutil.rmtree("out/final")
    resumed = command("--resume", "true", "--train.max_steps", 2, "--train.learning_rate", "auto")
    check_early(parse(resumed).args)
    capsys.readouterr()
    assert main(resumed) == 0
    assert "the run began with other defaults, and resumes with them: --lora_r 8, " in capsys.readouterr().err
    config = json.loads(Path("out/final/adapter_config.json").read_text(encoding="utf-8"))
    assert (config["r"], sorted(config["target_modules"])) == (8, ["q_proj", "v_proj"])
    assert read_settings(Path("out"))["train"]["learning_rate"] == 2e-4


def test_fewer_steps_are_refused(stopped, capsys):
    was = "--train.max_steps was 2 and is 1"
    assert refusal(capsys, "--resume", "true", "--train.max_steps", 1) == other_run(was)


def test_other_rows_are_refused(stopped, capsys):
    rows = Path("data/train.jsonl").read_text(encoding="utf-8")
    Path("data/train.jsonl").write_text(rows.replace("green", "blue"), encoding="utf-8")
    assert refusal(capsys, "--resume", "true") == other_run("the rows of train.jsonl have changed")


def test_tokens_of_an_earlier_version_are_named(stopped, capsys):
    """Such a run resumes where its tokens are the same, and is told why where they are not."""
    path = Path("out/step-000002/run.json")
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["contents"]["ids"]
    name = "the rows or the tokenizer of train.jsonl"
    identity = Identity(content["settings"], content["contents"] | TOKENIZATION)
    path.write_text(json.dumps(content), encoding="utf-8")
    identity.check(path.parent)
    content["contents"][name] = "train-of-other-ids"
    path.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(LitLoraError) as error:
        identity.check(path.parent)
    was = f"{name} have changed (an earlier version of litlora tokenized them by tokenizer_class, "
    assert (
        str(error.value) == other_run(f"{was}this one follows the tokenizer's file)").removeprefix("litlora: ").strip()
    )


def test_another_base_is_refused(stopped, capsys):
    weights = load_file("base/model.safetensors")
    save_file(weights | {"model.norm.weight": torch.full((32,), 2.0)}, "base/model.safetensors", {"format": "pt"})
    assert refusal(capsys, "--resume", "true") == other_run(
        "the base's weights have changed (model.norm.weight differs)"
    )


def test_settings_without_effect_on_the_result_may_change(world):
    assert run() == 0
    shutil.copytree("out", "again")
    shutil.rmtree("again/final")
    for late in (3, 4):
        shutil.rmtree(f"again/step-00000{late}")
    shutil.move("base", "moved")
    flags = ["--train.save_interval", 2, "--train.activation_checkpointing", "true", "--checkpoint_dir", "moved"]
    assert run("--resume", "true", *flags, out="again") == 0
    assert same("out/final", "again/final")
    assert steps("again") == [1, 2, 4]


def test_more_epochs_resume_a_finished_run_with_overwrite(world, capsys):
    assert run() == 0
    more = ["--resume", "true", "--train.epochs", 2]
    hint = "choose another, or replace it by --overwrite true"
    assert refusal(capsys, *more) == f"litlora: --out_dir (out) holds a finished run: {hint}\n"
    first = metrics("out")
    assert run(*more, "--overwrite", "true") == 0
    assert report("out/final")["steps"] == 8
    assert metrics("out")[:5] == first
    assert [row["step"] for row in metrics("out")[5:]] == ["5", "6", "7", "8"]


def test_run_killed_before_its_report_writes_the_same_one(world):
    assert run() == 0
    val_loss = report("out/final")["val_loss"]
    shutil.move("out/final", "first")
    assert run("--resume", "true") == 0
    assert same("out/final", "first")
    assert report("out/final")["val_loss"] == val_loss


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["training_state.safetensors", WEIGHTS, "run.json", "manifest.json"])
@pytest.mark.parametrize("corrupt", [cut, flip, Path.unlink])
def test_corrupt_checkpoint_is_skipped(stopped, capsys, name, corrupt):
    if (name, corrupt) == ("manifest.json", flip):
        corrupt = cut  # its last byte is a line end, and any other would do as well
    corrupt(Path("out/step-000002", name))
    capsys.readouterr()
    assert run("--resume", "true", "--train.max_steps", 2) == 0
    assert capsys.readouterr().err.startswith("out/step-000002 is corrupt and skipped: ")
    assert [row["step"] for row in metrics("out")] == ["0", "1", "2"]


def test_named_corrupt_checkpoint_is_refused(stopped, capsys):
    flip(Path("out/step-000002", WEIGHTS))
    fault = f"is corrupt ({WEIGHTS} differs from its entry in manifest.json); name another, or pass --resume true"
    assert refusal(capsys, "--resume", "out/step-000002") == f"litlora: --resume: out/step-000002 {fault}\n"


def test_run_without_an_intact_checkpoint_is_refused(stopped, capsys):
    for step in (1, 2):
        cut(Path(f"out/step-00000{step}", WEIGHTS))
    *_, sentence = refusal(capsys, "--resume", "true").splitlines()
    assert sentence == "litlora: --resume: no checkpoint in out is intact; start again with --overwrite true"


def test_run_killed_before_its_first_checkpoint_starts_again(stopped, capsys):
    for step in (1, 2):
        shutil.rmtree(f"out/step-00000{step}")
    assert run("--resume", "true", "--train.max_steps", 1) == 0
    assert "there is no checkpoint in out yet: starting at the first step\n" in capsys.readouterr().err
    assert [row["step"] for row in metrics("out")] == ["0", "1"]


def test_checkpoints_are_in_the_order_of_their_numbers(stopped, capsys):
    shutil.copytree("out/step-000002", "out/step-1000000")
    shutil.copytree("out/step-000002", "out/step-999999")
    cut(Path("out/step-1000000", WEIGHTS))
    capsys.readouterr()
    assert run("--resume", "true", "--train.max_steps", 2) == 0
    assert capsys.readouterr().err.startswith("out/step-1000000 is corrupt and skipped: ")
    assert steps() == [1, 2]


def test_named_checkpoint_resumes_in_another_folder(world):
    assert run() == 0
    assert run("--resume", "out/step-000002", out="elsewhere") == 0
    assert same("out/final", "elsewhere/final")
    assert steps("elsewhere") == [3, 4]
    timeless = [[value for name, value in row.items() if name not in ("tokens_per_second", "memory_gb")]
                for out_dir in ("out", "elsewhere") for row in metrics(out_dir)]  # fmt: skip
    assert timeless[:5] == timeless[5:]


def test_later_checkpoints_than_the_named_one_are_removed(stopped):
    assert run("--resume", "out/step-000001", "--train.save_interval", 4) == 0
    assert steps() == [1, 4]


def test_existing_run_is_replaced_only_with_overwrite(stopped, capsys):
    hint = "choose another, resume it by --resume true, or replace it by --overwrite true"
    assert refusal(capsys) == f"litlora: --out_dir (out) holds a run already: {hint}\n"
    Path("out/mine.txt").touch()
    assert run("--overwrite", "true", "--lora_r", 2, "--train.save_interval", 3) == 0
    assert steps() == [3]
    assert {path.name for path in Path("out").iterdir()} == {
        "hyperparameters.yaml", "metrics.csv", "step-000003", "final", "mine.txt",
    }  # fmt: skip


def test_an_out_dir_in_use_is_refused(stopped, capsys):
    with locked(Path("out"), "--out_dir"):
        hint = "wait for its end, or choose another folder"
        assert refusal(capsys, "--resume", "true") == f"litlora: --out_dir (out) is in use by another run: {hint}\n"


def test_only_the_newest_checkpoints_and_the_best_remain(contradicting):
    flags = [*OVERFITTING, "--train.epochs", 2, "--train.save_total_limit", 2]
    assert run(*flags) == 0
    losses = [float(row["val_loss"]) for row in metrics("out")[1:]]
    best = losses.index(min(losses)) + 1
    assert steps() == sorted({best, 7, 8})
    assert best < 7


def test_final_adapter_is_the_best_with_keep_best(contradicting):
    flags = [*OVERFITTING, "--train.epochs", 2]
    assert run(*flags, "--eval.keep_best", "true") == 0
    losses = [float(row["val_loss"]) for row in metrics("out")[1:]]
    best = losses.index(min(losses)) + 1
    assert best < 8
    assert same("out/final", f"out/step-00000{best}")
    assert report("out/final")["val_loss"] == min(losses)
    for late in range(best + 1, 9):
        shutil.rmtree(f"out/step-00000{late}")
    shutil.move("out/final", "first")
    assert run(*flags, "--eval.keep_best", "true", "--resume", "true") == 0
    assert same("out/final", "first")


def test_patience_ends_a_run_that_gets_no_better(contradicting, capsys):
    flags = [*OVERFITTING, "--train.epochs", 4, "--eval.patience", 2]
    assert run(*flags) == 0
    losses = [float(row["val_loss"]) for row in metrics("out")[1:]]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 < 16
    expected = f"stopped early after step {best + 2}: no validation has been better than that of step {best} "
    assert expected + f"({min(losses):.4f})" in capsys.readouterr().err
    shutil.rmtree("out/final")
    assert run(*flags, "--resume", "true") == 0
    assert len(metrics("out")) == best + 3


def test_resume_auto_starts_resumes_or_leaves_a_finished_run_alone(world, capsys):
    auto = ["--resume", "auto"]
    assert run(*auto, "--train.max_time", 0.001) == 124
    assert steps() == [1]
    assert run(*auto, "--train.save_interval", 9) == 0
    assert [row["step"] for row in metrics("out")] == ["0", "1", "2", "3", "4"]
    before = {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")}
    capsys.readouterr()
    assert run(*auto) == 0
    assert capsys.readouterr().err.splitlines()[0] == "the run in out is finished: adapter in out/final"
    assert {path: path.stat().st_mtime_ns for path in Path("out").rglob("*")} == before
    changes = "--lora_alpha was 32 and is 64, --train.epochs was 1 and is 2"
    hint = "choose another, or resume it by --overwrite true"
    sentence = refusal(capsys, *auto, "--train.epochs", 2, "--lora_alpha", 64)
    assert sentence == f"litlora: --out_dir (out) holds a finished run: {changes}; {hint}\n"
    assert run(*auto, "--train.epochs", 2, "--overwrite", "true") == 0
    assert [row["step"] for row in metrics("out")] == [*"012345678"]


def test_finetune_returns_its_report(world):
    args = litlora.FinetuneLoraArgs(
        Path("base"), Path("data"), Path("out"), train=TrainArgs(epochs=9, max_steps=6), precision="32-true",
        resume="auto",
    )  # fmt: skip
    made = litlora.finetune(args)
    assert made.steps == 6
    assert made._repr_png_() == Path("out/final/loss.png").read_bytes()  # what a notebook shows
    assert made.figures() == report("out/final")
    assert made.final == Path("out/final")
    again = litlora.finetune(args)
    assert again == made
    assert again.final == made.final
    with pytest.raises(LitLoraError, match="needs a process for each"):
        litlora.finetune(replace(args, devices=2))
    with pytest.raises(LitLoraError, match="dry_run"):
        litlora.finetune(replace(args, dry_run=True))


def test_folders_may_be_texts():
    assert FinetuneLoraArgs("base", "data", "out", resume="auto") == FinetuneLoraArgs(
        Path("base"), Path("data"), Path("out"), resume="auto"
    )
    assert FinetuneLoraArgs("base", "data", resume="out/step-000001").resume == Path("out/step-000001")


def test_loss_of_each_source_is_reported(world, capsys):
    for name, letter in (("one", "a"), ("two", "b")):
        rows = [{"instruction": f"Write {n}.", "output": letter * n} for n in range(1, 9)]
        Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sources = ["--source", "one.jsonl", "--source", "two.jsonl"]
    assert main(["prepare_json", *sources, "--destination_path", "mixed", "--val_split_fraction", "0.5"]) == 0
    flags = ["--data_dir", "mixed", "--train.max_steps", 2, "--eval.keep_best", "true"]
    assert run(*flags) == 0
    losses = report("out/final")["val_loss_by_source"]
    assert losses.keys() == {"one.jsonl", "two.jsonl"}
    printed = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
    err = capsys.readouterr().err
    assert f"validation loss by source: {printed}\n" in err
    assert f"step 2: validation loss {report('out/final')['val_loss']:.4f} ({printed})\n" in err
    assert f"<td>one.jsonl</td><td>{losses['one.jsonl']:.4f}" in Path("out/final/report.html").read_text()
    shutil.rmtree("out/final")
    assert run(*flags, "--resume", "true") == 0
    assert report("out/final")["val_loss_by_source"] == losses


def test_run_out_of_time_saves_and_resumes(world, capsys):
    assert run("--train.save_interval", 9) == 0
    assert run("--train.save_interval", 9, "--train.max_time", 0.001, out="parts") == 124
    expected = "litlora: stopped after --train.max_time (0.001 seconds) after step 1 of 4, which is saved in "
    assert capsys.readouterr().err.endswith(f"{expected}parts/step-000001; {RESUME}\n")
    assert run("--train.save_interval", 9, "--resume", "true", out="parts") == 0
    assert same("out/final", "parts/final")


def renew_manifest(checkpoint: Path) -> None:
    """Renew the manifest of a checkpoint, so that it counts as intact."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest:
        content = (checkpoint / name).read_bytes()
        manifest[name] = {"size": len(content), "sha256": sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_state_of_another_optimizer_is_refused(stopped, capsys):
    checkpoint = Path("out/step-000002")
    (checkpoint / "training_state.json").write_text(json.dumps({"progress": {"nonsense": 1}, "optimizer": {}}))
    renew_manifest(checkpoint)
    assert "out/step-000002 holds no training state of this optimizer: " in refusal(capsys, "--resume", "true")


def test_state_of_another_shape_is_refused(stopped, capsys):
    path = Path("out/step-000002/training_state.safetensors")
    state = load_file(path)
    shape = [*state["optimizer.0.exp_avg"].shape]
    save_file(state | {"optimizer.0.exp_avg": torch.zeros(1)}, path)
    renew_manifest(path.parent)
    expected = f"of this optimizer: optimizer.0.exp_avg has the shape [1] instead of {shape}\n"
    assert refusal(capsys, "--resume", "true").endswith(expected)


def test_setting_unknown_to_the_version_that_began_the_run_had_its_default(tmp_path):
    """A run that an older version began resumes, unless a newer setting makes it another run."""
    args = FinetuneLoraArgs(Path("base"), Path("data"))
    current = Identity.of(args, {})
    Identity({name: value for name, value in current.settings.items() if name != "lora_init"}, {}).write(tmp_path)
    current.check(tmp_path)
    with pytest.raises(LitLoraError, match="--lora_init was zero and is fisher"):
        Identity.of(replace(args, lora_init="fisher", quantize="bnb.nf4"), {}).check(tmp_path)
