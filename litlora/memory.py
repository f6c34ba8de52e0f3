"""Whether there is memory for what lies ahead, found out before the first step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from litlora.args import FinetuneLoraArgs, TrainArgs
from litlora.batches import Sample, Samples, deal, join, longest_micro_batch
from litlora.errors import LitLoraError
from litlora.footprint import Load, Network, breakdown
from litlora.ranks import Ranks
from litlora.training import Run, steps, summed_loss, total_steps

USABLE = 0.9  # share of a GPU's free memory; the rest is for its libraries, and for gaps
CPU_FAULT = "can't allocate memory"  # in the RuntimeError of torch's allocator, which has no class of its own


def check_memory(run: Run, done: int) -> None:
    """Refuse a run whose longest micro-batch, of all behind the steps that are done, is too much for the memory.

    It goes forward and back before the first step; nothing of it stays, neither gradients nor random numbers drawn.
    """
    if done == total_steps(len(run.train), run.args.train):
        return
    longest = longest_ahead(run.train, run.args, run.ranks, done)
    if not fits(run, longest):
        # With sharded weights a rank cannot try again: the others may still be in the midst of the pass.
        fitting = [] if isinstance(run.gpt, FSDPModule) else fitting_part(run, longest)
        raise too_long(longest, fitting, run.args.train)


def longest_ahead(samples: Samples, args: FinetuneLoraArgs, ranks: Ranks, done: int) -> list[Sample]:
    """Return the samples of the longest micro-batch, on any rank, of all behind the steps that are done."""
    train, total = args.train, total_steps(len(samples), args.train)
    ahead = (
        share
        for _, _, batch in steps(range(len(samples)), args, after=done, total=total)
        for share in filter(None, deal(batch, samples.lengths[batch].tolist(), ranks.count))
    )
    return longest_micro_batch(samples, ahead, train.micro_batch_size, train.micro_batch_tokens)


def must_shard(args: FinetuneLoraArgs, network: Network, samples: Samples, ranks: Ranks) -> bool:
    """Tell whether each of several devices is to hold a part of the base only: as asked for, or for want of memory."""
    if ranks.count == 1 or args.strategy != "auto" or network.on_cpu:
        return ranks.count > 1 and args.strategy == "fsdp"
    longest = join(longest_ahead(samples, args, ranks, 0))
    load = Load(longest.lengths, longest.supervised, args.train.activation_checkpointing)
    free, _ = torch.cuda.mem_get_info(network.device)
    return bool(ranks.highest(int(not has_room(free, network, load, args.optimizer))))


def has_room(free: int, network: Network, load: Load, optimizer: str | dict[str, Any]) -> bool:
    """Tell whether a run fits into the free bytes of a GPU."""
    return sum(breakdown(network, load, optimizer).values()) <= free * USABLE


def fits(run: Run, samples: Sequence[Sample]) -> bool:
    """Tell whether there is memory for samples to go forward and back."""
    with torch.random.fork_rng([run.fabric.device] if run.fabric.device.type == "cuda" else []):
        try:
            run.fabric.backward(summed_loss(run, join(samples)))
        except (MemoryError, RuntimeError) as error:
            if not isinstance(error, MemoryError | torch.OutOfMemoryError) and CPU_FAULT not in str(error):
                raise
            return False
        finally:
            run.optimizer.zero_grad()
    return True


def fitting_part(run: Run, samples: Sequence[Sample]) -> Sequence[Sample]:
    """Return as many of the samples as there is memory for, found by halving; possibly none."""
    part = samples[: len(samples) // 2]
    while part and not fits(run, part):
        part = part[: len(part) // 2]
    return part


def too_long(samples: Sequence[Sample], fitting: Sequence[Sample], train: TrainArgs) -> LitLoraError:
    """Say what is too much, and which settings to lower."""
    tokens, enough = (sum(len(sample.tokens) for sample in part) for part in (samples, fitting))
    name, now, then = ("micro_batch_size", train.micro_batch_size, len(fitting))
    if train.micro_batch_tokens is not None:
        name, now, then = ("micro_batch_tokens", train.micro_batch_tokens, enough)
    way = f"lower --train.{name} ({now})" + (f" to {then}, for which there is enough" if fitting else "")
    if len(samples) == 1:
        way = "lower --train.max_seq_length"
    if not train.activation_checkpointing:
        way += ", or pass --train.activation_checkpointing true"
    return LitLoraError(
        f"there is too little memory for the longest micro-batch, examples: {len(samples)}, tokens: {tokens:,}; {way}"
    )
