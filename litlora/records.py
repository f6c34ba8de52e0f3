"""What a run leaves in its folder: hyperparameters.yaml, metrics.csv, step-NNNNNN/ to go on from, and final/."""

import csv
import dataclasses
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.optim import Optimizer

from litlora.adapter import write_adapter
from litlora.args import FinetuneLoraArgs
from litlora.errors import LitLoraError
from litlora.files import check_writable, failure_said, whole_directory, write_whole
from litlora.lora import LoRAConfig
from litlora.state import Progress, write_state

COLUMNS = (
    "step", "epoch", "loss", "val_loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "memory_gb",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    args: FinetuneLoraArgs
    lora: LoRAConfig
    tokenizer_files: tuple[Path, ...]

    @property
    def path(self) -> Path:
        return self.args.out_dir

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.csv"

    def check(self) -> None:
        """Refuse a folder that cannot be written, holds a run already, or none to go on with; nothing is created."""
        check_writable(self.path, "--out_dir")
        if self.metrics.exists() and not self.args.resume:
            hint = "choose another, remove it, or go on with it by --resume true"
            raise LitLoraError(f"--out_dir ({self.path}) holds a run already: {hint}")
        if (self.path / "final").exists():
            raise LitLoraError(f"--out_dir ({self.path}) holds a finished run: choose another, or remove it")
        self.resume_from()

    def resume_from(self) -> Path | None:
        """Return the checkpoint that --resume asks for, or None for a run from the start."""
        if not self.args.resume:
            return None
        if isinstance(self.args.resume, Path):
            found = [self.args.resume] if (self.args.resume / "training_state.json").is_file() else []
        else:
            found = sorted(self.path.glob("step-*"))
        if not found:
            where = self.path if self.args.resume is True else self.args.resume
            raise LitLoraError(f"--resume: there is no checkpoint in {where}; start without --resume")
        return found[-1]

    def open(self, progress: Progress) -> None:
        """Write the settings, and a metrics.csv that ends where the progress stands."""
        settings = plain(dataclasses.replace(self.args, resume=False))
        rows = self._rows_until(progress.step) if progress.step else [",".join(COLUMNS)]
        write_whole(
            {
                self.path / "hyperparameters.yaml": yaml.safe_dump(settings, sort_keys=False).encode(),
                self.metrics: ("\n".join(rows) + "\n").encode(),
            }
        )

    def _rows_until(self, step: int) -> list[str]:
        header, *rows = self.metrics.read_text(encoding="utf-8").splitlines()
        return [header, *(row for row in rows if int(row.split(",")[0]) <= step)]

    def log(self, **values: float | None) -> None:
        """Append a row to metrics.csv, at once, so that a killed run keeps its log."""
        with failure_said(self.metrics), self.metrics.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(values)

    def save_step(self, model: nn.Module, optimizer: Optimizer, progress: Progress) -> None:
        """Save the adapter and all that an exact continuation needs."""
        with whole_directory(self.path / f"step-{progress.step:06d}") as folder:
            self._write_adapter(folder, model)
            write_state(folder, optimizer, progress)

    def save_final(self, model: nn.Module, report: dict[str, Any]) -> Path:
        """Save the adapter with the report of the run, and return its folder."""
        with whole_directory(self.path / "final") as folder:
            self._write_adapter(folder, model)
            (folder / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        return self.path / "final"

    def _write_adapter(self, folder: Path, model: nn.Module) -> None:
        write_adapter(folder, model, self.lora, self.args.checkpoint_dir, self.args.prompt_style)
        for path in self.tokenizer_files:
            shutil.copyfile(path, folder / path.name)


def plain(value: Any) -> Any:
    """Turn nested dataclasses and paths into what YAML holds."""
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return str(value) if isinstance(value, Path) else value
