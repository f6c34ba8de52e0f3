"""The plan of a run: the fastest micro-batches whose memory fits.

The model of time is that of the device (`Backend.relative_time`): a micro-batch takes the time of the tokens that it
computes, and of a number of tokens more; a step takes that of its micro-batches as the workers share them; activation
checkpointing computes the forward pass twice. A plan decides memory and speed, and of the result nothing but rounding.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

from litlora.args.finetune import AUTO, FinetuneLoraArgs, TrainArgs
from litlora.data.batching import Sample, Samples, group_samples, is_alone, optimize_layout, pack, split_across_ranks
from litlora.distributed.process_group import Ranks
from litlora.errors import LitLoraError
from litlora.lora.layer import LoRALinear
from litlora.nn.linear import Linear
from litlora.train.memory_check import USABLE, concurrent_micro_batches, half, load_of, longest_ahead
from litlora.train.memory_estimate import breakdown, weight_bytes
from litlora.train.network_shape import Network
from litlora.train.schedule import orders, total_steps
from litlora.utils.console import warn

RECOMPUTATION = 4 / 3
"""Time of a step with activation checkpointing as a multiple: of forward, and the two products of backward, the first
is computed twice."""
TIE = 1.02
"""Of plans whose times differ by less than this factor, the smaller one is chosen."""
LOWERED = 0.8
"""Share of a plan's memory that the next one may need, where it did not fit."""
TIMED_ROWS = 64
"""Rows, at least a global batch, on which plans are compared."""
FEWEST_TOKENS = 128
MOST_SPLIT = 8
"""A micro-batch has the tokens of a step divided by this, or more, unless memory is too small for that."""


@dataclass(frozen=True)
class Plan:
    """How a step is computed."""

    limit: int
    """Tokens of a micro-batch at most, or examples."""
    by_examples: bool
    concurrent: int
    """Micro-batches at most that are computed concurrently."""
    activation_checkpointing: bool

    def applied(self, train: TrainArgs) -> TrainArgs:
        """Return the settings of a run that follows this plan."""
        tokens, size = (None, self.limit) if self.by_examples else (self.limit, train.micro_batch_size)
        return replace(
            train,
            micro_batch_tokens=tokens,
            micro_batch_size=size,
            parallel_micro_batches=self.concurrent,
            activation_checkpointing=self.activation_checkpointing,
        )

    def __str__(self) -> str:
        """Return it in the words of the run's output."""
        unit = "example" if self.by_examples else "token"
        size = f"{self.limit:,} {unit}{'' if self.limit == 1 else 's'} per micro-batch"
        several = f", {self.concurrent} concurrent" if self.concurrent > 1 else ""
        return f"{size}{several}, {'' if self.activation_checkpointing else 'no '}checkpointing"


@dataclass(frozen=True)
class Budget:
    """The memory of a device, in bytes."""

    total: int
    """What the run may have at most."""
    used: int
    """What the process has before it loads a weight."""
    peak: int
    """The most that the process has had so far."""
    given: str | None = None
    """--memory as it was given."""

    @classmethod
    def of(cls, args: FinetuneLoraArgs, network: Network, ranks: Ranks) -> Self:
        """Return what --memory gives, or what is free on the rank that has least."""
        backend, device = network.backend, network.device
        processes = max(args.devices, ranks.world_size // args.num_nodes) if backend.counts_process_memory else 1
        used, given = backend.memory_in_use(), args.memory_bytes
        free, machine = used + backend.free_memory(device) // processes, backend.total_memory(device)
        if given is not None and given > machine:
            fault = f"--memory ({args.memory}) is beyond the {gigabytes(machine)} that there are"
            warn(f"{fault}: the plan takes the {gigabytes(free)} that are free")
            given = None
        total = -ranks.all_reduce_max(-(free if given is None else given))
        text = args.memory if given is not None else None
        return cls(total, ranks.all_reduce_max(used), backend.peak_memory(), text)

    @property
    def name(self) -> str:
        """What it is called in an error."""
        free = f"the {gigabytes(self.total)} of memory that are free"
        return free if self.given is None else f"--memory ({self.given})"


def gigabytes(*sizes: float) -> str:
    """Return bytes as text: one number, or several as "1.2 of 8.0 GB", with another digit if they are below 1 GB."""
    digits = 1 if max(sizes) >= 1e9 else 2
    return " of ".join(f"{size / 1e9:.{digits}f}" for size in sizes) + " GB"


def rungs(least: int, most: int) -> list[int]:
    """Return powers of two, and those times 1.5, from the last that is at most `least` to the first from `most` on."""
    ladder = sorted(factor << power for power in range(6, 40) for factor in (2, 3))
    first = max((rung for rung in ladder if rung <= max(least, FEWEST_TOKENS)), default=FEWEST_TOKENS)
    last = next(rung for rung in ladder if rung >= max(most, first))
    return [rung for rung in ladder if first <= rung <= last]


@dataclass(frozen=True)
class Planner:
    """Finds the plan of a run."""

    args: FinetuneLoraArgs
    network: Network
    samples: Samples
    ranks: int
    """Number of devices."""
    workers: int
    """Micro-batches at most that a device may compute concurrently."""
    budget: Budget

    def fastest(self, correction: float = 1.0) -> Plan | None:
        """Return the fastest plan that fits with a margin, or else the smallest if it fits without one.

        `correction` is the memory that a run takes as a multiple of its estimate.
        """
        fitting = (plan for plan in self._by_time if self._fits(plan, correction))
        if (first := next(fitting, None)) is None:
            smallest = self.smallest
            return smallest if self.need(smallest) * correction <= self.budget.total else None
        near = [plan for plan in self._by_time if self.times[plan] <= TIE * self.times[first]]
        near.sort(key=lambda plan: (plan.activation_checkpointing, plan.concurrent * plan.limit, plan.limit))
        return next(plan for plan in near if self._fits(plan, correction))

    @property
    def _by_time(self) -> list[Plan]:
        return sorted(self.times, key=self.times.__getitem__)

    def _fits(self, plan: Plan, correction: float) -> bool:
        """Tell whether a plan fits with a margin."""
        added = self.need(plan) - self.budget.used
        return self.budget.used + added * correction / USABLE <= self.budget.total

    def is_limited(self, plan: Plan) -> bool:
        """Tell whether another plan would be faster by more than a tie."""
        return self.times.get(plan, math.inf) > TIE * min(self.times.values())

    def lower(self, plan: Plan) -> Plan | None:
        """Return the fastest plan that needs clearly less than this one, if there is one."""
        most = self.budget.used + LOWERED * (self.need(plan) - self.budget.used)
        return next((other for other in self._by_time if self.need(other) <= most), None)

    def need(self, plan: Plan) -> int:
        """Return the peak memory of the process under a plan."""
        if plan not in self._needs:
            self._needs[plan] = self._peak(self.network, plan, self._longest(plan))
        return self._needs[plan]

    @cached_property
    def _needs(self) -> dict[Plan, int]:
        return {}

    def _longest(self, plan: Plan) -> list[Sample]:
        train = plan.applied(self.args.train)
        return longest_ahead(self.samples, train, self.args.seed, self.ranks, workers=plan.concurrent)

    def _peak(self, network: Network, plan: Plan, longest: Sequence[Sample]) -> int:
        """Return the peak memory of the process if these samples are the longest micro-batch."""
        train = plan.applied(self.args.train)
        concurrent = concurrent_micro_batches(longest, train, self.ranks, plan.concurrent)
        load = load_of(longest, network, plan.activation_checkpointing, concurrent)
        return self.budget.used + sum(breakdown(network, load, self.args.optimizer).values())

    def refusal(self) -> LitLoraError:
        """Return the error that no plan fits, which names what would help, in the order of its cost."""
        smallest, network = self.smallest, self.network
        weights = sum(weight_bytes(network.outline(), network.quantize, network.quantized_bytes).values())
        weights = weights // network.shards
        if weights > self.budget.total:
            fault = f"the weights of the base alone take {gigabytes(weights)}, more than {self.budget.name}"
        else:
            needed = gigabytes(self.need(smallest))
            fault = f"no plan fits in {self.budget.name}: the smallest, {smallest}, needs {needed}"
        ways = ", ".join(f"{way} ({gigabytes(size)})" for way, size in self._ways(smallest))
        return LitLoraError(f"{fault}; what would help: {ways}")

    def _ways(self, smallest: Plan) -> Iterator[tuple[str, int]]:
        """Yield what lowers the memory of the smallest plan, with what it would then need."""
        network, longest = self.network, self._longest(smallest)
        if not smallest.activation_checkpointing:
            recomputing = replace(smallest, activation_checkpointing=True)
            yield "--train.activation_checkpointing true", self._peak(network, recomputing, longest)
        if network.quantize is None and network.precision != "bf16-mixed":
            yield "--quantize bnb.nf4", self._peak(replace(network, quantize="bnb.nf4"), smallest, longest)
        if shorter := half([max(longest, key=lambda sample: len(sample.tokens))]):
            yield f"--train.max_seq_length {len(shorter[0].tokens)}", self._peak(network, smallest, shorter)
        devices = 2 * network.shards
        sharded = self._peak(replace(network, shards=devices), smallest, longest)
        yield f"--strategy fsdp --devices {devices}, on each", sharded

    @property
    def smallest(self) -> Plan:
        """The plan that needs least memory."""
        return min(self.times, key=lambda plan: (not plan.activation_checkpointing, plan.concurrent * plan.limit))

    @cached_property
    def times(self) -> dict[Plan, float]:
        """The time of each plan, in arbitrary units."""
        plans: dict[Plan, float] = {}
        wished = self.args.train.activation_checkpointing
        for limit in self._limits():
            steps = [self._micro_batches(share, limit) for share in self._shares]
            for workers in range(1, self.workers + 1):
                time = sum(self._step_time(alone, pooled, workers) for alone, pooled in steps)
                for recomputes in (False, True) if wished == AUTO else (bool(wished),):
                    plan = Plan(limit, self._by_examples, workers, recomputes)
                    plans[plan] = time * (RECOMPUTATION if recomputes else 1)
        return plans

    @property
    def _by_examples(self) -> bool:
        return self.args.train.micro_batch_size is not None

    def _limits(self) -> list[int]:
        """Return the sizes of micro-batches that plans may have."""
        if (size := self.args.train.micro_batch_size) is not None:
            return sorted({size, *(size >> power for power in range(1, size.bit_length()))})
        sums = [sum(len(sample.tokens) for sample in share) for share in self._shares]
        longest = int(self.samples.lengths.max())
        return rungs(min(longest, max(sums) // MOST_SPLIT), max(sums))

    @cached_property
    def _shares(self) -> list[list[Sample]]:
        """The samples of the first ranks of the first steps, which stand for all."""
        size, seed = self.args.train.global_batch_size, self.args.seed
        total = min(max(1, TIMED_ROWS // size), total_steps(len(self.samples), self.args.train))
        batches = [
            order[start : start + size].tolist()
            for _, order in orders(len(self.samples), size, seed, after=0, total=total)
            for start in range(0, len(order), size)
        ]
        shares = (split_across_ranks(batch, self.samples.lengths[batch].tolist(), self.ranks)[0] for batch in batches)
        return [[self.samples[index] for index in share] for share in shares]

    @cached_property
    def _layer_parameters(self) -> int:
        """The number of parameters of a block."""
        modules = self.network.outline().model.modules()
        sizes = sum(module.weight.shape.numel() for module in modules if isinstance(module, Linear | LoRALinear))
        return max(1, sizes // self.network.config.num_hidden_layers)

    def _micro_batches(self, share: Sequence[Sample], limit: int) -> tuple[list[int], list[int]]:
        """Return the computed tokens of the micro-batches that exceed the limit, and of the others, in their order."""
        lengths = [len(sample.tokens) for sample in share]
        tokens, size = (None, limit) if self._by_examples else (limit, len(share))
        groups = sorted(group_samples(lengths, size, tokens), key=lambda group: -sum(lengths[i] for i in group))
        counts = [self._computed([share[index] for index in group]) for group in groups]
        alone = sum(is_alone([lengths[index] for index in group], tokens) for group in groups)
        return counts[:alone], counts[alone:]

    def _step_time(self, alone: Sequence[int], pooled: Sequence[int], workers: int) -> float:
        """Return the time of a step; what is left over of the pool's groups has all cores."""
        full = len(pooled) - len(pooled) % workers
        groups = [pooled[start : start + workers] for start in range(0, full, workers)]
        single = sum(map(self._relative_time, (*alone, *pooled[full:])))
        return single + sum(max(self._relative_time(count, workers) for count in group) for group in groups)

    def _computed(self, samples: Sequence[Sample]) -> int:
        """Return the number of tokens that a micro-batch computes."""
        micro = optimize_layout(
            pack(samples), self.network.backend, self.network.dtype, self.network.config.rope_regimes
        )
        return len(micro.tokens)

    def _relative_time(self, tokens: int, workers: int = 1) -> float:
        return self.network.backend.relative_time(tokens, self._layer_parameters, 1 / workers)
