"""Run litlora, PEFT + transformers and litgpt on the same rows, and write a table of their times.

With --against, compare two versions of litlora instead:
git worktree add ../previous COMMIT && scripts/benchmark --against ../previous --case train-32 generate-32 ...
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.cases import CASES, LITGPT, Case
from benchmarks.environments import HOME, Environments, ProgramError, install, run_job
from benchmarks.inputs import prepare_inputs
from benchmarks.jobs import Job, Products, Result
from benchmarks.measuring import DisagreementError, Measurement, measure
from benchmarks.table import render
from benchmarks.versions import as_json, compare_versions

WORK = HOME / "work"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint_dir", type=Path, required=True, help="folder of a checkpoint from the Hub")
    parser.add_argument(
        "--data_dir", type=Path, required=True, help="folder with a train.jsonl, as prepare_* writes it"
    )
    names = [case.name for case in CASES]
    parser.add_argument("--case", nargs="+", choices=names, default=names, help="cases to run (default: all)")
    parser.add_argument("--rows", type=int, default=64, help="number of rows to train on (default: %(default)s)")
    parser.add_argument(
        "--repetitions", type=int, default=5, help="number of runs of each program (default: %(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument(
        "--installed", action="store_true", help="run all programs with this Python, where nothing can be downloaded"
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="WORKTREE",
        help="compare this version of litlora with the one in another git worktree (git worktree add WORKTREE COMMIT), "
        "on the CPU, in alternating processes and without the other programs",
    )
    parser.add_argument("--out", type=Path, help="file of the tables (default: .benchmark/results.md, or versions.md)")
    return parser


def main() -> int:
    args = build_parser().parse_args()
    chosen = [case for case in CASES if case.name in args.case]
    try:
        prepare_inputs(WORK, args.checkpoint_dir, args.data_dir, args.rows)
        if args.against:
            return compare(args, chosen)
        environments = prepare_environments(chosen, args.installed)
        out = args.out or HOME / "results.md"
        measurements = read(out.with_suffix(".json"))
        for case in chosen:
            sys.stderr.write(f"{case.name}\n")
            job = Job(case.task, case.precision, str(WORK), args.rows, case.layers, case.quantized, device=args.device)
            measurements[case.name] = measure(case, job, environments, args.repetitions)
            write(out, measurements)
    except (DisagreementError, ProgramError) as error:
        sys.stderr.write(f"benchmark: {error}\n")
        return 1
    print(render(measurements), end="")
    return 0


def compare(args: argparse.Namespace, chosen: Sequence[Case]) -> int:
    """Compare two versions of litlora, and write the table and the runs."""
    python = Path(sys.executable) if args.installed else install("litlora")
    tables, runs = compare_versions(chosen, WORK, args.rows, args.against, python, args.repetitions)
    out = args.out or HOME / "versions.md"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(tables, encoding="utf-8")
    out.with_suffix(".json").write_text(as_json(runs), encoding="utf-8")
    print(tables, end="")
    return 0


def prepare_environments(chosen: Sequence[Case], installed: bool) -> Environments:
    """Create the environments that the cases need, unless all is installed; continue without those that fail."""
    environments = Environments()
    needed = {"litlora", *(program.environment for case in chosen for program in case.programs)}
    for name in sorted(needed):
        try:
            python = Path(sys.executable) if installed else install(name)
            if name == LITGPT.environment:
                run_job(Job("convert", "32-true", str(WORK)), python, name)
            environments.pythons[name] = python
        except ProgramError as error:
            if name == "litlora":
                raise
            sys.stderr.write(f"continuing without {name}: {error}\n")
            environments.missing[name] = str(error)
    return environments


def read(path: Path) -> dict[str, Measurement]:
    """Read the measurements of earlier runs, so that cases can be run one at a time."""
    if not path.is_file():
        return {}
    return {name: measurement_of(values) for name, values in json.loads(path.read_text(encoding="utf-8")).items()}


def measurement_of(values: dict[str, Any]) -> Measurement:
    results = {name: [Result(**result) for result in results] for name, results in values["results"].items()}
    products = [Products(**product) for product in values["products"]]
    return Measurement(**{**values, "results": results, "products": products})


def write(path: Path, measurements: Mapping[str, Measurement]) -> None:
    """Write the tables, and the measurements behind them as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = {name: asdict(measurement) for name, measurement in measurements.items()}
    path.with_suffix(".json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    path.write_text(render(measurements), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
