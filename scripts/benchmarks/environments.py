"""The virtual environments of the programs, and running a job in one of them."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.jobs import Job

ROOT = Path(__file__).parents[2]
HOME = ROOT / ".benchmark"
SCRIPTS = str(Path(__file__).parents[1])
QUIET = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
NO_GPU = {"CUDA_VISIBLE_DEVICES": ""}
TORCH = "torch==2.13.0"  # one version for all, so that the programs are compared
REQUIREMENTS = {
    "litlora": ("--editable", str(ROOT)),
    "peft": ("peft==0.21.2", "transformers==5.23.0", "accelerate==1.15.0", "bitsandbytes==0.50.2"),
    "litgpt": ("litgpt==0.5.13",),
}


class ProgramError(Exception):
    """A program cannot run, for the reason that the message gives."""


@dataclass
class Environments:
    """The Python of each environment, and the errors of those that could not be created."""

    pythons: dict[str, Path] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)


def install(name: str) -> Path:
    """Create the environment unless it is up to date, and return its Python."""
    folder = HOME / name
    python, stamp = folder / "bin/python", folder / "installed.txt"
    requirements = requirements_of(name)
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != requirements:
        sys.stderr.write(f"installing {name} into {folder}\n")
        run([sys.executable, "-m", "venv", str(folder)], HOME / f"{name}.log")
        run([str(python), "-m", "pip", "install", "--quiet", TORCH, *REQUIREMENTS[name]], HOME / f"{name}.log")
        stamp.write_text(requirements, encoding="utf-8")
    return python


def requirements_of(name: str) -> str:
    """Return the requirements of an environment as text, including litlora's own."""
    own = (ROOT / "pyproject.toml").read_text(encoding="utf-8") if name == "litlora" else ""
    return "\n".join((TORCH, *REQUIREMENTS[name], own))


def run_job(job: Job, python: Path, module: str) -> Any:
    """Run a job in its own process, and return the JSON of its last output line."""
    command = [str(python), "-m", f"benchmarks.{module}", json.dumps(asdict(job))]
    extra = {} if job.device == "cuda" else NO_GPU
    if python == Path(sys.executable):  # a separate environment must not import from this one
        paths = [SCRIPTS, *filter(None, [os.environ.get("PYTHONPATH")])]
        extra = extra | {"PYTHONPATH": os.pathsep.join(paths)}
    output = run(command, job.work / f"{module}-{job.task}.log", extra)
    return json.loads(output.splitlines()[-1])


def run(command: list[str], log: Path, extra: Mapping[str, str] = NO_GPU) -> str:
    """Return a command's stdout; on failure raise the last line of its stderr, which is logged."""
    log.parent.mkdir(parents=True, exist_ok=True)
    env = os.environ | QUIET | {"PYTHONPATH": SCRIPTS} | extra
    with log.open("w", encoding="utf-8") as errors:
        done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
    if done.returncode:
        lines = log.read_text(encoding="utf-8").splitlines()
        sys.stderr.write(f"failed; see {log}:\n")
        raise ProgramError(lines[-1] if lines else f"exit code {done.returncode}")
    return done.stdout
