"""Two versions of litlora at the same work: this one, and the one in another git worktree.

Only the command lines and the files of a run are used, so that the versions may differ in all of their modules. Each
run is a process of its own; the versions alternate.
"""

import csv
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from benchmarks.cases import LITLORA_COMPILED, Case
from benchmarks.command import Run, environment, time_command
from benchmarks.environments import ROOT, ProgramError
from benchmarks.flags import generate_flags, train_flags
from benchmarks.jobs import Job
from benchmarks.table import line, machine, spread

PREVIOUS, CURRENT = "previous", "this"
COLUMNS = ("seconds: median (least to most)", "× the previous", "whole command, s", "peak memory, GB", "× the previous")


def compare_versions(
    cases: Sequence[Case], work: Path, rows: int, worktree: Path, python: Path, repetitions: int
) -> tuple[str, dict[str, dict[str, list[Run]]]]:
    """Run the cases with this version and with that of `worktree`; return the tables and the runs."""
    versions = {PREVIOUS: worktree.resolve(), CURRENT: ROOT}
    for name, folder in versions.items():
        check_version(folder, python)
        sys.stderr.write(f"{name}: {folder} at {commit(folder)}\n")
    runs: dict[str, dict[str, list[Run]]] = {}
    for case in cases:
        compiled = {"": False, " --compile": True} if LITLORA_COMPILED in case.programs else {"": False}
        for suffix, compile_model in compiled.items():
            job = Job(case.task, case.precision, str(work), rows, case.layers, case.quantized, compile_model)
            runs[case.name + suffix] = alternate(case.name + suffix, job, versions, python, repetitions)
    commits = ", ".join(f"{name} {commit(folder)}" for name, folder in versions.items())
    return f"{machine('cpu')}; {commits}.\n\n" + "\n\n".join(map(section, runs, runs.values())) + "\n", runs


def alternate(
    name: str, job: Job, versions: Mapping[str, Path], python: Path, repetitions: int
) -> dict[str, list[Run]]:
    """Run a job with each version in turn, in reverse order every other time."""
    runs: dict[str, list[Run]] = {version: [] for version in versions}
    for repetition in range(repetitions):
        for version in list(versions)[:: -1 if repetition % 2 else 1]:
            run = (
                train(job, versions[version], python)
                if job.task == "train"
                else generate(job, versions[version], python)
            )
            sys.stderr.write(f"{name}, {version}: {run.seconds:.2f} s, {run.memory_gb:.2f} GB\n")
            runs[version].append(run)
    return runs


def check_version(folder: Path, python: Path) -> None:
    """Refuse a folder whose litlora is not the one that would run."""
    if not (folder / "litlora/__main__.py").is_file():
        raise ProgramError(f"--against ({folder}) must be a git worktree of litlora")
    command = [str(python), "-c", "import litlora; print(litlora.__file__)"]
    done = subprocess.run(command, cwd="/", env=environment(folder, "cpu"), capture_output=True, text=True)
    if not Path(done.stdout.strip()).is_relative_to(folder):
        raise ProgramError(f"{python} imports litlora from {done.stdout.strip() or 'nowhere'}, not from {folder}")


def commit(folder: Path) -> str:
    """Return the short hash of a worktree's commit."""
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() or folder.name


def train(job: Job, folder: Path, python: Path) -> Run:
    """Fine-tune on the rows once."""
    with tempfile.TemporaryDirectory() as scratch:
        out_dir = Path(scratch) / "run"
        timed = time_command(train_flags(job, job.data, out_dir), job, folder, python)
        seconds = json.loads((out_dir / "final/report.json").read_text(encoding="utf-8"))["seconds"]
        with (out_dir / "metrics.csv").open(encoding="utf-8", newline="") as file:
            losses = " ".join(row["loss"] for row in csv.DictReader(file))
    return Run(seconds, timed.command_seconds, timed.memory_gb, losses)


def generate(job: Job, folder: Path, python: Path) -> Run:
    """Generate two greedy completions."""
    return time_command(generate_flags(job), job, folder, python)


def section(name: str, runs: Mapping[str, Sequence[Run]]) -> str:
    """Return the table of a case, and whether both versions computed the same."""
    count = len(runs[CURRENT])
    lines = [f"**{name}**, repetitions: {count}", "", line(["", *COLUMNS]), line(["---", *["--:"] * len(COLUMNS)])]
    lines += [row(version, runs) for version in runs]
    outputs = {run.output for version in runs.values() for run in version}
    verdict = "identical" if len(outputs) == 1 else f"not identical ({len(outputs)} different ones)"
    return "\n".join([*lines, "", f"- Losses or completions of all runs: {verdict}."])


def row(version: str, runs: Mapping[str, Sequence[Run]]) -> str:
    seconds, commands, memory = (
        {name: [getattr(run, key) for run in runs[name]] for name in runs}
        for key in ("seconds", "command_seconds", "memory_gb")
    )
    cells = [spread(seconds[version], 2), ratio(seconds, version), spread(commands[version])]
    return line([version, *cells, spread(memory[version], 2), ratio(memory, version)])


def ratio(values: Mapping[str, Sequence[float]], version: str) -> str:
    """Return a version's median divided by the previous version's."""
    return f"{median(values[version]) / median(values[PREVIOUS]):.3f}"


def as_json(runs: Mapping[str, Mapping[str, Sequence[Run]]]) -> str:
    content = {case: {name: [asdict(run) for run in taken] for name, taken in of.items()} for case, of in runs.items()}
    return json.dumps(content, indent=1) + "\n"
