"""Training state beside an adapter: optimizer, random generators, counters and the best adapter, without a pickle."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.optim import Optimizer

from litlora.errors import LitLoraError
from litlora.train.resume import COUNTERS
from litlora.utils.files import read_json

TENSORS = "training_state.safetensors"
Counted = TypeVar("Counted", "Best", "Progress")


@dataclass(frozen=True)
class StepResult:
    """One optimizer step: its mean loss per supervised token, and the norm of its gradients before clipping."""

    loss: float
    grad_norm: float
    tokens: int
    supervised_tokens: int
    seconds: float


@dataclass
class Best:
    """The lowest validation loss of a run so far."""

    loss: float | None = None
    step: int = 0
    beaten: int = 0
    """How many validations in a row have not been better since."""
    matrices: dict[str, Tensor] = field(default_factory=dict)
    """The adapter that had it, where it is to be kept."""


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
    val_loss: float | None = None
    """Validation loss after the present step, if one was taken."""
    best: Best = field(default_factory=Best)

    def add(self, epoch: int, result: StepResult) -> None:
        """Count one more step."""
        if epoch != self.epoch:
            self.epoch, self.epoch_loss, self.epoch_supervised_tokens = epoch, 0.0, 0
        self.step += 1
        self.val_loss = None
        self.tokens += result.tokens
        self.supervised_tokens += result.supervised_tokens
        self.seconds += result.seconds
        self.epoch_loss += result.loss * result.supervised_tokens
        self.epoch_supervised_tokens += result.supervised_tokens

    def validated(self, loss: float, matrices: Mapping[str, Tensor]) -> None:
        """Note the validation loss after the present step, and the adapter that had it if it is the best so far."""
        self.val_loss = loss
        if self.best.loss is None or loss < self.best.loss:
            kept = {name: matrix.detach().to("cpu", copy=True) for name, matrix in matrices.items()}
            self.best = Best(loss, self.step, matrices=kept)
        else:
            self.best.beaten += 1

    @property
    def train_loss(self) -> float:
        """Mean loss over the supervised tokens of the present epoch."""
        return self.epoch_loss / self.epoch_supervised_tokens


def write_state(folder: Path, optimizer: Optimizer, progress: Progress) -> None:
    """Write what an exact continuation needs, beside the adapter."""
    best = dataclasses.replace(progress.best, matrices={})
    tensors: dict[str, Tensor] = {"cpu_generator": torch.get_rng_state()}
    tensors |= {f"best.{name}": matrix for name, matrix in progress.best.matrices.items()}
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
    copies = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    (folder / TENSORS).write_bytes(save(copies))
    counters = {"progress": dataclasses.asdict(dataclasses.replace(progress, best=best)), "optimizer": scalars}
    (folder / COUNTERS).write_text(json.dumps(counters, indent=2) + "\n", encoding="utf-8")


def _flat(values: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield the state of a parameter, of which bitsandbytes wraps a part in a dictionary that it need not be in."""
    for name, value in values.items():
        yield from value.items() if isinstance(value, dict) else [(name, value)]


def restore_state(folder: Path, optimizer: Optimizer) -> Progress:
    """Put optimizer and random generators back to where `write_state` found them, and return the progress."""
    try:
        return _restore(load_file(folder / TENSORS), read_json(folder / COUNTERS), optimizer)
    except (AttributeError, KeyError, RuntimeError, SafetensorError, TypeError, ValueError) as error:
        raise LitLoraError(f"{folder} holds no training state of this optimizer: {error}") from error


def _restore(tensors: dict[str, Tensor], counters: dict[str, Any], optimizer: Optimizer) -> Progress:
    groups = optimizer.state_dict()
    _check_shapes(tensors, optimizer)
    torch.set_rng_state(tensors.pop("cpu_generator"))
    state: dict[int, dict[str, object]] = {}
    matrices: dict[str, Tensor] = {}
    for key, value in (tensors | counters["optimizer"]).items():
        kind, _, name = key.partition(".")
        if kind == "best":
            matrices[name] = value
        elif kind == "optimizer":
            index, _, name = name.partition(".")
            state.setdefault(int(index), {})[name] = value
        elif int(name) < torch.cuda.device_count():
            torch.cuda.set_rng_state(value, int(name))
    optimizer.load_state_dict(groups | {"state": state})
    progress = counters["progress"]
    best = Best(**progress["best"] | {"matrices": matrices})
    return _checked(Progress(**progress | {"best": _checked(best)}))


def _check_shapes(tensors: dict[str, Tensor], optimizer: Optimizer) -> None:
    """Refuse tensors that are not as large as those which the optimizer makes itself at a step; it would not ask."""
    own = _state_after_a_step(optimizer)
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "optimizer" and tensor.shape != own.get(name, tensor).shape:
            raise ValueError(f"{key} is of the shape {[*tensor.shape]} and not {[*own[name].shape]}")


@torch.no_grad()
def _state_after_a_step(optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the tensors of an optimizer's state after a step that leaves the parameters as they are."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    before = [parameter.clone() for parameter in parameters]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for parameter, value in zip(parameters, before, strict=True):
        parameter.copy_(value)
    states = optimizer.state_dict()["state"].items()
    flat = {f"{index}.{name}": value for index, values in states for name, value in _flat(values)}
    return {name: value for name, value in flat.items() if isinstance(value, Tensor)}


def _checked(counted: Counted) -> Counted:
    """Refuse counters that are no numbers of their kind, before anything is counted on from them."""
    for name, kind in get_type_hints(type(counted)).items():
        value = getattr(counted, name)
        is_of_kind = isinstance(value, dict if get_origin(kind) is dict else kind)
        if not is_of_kind or (isinstance(value, int) and not 0 <= value < 2**63):
            raise ValueError(f"{name} cannot be {value!r}")
    return counted
