"""Run the tests that need a GPU, then LoRA, QLoRA and generation at the shapes of Llama 3.2 1B and 3.1 8B, beside PEFT.

The weights are random. A table and its JSON are written after each case, so that a run that is cut off has left what it
measured.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from benchmarks.environments import HOME

from gpu_checks.cases import TINY_SHAPE, Case, Work, cases
from gpu_checks.inputs import write_checkpoint, write_data
from gpu_checks.running import CaseError, Result, measure
from gpu_checks.table import render

SHAPES = "1B (Llama 3.2)", "8B (Llama 3.1)"
TESTS_SHARE = 0.25
"""Of the time, what the tests may take."""
MEMORY_DISK = Path("/dev/shm")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape and few steps, to try the check itself")
    parser.add_argument("--seconds", type=float, default=450, help="when to stop (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=HOME / "gpu_check.md", help="file of the table (default: %(default)s)"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.stderr.write("gpu_check: torch sees no GPU here; --device cpu --tiny tries the check itself\n")
        return 1
    end = time.monotonic() + args.seconds
    args.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[Case, Result] = {}
    with tempfile.TemporaryDirectory(dir=scratch(args.tiny)) as folder:
        for case in cases((TINY_SHAPE,) if args.tiny else SHAPES):
            results[case] = run_case(case, args, Path(folder), end)
            sys.stderr.write(f"{case.name}: {results[case]}\n")
            write(args.out, args.device, results)
    print(args.out.read_text(encoding="utf-8"), end="")
    return 0


def scratch(tiny: bool) -> Path | None:
    """Return where checkpoints of up to 17 GB are written fastest: in memory, where there is enough."""
    has_room = MEMORY_DISK.is_dir() and shutil.disk_usage(MEMORY_DISK).free > 20e9
    return MEMORY_DISK if has_room and not tiny else None


def run_case(case: Case, args: argparse.Namespace, folder: Path, end: float) -> Result:
    """Run a case in what is left of the time; a case that fails leaves its reason as the note."""
    try:
        left = end - time.monotonic()
        if left < 1:
            raise CaseError("no time was left")
        work = work_of(case, args, folder, left * TESTS_SHARE if case.task == "tests" else left)
        if case.shape:
            prepare(work, folder)
        return measure(case, work)
    except (CaseError, OSError, torch.OutOfMemoryError) as error:
        return Result(note=str(error).replace("|", "/"))


def work_of(case: Case, args: argparse.Namespace, folder: Path, seconds: float) -> Work:
    """Return the size of a case."""
    steps, rows, most_tokens, new_tokens = (3, 4, 512, 8) if args.tiny else (8, 128, 32768, 128)
    return Work(
        str(folder), case.shape, case.quantized, args.device, steps, rows, most_tokens, new_tokens, seconds
    )  # fmt: skip


def prepare(work: Work, folder: Path) -> None:
    """Write the data, and the checkpoint of a shape unless it is there; it replaces that of another shape."""
    stamp = folder / "shape.txt"
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == work.shape:
        return
    shutil.rmtree(work.checkpoint, ignore_errors=True)
    write_checkpoint(work.checkpoint, work.shape, work.device)
    write_data(work.data, work.rows * (work.steps + 1))
    stamp.write_text(work.shape, encoding="utf-8")


def write(out: Path, device: str, results: dict[Case, Result]) -> None:
    """Write the table, and the results as JSON."""
    machine = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    out.write_text(render(machine, results), encoding="utf-8")
    found = {case.name: asdict(result) for case, result in results.items()}
    out.with_suffix(".json").write_text(json.dumps({"machine": machine, "cases": found}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
