"""The validation loss."""

from functools import partial
from itertools import chain, islice, zip_longest

import torch

from litlora.data.batching import DUMMY_MICRO_BATCH, Batching, MicroBatch, Samples, sequential_batches
from litlora.evaluation.engine import Engine
from litlora.models.transformer import evaluating


def validate(engine: Engine, samples: Samples, batching: Batching, max_iters: int | None = None) -> float:
    """Return the mean loss over the supervised tokens of a split, or of its first `max_iters` micro-batches."""
    total, supervised, ranks = 0.0, 0, engine.ranks
    groups = sequential_batches(samples, batching.global_batch_size)
    batches = islice(chain.from_iterable(map(batching.micro_batches, groups)), max_iters)
    with evaluating(engine.gpt):
        rounds = zip_longest(*[batches] * ranks.world_size, fillvalue=DUMMY_MICRO_BATCH)  # a micro-batch for each rank
        for loss, tokens in engine.workers.map(
            partial(loss_and_tokens, engine), (round_[ranks.rank] for round_ in rounds)
        ):
            total += loss
            supervised += tokens
    sums = ranks.all_reduce(torch.tensor([total, supervised], dtype=torch.float64, device=engine.fabric.device))
    return float(sums[0] / sums[1])


@torch.no_grad()  # in the worker thread: the setting holds for one thread only
def loss_and_tokens(engine: Engine, micro: MicroBatch) -> tuple[float, int]:
    """Return the sum of a micro-batch's losses, and the number of its supervised tokens."""
    return engine.summed_loss(micro).item(), micro.supervised
