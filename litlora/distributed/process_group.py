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

from litlora.distributed.heartbeat import LostPeerError, claim_report, monitoring_peers
from litlora.distributed.launcher import PEER_FAILED, RankInfo
from litlora.errors import RESUME, EndedElsewhereError, LitLoraError, StoppedError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """The processes of a run as one of them sees them; a single process waits for nobody and sends nothing."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes files and prints."""
        return self.rank == 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place, and return it."""
        if self.world_size > 1:
            with _naming_lost_peer(self.rank):
                dist.all_reduce(tensor)
        return tensor

    def all_reduce_max(self, value: int) -> int:
        """Return the maximum of a value over all ranks."""
        if self.world_size == 1:
            return value
        maximum = torch.tensor(value, device=self.device)
        with _naming_lost_peer(self.rank):
            dist.all_reduce(maximum, dist.ReduceOp.MAX)
        return int(maximum)

    def all_reduce_gradients(self, parameters: Iterable[nn.Parameter], loss: Tensor) -> Tensor:
        """Sum the gradients over all ranks, and return the sum of the losses.

        All of it is one message: many small messages would mostly wait.
        """
        if self.world_size == 1:
            return loss
        sums = [*(parameter.grad for parameter in parameters if parameter.grad is not None), loss.view(1)]
        nn.utils.vector_to_parameters(self.all_reduce(nn.utils.parameters_to_vector(sums)), sums)
        return sums[-1]

    def broadcast_result(self, compute: Callable[[], T]) -> T:
        """Return what rank 0 computes, on all ranks."""
        if self.world_size == 1:
            return compute()
        results = [compute() if self.is_first else None]
        with _naming_lost_peer(self.rank):
            dist.broadcast_object_list(results)
        return results[0]  # type: ignore[return-value]

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Copy rank 0's values into a tensor, and return it."""
        if self.world_size > 1:
            with _naming_lost_peer(self.rank):
                dist.broadcast(tensor, 0)
        return tensor

    @contextmanager
    def first_ahead(self) -> Iterator[None]:
        """Run the block on rank 0 before all other ranks, which then find its files."""
        if not self.is_first:
            self.all_reduce_max(0)
        yield
        if self.is_first:
            self.all_reduce_max(0)

    def require_identical(self, contents: Mapping[str, str]) -> None:
        """Refuse to train on other contents than rank 0, as on nodes that share no folders."""
        expected = self.broadcast_result(lambda: contents)
        if others := [name for name in contents if contents[name] != expected[name]]:
            hint = "all nodes must see the same --checkpoint_dir and --data_dir"
            raise LitLoraError(f"rank {self.rank} does not read what rank 0 reads ({', '.join(others)}): {hint}")


@contextmanager
def _naming_lost_peer(rank: int) -> Iterator[None]:
    """Turn the failure of a collective, which has no exception of its own, into what it means."""
    try:
        yield
    except RuntimeError as error:
        raise LostPeerError(f"rank {rank} has lost contact with a peer, which has ended: {RESUME}") from error


def open_fabric(rank_info: RankInfo, precision: Literal["32-true", "bf16-mixed"]) -> Fabric:
    """Return this process's Fabric, connected to its peers where there are any."""
    warnings.filterwarnings("ignore", "Attempting to run cuBLAS")  # autograd's thread, which finds its way by itself
    if rank_info.world_size == 1:
        return Fabric(devices=1, precision=precision)
    devices, nodes, environment = _visible_devices(rank_info, torch.cuda.device_count())
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    fabric = Fabric(
        devices=devices,
        num_nodes=nodes,
        precision=precision,
        strategy=ModelParallelStrategy(_unwrapped, data_parallel_size=rank_info.world_size, tensor_parallel_size=1),
        plugins=[environment],
    )
    fabric.launch()
    return fabric


class OneGPU(TorchElasticEnvironment):
    """The environment of a process whose only visible GPU is its own, as if it were alone on its machine."""

    def local_rank(self) -> int:
        """Return the index of its GPU among the visible ones."""
        return 0


def _visible_devices(rank_info: RankInfo, gpus: int) -> tuple[int, int, TorchElasticEnvironment]:
    """Return the number of devices and nodes for a process that sees this number of GPUs, and its environment."""
    if gpus == 1 and rank_info.has_own_gpu:
        return 1, rank_info.world_size, OneGPU()
    if 0 < gpus < rank_info.local_world_size:
        number = rank_info.local_world_size
        raise LitLoraError(f"--devices ({number}) must be at most the GPUs of this machine ({gpus})")
    return rank_info.local_world_size, rank_info.nodes, TorchElasticEnvironment()


def monitor_peers(rank_info: RankInfo) -> AbstractContextManager[None]:
    """End the connected processes of a run together if one of them dies."""
    return nullcontext() if rank_info.world_size == 1 else monitoring_peers(rank_info, _get_default_store())


def _unwrapped(gpt: nn.Module, _: DeviceMesh) -> nn.Module:
    """Leave a model as it is: its base may be sharded already, and its gradients are summed once a step, not here."""
    return gpt


@contextmanager
def reporting_once(rank_info: RankInfo) -> Iterator[None]:
    """Let rank 0 alone print, and of several ranks that fail only the first one report."""
    if rank_info.world_size == 1:
        yield
        return
    try:
        with ExitStack() as stack:
            if rank_info.rank:
                devnull = stack.enter_context(Path(os.devnull).open("w"))
                stack.enter_context(redirect_stdout(devnull))
                stack.enter_context(redirect_stderr(devnull))
            yield
    except StoppedError as error:  # on which all ranks agree
        if rank_info.rank:
            raise EndedElsewhereError(error.exit_code) from error
        raise
    except (Exception, KeyboardInterrupt) as error:
        if not _reports(error, rank_info):
            raise EndedElsewhereError(PEER_FAILED if rank_info.is_launched else 1) from error
        if rank_info.rank:
            sys.stderr.write("\n")  # for the progress bar of rank 0, whose line may not have ended
        raise


def _reports(error: BaseException, rank_info: RankInfo) -> bool:
    """Tell whether this rank reports why it ends: a launcher prints one of several sentences, others print each."""
    if rank_info.is_launched and isinstance(error, LostPeerError):
        return False
    return _reports_first(rank_info.rank) or (rank_info.is_launched and isinstance(error, LitLoraError))


def _reports_first(rank: int) -> bool:
    """Tell whether no other rank has reported why the run ends; a rank that cannot ask leaves it to rank 0."""
    if not dist.is_initialized():
        return rank == 0
    try:
        return claim_report(_get_default_store(), rank)
    except RuntimeError:
        return False
