"""Memory decides the plan, and never the result."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.runs import adapter, finetune, report, same_adapter

from litlora.__main__ import main
from litlora.args.finetune import EXAMPLES, EvalArgs, FinetuneLoraArgs, TrainArgs
from litlora.args.values import as_bytes
from litlora.data.batching import Samples, pack_into_fewest
from litlora.data.tokens import ABOUT, Tokens
from litlora.lora.config import LoRAConfig
from litlora.models.checkpoint import Checkpoint
from litlora.train.memory_plan import Budget, Plan, Planner, gigabytes, rungs
from litlora.train.network_shape import Network
from litlora.train.planned_run import Layout, PlannedRun, recorded_plan
from litlora.utils.memory import available_memory, resident_memory, total_memory

CHEAP = ["--eval.initial_validation", "false", "--eval.final_validation", "false", "--receipt", "false"]
CHEAP += ["--eval.highest_losses", 0, "--lora_mlp", "true"]
GB = 10**9


def samples_of(lengths: list[int]) -> Samples:
    """Return samples of these lengths, whose tokens differ, so that none shares a prefix."""
    offsets = np.concatenate([[0], np.cumsum(np.array(lengths) + 1)])
    rows = np.repeat(np.arange(len(lengths)), np.array(lengths) + 1).astype(np.int32)
    return Samples(Tokens(rows, offsets, np.zeros(len(lengths), np.int32), np.zeros(len(lengths), ABOUT)), max(lengths))


@pytest.fixture
def planner(tiny: Path) -> Planner:
    """Return a planner of a small network, with memory for any plan."""
    args = FinetuneLoraArgs(tiny, Path("data"), precision="32-true", memory="100GB")
    config = Checkpoint.open(tiny).config
    lora = LoRAConfig(8, 16, 0.0, ["q_proj", "v_proj"])
    network = Network(config, lora, "32-true", None, torch.device("cpu"))
    return Planner(args, network, samples_of([200, 100, 50, 150] * 16), 1, 2, Budget(100 * GB, GB, GB))


def with_memory(planner: Planner, size: float) -> Planner:
    return replace(planner, budget=replace(planner.budget, total=int(size)))


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * 10**9), ("7.5 GiB", 15 * 2**29), ("900mb", 9 * 10**8), ("64KiB", 2**16), ("1B", 1)]
)
def test_sizes_have_units(text, size):
    assert as_bytes("--memory", text) == size


def test_rungs_end_at_the_largest_step():
    assert rungs(300, 1000) == [256, 384, 512, 768, 1024]
    assert rungs(1, 1) == [128]


def test_more_memory_is_never_slower(planner):
    needs = sorted(planner.need(plan) for plan in planner.times)
    times = []
    for size in (needs[0], needs[len(needs) // 2], needs[-1], 2 * needs[-1]):
        plan = with_memory(planner, size).fastest()
        assert plan is not None
        assert planner.need(plan) <= size
        times.append(planner.times[plan])
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]
    assert with_memory(planner, needs[0] - 1).fastest() is None


def test_what_the_process_has_counts(planner):
    plan = planner.fastest()
    more = replace(planner, budget=replace(planner.budget, used=2 * GB))
    assert more.need(plan) == planner.need(plan) + GB


def test_memory_is_tight_where_it_keeps_a_run_from_a_faster_plan(planner):
    """The allocator then trades time for memory."""
    fastest, smallest = planner.fastest(), planner.smallest
    assert not planner.is_limited(fastest)
    assert planner.is_limited(smallest)
    requested = replace(planner.args, train=replace(planner.args.train, activation_checkpointing=True))
    assert not (same := replace(planner, args=requested)).is_limited(same.fastest())


def test_sizes_below_a_gigabyte_have_another_digit():
    assert (gigabytes(0.6e9, 8e9), gigabytes(0.63e9)) == ("0.6 of 8.0 GB", "0.63 GB")


def test_requested_checkpointing_and_examples_bound_the_plan(planner):
    for recomputes in (True, False):
        train = TrainArgs(activation_checkpointing=recomputes, micro_batch_size=6, micro_batch_tokens="auto")
        bound = replace(planner, args=replace(planner.args, train=train))
        assert {plan.activation_checkpointing for plan in bound.times} == {recomputes}
        assert {plan.limit for plan in bound.times} == {1, 3, 6}
        assert all(plan.by_examples for plan in bound.times)


def test_a_long_row_is_alone(planner):
    """It decides the memory, but the short rows are split as they are without it."""
    assert pack_into_fewest([10, 900, 20, 30], 60) == [[0, 2, 3], [1]]
    long = replace(planner, samples=samples_of([100] * 63 + [8000]))
    needs = {plan: long.need(plan) for plan in long.times}
    tight = with_memory(long, 1.2 * min(needs.values()))
    plan = tight.fastest()
    assert plan is not None
    assert plan.limit < 8000


def test_plan_too_bold_is_lowered(planner):
    planned = PlannedRun(planner.args, Layout(planner.network, 2), planner.samples, planner, planner.fastest())
    assert planned.fits(1.0)
    assert not planned.fits(1e6)
    seen = [planner.need(planned.plan)]
    while (planned := planned.lowered(float("inf"))) is not None:
        seen.append(planner.need(planned.plan))
    assert len(seen) > 1
    assert seen == sorted(seen, reverse=True)


def test_plan_of_fewer_examples_validates_the_same_rows(planner):
    train = TrainArgs(micro_batch_size=6, micro_batch_tokens="auto")
    bound = replace(planner, args=replace(planner.args, train=train, eval=EvalArgs(max_iters=5)))
    planned = PlannedRun._with(bound, bound.smallest)
    assert planned.args.train.micro_batch_size == 1
    assert planned.validated_rows == 30
    assert PlannedRun(bound.args, Layout(bound.network, 2), bound.samples).validated_rows == 30


def test_recorded_plan_is_taken_where_it_is_allowed():
    was = {"micro_batch_tokens": 512, "micro_batch_size": None, "parallel_micro_batches": 2}
    settings = {"train": was | {"activation_checkpointing": True}}
    assert recorded_plan(settings, TrainArgs()) == Plan(512, False, 2, True)
    assert recorded_plan(settings, TrainArgs(activation_checkpointing=False)) is None
    before = {"micro_batch_tokens": None, "micro_batch_size": 4, "parallel_micro_batches": 2}
    older = {"train": before | {"activation_checkpointing": False}}
    assert recorded_plan(older, TrainArgs(parallel_micro_batches=1)) == Plan(4, True, 1, False)
    assert recorded_plan({}, TrainArgs()) is None


def test_every_plan_gives_the_same_adapter(planner, tiny, data_dir, tmp_path, four_threads):
    """Checkpointing keeps the order of all sums, so that its adapter is identical."""
    adapters = {}
    for number, plan in enumerate(replace(planner, samples=samples_of([150] * 3)).times):
        train = plan.applied(TrainArgs())
        flags = ["--train.micro_batch_tokens", train.micro_batch_tokens, "--train.max_steps", 2]
        flags += ["--train.parallel_micro_batches", train.parallel_micro_batches]
        flags += ["--train.activation_checkpointing", str(train.activation_checkpointing).lower()]
        adapters[plan] = adapter(finetune(tiny, data_dir, tmp_path / str(number), *CHEAP, *flags))
    first = next(iter(adapters.values()))
    for plan, matrices in adapters.items():
        other = adapters[replace(plan, activation_checkpointing=not plan.activation_checkpointing)]
        for name, matrix in matrices.items():
            torch.testing.assert_close(matrix, first[name], atol=1e-6, rtol=0)
            assert torch.equal(matrix, other[name])


def test_run_repeats_from_its_hyperparameters(tiny, data_dir, tmp_path, capsys):
    final = finetune(tiny, data_dir, tmp_path / "out", *CHEAP, "--train.max_steps", 2, "--memory", "8GB")
    line = r"plan: [\d,]+ tokens per micro-batch, (\d concurrent, )?no checkpointing, \d\.\d of 8\.0 GB"
    assert re.search(line, capsys.readouterr().err)
    settings = yaml.safe_load((tmp_path / "out/hyperparameters.yaml").read_text(encoding="utf-8"))
    recorded = report(final)["plan"]
    assert settings["train"].items() >= {key: recorded[key] for key in settings["train"] if key in recorded}.items()
    assert isinstance(settings["train"]["micro_batch_tokens"], int)
    assert (settings["memory"], recorded["memory_gb"]) == (None, 8.0)
    again = ["--config", str(tmp_path / "out/hyperparameters.yaml"), "--out_dir", str(tmp_path / "again")]
    assert main(["finetune_lora", *again]) == 0
    assert same_adapter(final, tmp_path / "again/final")
    assert report(tmp_path / "again/final")["plan"] is None


def test_run_that_began_without_a_plan_resumes_with_its_split(tiny, data_dir, tmp_path):
    """Dropout shows the split, as each micro-batch draws its masks."""
    flags = [*CHEAP, "--lora_dropout", 0.2, "--train.global_batch_size", 8, "--train.epochs", 2, "--train.max_steps", 2]
    fixed = ["--train.micro_batch_tokens", "null"]
    whole = finetune(tiny, data_dir, tmp_path / "whole", *flags, *fixed)
    finetune(tiny, data_dir, tmp_path / "out", *flags, *fixed, "--train.save_interval", 1)
    for folder in ("final", "step-000002"):
        shutil.rmtree(tmp_path / "out" / folder)
    resumed = finetune(tiny, data_dir, tmp_path / "out", *flags, "--resume", "true")
    assert report(resumed)["plan"]["micro_batch_size"] == EXAMPLES
    assert same_adapter(resumed, whole)
    planned = finetune(tiny, data_dir, tmp_path / "planned", *flags)
    assert report(planned)["plan"]["micro_batch_tokens"]
    assert not same_adapter(planned, whole)


@pytest.mark.skipif(os.name != "posix", reason="reads what Linux reports")
def test_memory_of_process_and_machine():
    block = bytearray(os.urandom(1)) * 2**26
    assert 2**26 < resident_memory() < total_memory()
    assert 0 < available_memory() < total_memory()
    assert len(block) == 2**26
