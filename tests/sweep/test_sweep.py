"""sweep: every trial is an ordinary run, none is lost or counted twice, and its results are those of the runs."""

import errno
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import yaml
from helpers.runs import report
from optuna.trial import TrialState

from litlora.__main__ import main
from litlora.args.sweep import SweepArgs
from litlora.cli.parser import parse
from litlora.commands.sweep import sweep
from litlora.errors import LitLoraError, StoppedError
from litlora.sweep import results, workers
from litlora.sweep.plan import Plan
from litlora.sweep.space import Space
from litlora.sweep.study import Study

EXPERIMENTS = sorted((Path(__file__).parents[2] / "config_hub/experiments").glob("*.yaml"))
QUICK = {"precision": "32-true", "eval": {"max_new_tokens": 0}, "train": {"max_steps": 2, "global_batch_size": 5}}


def run_here(words: Sequence[str], devices: int, output: Path, ends_early: Callable[[], bool]) -> None:
    """Run a trial in this process, which has torch already."""
    if main([*words]):
        raise LitLoraError("it failed")


@pytest.fixture
def planned(tiny: Path, data_dir: Path, tmp_path: Path) -> Callable[..., Plan]:
    """Return a function that plans a sweep of short runs of a small model."""

    def make(search: dict[str, Any], **settings: Any) -> Plan:
        base = QUICK | settings.pop("base", {})
        args = SweepArgs(tiny, data_dir, tmp_path / "sweep", base, search=search, seeds=(1, 2))
        return Plan.read(replace(args, **settings))

    return make


def test_trials_are_runs_and_the_table_has_their_figures(planned, capsys):
    plan = planned({"train.learning_rate": [1e-3, 1e-1]})
    study = workers.work(plan, run_here)
    folders = [plan.args.out_dir / f"trial-000{number}" for number in (1, 2, 3, 4)]
    settings = [yaml.safe_load((folder / "hyperparameters.yaml").read_text()) for folder in folders]
    assert [(each["train"]["learning_rate"], each["seed"]) for each in settings] == [
        (1e-3, 1), (1e-3, 2), (1e-1, 1), (1e-1, 2)
    ]  # fmt: skip
    losses = [report(folder / "final")["val_loss"] for folder in folders]
    assert [trial.value for trial in study.trials()] == losses
    best, worse = results.rows(plan, study)
    assert (best.loss.value, best.spread) == (fmean(losses[2:]), stdev(losses[2:]))
    assert worse.above(best).value == pytest.approx(fmean([losses[0] - losses[2], losses[1] - losses[3]]))
    assert best.mean("trainable_parameters") == report(folders[0] / "final")["trainable_parameters"]

    before = {path: path.stat().st_mtime_ns for path in plan.args.out_dir.rglob("trial-*/**/*")}
    sweep(plan.args)  # a second time: nothing is left to train
    assert {path: path.stat().st_mtime_ns for path in plan.args.out_dir.rglob("trial-*/**/*")} == before
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["train.learning_rate", "val_loss"]
    assert first.split()[:2] == ["0.1", f"{best.loss.value:.4f}"]
    assert second.split()[0] == "0.001"
    page = (plan.args.out_dir / "sweep.html").read_text(encoding="utf-8")
    assert f'<td class="number">{best.loss.value:.4f}</td>' in page
    assert page.count("<circle") == 4
    written = json.loads((plan.args.out_dir / "sweep.json").read_text(encoding="utf-8"))
    assert [trial["val_loss"] for trial in written["trials"]] == losses


def test_trials_are_measured_by_evaluate(planned):
    plan = planned({"lora_r": [2]}, seeds=(1,), evaluate={"metrics": "loss", "precision": "32-true"})
    (row,) = results.rows(plan, workers.work(plan, run_here))
    assert row.mean("loss") == pytest.approx(row.loss.value, rel=1e-4)
    head, line = results.table(plan, [row])
    assert line[head.index("perplexity")] == f"{math.exp(row.mean('loss')):.4g}"


def test_a_failed_trial_is_kept_and_reported(planned, capsys):
    plan = planned({"lora_r": [4, 4000]}, seeds=(1,))
    study = workers.work(plan, run_here)
    assert [trial.state.name for trial in study.trials()] == ["COMPLETE", "FAIL"]
    sweep(plan.args)
    printed = capsys.readouterr()
    assert "1 failed" in printed.out
    assert "warning: trial-0002 failed: it failed" in printed.err
    assert "trial-0002 failed" in (plan.args.out_dir / "sweep.html").read_text(encoding="utf-8")


def test_a_study_of_another_search_space_is_refused(planned, capsys):
    study = Study(planned({"lora_r": [4, 8]}))
    assert len(study.trials()) == 4
    with pytest.raises(LitLoraError, match=r"holds a study of another search space \(search differs\)"):
        Study(planned({"lora_r": [4, 16]}))
    with pytest.raises(LitLoraError, match=r"\(seeds, base differ\)"):
        Study(planned({"lora_r": [4, 8]}, seeds=(7,), base={"lora_alpha": 2}))
    assert len(Study(planned({"lora_r": [4, 8]}, workers=3, pruner="median")).trials()) == 4


def test_a_corrupt_journal_is_refused_in_one_sentence(planned):
    plan = planned({"lora_r": [4]})
    plan.args.out_dir.mkdir()
    for text in ("\n\n", "{}\n", '{"op_code": 0}\n', "[1]\n"):
        (plan.args.out_dir / "study.journal").write_text(text, encoding="utf-8")
        with pytest.raises(LitLoraError, match=r"study\.journal is corrupt .*: choose another --out_dir"):
            Study(plan)


def test_a_folder_without_locks_is_refused_and_left_alone(planned, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    plan = planned({"train.learning_rate": [1e-3]})
    with pytest.raises(
        LitLoraError, match=r"cannot be locked \(No locks available\): choose a folder on another file "
    ):
        Study(plan)
    assert not plan.args.out_dir.exists()


def test_abandoned_trials_are_finished_under_their_number(planned):
    """A worker that ends without a word leaves its trial to the next; one that lives keeps it."""
    plan = planned({"lora_r": [4, 8]}, seeds=(1,))
    first, second = Study(plan), Study(plan)
    with first.next() as lost:
        with second.next() as other, second.next() as none:
            assert (lost.number, other.number, none) == (0, 1, None)
            second.fail(other, "as a test")
        assert not second.is_done()
    with second.next() as again:
        assert (again.number, again.point, again.seed) == (0, lost.point, lost.seed)
        second.complete(again, 1.5, {})
    assert [trial.state for trial in second.trials()] == [TrialState.COMPLETE, TrialState.FAIL]
    assert first.is_done()


def test_tpe_trains_each_choice_with_every_seed(planned):
    search = {"train.learning_rate": {"low": 1e-4, "high": 1e-1, "log": True}, "lora_r": [2, 4]}
    plan = planned(search, method="tpe", trials=3)
    study = Study(plan)
    while not study.is_done():
        with study.next() as assignment:
            study.complete(assignment, float(assignment.point["train.learning_rate"]), {})
    assert len(study.trials()) == 6
    rows = results.rows(plan, study)
    assert [sorted(row.losses) for row in rows] == [[1, 2]] * 3
    assert len({row.loss.value for row in rows}) == 3
    assert all(row.spread == 0 for row in rows)
    more = Study(replace(plan, args=replace(plan.args, trials=4)))
    assert (more.total, more.is_done()) == (8, False)


def test_the_pruner_stops_a_bad_trial(planned, monkeypatch):
    monkeypatch.setattr("litlora.sweep.study.WARM_UP", 1)
    plan = planned({"lora_r": [2, 4]}, seeds=(1,), pruner="median")
    study = Study(plan)
    for loss, stops in ((1.0, False), (2.0, True)):
        with study.next() as assignment:
            assert assignment.record(1, loss) == stops
            study.prune(assignment) if stops else study.complete(assignment, loss, {})
    assert [row.ended_early for row in results.rows(plan, study)] == ["", "1 pruned"]


def test_a_stopped_worker_leaves_its_trial_to_be_resumed(planned):
    plan = planned({"lora_r": [2]}, seeds=(1,))

    def stopped(*_: object) -> None:
        raise LitLoraError("stopped", 128 + signal.SIGTERM)

    with pytest.raises(StoppedError, match="run the same command again"):
        workers.work(plan, stopped)
    study = workers.work(plan, run_here)
    assert [trial.state for trial in study.trials()] == [TrialState.COMPLETE]


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_runs(path, tiny, data_dir, tmp_path):
    """The whole file is checked by its plan; of each dimension, one value is trained with a small model."""
    folders = ["--checkpoint_dir", str(tiny), "--data_dir", str(data_dir), "--out_dir", str(tmp_path / "sweep")]
    args = parse(["sweep", "--config", str(path), *folders]).args
    plan = Plan.read(args)
    assert plan.space.grid()
    base = QUICK | (args.base or {}) | {"eval": {"max_new_tokens": 0, "initial_validation": False}}
    short = replace(args, base=base | {"train": {"max_steps": 1}}, seeds=args.seeds[:1])
    space = Space.of({name: _few(values) for name, values in args.search.items()})
    study = workers.work(replace(plan, args=short, space=space), run_here)
    assert {trial.state for trial in study.trials()} == {TrialState.COMPLETE}


def _few(values: Any) -> Any:
    match values:
        case {"times": _, "values": [*_, last]}:
            return values | {"values": [last]}
        case dict():
            return dict([*values.items()][-1:])
        case _:
            return values[:1]


def test_a_killed_worker_loses_no_trial(tiny, data_dir, tmp_path):
    """Two workers as processes: one is killed in the midst of a trial, which the other finishes."""
    config = {"checkpoint_dir": str(tiny), "data_dir": str(data_dir), "out_dir": str(tmp_path / "sweep"),
              "base": QUICK, "search": {"lora_r": [2, 4]}, "seeds": [1], "workers": 2}  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [sys.executable, "-m", "litlora", "sweep", "--config", str(tmp_path / "sweep.yaml")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    os.kill(worker_of(tmp_path / "sweep/trial-0001"), signal.SIGKILL)
    output, messages = process.communicate(timeout=900)
    assert process.returncode == 0, messages
    assert len(output.splitlines()) == 3
    written = json.loads((tmp_path / "sweep/sweep.json").read_text(encoding="utf-8"))["trials"]
    found = [(each["folder"], each["state"], each["settings"]["lora_r"]) for each in written]
    assert found == [("trial-0001", "complete", 2), ("trial-0002", "complete", 4)]
    assert messages.count("trial-0001 of 2") == 2


def worker_of(trial: Path) -> int:
    """Return the process that has started the one that trains in a folder."""
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if f"--out_dir={trial}" in (entry / "cmdline").read_text().split("\0"):
                    return int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        time.sleep(0.02)
    raise AssertionError("the trial has not begun")
