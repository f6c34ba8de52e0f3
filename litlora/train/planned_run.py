"""A run as its memory allows it: its plan, how the base lies over the devices, and the estimate of what it takes."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from litlora.args.finetune import AUTO, EXAMPLES, FinetuneLoraArgs, TrainArgs
from litlora.data.batching import Sample, Samples
from litlora.distributed.process_group import Ranks
from litlora.errors import LitLoraError
from litlora.lora.layer import count
from litlora.nn.backend_interface import Backend
from litlora.report.files import HYPERPARAMETERS, read_settings
from litlora.train.loop import Run
from litlora.train.memory_check import (
    check_memory,
    concurrent_micro_batches,
    has_room,
    load_of,
    longest_ahead,
    memory_factor,
)
from litlora.train.memory_estimate import PROCESS, breakdown, table
from litlora.train.memory_plan import Budget, Plan, Planner, gigabytes
from litlora.train.network_shape import Load, Network
from litlora.train.schedule import orders, total_steps
from litlora.utils.console import log, warn

MOST_FACTOR = 1000.0
"""Of its estimate, what a micro-batch counts as having taken for which memory does not suffice."""


@dataclass(frozen=True)
class Layout:
    """How the base lies over the devices."""

    network: Network
    """What each of them holds."""
    workers: int
    """Micro-batches at most that each of them may compute concurrently; sharded weights allow one."""
    devices: int = 1
    """Their number on all machines."""


def layouts(args: FinetuneLoraArgs, network: Network, ranks: Ranks) -> list[Layout]:
    """Return the layouts that --strategy allows, the fastest first: the whole base on each device, or a shard of it."""
    is_one = ranks.world_size == 1  # which stands for all processes in a dry run, and else computes alone
    backend, devices = network.backend, args.devices * args.num_nodes if is_one else ranks.world_size
    workers = backend.workers(args.train.parallel_micro_batches, args.devices if is_one else 1)
    whole, sharded = Layout(network, workers, devices), Layout(replace(network, shards=devices), 1, devices)
    if devices == 1 or args.strategy == "ddp":
        return [whole]
    if args.strategy == "fsdp":
        return [sharded]
    return [whole] if backend.counts_process_memory else [whole, sharded]


@dataclass(frozen=True)
class PlannedRun:
    """The settings of a run, and the plan that is in them, if memory decided."""

    args: FinetuneLoraArgs
    layout: Layout
    samples: Samples
    planner: Planner | None = None
    plan: Plan | None = None

    @classmethod
    def of(
        cls, args: FinetuneLoraArgs, network: Network, samples: Samples, ranks: Ranks, recorded: Plan | None = None
    ) -> Self:
        """Choose the plan that the run which is resumed had, if it fits, or else the fastest one."""
        allowed = layouts(args, network, ranks)
        if not args.train.is_planned:
            return cls._fixed(args, allowed, samples, ranks)
        planners = _planners(args, allowed, samples, ranks)
        for planner in planners:
            was = recorded and replace(recorded, concurrent=min(recorded.concurrent, planner.workers))
            fits = was is not None and planner.need(was) <= planner.budget.total
            if plan := was if fits else planner.fastest():
                return cls._with(planner, plan)
        raise planners[-1].refusal()

    @classmethod
    def forecast(cls, args: FinetuneLoraArgs, network: Network, samples: Samples, ranks: Ranks) -> Self:
        """Choose a plan; where none fits, warn and take the smallest."""
        try:
            return cls.of(args, network, samples, ranks)
        except LitLoraError as error:
            warn(str(error))
            planner = _planners(args, layouts(args, network, ranks), samples, ranks)[-1]
            return cls._with(planner, planner.smallest)

    @classmethod
    def _fixed(cls, args: FinetuneLoraArgs, allowed: Sequence[Layout], samples: Samples, ranks: Ranks) -> Self:
        """Take the settings as they are, and the first layout for which each device has room, or else the last."""
        args = replace(args, train=replace(args.train, activation_checkpointing=args.train.recomputes))
        *before, last = (cls(args, layout, samples) for layout in allowed)
        return next((run for run in before if not ranks.all_reduce_max(int(not run._has_room()))), last)

    @classmethod
    def _with(cls, planner: Planner, plan: Plan) -> Self:
        args = planner.args
        layout = Layout(planner.network, min(plan.concurrent, planner.workers), planner.ranks)
        return cls(replace(args, memory=None, train=plan.applied(args.train)), layout, planner.samples, planner, plan)

    @property
    def network(self) -> Network:
        """What each device holds."""
        return self.layout.network

    @property
    def is_sharded(self) -> bool:
        """Whether each device holds a shard of the base."""
        return self.network.shards > 1

    @property
    def validated_rows(self) -> int | None:
        """The number of rows of a validation at most: those of --eval.max_iters micro-batches as they were requested.

        Neither tokens nor a smaller number of examples count, which a plan has: memory decides no result.
        """
        requested = self.planner.args if self.planner else self.args
        iterations = requested.eval.max_iters
        return None if iterations is None else iterations * requested.train.example_limit

    @property
    def is_tight(self) -> bool:
        """Whether memory keeps the run from a faster plan."""
        return self.planner is not None and self.plan is not None and self.planner.is_limited(self.plan)

    def longest(self, done: int = 0) -> list[Sample]:
        """Return the samples of the longest micro-batch of the steps after those that are done."""
        if done not in self._longest:
            train, workers = self.args.train, self.layout.workers
            self._longest[done] = longest_ahead(self.samples, train, self.args.seed, self.layout.devices, done, workers)
        return self._longest[done]

    @cached_property
    def _longest(self) -> dict[int, list[Sample]]:
        return {}

    def lowered(self, factor: float) -> Self | None:
        """Return the run under a plan that needs less memory, where plans take this multiple of their estimates."""
        if self.planner is None or self.plan is None:
            return None
        others = (self.planner.fastest(factor) if math.isfinite(factor) else None, self.planner.lower(self.plan))
        smaller = (plan for plan in others if plan and self.planner.need(plan) < self.planner.need(self.plan))
        plan = next(smaller, None)
        return None if plan is None else self._with(self.planner, plan)

    def fits(self, factor: float) -> bool:
        """Tell whether the run stays within its memory if it takes this multiple of its estimate."""
        if self.planner is None or self.plan is None:
            return True
        budget = self.planner.budget
        return budget.used + (self.planner.need(self.plan) - budget.used) * factor <= budget.total

    def _has_room(self) -> bool:
        """Tell whether the longest micro-batch fits into what this device has free."""
        free = self.network.backend.free_memory(self.network.device)
        return has_room(free, self.network, self._load(), self.args.optimizer)

    def _load(self) -> Load:
        """Describe the concurrent micro-batches that need most memory."""
        longest, train = self.longest(), self.args.train
        concurrent = concurrent_micro_batches(longest, train, self.layout.devices, self.layout.workers)
        return load_of(longest, self.network, train.recomputes, concurrent)

    def estimate(self, process: int) -> dict[str, int]:
        """Return the parts of the peak memory in bytes; `process` are those in use before a weight is loaded."""
        parts = breakdown(self.network, self._load(), self.args.optimizer)
        return parts | ({PROCESS: process} if self.network.backend.counts_process_memory else {})

    @property
    def spare(self) -> int:
        """The bytes that a step alone takes, in which a base from a GGUF file may be dequantized between steps."""
        is_whole = self.args.gguf is not None and not self.is_sharded
        return self.estimate(0)["activations"] if is_whole else 0

    def table(self) -> str:
        """Return what the run computes and the parts of its peak memory, as a table."""
        train, samples, outline = self.args.train, self.samples, self.network.outline()
        steps = total_steps(len(samples), train)
        epochs = orders(len(samples), train.global_batch_size, self.args.seed, after=0, total=steps)
        counts = {
            "trainable parameters": count(outline, trainable=True),
            "frozen parameters": count(outline, trainable=False),
            "examples": len(samples),
            "steps": steps,
            "tokens": sum(int(samples.lengths[order].sum()) for _, order in epochs),
            "tokens in the longest micro-batch": sum(len(sample.tokens) for sample in self.longest()),
        }
        return table(counts, self.estimate(self.network.backend.memory_in_use()))

    def __str__(self) -> str:
        """Return the plan as the run prints it."""
        assert self.planner and self.plan
        return f"plan: {self.plan}, {gigabytes(self.planner.need(self.plan), self.planner.budget.total)}"

    def record(self) -> dict[str, Any] | None:
        """Return what report.json holds of the plan."""
        if self.planner is None or self.plan is None:
            return None
        names = ("micro_batch_tokens", "micro_batch_size", "parallel_micro_batches", "activation_checkpointing")
        needed, total = self.planner.need(self.plan) / 1e9, self.planner.budget.total / 1e9
        return {name: getattr(self.args.train, name) for name in names} | {"needed_gb": needed, "memory_gb": total}


def _planners(args: FinetuneLoraArgs, allowed: Sequence[Layout], samples: Samples, ranks: Ranks) -> list[Planner]:
    """Return the planner of each layout."""
    budget = Budget.of(args, allowed[0].network, ranks)
    return [Planner(args, layout.network, samples, layout.devices, layout.workers, budget) for layout in allowed]


def plan_of(start: Path | None, train: TrainArgs) -> Plan | None:
    """Return the plan of the run that is resumed, if its settings are there and allow one."""
    if start is None or not (start.parent / HYPERPARAMETERS).is_file():
        return None
    return recorded_plan(read_settings(start.parent), train)


def recorded_plan(settings: Mapping[str, Any], args: TrainArgs) -> Plan | None:
    """Return the plan in a run's hyperparameters.yaml, if it is one and what is requested now allows it."""
    was = settings.get("train")
    if not isinstance(was, dict):
        return None
    tokens, size = was.get("micro_batch_tokens"), was.get("micro_batch_size") or EXAMPLES
    recomputes, concurrent = was.get("activation_checkpointing"), was.get("parallel_micro_batches", 1)
    recomputes = False if recomputes == AUTO else recomputes  # in a run with fixed micro-batches
    limit = size if tokens is None else tokens
    if not (isinstance(limit, int) and isinstance(concurrent, int) and isinstance(recomputes, bool)):
        return None
    plan = Plan(limit, tokens is None, min(concurrent, args.parallel_micro_batches), recomputes)
    allowed = args.activation_checkpointing in (AUTO, recomputes) and args.micro_batch_size in (None, size)
    return plan if allowed else None


def _peak_from_now_on(backend: Backend) -> int:
    """Have the peak count from what the process has now, so that it tells what another plan takes, and return it."""
    backend.memory_in_use()  # which gives back what the plan before has left
    backend.forget_peak_memory()
    return backend.peak_memory()


def with_memory_checked(
    run: Run, planned: PlannedRun, done: int, under: Callable[[Run, PlannedRun], Run]
) -> tuple[Run, PlannedRun]:
    """Return the run, and its plan, whose longest micro-batch was computed within its memory; refuse a run without.

    `done` steps are behind it, and `under` gives the same run under another plan.
    """
    before = planned.planner.budget.peak if planned.planner else 0
    while True:
        train, optimizer = planned.args.train, planned.args.optimizer
        ranks, network, longest = run.engine.ranks, planned.network, planned.longest(done)
        if planned.planner is None or planned.is_sharded:
            check_memory(run.engine, network, train, optimizer, longest)
            return run, planned
        budget = planned.planner.budget
        factor = memory_factor(run.engine, network, train, optimizer, longest, budget.used, before)
        factor = ranks.all_reduce_max(round(min(factor, MOST_FACTOR) * 1000)) / 1000
        if factor < MOST_FACTOR and planned.fits(factor):
            return run, planned
        lowered = planned.lowered(factor)
        if lowered is None:
            if factor == MOST_FACTOR:
                check_memory(run.engine, network, train, optimizer, longest)
            warn(f"the longest micro-batch takes {factor:.1f} times its estimate, beyond {budget.name}")
            return run, planned
        planned = lowered
        log(f"{planned}: the one before took more than its estimate")
        run, before = under(run, planned), _peak_from_now_on(network.backend)
