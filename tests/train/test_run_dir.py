"""A disk that fails costs one sentence: what was saved stays, no partial file is visible, and the run resumes."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from itertools import chain, count
from pathlib import Path

import pytest
from helpers.failing_disk import CODES, failing_disk, refusal
from hypothesis import settings

from litlora.__main__ import main
from litlora.utils.files import complete_transaction, write_transaction
from litlora.utils.manifest import find_corruption

FINETUNE = [
    "finetune_lora", "--checkpoint_dir", "base", "--data_dir", "data", "--out_dir", "out", "--precision", "32-true",
    "--train.global_batch_size", "8", "--train.max_steps", "2", "--train.save_interval", "1",
    "--eval.max_new_tokens", "0", "--eval.initial_validation", "false", "--eval.final_validation", "false",
]  # fmt: skip
MERGE = ["merge_lora", "--checkpoint_dir", "adapter", "--base_dir", "base", "--out_dir", "out"]
EXPORT = ["export", "--checkpoint_dir", "base", "--format", "gguf", "--out_dir", "out"]
EACH = 1 if settings().max_examples > 100 else 7  # every n-th of the many requests of a training
PREPARE = ["prepare_json", "--source", "rows.jsonl", "--destination_path", "data"]


@pytest.fixture
def worlds(tiny, data_dir, adapter, tmp_path, monkeypatch):
    """Return what yields fresh folders, one after the other, in which all is well."""

    def fresh():
        for number in count():
            world = tmp_path / str(number)
            for name, folder in {"base": tiny, "adapter": adapter, "data": data_dir}.items():
                shutil.copytree(folder, world / name, ignore=shutil.ignore_patterns("tokenized"))
            rows = [{"prompt": str(n), "completion": "new"} for n in range(20)]
            (world / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            monkeypatch.chdir(world)
            yield world

    return fresh()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def requests(command: Sequence[str], world: Path) -> int:
    """Run a command with which all goes well, and return how often it asks something of the disk."""
    with failing_disk(world, 0, refusal(0)) as disk:
        assert main(command) == 0
    return disk.requests


def fails(command: Sequence[str], world: Path, at: int, capsys: pytest.CaptureFixture[str]) -> bool:
    """Run a command on a disk that fails once; tell whether the command fails, in one sentence that reports why."""
    capsys.readouterr()
    code = CODES[at % len(CODES)]
    with failing_disk(world, at, refusal(code)):
        exit_code = main(command)
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert not [path for path in world.rglob("*") if path.name.endswith(".partial")]
    if exit_code:
        assert exit_code == 1
        assert sentence.startswith("litlora: ")
        assert os.strerror(code) in sentence
        assert sentence.endswith(os.strerror(code)) or names_checkpoint(sentence)
        assert "out" in sentence or "data" in sentence
    return exit_code != 0


def names_checkpoint(sentence: str) -> bool:
    """Tell whether a sentence names the checkpoint to resume from, which is intact."""
    hint = "fix that, and resume with the same command and --resume true"
    named = re.search(rf"; (out/step-\d{{6}}) is saved: {hint}$", sentence)
    return named is not None and find_corruption(Path(named[1])) is None


def test_training_resumes_after_any_disk_error(worlds, capsys):
    world = next(worlds)
    total = requests(FINETUNE, world)
    good = contents(world / "out/final")
    steps = {path.name: set(contents(path)) for path in (world / "out").glob("step-*")}
    assert total > 50
    for at in range(1, total + 1, EACH):
        world = next(worlds)
        if fails(FINETUNE, world, at, capsys) and not Path("out/final").exists():
            saved = list(Path("out").glob("step-*"))
            assert all(set(contents(folder)) == steps[folder.name] for folder in saved)
            if not saved:
                shutil.rmtree("out", ignore_errors=True)
            assert main([*FINETUNE, *(["--resume", "true"] if saved else [])]) == 0
        found = contents(world / "out/final")
        assert found.keys() == good.keys()
        assert found["adapter_model.safetensors"] == good["adapter_model.safetensors"]
        shutil.rmtree(world)


def test_merging_leaves_an_intact_checkpoint_or_none(worlds, capsys):
    world = next(worlds)
    total = requests(MERGE, world)
    good = contents(world / "out")
    assert total > 10
    for at in range(1, total + 1):
        world = next(worlds)
        if fails(MERGE, world, at, capsys) and not Path("out").exists():
            assert main(MERGE) == 0
        assert contents(world / "out") == good


def prepared(world: Path) -> Path:
    """Let the data of a world be prepared, as those that a command replaces must be."""
    about = {"rows": 2, "train": 1, "val": 1}
    (world / "data/dataset.json").write_text(json.dumps(about), encoding="utf-8")
    return world


def test_preparing_again_leaves_the_old_rows_or_the_new_ones(worlds, capsys):
    world = prepared(next(worlds))
    old = contents(world / "data")
    total = requests(PREPARE, world)
    new = contents(world / "data")
    assert total > 10
    for at in range(1, total + 1):
        world = prepared(next(worlds))
        outcomes = (old, new) if fails(PREPARE, world, at, capsys) else (new,)
        complete_transaction(Path("data"))  # as whatever reads the data does first
        assert contents(world / "data") in outcomes


def test_write_together_is_atomic_when_killed(tmp_path):
    old, new = {"a": b"1", "b": b"1"}, {"a": b"2", "b": b"2", "c": b"2"}
    pieces = {name: [content] for name, content in new.items()}
    outcomes = []
    for at in count(1):
        folder = tmp_path / str(at)
        write_transaction(folder, {name: [content] for name, content in old.items()})
        if not killed_at(at, folder, pieces):
            break
        complete_transaction(folder)
        visible = {name: content for name, content in contents(folder).items() if not name.startswith(".")}
        outcomes.append([old, new].index(visible))
        write_transaction(folder, pieces)
        assert contents(folder) == new
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {0, 1}


def killed_at(at: int, folder: Path, new: dict[str, list[bytes]]) -> bool:
    """Write in a process that ends, as by SIGKILL, at the n-th request to the disk; tell whether there was one."""
    child = os.fork()
    if not child:
        with failing_disk(folder, at, lambda: os._exit(9)):
            write_transaction(folder, new)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


@pytest.mark.parametrize(
    ("command", "size"),
    [
        (MERGE, 0),
        (MERGE, 100),
        (MERGE, 10_000),
        ([*PREPARE[:-1], "new"], 0),
        ([*PREPARE[:-1], "new"], 100),
        (EXPORT, 100),
    ],
)
def test_full_disk_is_one_sentence(worlds, capsys, command, size):
    world = next(worlds)
    before = contents(world)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        assert main(command) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (sentence,) = capsys.readouterr().err.splitlines()
    assert sentence.startswith("litlora: cannot write ")
    assert "File too large" in sentence
    assert not (world / command[-1]).exists()
    assert contents(world) == before


@pytest.mark.parametrize(
    ("flag", "folder", "place"),
    [
        ("--checkpoint_dir", "base", "out/final"),
        ("--data_dir", "data", "out/step-000001/data"),
        ("--init_adapter", "adapter", "linked/final"),
    ],
)
def test_overwriting_spares_what_the_run_reads(worlds, capsys, flag, folder, place):
    world = next(worlds)
    (world / "out").mkdir()
    (world / "linked").symlink_to("out")
    shutil.copytree(folder, place)
    before = contents(world)
    flags = dict(zip(FINETUNE[1::2], FINETUNE[2::2], strict=True)) | {flag: place, "--overwrite": "true"}
    assert main(["finetune_lora", *chain.from_iterable(flags.items())]) == 1
    hint = "would be removed by --overwrite true: choose another --out_dir"
    assert capsys.readouterr().err.splitlines()[-1] == f"litlora: {flag} ({place}) {hint}"
    assert contents(world) == before


LONG = [*FINETUNE, "--train.max_steps", "40", "--train.epochs", "40"]
IN_A_SMALL_ROOM = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]


def can_mount() -> bool:
    mounted = [*IN_A_SMALL_ROOM, "mount -t tmpfs none /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(mounted, capture_output=True).returncode == 0


def run(command: Sequence[str], prefix: Sequence[str] = (), module: str = "litlora") -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "GATE": "go"}
    line = [*prefix, sys.executable, "-m", module, *command]
    return subprocess.Popen(line, stderr=subprocess.PIPE, text=True, env=env)


def assert_resumes_from(world: Path, sentence: str) -> None:
    """Assert that a sentence names an intact checkpoint, and that the run resumes from it without partial files."""
    assert names_checkpoint(sentence), sentence
    assert all(find_corruption(path) is None for path in world.glob("out/step-*"))
    (world / "out/.step-000002.1234.partial").mkdir(exist_ok=True)  # as a killed run leaves it
    assert main([*LONG, "--resume", "true"]) == 0
    assert not list(world.glob("out/.*.partial"))


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a disk that is small")
def test_full_disk_leaves_the_last_checkpoint(worlds):
    world = next(worlds)
    script = 'mkdir out && mount -t tmpfs -o size=600k none out && "$@"; code=$?; cp -a out saved; exit $code'
    full = run(LONG, [*IN_A_SMALL_ROOM, script, "sh"])
    _, stderr = full.communicate()
    assert full.returncode == 1
    (world / "out").rmdir()
    (world / "saved").rename(world / "out")
    *_, sentence = stderr.splitlines()
    assert "No space left on device" in sentence
    assert_resumes_from(world, sentence)


@pytest.mark.skipif(os.getuid() == 0 and shutil.which("setpriv") is None, reason="permissions do not bind root")
def test_lost_permission_leaves_the_last_checkpoint(worlds):
    world = next(worlds)
    without_rights = ["setpriv", "--bounding-set=-all", "--inh-caps=-all"] if os.getuid() == 0 else []
    process = run(LONG, without_rights, "tests.helpers.gate")
    while not (world / "out/step-000003").exists() and process.poll() is None:
        time.sleep(0.001)
    (world / "out").chmod(0o500)
    Path("go").touch()
    _, stderr = process.communicate()
    (world / "out").chmod(0o700)
    assert process.returncode == 1
    *_, sentence = stderr.splitlines()
    assert "Permission denied" in sentence
    assert_resumes_from(world, sentence)
