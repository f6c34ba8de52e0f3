"""Collectives between the processes of a run, and which of them reports."""

import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store

from litlora.distributed.heartbeat import HINT, LostContactError, has_the_word, keeping_contact
from litlora.distributed.launcher import LEFT_ALONE, Place
from litlora.errors import EndedElsewhereError, LitLoraError, StoppedError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run as one of them sees them; one that is alone waits for nobody and sends nothing."""

    index: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that writes and talks."""
        return self.index == 0

    def add_up(self, tensor: Tensor) -> Tensor:
        """Put the sum over all ranks into a tensor, and return it."""
        if self.count > 1:
            with _in_contact(self.index):
                dist.all_reduce(tensor)
        return tensor

    def highest(self, value: int) -> int:
        """Return the highest value that a rank has."""
        if self.count == 1:
            return value
        highest = torch.tensor(value, device=self.device)
        with _in_contact(self.index):
            dist.all_reduce(highest, dist.ReduceOp.MAX)
        return int(highest)

    def add_up_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Sum the gradients over all ranks, and return the sum of the losses.

        All of it is one message, since the time of many small ones is that of waiting.
        """
        if self.count == 1:
            return loss
        sums = [*(parameter.grad for parameter in parameters if parameter.grad is not None), loss.view(1)]
        nn.utils.vector_to_parameters(self.add_up(nn.utils.parameters_to_vector(sums)), sums)
        return sums[-1]

    def from_first(self, make: Callable[[], T]) -> T:
        """Return what the first rank makes, to all."""
        if self.count == 1:
            return make()
        made = [make() if self.is_first else None]
        with _in_contact(self.index):
            dist.broadcast_object_list(made)
        return made[0]  # type: ignore[return-value]

    def as_first(self, tensor: Tensor) -> Tensor:
        """Put what the first rank has into a tensor, and return it."""
        if self.count > 1:
            with _in_contact(self.index):
                dist.broadcast(tensor, 0)
        return tensor

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """Let the first rank do something before the others, who then find it done."""
        if not self.is_first:
            self.highest(0)
        yield
        if self.is_first:
            self.highest(0)

    def require_same(self, contents: Mapping[str, str]) -> None:
        """Refuse to train on other contents than the first rank has, as nodes may that share no folders."""
        expected = self.from_first(lambda: contents)
        if others := [name for name in contents if contents[name] != expected[name]]:
            hint = "all nodes must see the same --checkpoint_dir and --data_dir"
            raise LitLoraError(f"rank {self.index} has not what rank 0 has ({', '.join(others)}): {hint}")


@contextmanager
def _in_contact(rank: int) -> Iterator[None]:
    """Say of a failed collective, which has no exception of its own, what its failure means."""
    try:
        yield
    except RuntimeError as error:
        raise LostContactError(f"rank {rank} has lost the contact to another, which has ended: {HINT}") from error


def open_fabric(place: Place, precision: Literal["32-true", "bf16-mixed"]) -> Fabric:
    """Return the Fabric of a process at its place; where there are others, it has met them."""
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS")  # autograd's thread, which finds its way by itself
    if place.count == 1:
        return Fabric(devices=1, precision=precision)
    devices, nodes, environment = _view(place, torch.cuda.device_count())
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        devices=devices,
        num_nodes=nodes,
        precision=precision,
        strategy=ModelParallelStrategy(_unwrapped, data_parallel_size=place.count, tensor_parallel_size=1),
        plugins=[environment],
    )
    fabric.launch()
    return fabric


class OneGPU(TorchElasticEnvironment):
    """The surroundings of a process that sees one GPU, its own, as if it were alone on its machine."""

    def local_rank(self) -> int:
        """Return the number of its GPU among those that it sees."""
        return 0


def _view(place: Place, gpus: int) -> tuple[int, int, TorchElasticEnvironment]:
    """Return how many devices and machines there are for a process that sees so many GPUs, and its surroundings."""
    if gpus == 1 and place.has_own_gpu:
        return 1, place.count, OneGPU()
    if 0 < gpus < place.local_count:
        raise LitLoraError(f"--devices ({place.local_count}) must be at most the GPUs of this machine ({gpus})")
    return place.local_count, place.nodes, TorchElasticEnvironment()


def keep_contact(place: Place) -> AbstractContextManager[None]:
    """Have the processes of a run, which have met, end together if one of them dies."""
    return nullcontext() if place.count == 1 else keeping_contact(place, _get_default_store())


def _unwrapped(gpt: nn.Module, _: DeviceMesh) -> nn.Module:
    """Leave a model as it is: its base may be sharded already, and its gradients are summed once a step, not here."""
    return gpt


@contextmanager
def one_voice(place: Place) -> Iterator[None]:
    """Let the first rank alone talk, and of those that fail only the one that did so first."""
    if place.count == 1:
        yield
        return
    try:
        with ExitStack() as stack:
            if place.rank:
                silence = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(redirect_stdout(silence))
                stack.enter_context(redirect_stderr(silence))
            yield
    except StoppedError as error:  # which all have agreed on
        if place.rank:
            raise EndedElsewhereError(error.exit_code) from error
        raise
    except (Exception, KeyboardInterrupt) as error:
        if not _is_to_say(error, place):
            raise EndedElsewhereError(LEFT_ALONE if place.is_watched else 1) from error
        if place.rank:
            sys.stderr.write("\n")  # for the progress bar of the first, whose line may not have ended
        raise


def _is_to_say(error: BaseException, place: Place) -> bool:
    """Tell whether this rank says why it ends: whoever watches them takes one of several sentences, others need one."""
    if place.is_watched and isinstance(error, LostContactError):
        return False
    return _is_first_to_say(place.rank) or (place.is_watched and isinstance(error, LitLoraError))


def _is_first_to_say(rank: int) -> bool:
    """Tell whether no other rank has said why the run ends; one who cannot ask leaves it to the first."""
    if not dist.is_initialized():
        return rank == 0
    try:
        return has_the_word(_get_default_store(), rank)
    except RuntimeError:
        return False
