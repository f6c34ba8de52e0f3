"""The output folder of a run: hyperparameters.yaml, metrics.csv, resumable checkpoints and the final adapter."""

import csv
import dataclasses
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any, Self

import yaml
from torch.optim import Optimizer

from litlora.args.common import plain
from litlora.args.finetune import FinetuneLoraArgs
from litlora.data.prompts.styles import StyleSettings
from litlora.errors import RESUME, LitLoraError
from litlora.export.model_card import model_card
from litlora.export.receipt import Receipt
from litlora.hub.origin import origin
from litlora.lora.checkpoint import write_adapter
from litlora.lora.config import LoRAConfig
from litlora.models.transformer import GPT
from litlora.report.files import HYPERPARAMETERS, METRICS, SAMPLES, RunFiles, read_metrics, read_samples, read_settings
from litlora.report.output import write_report
from litlora.train.lora_flags import described
from litlora.train.report import Report
from litlora.train.resume import (
    AUTO,
    BASE,
    TENSORS,
    Explain,
    Identity,
    checkpoints_in,
    is_local,
    starting_point,
    step_of,
)
from litlora.train.train_state import Progress, write_state
from litlora.utils.files import atomic_directory, copy_own, reporting_write_errors, write_atomically
from litlora.utils.manifest import write_manifest

STEP = re.compile("[0-9]{1,18}")
COLUMNS = (
    "step", "epoch", "loss", "val_loss", "learning_rate", "grad_norm", "tokens", "tokens_per_second", "memory_gb",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """The folder of one run."""

    args: FinetuneLoraArgs
    lora: LoRAConfig
    tokenizer_files: tuple[Path, ...]
    identity: Identity
    prompt_style: StyleSettings
    plan: Mapping[str, Any] | None = None
    """The plan as report.json holds it."""

    @property
    def path(self) -> Path:
        return self.args.out_dir

    @property
    def adapter(self) -> str:
        """What the run trains, in a few words."""
        return described(self.args, self.lora)

    @property
    def switches(self) -> tuple[str, ...]:
        """The --lora_* switches that choose the layers, if they do."""
        chosen = self.args.lora_targets is not None or self.args.init_adapter is not None
        return () if chosen else self.args.lora_switches

    @property
    def metrics(self) -> Path:
        return self.path / METRICS

    @property
    def samples(self) -> Path:
        return self.path / SAMPLES

    @property
    def final(self) -> Path:
        return self.path / "final"

    def step(self, progress: Progress) -> Path:
        """Return the folder of the present step."""
        return self.path / f"step-{progress.step:06d}"

    @property
    def checkpoints(self) -> list[Path]:
        """The step folders, the oldest first."""
        return checkpoints_in(self.path)

    def check(self, explain: Mapping[str, Explain]) -> Path | None:
        """Return the checkpoint to start from, or None for a run from the start; nothing is created or removed.

        Refuses a folder that holds another run, or no intact checkpoint of this one.
        """
        start = starting_point(self.args)
        if start is not None:
            self.identity.check(start, explain)
        return start

    def with_details(self, details: Mapping[str, str]) -> Self:
        """Return the same folder, whose checkpoints record more details of the run."""
        return dataclasses.replace(self, identity=self.identity.with_details(details))

    def is_left_alone(self) -> bool:
        """Tell whether --resume auto finds this run finished, and refuse a finished run of other settings."""
        if self.args.resume != AUTO or self.args.overwrite or not self.final.exists():
            return False
        if changes := self.identity.changed_settings(read_settings(self.path)):
            hint = "choose another, or resume it by --overwrite true"
            raise LitLoraError(f"--out_dir ({self.path}) holds a finished run: {', '.join(changes)}; {hint}")
        return True

    def open(self, start: Path | None, step: int) -> None:
        """Remove what comes after the start, and write the settings and a metrics.csv that ends there."""
        for path in list(self.path.glob(".*.partial")):  # left by a killed run: this one holds the lock
            remove(path)
        for path in self.checkpoints:
            if step_of(path) > step or not is_local(start, self.path):
                remove(path)
        if not is_local(start, self.path):
            remove(self.final)
        settings = plain(dataclasses.replace(self.args, resume=False, overwrite=False))
        write_atomically(
            {
                self.path / HYPERPARAMETERS: yaml.safe_dump(settings, sort_keys=False).encode(),
                self.metrics: "".join(f"{row}\n" for row in rows_until(start, step)).encode(),
            }
        )
        samples = [] if start is None else samples_until(start.parent, step)
        if samples:
            write_atomically({self.samples: "".join(samples).encode()})
        else:
            remove(self.samples)

    def log(self, **values: float | None) -> None:
        """Append a row to metrics.csv, at once, so that a killed run loses none."""
        path = self.metrics
        with (
            self._naming_checkpoint(),
            reporting_write_errors(path),
            path.open("a", newline="", encoding="utf-8") as file,
        ):
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(values)

    def log_sample(self, step: int, sample: Mapping[str, Any]) -> None:
        """Append a sample completion to samples.jsonl."""
        path = self.samples
        with self._naming_checkpoint(), reporting_write_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **sample}) + "\n")

    def sampled_rows(self, step: int) -> list[int]:
        """Return the rows of which a step has a sample completion."""
        return [sample["row"] for sample in read_samples(self.path) if sample["step"] == step]

    def save_step(self, model: GPT, optimizer: Optimizer, progress: Progress) -> Path:
        """Save the adapter and all that an exact resume needs, and return its folder."""
        path = self.step(progress)
        with self._naming_checkpoint(), atomic_directory(path) as folder:
            self._write_adapter(folder, model)
            write_state(folder, optimizer, progress)
            self.identity.write(folder)
            write_manifest(folder)
        self._remove_old(progress.best.step)
        return path

    @contextmanager
    def _naming_checkpoint(self) -> Iterator[None]:
        """Add to an error in writing the checkpoint from which the run can resume."""
        try:
            yield
        except LitLoraError as error:
            if not self.checkpoints:
                raise
            raise LitLoraError(f"{error}; {self.checkpoints[-1]} is saved: fix that, and {RESUME}") from error

    def _remove_old(self, best: int) -> None:
        limit = self.args.train.save_total_limit
        for path in self.checkpoints[:-limit] if limit else ():
            if step_of(path) != best:
                remove(path)

    def save_final(self, model: GPT, report: Report, receipt: Receipt | None) -> Path:
        """Save the adapter with report and receipt of the run, and return its folder."""
        remove(self.final)
        with self._naming_checkpoint(), atomic_directory(self.final) as folder:
            self._write_adapter(folder, model)
            report.write(folder)
            if receipt is not None:
                receipt.of_adapter(folder).write(folder)
            self._write_model_card(folder, report)
            write_report(RunFiles.of(self.path, plain(self.args), report.figures()), folder)
        return self.final

    def start_val_loss(self) -> float | None:
        """Return the validation loss before the first step, also of a run that has resumed."""
        return next((row.get("val_loss") for row in read_metrics(self.path) if row.get("step") == 0), None)

    def _write_model_card(self, folder: Path, report: Report) -> None:
        base_dir = self.args.checkpoint_dir.resolve()
        card = model_card(base_dir.name, origin(base_dir), report.figures())
        (folder / "README.md").write_text(card, encoding="utf-8")

    def _write_adapter(self, folder: Path, model: GPT) -> None:
        base_dir, base_sha256 = self.args.checkpoint_dir, self.identity.contents[BASE]
        digests, gguf = self.identity.details.get(TENSORS), self.args.gguf
        write_adapter(folder, model, self.lora, base_dir, base_sha256, self.prompt_style, digests, gguf)
        for path in self.tokenizer_files:
            copy_own(path, folder)


class ReadOnlyRunFolder(RunFolder):
    """The same folder for a rank that leaves the writing to rank 0."""

    def open(self, start: Path | None, step: int) -> None:
        """Do nothing."""

    def log(self, **values: float | None) -> None:
        """Do nothing."""

    def log_sample(self, step: int, sample: Mapping[str, Any]) -> None:
        """Do nothing."""

    def save_step(self, model: GPT, optimizer: Optimizer, progress: Progress) -> Path:
        """Return the folder that rank 0 writes."""
        return self.step(progress)

    def save_final(self, model: GPT, report: Report, receipt: Receipt | None) -> Path:
        """Return the folder that rank 0 writes."""
        return self.final


def samples_until(run: Path, step: int) -> list[str]:
    """Return the lines of a run's samples.jsonl up to a step."""
    return [json.dumps(sample) + "\n" for sample in read_samples(run) if sample["step"] <= step]


def rows_until(start: Path | None, step: int) -> list[str]:
    """Return the header of metrics.csv, and the rows of a checkpoint's run up to its step."""
    header = ",".join(COLUMNS)
    metrics = None if start is None else start.parent / METRICS
    if metrics is None or not metrics.is_file():
        return [header]
    rows = (row.split(",") for row in metrics.read_text(encoding="utf-8", errors="replace").splitlines())
    intact_rows = (row for row in rows if len(row) == len(COLUMNS) and STEP.fullmatch(row[0]))
    return [header, *(",".join(row) for row in intact_rows if int(row[0]) <= step)]


def remove(path: Path) -> None:
    """Remove a file or folder, if it exists, so that no partial folder is ever visible."""
    if not os.path.lexists(path):
        return
    with reporting_write_errors(path):
        doomed = path.with_name(f".{path.name.strip('.')}.{token_hex(4)}.partial")
        path.rename(doomed)
        shutil.rmtree(doomed) if doomed.is_dir() and not doomed.is_symlink() else doomed.unlink()
