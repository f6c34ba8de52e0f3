"""Check before the first step that the longest micro-batch fits in memory."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from litlora.args import FinetuneLoraArgs, TrainArgs
from litlora.data.batching import Sample, Samples, longest_micro_batch, optimize_layout, pack
from litlora.distributed.process_group import Ranks
from litlora.errors import LitLoraError, is_shortage
from litlora.lora.layer import lora_parameters
from litlora.train.loop import Run, loss_and_gradients
from litlora.train.memory_estimate import Load, Network, breakdown
from litlora.train.schedule import orders, total_steps
from litlora.train.train_state import Progress

USABLE = 0.9  # share of a GPU's free memory; the rest is for its libraries, and for gaps


def check_memory(run: Run, done: int) -> None:
    """Refuse a run whose longest micro-batch, of all behind the steps that are done, is too much for the memory.

    It goes forward and back before the first step; nothing of it stays, neither gradients nor random numbers drawn.
    """
    if done == total_steps(len(run.train), run.args.train):
        return
    longest = longest_ahead(run.train, run.args, run.ranks.world_size, done)
    if not fits(run, longest):
        # With sharded weights a rank cannot try again: the others may still be in the midst of the pass.
        fitting = [] if isinstance(run.gpt, FSDPModule) else fitting_part(run, longest)
        raise too_long(run, longest, fitting)


def longest_ahead(samples: Samples, args: FinetuneLoraArgs, ranks: int, done: int) -> list[Sample]:
    """Return the samples of the longest micro-batch, on any rank, of all behind the steps that are done."""
    ahead = orders(len(samples), args, after=done, total=total_steps(len(samples), args.train))
    return longest_micro_batch(samples, (order for _, order in ahead), args.train, ranks)


def load_of(samples: Sequence[Sample], network: Network, activation_checkpointing: bool, at_once: int = 1) -> Load:
    """Describe so many micro-batches of these samples."""
    micro = optimize_layout(pack(samples), network.backend, network.dtype)
    return Load(micro.lengths, micro.supervised, activation_checkpointing, micro.shared, at_once)


def at_once(samples: Sequence[Sample], train: TrainArgs, ranks: int, lanes: int) -> int:
    """Return how many of so many lanes have a micro-batch like this one, of those of a step."""
    return min(lanes, math.ceil(train.global_batch_size / (ranks * len(samples))))


def must_shard(args: FinetuneLoraArgs, network: Network, samples: Samples, ranks: Ranks) -> bool:
    """Tell whether each of several devices is to hold a part of the base only: as asked for, or for want of memory."""
    if ranks.world_size == 1 or args.strategy != "auto" or network.backend.counts_process_memory:
        return ranks.world_size > 1 and args.strategy == "fsdp"
    longest = longest_ahead(samples, args, ranks.world_size, 0)
    load = load_of(longest, network, args.train.activation_checkpointing)
    free, _ = torch.cuda.mem_get_info(network.device)
    return bool(ranks.all_reduce_max(int(not has_room(free, network, load, args.optimizer))))


def has_room(free: int, network: Network, load: Load, optimizer: str | dict[str, Any]) -> bool:
    """Tell whether a run fits into the free bytes of a GPU."""
    return sum(breakdown(network, load, optimizer).values()) <= free * USABLE


def fits(run: Run, samples: Sequence[Sample]) -> bool:
    """Tell whether there is memory for samples to go forward and back, in as many lanes as they would in a step."""
    there_and_back = partial(loss_and_gradients, run, list(lora_parameters(run.gpt).values()), 1)
    try:
        for _ in run.workers.map(there_and_back, [pack(samples)] * workers_of(run, samples)):
            pass
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        return False
    return True


def workers_of(run: Run, samples: Sequence[Sample]) -> int:
    """Return how many lanes have a micro-batch like this one at a time."""
    return at_once(samples, run.args.train, run.ranks.world_size, run.workers.count)


def fitting_part(run: Run, samples: Sequence[Sample]) -> Sequence[Sample]:
    """Return as many of the samples as there is memory for, or the beginning of one, found by halving; or none."""
    part = half(samples)
    while part and not fits(run, part):
        part = half(part)
    return part


def half(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Return the first half of several samples, or of a single one if it has a label there."""
    if len(samples) > 1:
        return samples[: len(samples) // 2]
    (sample,) = samples
    middle = len(sample.tokens) // 2
    beginning = Sample(sample.tokens[:middle], sample.labels[:middle], sample.row)
    return [beginning] if beginning.supervised else []


def too_long(run: Run, samples: Sequence[Sample], fitting: Sequence[Sample]) -> LitLoraError:
    """Say what is too much, which settings to lower, and what they would need."""
    kept, lanes = run.args.train.activation_checkpointing, workers_of(run, samples)
    ways = [lower(samples, fitting, run.args.train)]
    if fitting:
        ways[0] += f", which needs {need(run, fitting, kept, workers_of(run, fitting))}"
    if lanes > 1:
        ways.append(f"or pass --train.parallel_micro_batches 1, which needs {need(run, samples, kept, 1)}")
    if not kept:
        ways.append(f"or pass --train.activation_checkpointing true, which needs {need(run, samples, True, lanes)}")
    longest = f"the longest micro-batch, examples: {len(samples)}, tokens: {total(samples):,}"
    if lanes > 1:
        longest = f"{lanes} times {longest}"
    needed = need(run, samples, kept, lanes)
    return LitLoraError(f"there is too little memory for {longest}, which needs {needed}; {', '.join(ways)}")


def lower(samples: Sequence[Sample], fitting: Sequence[Sample], train: TrainArgs) -> str:
    """Name the settings to lower, with the values for which there is enough."""
    enough, changes = total(fitting), []
    if fitting and train.micro_batch_tokens is not None:
        changes.append(f"--train.micro_batch_tokens ({train.micro_batch_tokens}) to {enough}")
    elif len(samples) > 1:
        changes.append(f"--train.micro_batch_size ({train.micro_batch_size}) to {len(fitting) or 1}")
    if enough < len(samples[0].tokens):
        changes.append("--train.max_seq_length" + (f" to {enough}" if fitting else ""))
    return f"lower {' and '.join(changes)}"


def total(samples: Sequence[Sample]) -> int:
    return sum(len(sample.tokens) for sample in samples)


def need(run: Run, samples: Sequence[Sample], activation_checkpointing: bool, lanes: int) -> str:
    """Say how much memory a run takes whose longest micro-batches, in so many lanes, are of these samples."""
    args = run.args
    shards = run.ranks.world_size if isinstance(run.gpt, FSDPModule) else 1
    network = Network(run.gpt.config, run.folder.lora, args.precision, args.quantize, run.fabric.device, shards)
    load = load_of(samples, network, activation_checkpointing, lanes)
    return f"about {sum(breakdown(network, load, args.optimizer).values()) / 1e9:.1f} GB"


@contextmanager
def shortage_said(progress: Progress, train: TrainArgs) -> Iterator[None]:
    """Say in one sentence that memory has run out on the way, where others have taken what was there at the start."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        name = "micro_batch_size" if train.micro_batch_tokens is None else "micro_batch_tokens"
        hint = f"free some, or lower --train.{name} ({getattr(train, name)}), and resume by --resume true"
        fault = f"there is no longer enough memory after step {progress.step}"
        raise LitLoraError(f"{fault}; what is saved so far stays: {hint}") from error
