"""A run that is killed at any moment and resumed equals the unbroken one, bit for bit."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
import torch
from helpers.processes import children, wait_until_received
from helpers.runs import QUERY_VALUE
from safetensors.torch import load_file

from litlora.utils.locks import LOCK

ROOT = Path(__file__).parents[2]
TIMING = ("tokens_per_second", "memory_gb")
STEPS = 24


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Return a data folder with a few of pico's rows."""
    folder = tmp_path_factory.mktemp("few")
    for name, count in (("train", STEPS * 2), ("val", 8)):
        rows = (ROOT / f"data/pico/{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(rows[:count]), encoding="utf-8")
    return folder


def command(data_dir: Path, out_dir: Path) -> list[str]:
    folders = ["--checkpoint_dir", ROOT / "checkpoints/pico", "--data_dir", data_dir, "--out_dir", out_dir]
    settings = "--precision 32-true --lora_dropout 0.1 --train.global_batch_size 4 --train.epochs 2"
    more = "--train.save_interval 3 --train.save_total_limit 2 --eval.interval 5 --eval.keep_best true"
    rate = "--train.learning_rate 1e-2 --eval.max_new_tokens 4"
    return ["finetune_lora", *map(str, folders), *QUERY_VALUE, *settings.split(), *more.split(), *rate.split()]


@pytest.fixture(scope="module")
def unbroken(runs, few, tmp_path_factory) -> tuple[Path, float]:
    """Return the folder of a run that was not killed, and the seconds that it took."""
    out_dir = tmp_path_factory.mktemp("unbroken") / "out"
    start = time.monotonic()
    runs.start(command(few, out_dir))
    assert runs.wait() == 0, runs.stderr.read_text()
    return out_dir, time.monotonic() - start


def rows(out_dir: Path) -> list[dict[str, str]]:
    with (out_dir / "metrics.csv").open() as file:
        return [{name: value for name, value in row.items() if name not in TIMING} for row in csv.DictReader(file)]


def assert_same_result(out_dir: Path, other: Path) -> None:
    ours, theirs = (load_file(folder / "final/adapter_model.safetensors") for folder in (out_dir, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert rows(out_dir) == rows(other)
    assert names(out_dir) == names(other)


def names(out_dir: Path) -> set[str]:
    """Return what a run leaves beside its checkpoints; a killed one cannot remove its lock."""
    return {path.name for path in out_dir.iterdir() if not path.name.startswith("step-")} - {LOCK}


def wait_until_saving(out_dir: Path, running: int) -> None:
    """Return while a checkpoint is being written, or the run is over."""
    while not any(out_dir.glob(".*.partial")) and Path(f"/proc/{running}").exists():
        time.sleep(0.0002)


@pytest.mark.parametrize(("number", "kills"), [(signal.SIGKILL, 12), (signal.SIGTERM, 8)])
def test_run_killed_at_random_moments_equals_the_unbroken_one(runs, unbroken, few, tmp_path, number, kills):
    expected, seconds = unbroken
    out_dir, random, killed, finished = tmp_path / "out", Random(number), 0, 0
    while killed < kills or not finished:
        resume = ["--resume", "true"] if out_dir.exists() else []
        running = runs.start(command(few, out_dir) + resume)
        if killed < kills:
            if killed % 2:
                wait_until_saving(out_dir, running)
                time.sleep(random.uniform(0, 0.02))
            else:
                time.sleep(random.uniform(0, 0.6 * seconds))
            with suppress(ProcessLookupError):
                os.kill(running, number)
        code = runs.wait()
        if (out_dir / "final").exists():
            assert_same_result(out_dir, expected)
            shutil.rmtree(out_dir)
            finished += 1
        if code != 0:
            assert code in (-number, 128 + number), runs.stderr.read_text()
            killed += 1


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_process_can_be_resumed(runs, unbroken, few, tmp_path, number):
    out_dir = tmp_path / "out"
    env = os.environ | {"PYTHONPATH": str(ROOT), "GATE": str(tmp_path / "go"), "OMP_NUM_THREADS": "1"}
    line = [sys.executable, "tests/helpers/gate.py", *command(few, out_dir)]
    process = subprocess.Popen(line, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)
    while not (out_dir / "step-000003").exists() and process.poll() is None:
        time.sleep(0.001)
    (training,) = children(process.pid) or [process.pid]
    process.send_signal(number)
    if number != signal.SIGKILL:
        wait_until_received(number, training)
    (tmp_path / "go").touch()
    _, stderr = process.communicate()
    if number == signal.SIGKILL:
        assert process.returncode == -number
    else:
        assert process.returncode == 128 + number
        *_, sentence = stderr.splitlines()
        report = (
            rf"litlora: stopped by {number.name} after step (\d+) of {STEPS}, which is saved in {out_dir}/step-0000\d\d"
        )
        assert re.fullmatch(rf"{report}; resume with the same command and --resume true", sentence)
    runs.start([*command(few, out_dir), "--resume", "true"])
    assert runs.wait() == 0, runs.stderr.read_text()
    assert_same_result(out_dir, unbroken[0])


def test_too_little_memory_is_found_before_the_first_step(runs, tmp_path):
    sizes = ["--train.micro_batch_size", "512", "--train.global_batch_size", "512"]
    sizes += ["--train.micro_batch_tokens", "null"]
    sizes += ["--mask_prompt", "false"]  # or these rows would share most of their tokens as prefixes
    for split in ("train", "val"):
        shutil.copy(ROOT / f"data/pico/{split}.jsonl", tmp_path)
    runs.start([*command(tmp_path, tmp_path / "out"), *sizes], headroom=1_000_000_000)
    assert runs.wait() == 1
    *_, sentence = runs.stderr.read_text().splitlines()
    fault = r"litlora: there is too little memory for the longest micro-batch, examples: 512, tokens: [\d,]+"
    needs = r", which needs about (\d\.\d) GB"
    way = rf"lower --train.micro_batch_size \(512\) to (256|128|64){needs}"
    match = re.fullmatch(f"{fault}{needs}; {way}, or pass --train.activation_checkpointing true{needs}", sentence)
    assert match, sentence
    full, lowered, checkpointed = (float(match[group]) for group in (1, 3, 4))
    assert full > 1.0 > lowered, sentence
    assert full > checkpointed
    assert not (tmp_path / "out").exists()


def test_too_little_memory_for_two_concurrent_micro_batches(runs, tmp_path):
    sizes = ["--train.micro_batch_size", "256", "--train.global_batch_size", "512", "--mask_prompt", "false"]
    sizes += ["--train.micro_batch_tokens", "null"]
    for split in ("train", "val"):
        shutil.copy(ROOT / f"data/pico/{split}.jsonl", tmp_path)
    runs.start_all([*command(tmp_path, tmp_path / "out"), *sizes], [{"CORES": "2"}], headroom=1_000_000_000)
    assert runs.wait() == 1
    *_, sentence = runs.stderr.read_text().splitlines()
    needs = r", which needs about (\d\.\d) GB"
    fault = rf"too little memory for 2 times the longest micro-batch, examples: 256, tokens: [\d,]+{needs}"
    ways = rf"; lower --train.micro_batch_size \(256\) to \d+{needs}, or pass --train.parallel_micro_batches 1{needs}, "
    match = re.search(fault + ways, sentence)
    assert match, sentence
    both, lowered, alone = map(float, match.groups())
    assert both > 1.0 > lowered
    assert both > alone
    assert not (tmp_path / "out").exists()


def test_memory_that_runs_out_later_is_reported_in_one_sentence(runs, few, tmp_path):
    sizes = "--lora_r 16384 --train.micro_batch_size 1 --train.global_batch_size 2 --eval.initial_validation false"
    arguments = [*command(few, tmp_path / "out"), *sizes.split(), "--train.micro_batch_tokens", "null"]
    runs.start_all(arguments, [{"ANY_RANK": "1"}], headroom=1_100_000_000)  # all but for AdamW's state
    assert runs.wait() == 1
    *_, sentence = runs.stderr.read_text().splitlines()
    hint = "free some, or lower --train.micro_batch_size (1), and resume by --resume true"
    fault = "there is no longer enough memory after step 0; what is saved so far stays"
    assert sentence == f"litlora: {fault}: {hint}"
