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
from litlora.evaluation.validation import ValLoss
from litlora.train.resume import COUNTERS
from litlora.utils.files import read_json

TENSORS = "training_state.safetensors"
Counters = TypeVar("Counters", "Best", "Progress")


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
    by_source: dict[str, float] = field(default_factory=dict)
    """That of each source, if the validation rows have several."""
    step: int = 0
    beaten: int = 0
    """How many validations in a row since then have not been better."""
    matrices: dict[str, Tensor] = field(default_factory=dict)
    """The adapter that had it, if --eval.keep_best is on."""


@dataclass
class Progress:
    """The counters of a run; those of an epoch belong to the present one."""

    step: int = 0
    epoch: int = 0
    tokens: int = 0
    """Tokens of the examples so far, prompts included: neither padding nor the last token of a text, which is a label
    only. A prefix that examples share counts for each of them, though a CPU computes it once."""
    supervised_tokens: int = 0
    seconds: float = 0.0
    """Time of all optimizer steps."""
    epoch_loss: float = 0.0
    """Sum of the losses of the epoch's supervised tokens so far."""
    epoch_supervised_tokens: int = 0
    val_loss: float | None = None
    """Validation loss after the present step, if one was taken."""
    val_loss_by_source: dict[str, float] = field(default_factory=dict)
    """That of each source, if the validation rows have several."""
    best: Best = field(default_factory=Best)

    def add(self, epoch: int, result: StepResult) -> None:
        """Count one more step."""
        if epoch != self.epoch:
            self.epoch, self.epoch_loss, self.epoch_supervised_tokens = epoch, 0.0, 0
        self.step += 1
        self.val_loss, self.val_loss_by_source = None, {}
        self.tokens += result.tokens
        self.supervised_tokens += result.supervised_tokens
        self.seconds += result.seconds
        self.epoch_loss += result.loss * result.supervised_tokens
        self.epoch_supervised_tokens += result.supervised_tokens

    def validated(self, loss: ValLoss, matrices: Mapping[str, Tensor]) -> None:
        """Record the validation loss after the present step, and its adapter if it is the best so far."""
        self.val_loss, self.val_loss_by_source = loss.mean, loss.by_source
        if self.best.loss is None or loss.mean < self.best.loss:
            matrices = {name: matrix.detach().to("cpu", copy=True) for name, matrix in matrices.items()}
            self.best = Best(loss.mean, loss.by_source, self.step, matrices=dict(matrices))
        else:
            self.best.beaten += 1

    @property
    def train_loss(self) -> float:
        """Mean loss over the supervised tokens of the present epoch."""
        return self.epoch_loss / self.epoch_supervised_tokens


def write_state(folder: Path, optimizer: Optimizer, progress: Progress) -> None:
    """Write what an exact resume needs, beside the adapter."""
    best = dataclasses.replace(progress.best, matrices={})
    tensors: dict[str, Tensor] = {"cpu_generator": torch.get_rng_state()}
    tensors |= {f"best.{name}": matrix for name, matrix in progress.best.matrices.items()}
    scalars: dict[str, object] = {}
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in _flattened(values):
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


def _flattened(values: dict[str, Any]) -> Iterator[tuple[str, object]]:
    """Yield the state of a parameter; bitsandbytes wraps some of it in another dictionary."""
    for name, value in values.items():
        yield from value.items() if isinstance(value, dict) else [(name, value)]


def restore_state(folder: Path, optimizer: Optimizer) -> Progress:
    """Restore optimizer and random generators from the files of `write_state`, and return the progress."""
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
    """Refuse tensors of another shape than those that the optimizer makes at a step: it would not check them."""
    expected = _state_after_a_step(optimizer)
    for key, tensor in tensors.items():
        kind, _, name = key.partition(".")
        if kind == "optimizer" and tensor.shape != expected.get(name, tensor).shape:
            raise ValueError(f"{key} has the shape {[*tensor.shape]} instead of {[*expected[name].shape]}")


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
    flat = {f"{index}.{name}": value for index, values in states for name, value in _flattened(values)}
    return {name: value for name, value in flat.items() if isinstance(value, Tensor)}


def _checked(counters: Counters) -> Counters:
    """Refuse counters that are no numbers of their type."""
    for name, kind in get_type_hints(type(counters)).items():
        value = getattr(counters, name)
        is_of_type = isinstance(value, dict if get_origin(kind) is dict else kind)
        if not is_of_type or (isinstance(value, int) and not 0 <= value < 2**63):
            raise ValueError(f"{name} cannot be {value!r}")
    return counters
