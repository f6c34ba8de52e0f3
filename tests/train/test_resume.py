"""Going on with a run: from which checkpoint, with which settings, and what it leaves."""

import csv
import json
import os
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from litlora.__main__ import main
from litlora.args import FinetuneLoraArgs
from litlora.errors import RESUME, LitLoraError
from litlora.train.resume import Identity
from litlora.utils.locks import locked

WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def world(tiny, data_dir, tmp_path, monkeypatch) -> None:
    shutil.copytree(tiny, tmp_path / "base")
    shutil.copytree(data_dir, tmp_path / "data")
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def stopped(world) -> None:
    """Leave a run of two steps out of the four of an epoch, with both of its checkpoints."""
    assert run("--train.max_steps", 2) == 0
    shutil.rmtree("out/final")


def run(*flags: object, out: str = "out") -> int:
    folders = ["--checkpoint_dir", "base", "--data_dir", "data", "--out_dir", out]
    settings = "--precision 32-true --lora_dropout 0.1 --train.learning_rate 1e-2 --eval.max_new_tokens 0"
    sizes = "--train.global_batch_size 4 --train.save_interval 1"
    return main(["finetune_lora", *folders, *settings.split(), *sizes.split(), *map(str, flags)])


def adapter(folder: str) -> dict[str, torch.Tensor]:
    return load_file(f"{folder}/{WEIGHTS}")


def same(folder: str, other: str) -> bool:
    ours, theirs = adapter(folder), adapter(other)
    return all(torch.equal(ours[name], theirs[name]) for name in theirs)


def metrics(out_dir: str = "out") -> list[dict[str, str]]:
    with Path(out_dir, "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def steps(out_dir: str = "out") -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in Path(out_dir).glob("step-*"))


def refusal(capsys, *flags: object, out: str = "out") -> str:
    """Return the sentence by which a run is refused that must leave everything as it is."""
    before = {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")}
    capsys.readouterr()
    assert run(*flags, out=out) == 1
    assert {path: path.stat().st_mtime_ns for path in Path(out).rglob("*")} == before
    return capsys.readouterr().err


def other_run(was: str, checkpoint: str = "out/step-000002") -> str:
    hint = "go on with what it was started with, or start anew in another --out_dir"
    return f"litlora: --resume {checkpoint} would not continue the same run: {was}; {hint}\n"


def test_settings_that_change_the_result_are_refused_by_name(stopped, capsys):
    changed = ["--lora_alpha", 32, "--seed", 1, "--prompt_style", "none", "--eval.max_iters", 1]
    was = "--lora_alpha was 16 and is 32, --prompt_style was alpaca and is none, --eval.max_iters was null and is 1, "
    was += "--seed was 1337 and is 1, the rows or the tokenizer of train.jsonl have changed, "
    was += "the rows or the tokenizer of val.jsonl have changed"
    assert refusal(capsys, "--resume", "true", "--train.max_steps", 2, *changed) == other_run(was)


def test_fewer_steps_are_refused(stopped, capsys):
    was = "--train.max_steps was 2 and is 1"
    assert refusal(capsys, "--resume", "true", "--train.max_steps", 1) == other_run(was)


def test_other_rows_are_refused(stopped, capsys):
    rows = Path("data/train.jsonl").read_text(encoding="utf-8")
    Path("data/train.jsonl").write_text(rows.replace("green", "blue"), encoding="utf-8")
    was = "the rows or the tokenizer of train.jsonl have changed"
    assert refusal(capsys, "--resume", "true") == other_run(was)


def test_another_base_is_refused(stopped, capsys):
    weights = load_file("base/model.safetensors")
    save_file(weights | {"model.norm.weight": torch.full((32,), 2.0)}, "base/model.safetensors", {"format": "pt"})
    assert refusal(capsys, "--resume", "true") == other_run("the base's weights have changed")


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


def test_more_epochs_go_on_and_a_finished_run_is_replaced_only_when_asked(world, capsys):
    assert run() == 0
    more = ["--resume", "true", "--train.epochs", 2]
    hint = "choose another, or replace it by --overwrite true"
    assert refusal(capsys, *more) == f"litlora: --out_dir (out) holds a finished run: {hint}\n"
    first = metrics()
    assert run(*more, "--overwrite", "true") == 0
    assert json.loads(Path("out/final/report.json").read_text())["steps"] == 8
    assert metrics()[:5] == first
    assert [row["step"] for row in metrics()[5:]] == ["5", "6", "7", "8"]


def test_a_run_that_was_killed_before_its_last_word_says_the_same(world):
    assert run() == 0
    report = Path("out/final/report.json").read_text()
    shutil.move("out/final", "first")
    assert run("--resume", "true") == 0
    assert same("out/final", "first")
    assert json.loads(Path("out/final/report.json").read_text())["val_loss"] == json.loads(report)["val_loss"]


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["training_state.safetensors", WEIGHTS, "run.json", "manifest.json"])
@pytest.mark.parametrize("spoil", [cut, flip, Path.unlink])
def test_a_damaged_checkpoint_is_left_out_for_the_newest_whole_one(stopped, capsys, name, spoil):
    if (name, spoil) == ("manifest.json", flip):
        spoil = cut  # its last byte is a line end, and any other would do as well
    spoil(Path("out/step-000002", name))
    capsys.readouterr()
    assert run("--resume", "true", "--train.max_steps", 2) == 0
    assert capsys.readouterr().err.startswith("out/step-000002 is damaged and left out: ")
    assert [row["step"] for row in metrics()] == ["0", "1", "2"]


def test_a_damaged_checkpoint_that_is_named_is_refused(stopped, capsys):
    flip(Path("out/step-000002", WEIGHTS))
    fault = f"is damaged ({WEIGHTS} differs from its entry in manifest.json); name another, or pass --resume true"
    assert refusal(capsys, "--resume", "out/step-000002") == f"litlora: --resume: out/step-000002 {fault}\n"


def test_a_run_without_one_whole_checkpoint_is_refused(stopped, capsys):
    for step in (1, 2):
        cut(Path(f"out/step-00000{step}", WEIGHTS))
    *_, sentence = refusal(capsys, "--resume", "true").splitlines()
    assert sentence == "litlora: --resume: no checkpoint in out is whole; start anew with --overwrite true"


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_again(stopped, capsys):
    for step in (1, 2):
        shutil.rmtree(f"out/step-00000{step}")
    assert run("--resume", "true", "--train.max_steps", 1) == 0
    assert "there is no checkpoint in out yet: starting at the first step\n" in capsys.readouterr().err
    assert [row["step"] for row in metrics()] == ["0", "1"]


def test_checkpoints_are_in_the_order_of_their_numbers(stopped, capsys):
    shutil.copytree("out/step-000002", "out/step-1000000")
    shutil.copytree("out/step-000002", "out/step-999999")
    cut(Path("out/step-1000000", WEIGHTS))
    capsys.readouterr()
    assert run("--resume", "true", "--train.max_steps", 2) == 0
    assert capsys.readouterr().err.startswith("out/step-1000000 is damaged and left out: ")
    assert steps() == [1, 2]


def test_a_named_checkpoint_may_go_on_in_another_folder(world):
    assert run() == 0
    assert run("--resume", "out/step-000002", out="elsewhere") == 0
    assert same("out/final", "elsewhere/final")
    assert steps("elsewhere") == [3, 4]
    timeless = [[value for name, value in row.items() if name not in ("tokens_per_second", "memory_gb")]
                for out_dir in ("out", "elsewhere") for row in metrics(out_dir)]  # fmt: skip
    assert timeless[:5] == timeless[5:]


def test_an_older_checkpoint_that_is_named_leaves_nothing_behind_it(stopped):
    assert run("--resume", "out/step-000001", "--train.save_interval", 4) == 0
    assert steps() == [1, 4]


def test_another_run_is_replaced_only_when_asked(stopped, capsys):
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


def test_only_the_newest_checkpoints_and_the_best_are_kept(world):
    growing = ["--lora_head", "true", "--train.learning_rate", 8, "--train.lr_warmup_steps", 8]  # and the loss with it
    flags = [*growing, "--train.epochs", 2, "--eval.interval", 1, "--train.save_total_limit", 2]
    assert run(*flags) == 0
    losses = [float(row["val_loss"]) for row in metrics()[1:]]
    best = losses.index(min(losses)) + 1
    assert steps() == sorted({best, 7, 8})
    assert best < 7


def test_the_final_adapter_is_the_best_one_when_asked(world):
    flags = ["--train.epochs", 2, "--train.learning_rate", 3, "--eval.interval", 1]
    assert run(*flags, "--eval.keep_best", "true") == 0
    losses = [float(row["val_loss"]) for row in metrics()[1:]]
    best = losses.index(min(losses)) + 1
    assert best < 8
    assert same("out/final", f"out/step-00000{best}")
    assert json.loads(Path("out/final/report.json").read_text())["val_loss"] == min(losses)
    for late in range(best + 1, 9):
        shutil.rmtree(f"out/step-00000{late}")
    shutil.move("out/final", "first")
    assert run(*flags, "--eval.keep_best", "true", "--resume", "true") == 0
    assert same("out/final", "first")


def test_patience_ends_a_run_that_gets_no_better(world, capsys):
    flags = ["--train.epochs", 4, "--train.learning_rate", 3, "--eval.interval", 1, "--eval.patience", 2]
    assert run(*flags) == 0
    losses = [float(row["val_loss"]) for row in metrics()[1:]]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 < 16
    said = f"stopped early after step {best + 2}: no validation has been better than that of step {best} "
    assert said + f"({min(losses):.4f})" in capsys.readouterr().err
    shutil.rmtree("out/final")
    assert run(*flags, "--resume", "true") == 0
    assert len(metrics()) == best + 3


def test_a_run_out_of_time_saves_and_can_be_gone_on_with(world, capsys):
    assert run("--train.save_interval", 9) == 0
    assert run("--train.save_interval", 9, "--train.max_time", 0.001, out="parts") == 124
    said = "litlora: stopped after --train.max_time (0.001 seconds) after step 1 of 4, which is saved in "
    assert capsys.readouterr().err.endswith(f"{said}parts/step-000001; {RESUME}\n")
    assert run("--train.save_interval", 9, "--resume", "true", out="parts") == 0
    assert same("out/final", "parts/final")


def renew_manifest(checkpoint: Path) -> None:
    """Have a checkpoint pass for whole whatever was done to its files."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for name in manifest:
        content = (checkpoint / name).read_bytes()
        manifest[name] = {"size": len(content), "sha256": sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def test_a_state_of_another_optimizer_is_refused(stopped, capsys):
    checkpoint = Path("out/step-000002")
    (checkpoint / "training_state.json").write_text(json.dumps({"progress": {"nonsense": 1}, "optimizer": {}}))
    renew_manifest(checkpoint)
    assert "out/step-000002 holds no training state of this optimizer: " in refusal(capsys, "--resume", "true")


def test_a_state_of_another_shape_is_refused(stopped, capsys):
    path = Path("out/step-000002/training_state.safetensors")
    state = load_file(path)
    shape = [*state["optimizer.0.exp_avg"].shape]
    save_file(state | {"optimizer.0.exp_avg": torch.zeros(1)}, path)
    renew_manifest(path.parent)
    said = f"of this optimizer: optimizer.0.exp_avg is of the shape [1] and not {shape}\n"
    assert refusal(capsys, "--resume", "true").endswith(said)


def test_setting_unknown_to_the_version_that_began_the_run_had_its_default(tmp_path):
    """A run that an older version began resumes, unless a newer setting makes it another run."""
    args = FinetuneLoraArgs(Path("base"), Path("data"))
    current = Identity.of(args, {})
    Identity({name: value for name, value in current.settings.items() if name != "lora_init"}, {}).write(tmp_path)
    current.check(tmp_path)
    with pytest.raises(LitLoraError, match="--lora_init was zero and is fisher"):
        Identity.of(replace(args, lora_init="fisher", quantize="bnb.nf4"), {}).check(tmp_path)
