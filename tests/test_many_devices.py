"""Several processes train one adapter: what comes out is what one of them would have made, and none is left waiting."""

import csv
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from litlora.__main__ import main
from litlora.checkpoint import load_model
from litlora.quantize import Quantization

ROOT = Path(__file__).parent.parent
HEAD = ["--lora_head", "true"]
NF4 = ["--quantize", "bnb.nf4"]


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Return data of so few rows that the last global batch of an epoch has two, and four processes share them."""
    folder = tmp_path_factory.mktemp("few")
    for name, count in (("train", 22), ("val", 9)):
        rows = (ROOT / f"data/pico/{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(rows[:count]), encoding="utf-8")
    return folder


def arguments(data_dir: Path, out_dir: Path, *flags: object) -> list[str]:
    folders = ["--checkpoint_dir", ROOT / "checkpoints/pico", "--data_dir", data_dir, "--out_dir", out_dir]
    settings = "--precision 32-true --lora_dropout 0 --train.global_batch_size 5 --train.max_steps 10 --train.epochs 2"
    more = "--train.learning_rate 2e-3 --train.micro_batch_size 2 --eval.max_new_tokens 0"
    return ["finetune_lora", *map(str, folders), *settings.split(), *more.split(), *map(str, flags)]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=120)


@pytest.fixture(scope="module")
def alone(few, tmp_path_factory):
    """Return a function that gives the folder of the run of one process with these flags."""
    made: dict[tuple[str, ...], Path] = {}

    def get(*flags: str) -> Path:
        if flags not in made:
            made[flags] = tmp_path_factory.mktemp("alone") / "out"
            assert main(arguments(few, made[flags], *flags)) == 0
        return made[flags]

    return get


def assert_same(one: Path, other: Path) -> None:
    """Check that two runs have made one adapter, and say the same of it."""
    ours, theirs = (load_file(folder / "final/adapter_model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-5
    reports = [json.loads((folder / "final/report.json").read_text()) for folder in (one, other)]
    for name in ("steps", "tokens", "supervised_tokens", "trainable_parameters"):
        assert reports[0][name] == reports[1][name]
    rows = [list(csv.DictReader((folder / "metrics.csv").read_text().splitlines())) for folder in (one, other)]
    for row, same in zip(*rows, strict=True):
        for name in ("loss", "val_loss", "grad_norm"):
            assert (row[name] == same[name] == "") or float(row[name]) == pytest.approx(float(same[name]), rel=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize(("devices", "flags"), [(2, (*HEAD, *NF4)), (4, tuple(HEAD))])
def test_any_number_of_devices_makes_the_same_adapter_and_one_of_them_talks(
    alone, few, tmp_path, devices, flags, strategy
):
    placed = "--devices", devices, "--strategy", strategy
    done = run("-m", "litlora", *arguments(few, tmp_path / "out", *placed, *flags))
    assert done.returncode == 0, done.stderr
    assert_same(alone(*flags), tmp_path / "out")
    assert done.stdout == ""
    assert done.stderr.count("trainable parameters over") == done.stderr.count("adapter in") == 1
    assert "Warning" not in done.stderr


SMALL = ["--quantize", "bnb.nf4-dq", "--train.activation_checkpointing", "true", "--train.save_interval", "6"]


@pytest.fixture(scope="module")
def gone_on(few, alone, tmp_path_factory) -> Path:
    """Return a folder with a run that one process has begun and two went on with, and what each of these held."""
    folder = tmp_path_factory.mktemp("gone_on")
    shutil.copytree(alone(*SMALL), folder / "out", ignore=shutil.ignore_patterns("final"))
    started = ["-m", "torch.distributed.run", "--nproc_per_node", "2", ROOT / "tests/holding.py", folder]
    flags = [*SMALL, "--strategy", "fsdp", "--resume", "true", "--eval.max_new_tokens", "3"]
    done = run(*map(str, started), *arguments(few, folder / "out", *flags))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("  -> ") == 1  # the answer that all have computed
    return folder


def test_a_run_of_one_device_goes_on_with_a_base_dealt_to_two(alone, gone_on):
    assert_same(alone(*SMALL), gone_on / "out")


def test_each_device_holds_its_part_of_a_sharded_base_and_no_more(gone_on):
    quantization = Quantization("bnb.nf4-dq", torch.float32)
    base = load_model(ROOT / "checkpoints/pico", torch.float32, torch.device("cpu"), quantization)
    whole = sum(weight.nbytes for weight in base.parameters())
    held = [int((gone_on / rank).read_text()) for rank in "01"]
    assert sum(held) == whole
    assert max(held) < 0.51 * whole


def test_two_machines_make_the_same_adapter_and_send_their_gradients_alone(alone, few, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
    place = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint]
    script = [str(ROOT / "tests/sending.py"), str(tmp_path)]
    command = ["-m", "torch.distributed.run", *place, *script]
    command += arguments(few, tmp_path / "out", "--num_nodes", 2, *HEAD)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    said = [node.communicate(timeout=120)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], said
    assert_same(alone(*HEAD), tmp_path / "out")
    gradients = 4 * json.loads((tmp_path / "out/final/report.json").read_text())["trainable_parameters"]
    for rank in "01":
        sent = [int(count) for count in (tmp_path / rank).read_text().split()]
        assert (sent[-1] - sent[0]) / (len(sent) - 1) == pytest.approx(gradients, rel=0.05)  # 2 (n - 1) / n is 1


def ranks_of(parent: int) -> dict[int, int]:
    """Return the process ids of the ranks that a process has started, by rank."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    lines = {int(child): Path(f"/proc/{child}/cmdline").read_bytes() for child in children}
    return dict(enumerate(sorted(child for child, line in lines.items() if b"spawn_main" in line)))


def test_a_killed_rank_ends_the_others_by_name_and_the_run_goes_on_with_another_number(alone, few, tmp_path):
    flags = [*HEAD, "--train.save_interval", "1"]
    command = [sys.executable, "-m", "litlora", *arguments(few, tmp_path / "out", *flags, "--devices", 2)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    parent = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    while not (tmp_path / "out/step-000002").exists():
        assert parent.poll() is None
        time.sleep(0.01)
    ranks = ranks_of(parent.pid)
    os.kill(ranks[1], signal.SIGKILL)
    said = parent.communicate(timeout=60)[1]
    assert parent.returncode == 1
    assert re.findall("^litlora: .*", said, re.MULTILINE) == [
        "litlora: rank 1 was killed by SIGKILL: was there too little memory? "
        "Go on with the same command and --resume true"
    ]
    assert not any(Path(f"/proc/{child}").exists() for child in ranks.values())
    assert main(arguments(few, tmp_path / "out", *flags, "--resume", "true")) == 0
    assert_same(alone(*HEAD), tmp_path / "out")


def test_a_mistake_is_said_once(few, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/metrics.csv").write_text("")
    done = run("-m", "litlora", *arguments(few, tmp_path / "out", "--devices", 2))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "holds a run already" in done.stderr
