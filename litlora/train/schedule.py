"""Steps, epochs, the order of samples, and the learning rate."""

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from litlora.args.finetune import TrainArgs
from litlora.data.batching import Sample, Samples, epoch_order


def steps(samples: Samples, size: int, seed: int, *, after: int, total: int) -> Iterator[tuple[int, int, list[Sample]]]:
    """Yield epoch, step and global batch, of `size` samples, of every step after `after`."""
    step = after
    for epoch, order in orders(len(samples), size, seed, after=after, total=total):
        for start in range(0, len(order), size):
            step += 1
            yield epoch, step, [samples[number] for number in order[start : start + size].tolist()]


def orders(samples: int, size: int, seed: int, *, after: int, total: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yield each epoch with the indices of its samples after step `after`; the order follows from the seed alone."""
    per_epoch = math.ceil(samples / size)
    for epoch in range(after // per_epoch + 1, math.ceil(total / per_epoch) + 1):
        before = (epoch - 1) * per_epoch
        first, last = max(after - before, 0), min(total - before, per_epoch)
        yield epoch, epoch_order(samples, seed=seed, epoch=epoch)[first * size : last * size]


def total_steps(samples: int, args: TrainArgs) -> int:
    """Return the number of optimizer steps of a run; the last, smaller global batch of an epoch counts."""
    requested = args.epochs * math.ceil(samples / args.global_batch_size)
    return requested if args.max_steps is None else min(requested, args.max_steps)


def learning_rate(step: int, total_steps: int, args: TrainArgs) -> float:
    """Return the rate of a step, counted from 1: linear warm-up, then cosine decay towards `min_lr`.

    The peak is reached at the end of the warm-up (at step 1 without one); the decay would end one step after the
    last, so that no step has a rate of 0.
    """
    steps = args.lr_warmup_steps if args.lr_warmup_steps is not None else int(args.lr_warmup_fraction * total_steps)
    warmup = min(max(steps, 1), total_steps)
    if step <= warmup:
        return args.peak_rate * step / warmup
    done = (step - warmup) / (total_steps - warmup + 1)
    return args.min_lr + (args.peak_rate - args.min_lr) * 0.5 * (1 + math.cos(math.pi * done))
