"""Whether there is memory for what lies ahead, found out before the first step."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from litlora.args import TrainArgs
from litlora.batches import Sample, deal, join, longest_micro_batch
from litlora.errors import LitLoraError
from litlora.training import Run, steps, summed_loss, total_steps

CPU_FAULT = "can't allocate memory"  # in the RuntimeError of torch's allocator, which has no class of its own


def check_memory(run: Run, done: int) -> None:
    """Refuse a run whose longest micro-batch, of all behind the steps that are done, is too much for the memory.

    It goes forward and back before the first step; nothing of it stays, neither gradients nor random numbers drawn.
    """
    train, total = run.args.train, total_steps(len(run.train), run.args.train)
    if done == total:
        return
    ahead = (
        share
        for _, _, batch in steps(range(len(run.train)), run.args, after=done, total=total)
        for share in filter(None, deal(batch, run.train.lengths[batch].tolist(), run.ranks.count))
    )
    longest = longest_micro_batch(run.train, ahead, train.micro_batch_size, train.micro_batch_tokens)
    if not fits(run, longest):
        raise too_long(longest, fitting_part(run, longest), train)


def fits(run: Run, samples: Sequence[Sample]) -> bool:
    """Tell whether there is memory for samples to go forward and back."""
    with torch.random.fork_rng([run.fabric.device] if run.fabric.device.type == "cuda" else []):
        try:
            run.fabric.backward(summed_loss(run, join(samples)))
        except (MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            return False
        finally:
            run.optimizer.zero_grad()
    return True


def is_shortage(error: Exception) -> bool:
    """Tell whether an error says that there is no memory left."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or CPU_FAULT in str(error)


@contextmanager
def shortage_said() -> Iterator[None]:
    """Say what is to be done where others have taken the memory that was there before the first step."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        hint = "end what else uses it, or lower --train.micro_batch_size; go on with the same command and --resume true"
        raise LitLoraError(f"the memory that a step needs was there at the start and no longer is: {hint}") from error


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
