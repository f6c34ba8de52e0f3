"""Several processes train the adapter that one of them would have trained, and none waits for a dead one."""

import csv
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from itertools import count
from pathlib import Path

import pytest
import torch
from helpers.processes import children, is_running, wait_until_received
from helpers.runs import QUERY_VALUE
from safetensors.torch import load_file

from litlora.__main__ import main
from litlora.data.row_sources import about_sources
from litlora.distributed.launcher import PEER_FAILED
from litlora.models.checkpoint import Checkpoint
from litlora.nn.nf4 import Quantization

ROOT = Path(__file__).parents[2]
HUNG = 600  # seconds after which a run will not end any more
HEAD = ["--lora_head", "true"]
NF4 = ["--quantize", "bnb.nf4", "--lora_init", "fisher"]


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """Return data whose last global batch of an epoch has two rows, for four processes, with two sources in val."""
    folder = tmp_path_factory.mktemp("few")
    for name, many in (("train", 22), ("val", 9)):
        lines = (ROOT / f"data/pico/{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{name}.jsonl").write_text("".join(lines[:many]), encoding="utf-8")
    about = about_sources(["a", "a", "b"] * 3, (folder / "val.jsonl").read_bytes().splitlines(keepends=True))
    (folder / "dataset.json").write_text(json.dumps(about), encoding="utf-8")
    return folder


def arguments(data_dir: Path, out_dir: Path, *flags: object) -> list[str]:
    folders = ["--checkpoint_dir", ROOT / "checkpoints/pico", "--data_dir", data_dir, "--out_dir", out_dir]
    settings = "--precision 32-true --lora_dropout 0 --train.global_batch_size 5 --train.max_steps 10 --train.epochs 2"
    settings += " --train.micro_batch_size 2 --train.micro_batch_tokens null"
    more = "--train.learning_rate 2e-3 --eval.max_new_tokens 0"
    return ["finetune_lora", *map(str, folders), *QUERY_VALUE, *settings.split(), *more.split(), *map(str, flags)]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=HUNG)


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
    """Check that two runs have trained one adapter, and report the same figures."""
    ours, theirs = (load_file(folder / "final/adapter_model.safetensors") for folder in (one, other))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-5
    reports = [json.loads((folder / "final/report.json").read_text()) for folder in (one, other)]
    for name in ("steps", "tokens", "supervised_tokens", "trainable_parameters"):
        assert reports[0][name] == reports[1][name]
    assert reports[0]["val_loss_by_source"] == pytest.approx(reports[1]["val_loss_by_source"], rel=1e-4)
    assert reports[0]["val_loss_by_source"].keys() == {"a", "b"}
    for row, same in zip(rows(one), rows(other), strict=True):
        for name in ("loss", "val_loss", "grad_norm"):
            assert (row[name] == same[name] == "") or float(row[name]) == pytest.approx(float(same[name]), rel=1e-4)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_launched_ranks_train_the_adapter_of_one_device(alone, few, tmp_path, strategy):
    flags = *HEAD, *NF4
    done = run("-m", "litlora", *arguments(few, tmp_path / "out", "--devices", 2, "--strategy", strategy, *flags))
    assert done.returncode == 0, done.stderr
    assert_same(alone(*flags), tmp_path / "out")
    assert done.stdout == ""
    assert_reported_once(done.stderr)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_four_ranks_train_the_adapter_of_one_device(runs, alone, few, tmp_path, strategy):
    runs.start_all(arguments(few, tmp_path / "out", "--devices", 4, "--strategy", strategy, *HEAD), srun(4))
    assert runs.wait_all() == [0] * 4, runs.stderr.read_text()
    assert_same(alone(*HEAD), tmp_path / "out")
    assert_reported_once(runs.stderr.read_text())


# Not PiSSA over NF4: the rounding of a decomposition, which threads change, can move a value to another of 16 levels.
VARIANTS = {
    "nf4": "--lora_use_dora true --lora_plus_ratio 4 --lora_mlp true --quantize bnb.nf4",
    "dense": "--lora_use_dora true --lora_use_rslora true --lora_head true",
    "pissa": "--lora_init pissa --lora_layers 0-2",
}


@pytest.mark.parametrize(
    ("strategy", "variant"), [("ddp", "nf4"), ("fsdp", "nf4"), ("fsdp", "dense"), ("fsdp", "pissa")]
)
def test_variants_train_over_two_ranks_as_on_one_device(runs, alone, few, tmp_path, strategy, variant):
    # Adam would divide the rounding of a gradient near zero by its size.
    settings = "--train.max_steps 2 --optimizer SGD --train.learning_rate 0.1"
    short = [*VARIANTS[variant].split(), *settings.split()]
    runs.start_all(arguments(few, tmp_path / "out", *short, "--devices", 2, "--strategy", strategy), srun(2))
    assert runs.wait_all() == [0, 0], runs.stderr.read_text()
    assert_same(alone(*short), tmp_path / "out")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_continue_from_an_adapter_as_one_device(runs, alone, few, tmp_path, strategy):
    short = ["--train.max_steps", "2", "--optimizer", "SGD", "--train.learning_rate", "0.2"]
    flags = ["--init_adapter", str(alone(*VARIANTS["dense"].split(), *short) / "final"), *short]
    runs.start_all(arguments(few, tmp_path / "out", *flags, "--devices", 2, "--strategy", strategy), srun(2))
    assert runs.wait_all() == [0, 0], runs.stderr.read_text()
    assert_same(alone(*flags), tmp_path / "out")


def test_tied_head_cannot_be_parted_from_a_sharded_embedding(runs, few, tmp_path):
    flags = ["--lora_init", "pissa", *HEAD, "--devices", 2, "--strategy", "fsdp"]
    runs.start_all(arguments(few, tmp_path / "out", *flags), srun(2))
    assert runs.wait_all() == [1, 1]
    assert "litlora: --lora_init pissa cannot part a head from its embedding under --strategy fsdp" in report(runs)


def assert_reported_once(stderr: str) -> None:
    assert stderr.count("trainable parameters over") == stderr.count("adapter in") == 1
    assert "Warning" not in stderr


SMALL = ["--quantize", "bnb.nf4-dq", "--train.activation_checkpointing", "true", "--train.save_interval", "6"]


@pytest.fixture(scope="module")
def resumed(few, alone, tmp_path_factory) -> Path:
    """Return a folder with a run of one process that two resumed, and how many bytes each of these held."""
    folder = tmp_path_factory.mktemp("resumed")
    shutil.copytree(alone(*SMALL), folder / "out", ignore=shutil.ignore_patterns("final"))
    started = ["-m", "torch.distributed.run", "--nproc_per_node", "2", ROOT / "tests/helpers/holding.py", folder]
    flags = [*SMALL, "--strategy", "fsdp", "--resume", "true", "--eval.max_new_tokens", "3"]
    done = run(*map(str, started), *arguments(few, folder / "out", *flags))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("  -> ") == 1  # the completion that all have computed
    return folder


def test_run_of_one_device_resumes_sharded_over_two(alone, resumed):
    assert_same(alone(*SMALL), resumed / "out")


def test_each_device_holds_only_its_shard(resumed):
    quantization = Quantization("bnb.nf4-dq", torch.float32)
    base = Checkpoint.open(ROOT / "checkpoints/pico").load(torch.float32, torch.device("cpu"), quantization)
    total = sum(weight.nbytes for weight in base.parameters())
    held = [int((resumed / rank).read_text()) for rank in "01"]
    assert sum(held) == total
    assert max(held) < 0.51 * total


def test_two_nodes_send_only_gradients(alone, few, tmp_path):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        endpoint = f"127.0.0.1:{listener.getsockname()[1]}"
    rendezvous = ["--nnodes", "2", "--nproc_per_node", "1", "--rdzv_backend", "c10d", "--rdzv_endpoint", endpoint]
    script = [str(ROOT / "tests/helpers/sending.py"), str(tmp_path)]
    command = ["-m", "torch.distributed.run", *rendezvous, *script]
    command += arguments(few, tmp_path / "out", "--num_nodes", 2, *HEAD)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    nodes = [subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    stderr = [node.communicate(timeout=HUNG)[1] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], stderr
    assert_same(alone(*HEAD), tmp_path / "out")
    gradients = 4 * json.loads((tmp_path / "out/final/report.json").read_text())["trainable_parameters"]
    for rank in "01":
        sent = [int(count) for count in (tmp_path / rank).read_text().split()]
        assert (sent[-1] - sent[0]) / (len(sent) - 1) == pytest.approx(gradients, rel=0.05)  # 2 (n - 1) / n is 1


def rows(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "metrics.csv").read_text().splitlines()))


def is_free(port: int) -> bool:
    with socket.socket() as listener:
        return listener.connect_ex(("127.0.0.1", port)) != 0


jobs = count(os.getpid() * 7)  # far from those of a test process beside this one


def srun(number: int, **more: object) -> list[dict[str, str]]:
    """Return the variables that srun gives to each of a number of processes; the port follows from the job."""
    job = next(job for job in jobs if is_free(20_000 + job % 1000 * 10))  # their port follows from it and step 0
    step = {"JOB_ID": job, "STEP_ID": 0, "STEP_NODELIST": "127.0.0.1", "NODEID": 0}
    step |= {"STEP_NUM_TASKS": number, "STEP_TASKS_PER_NODE": number}
    variables = [step | {"PROCID": rank, "LOCALID": rank} for rank in range(number)]
    others = {name: str(value) for name, value in more.items()}
    return [{f"SLURM_{name}": str(value) for name, value in process.items()} | others for process in variables]


def report(runs) -> str:
    return "\n".join(re.findall("^litlora: .*", runs.stderr.read_text(), re.MULTILINE))


def wait_for(path: Path, process: int) -> None:
    """Return when a folder exists, while the process that creates it runs."""
    while not path.exists():
        assert Path(f"/proc/{process}").exists()
        time.sleep(0.005)


def test_run_of_two_srun_processes_resumes_on_one_and_on_four(runs, alone, few, tmp_path):
    flags, first = [*HEAD, "--train.save_interval", "4"], tmp_path / "first"
    runs.start_all(arguments(few, first, *flags, "--devices", 2), srun(2))
    assert runs.wait_all() == [0, 0], runs.stderr.read_text()
    assert_same(alone(*HEAD), first)
    for number in (1, 4):
        out_dir = tmp_path / str(number)
        again = arguments(few, out_dir, *flags, "--devices", number, "--resume", first / "step-000004")
        runs.start_all(again, srun(number))
        assert runs.wait_all() == [0] * number, runs.stderr.read_text()
        for row, same in zip(rows(first), rows(out_dir), strict=True):
            for name in ("step", "epoch", "tokens", "learning_rate"):
                assert row[name] == same[name]
            for name in ("loss", "val_loss"):
                assert (row[name] == same[name] == "") or float(row[name]) == pytest.approx(float(same[name]), rel=1e-6)


def test_signal_or_max_time_stops_all_ranks_after_one_step(runs, alone, few, tmp_path):
    flags = arguments(few, tmp_path / "out", *HEAD, "--train.save_interval", "1")
    processes = runs.start_all(flags, srun(2, GATE=tmp_path / "go"))
    wait_for(tmp_path / "out/step-000003", processes[0])
    os.kill(processes[1], signal.SIGTERM)
    (tmp_path / "go").touch()
    assert runs.wait_all() == [128 + signal.SIGTERM] * 2
    assert re.fullmatch(r"litlora: stopped by SIGTERM after step 4 of 10, .*", report(runs))
    runs.start_all([*flags, "--resume", "true", "--train.max_time", "1e-3"], srun(2))
    assert runs.wait_all() == [124] * 2
    assert re.fullmatch(r"litlora: stopped after --train.max_time .*", report(runs))
    runs.start_all([*flags, "--resume", "true"], srun(2))
    assert runs.wait_all() == [0, 0]
    assert_same(alone(*HEAD), tmp_path / "out")


def test_out_of_memory_in_one_rank_is_reported_once(runs, few, tmp_path):
    longer = ["--train.max_steps", 200, "--train.epochs", 200, "--train.save_interval", 3]
    longer += ["--train.global_batch_size", 22, "--train.micro_batch_size", 22]
    processes = runs.start_all(arguments(few, tmp_path / "out", *longer), srun(2, GATE=tmp_path / "go"))
    wait_for(tmp_path / "out/step-000003", processes[0])
    resource.prlimit(processes[1], resource.RLIMIT_AS, (2**20, resource.RLIM_INFINITY))
    (tmp_path / "go").touch()
    assert runs.wait_all() == [1, 1]
    assert "Traceback" not in runs.stderr.read_text(), runs.stderr.read_text()
    assert re.fullmatch("litlora: there is no longer enough memory after step .*", report(runs))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_without_launcher_name_a_killed_peer(runs, few, tmp_path, strategy):
    flags = "--train.save_interval", "1", "--strategy", strategy
    processes = runs.start_all(arguments(few, tmp_path / "out", *flags), srun(4, GATE=tmp_path / "go"))
    wait_for(tmp_path / "out/step-000003", processes[0])
    os.kill(processes[2], signal.SIGKILL)
    (tmp_path / "go").touch()
    assert runs.wait_all() == [1, 1, -signal.SIGKILL, 1]
    assert re.fullmatch(r"litlora: rank [013] has lost contact with rank 2, which has ended: .*", report(runs))


def hang(runs, few, tmp_path, hung: int, **variables: object) -> list[int]:
    """Return the exit codes of two processes whose peer hangs."""
    variables |= {"GATE": tmp_path / "go", "LIMIT": 50}
    processes = runs.start_all(arguments(few, tmp_path / "out", "--train.save_interval", "1"), srun(3, **variables))
    wait_for(tmp_path / "out/step-000003", processes[0])
    os.kill(processes[hung], signal.SIGSTOP)
    (tmp_path / "go").touch()
    while any(is_running(process) for process in processes if process != processes[hung]):
        time.sleep(0.05)
    os.kill(processes[hung], signal.SIGKILL)
    return [code for rank, code in enumerate(runs.wait_all()) if rank != hung]


@pytest.mark.parametrize(("hung", "who"), [(1, "rank 1"), (0, "rank 0, or what has started it,")])
def test_hung_rank_does_not_block_its_peers(runs, few, tmp_path, hung, who):
    assert hang(runs, few, tmp_path, hung) == [1, 1]
    assert re.fullmatch(f"litlora: {who} has sent no heartbeat for 10 seconds: .*", report(runs))


@pytest.mark.parametrize("hung", [0, 1])
def test_launched_ranks_leave_the_report_to_the_launcher(runs, few, tmp_path, hung):
    assert hang(runs, few, tmp_path, hung, LITLORA_LAUNCHED=1) == [PEER_FAILED, PEER_FAILED]
    assert report(runs) == ""


# The launcher does not know the strategy, and a resumed run does not know whether the launcher had stalled.
@pytest.mark.parametrize(("strategy", "stalled"), [("ddp", True), ("fsdp", False)])
def test_launcher_names_a_killed_rank_and_the_run_resumes(runs, alone, few, tmp_path, strategy, stalled):
    parent = start(tmp_path, few, "--strategy", strategy)
    ranks = children(parent.pid)
    if stalled:
        parent.send_signal(signal.SIGSTOP)
    os.kill(ranks[1], signal.SIGKILL)
    (tmp_path / "go").touch()
    while stalled and is_running(ranks[0]):
        time.sleep(0.05)
    parent.send_signal(signal.SIGCONT)
    stderr = parent.communicate(timeout=HUNG)[1]
    assert parent.returncode == 1
    assert re.findall("^litlora: .*", stderr, re.MULTILINE) == [
        "litlora: rank 1 was killed by SIGKILL: was there too little memory? "
        "Resume with the same command and --resume true"
    ]
    assert "Traceback" not in stderr
    assert not any(Path(f"/proc/{child}").exists() for child in ranks)
    resume(runs, tmp_path / "out", few, alone, 2 if strategy == "fsdp" else 1, "--strategy", strategy)


def start(folder: Path, few: Path, *flags: object) -> subprocess.Popen[str]:
    """Start two processes by one command, which save every step, and return it when they wait before step 4."""
    command = arguments(few, folder / "out", *HEAD, "--train.save_interval", 1, "--devices", 2, *flags)
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GATE": str(folder / "go")}
    script = [sys.executable, str(ROOT / "tests/helpers/gate.py"), *command]
    parent = subprocess.Popen(script, stderr=subprocess.PIPE, text=True, env=env)
    wait_for(folder / "out/step-000003", parent.pid)
    return parent


def resume(runs, out_dir: Path, few: Path, alone, devices: int, *flags: object) -> None:
    """Resume what `start` has begun, which ends with the adapter of a single process."""
    again = [*HEAD, "--train.save_interval", 1, "--resume", "true", "--devices", devices, *flags]
    runs.start_all(arguments(few, out_dir, *again), srun(devices))
    assert runs.wait_all() == [0] * devices, runs.stderr.read_text()
    assert_same(alone(*HEAD), out_dir)


def test_signal_to_launcher_stops_all_and_its_end_ends_them(runs, alone, few, tmp_path):
    parent = start(tmp_path, few)
    parent.send_signal(signal.SIGTERM)
    wait_until_received(signal.SIGTERM, children(parent.pid)[0])
    (tmp_path / "go").touch()
    stderr = parent.communicate(timeout=HUNG)[1]
    assert parent.returncode == 128 + signal.SIGTERM
    assert len(re.findall(r"^litlora: stopped by SIGTERM after step \d+ of 10, ", stderr, re.MULTILINE)) == 1
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "go").unlink()
    parent = start(tmp_path, few)
    ranks = children(parent.pid)
    parent.kill()
    parent.communicate(timeout=HUNG)
    while any(map(is_running, ranks)):
        time.sleep(0.01)
    resume(runs, tmp_path / "out", few, alone, 1)


def test_torchrun_ends_all_when_one_rank_is_killed(few, tmp_path):
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "tests/helpers/gate.py"), *arguments(few, tmp_path / "out", "--train.save_interval", 1)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GATE": str(tmp_path / "go")}
    torchrun = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=env)
    wait_for(tmp_path / "out/step-000003", torchrun.pid)
    variables = {rank: Path(f"/proc/{rank}/environ").read_text().split("\0") for rank in children(torchrun.pid)}
    os.kill(next(child for child, given in variables.items() if "RANK=1" in given), signal.SIGKILL)
    (tmp_path / "go").touch()
    stderr = torchrun.communicate(timeout=HUNG)[1]
    assert torchrun.returncode == 1
    assert re.search(r"Root Cause .*rank +: 1 .*exitcode +: -9 ", stderr, re.DOTALL), stderr
    assert len(re.findall("^litlora: ", stderr, re.MULTILINE)) <= 1, stderr  # torchrun may end the others before that
    assert not any(is_running(child) for child in variables)


def test_mistake_is_reported_once(few, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/metrics.csv").write_text("")
    done = run("-m", "litlora", *arguments(few, tmp_path / "out", "--devices", 2))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 2
    assert "holds a run already" in done.stderr
