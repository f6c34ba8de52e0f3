"""Check before the first step that the longest micro-batch fits in memory."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.distributed.fsdp import FSDPModule

from litlora.args.finetune import TrainArgs
from litlora.data.batching import Sample, Samples, is_alone, longest_micro_batch, optimize_layout, pack
from litlora.errors import LitLoraError, is_shortage
from litlora.evaluation.engine import Engine
from litlora.lora.layer import lora_parameters
from litlora.nn.backend import compute_dtype
from litlora.train.loop import loss_and_gradients
from litlora.train.memory_estimate import breakdown
from litlora.train.network_shape import Load, Network
from litlora.train.schedule import orders, total_steps
from litlora.train.train_state import Progress

USABLE = 0.9  # share of a GPU's free memory; the rest is for its libraries and for fragmentation


def longest_ahead(
    samples: Samples, train: TrainArgs, seed: int, ranks: int, done: int = 0, workers: int = 1
) -> list[Sample]:
    """Return the samples of the longest micro-batch, on any rank, of all steps after those that are done."""
    total = total_steps(len(samples), train)
    ahead = orders(len(samples), train.global_batch_size, seed, after=done, total=total)
    return longest_micro_batch(samples, (order for _, order in ahead), train, ranks, workers)


def load_of(samples: Sequence[Sample], network: Network, activation_checkpointing: bool, concurrent: int = 1) -> Load:
    """Describe a number of concurrent micro-batches of these samples."""
    dtype, regimes = compute_dtype(network.precision), network.config.rope_regimes
    micro = optimize_layout(pack(samples), network.backend, dtype, regimes)
    return Load(micro.lengths, micro.supervised, activation_checkpointing, micro.shared, concurrent)


def concurrent_micro_batches(samples: Sequence[Sample], train: TrainArgs, ranks: int, workers: int) -> int:
    """Return how many micro-batches of the size of this one a step computes concurrently."""
    if is_alone([len(sample.tokens) for sample in samples], train.token_limit):
        return 1
    return min(workers, math.ceil(train.global_batch_size / (ranks * len(samples))))


def has_room(free: int, network: Network, load: Load, optimizer: str | dict[str, Any]) -> bool:
    """Tell whether a run fits into the free bytes of a GPU."""
    return sum(breakdown(network, load, optimizer).values()) <= free * USABLE


def check_memory(
    engine: Engine, network: Network, train: TrainArgs, optimizer: str | dict[str, Any], longest: Sequence[Sample]
) -> None:
    """Refuse a run whose longest micro-batch needs too much memory.

    Forward and backward run on it before the first step, and leave neither gradients nor another random state.
    """
    check = _Check(engine, network, train, optimizer)
    if not check.fits(longest):
        # With sharded weights a rank cannot try again: its peers may still be inside forward or backward.
        fitting = [] if isinstance(engine.gpt, FSDPModule) else check.fitting_subset(longest)
        raise check.error(longest, fitting)


def memory_factor(
    engine: Engine,
    network: Network,
    train: TrainArgs,
    optimizer: str | dict[str, Any],
    longest: Sequence[Sample],
    process: int,
    before: int,
) -> float:
    """Return the memory that forward and backward of the longest micro-batch take, as a multiple of its estimate.

    It is infinite where memory runs out, and 1 where the run has had no more than the process had before it. `process`
    are the bytes without the run.
    """
    check = _Check(engine, network, train, optimizer)
    if not check.fits(longest):
        return math.inf
    peak = network.backend.peak_memory()
    parts = breakdown(network, load_of(longest, network, train.recomputes, check.concurrent(longest)), optimizer)
    added = peak - process + parts["optimizer state"]  # which exists from the first step on
    return added / sum(parts.values()) if peak > before else 1.0


@dataclass(frozen=True)
class _Check:
    """What the check runs, and what it needs for the estimates in its error."""

    engine: Engine
    network: Network
    train: TrainArgs
    optimizer: str | dict[str, Any]

    def fits(self, samples: Sequence[Sample]) -> bool:
        """Tell whether forward and backward fit in memory, with as many concurrent micro-batches as in a step."""
        parameters = list(lora_parameters(self.engine.gpt).values())
        work = partial(loss_and_gradients, self.engine, parameters, 1)
        try:
            for _ in self.engine.workers.map(work, [pack(samples)] * self.concurrent(samples)):
                pass
        except (MemoryError, RuntimeError) as error:
            if not is_shortage(error):
                raise
            return False
        return True

    def concurrent(self, samples: Sequence[Sample]) -> int:
        """Return how many micro-batches of the size of this one are computed concurrently."""
        return concurrent_micro_batches(samples, self.train, self.engine.ranks.world_size, self.engine.workers.count)

    def fitting_subset(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        """Return as many of the samples as fit in memory, or the beginning of one, found by halving; or none."""
        subset = half(samples)
        while subset and not self.fits(subset):
            subset = half(subset)
        return subset

    def need(self, samples: Sequence[Sample], activation_checkpointing: bool, concurrent: int) -> str:
        """Return the memory of a run whose longest micro-batches have these samples, in words."""
        load = load_of(samples, self.network, activation_checkpointing, concurrent)
        return f"about {sum(breakdown(self.network, load, self.optimizer).values()) / 1e9:.1f} GB"

    def error(self, samples: Sequence[Sample], fitting: Sequence[Sample]) -> LitLoraError:
        """Return the error that names what needs too much memory, the settings to lower, and what they would need."""
        recomputes, concurrent = self.train.recomputes, self.concurrent(samples)
        ways = [lower(samples, fitting, self.train)]
        if fitting:
            ways[0] += f", which needs {self.need(fitting, recomputes, self.concurrent(fitting))}"
        if concurrent > 1:
            ways.append(f"or pass --train.parallel_micro_batches 1, which needs {self.need(samples, recomputes, 1)}")
        if not recomputes:
            needed = self.need(samples, True, concurrent)
            ways.append(f"or pass --train.activation_checkpointing true, which needs {needed}")
        longest = f"the longest micro-batch, examples: {len(samples)}, tokens: {total(samples):,}"
        if concurrent > 1:
            longest = f"{concurrent} times {longest}"
        needed = self.need(samples, recomputes, concurrent)
        return LitLoraError(f"there is too little memory for {longest}, which needs {needed}; {', '.join(ways)}")


def half(samples: Sequence[Sample]) -> Sequence[Sample]:
    """Return the first half of several samples, or of a single one if it has a label there."""
    if len(samples) > 1:
        return samples[: len(samples) // 2]
    (sample,) = samples
    middle = len(sample.tokens) // 2
    beginning = Sample(sample.tokens[:middle], sample.labels[:middle], sample.row)
    return [beginning] if beginning.supervised else []


def lower(samples: Sequence[Sample], fitting: Sequence[Sample], train: TrainArgs) -> str:
    """Name the settings to lower, with the values for which memory suffices."""
    enough, changes = total(fitting), []
    if fitting and train.micro_batch_tokens is not None:
        changes.append(f"--train.micro_batch_tokens ({train.micro_batch_tokens}) to {enough}")
    elif len(samples) > 1:
        changes.append(f"--train.micro_batch_size ({train.example_limit}) to {len(fitting) or 1}")
    if enough < len(samples[0].tokens):
        changes.append("--train.max_seq_length" + (f" to {enough}" if fitting else ""))
    return f"lower {' and '.join(changes)}"


def total(samples: Sequence[Sample]) -> int:
    """Return the number of tokens in samples."""
    return sum(len(sample.tokens) for sample in samples)


@contextmanager
def reporting_shortage(progress: Progress, train: TrainArgs) -> Iterator[None]:
    """Report in one sentence that memory has run out during the run, where others have taken it meanwhile."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_shortage(error):
            raise
        tokens = train.micro_batch_tokens
        limit = f"size ({train.example_limit})" if tokens is None else f"tokens ({tokens})"
        hint = f"free some, or lower --train.micro_batch_{limit}, and resume by --resume true"
        fault = f"there is no longer enough memory after step {progress.step}"
        raise LitLoraError(f"{fault}; what is saved so far stays: {hint}") from error
