"""Training state beside an adapter: optimizer, random generator and counters, stored without a pickle."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from litlora.files import read_json

TENSORS = "training_state.safetensors"
COUNTERS = "training_state.json"


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: its mean loss per supervised token, and the norm of its gradients before clipping."""

    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    seconds: float


@dataclass
class Progress:
    """How far a run is; losses and tokens of an epoch are those of the present one."""

    step: int = 0
    epoch: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    seconds: float = 0.0
    epoch_loss: float = 0.0
    """Sum of the losses of the epoch's supervised tokens so far."""
    epoch_supervised_tokens: int = 0

    def add(self, epoch: int, result: StepResult) -> None:
        """Count one more step."""
        if epoch != self.epoch:
            self.epoch, self.epoch_loss, self.epoch_supervised_tokens = epoch, 0.0, 0
        self.step += 1
        self.tokens += result.tokens
        self.supervised_tokens += result.supervised_tokens
        self.seconds += result.seconds
        self.epoch_loss += result.loss * result.supervised_tokens
        self.epoch_supervised_tokens += result.supervised_tokens

    @property
    def train_loss(self) -> float:
        """Mean loss over the supervised tokens of the present epoch."""
        return self.epoch_loss / self.epoch_supervised_tokens


def write_state(folder: Path, optimizer: Optimizer, progress: Progress) -> None:
    """Write what an exact continuation needs, beside the adapter."""
    tensors: dict[str, Tensor] = {"cpu_generator": torch.get_rng_state()}
    scalars: dict[str, object] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in _flat(values):
            key = f"optimizer.{index}.{name}"
            if isinstance(value, Tensor):
                tensors[key] = value
            else:
                scalars[key] = value
    for device in range(torch.cuda.device_count()):
        tensors[f"cuda_generator.{device}"] = torch.cuda.get_rng_state(device)
    # Copies, since optimizers may share tensors among their parameters, and safetensors refuses that.
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()},
        folder / TENSORS,
    )
    counters = {"progress": dataclasses.asdict(progress), "optimizer": scalars}
    (folder / COUNTERS).write_text(json.dumps(counters, indent=2) + "\n", encoding="utf-8")


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield the state of a parameter, of which bitsandbytes wraps a part in a dictionary that it need not be in."""
    for name, value in values.items():
        yield from value.items() if isinstance(value, dict) else [(name, value)]


def restore_state(folder: Path, optimizer: Optimizer) -> Progress:
    """Put optimizer and random generators back to where `write_state` found them, and return the counters."""
    tensors, counters = load_file(folder / TENSORS), read_json(folder / COUNTERS)
    torch.set_rng_state(tensors.pop("cpu_generator"))
    state: dict[int, dict[str, object]] = {}
    for key, value in (tensors | counters["optimizer"]).items():
        kind, index, *name = key.split(".", 2)
        if kind == "cuda_generator":
            torch.cuda.set_rng_state(value, int(index))
        else:
            state.setdefault(int(index), {})[name[0]] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return Progress(**counters["progress"])
