"""Building a fine-tuning run from its arguments, and carrying it out."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric  # not by way of lightning, which imports all of its trainer as well
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from litlora.args.common import plain
from litlora.args.finetune import FinetuneLoraArgs
from litlora.data.batching import Batching, Samples, epoch_order
from litlora.distributed.fsdp import load_sharded
from litlora.distributed.launcher import find_rank_info
from litlora.distributed.process_group import Ranks, monitor_peers, open_fabric, reporting_once
from litlora.errors import LitLoraError
from litlora.evaluation.engine import Engine
from litlora.evaluation.row_losses import highest_losses
from litlora.evaluation.samples import Completer
from litlora.evaluation.validation import ValLoss, parts, validate
from litlora.lora.checkpoint import load_matrices
from litlora.lora.config import LoRAConfig
from litlora.lora.init import INITIALIZERS, Calibration
from litlora.lora.layer import add_lora, count, lora_layers, lora_parameters
from litlora.lora.targets import fused_note, refuse_parted_head
from litlora.models.checkpoint import Checkpoint
from litlora.models.checkpoint_files import CheckpointFiles
from litlora.models.config import GPTConfig
from litlora.models.transformer import GPT, evaluating
from litlora.nn.nf4 import Quantization
from litlora.train.inputs import Data, Inputs, find_inputs, log_choices, read_data, run_folder
from litlora.train.loggers import Loggers, Place
from litlora.train.loop import Run, fit, loss_and_gradients
from litlora.train.memory_check import (
    reporting_shortage,
)
from litlora.train.network_shape import Network
from litlora.train.optimizers import adapter_groups, build_optimizer
from litlora.train.planned_run import PlannedRun, plan_of, with_memory_checked
from litlora.train.receipts import find_receipt
from litlora.train.report import Report, losses_with_digests
from litlora.train.resume import (
    no_checkpoint,
)
from litlora.train.run_dir import RunFolder
from litlora.train.samples import SampleRows, is_told_to_stop
from litlora.train.schedule import total_steps
from litlora.train.train_state import Progress, restore_state
from litlora.utils.console import log, quietly, warn
from litlora.utils.locks import locked
from litlora.utils.progress import task
from litlora.utils.signals import StopRequest

FISHER_EXAMPLES = 32
"""Examples that measure the Fisher information; eight times as many gave no lower loss."""
SCORED = 10
"""Rows are scored after training up to one in this number of the trained tokens: about 3 % of the time."""


def finetune(args: FinetuneLoraArgs, base: CheckpointFiles | None = None) -> Report:
    """Fine-tune a checkpoint with LoRA, and return the report of the run.

    Called in a Python program, it trains in the program's process, on one device. `base` is what was read of the
    checkpoint, if anything.
    """
    if args.dry_run:
        raise LitLoraError("--dry_run makes no report: leave it out, or call litlora.train.setup.forecast")
    stop = StopRequest(args.train.max_time)
    with joined(args) as (fabric, ranks):
        inputs = find_inputs(args, base, fabric.device, ranks)
        args = inputs.args
        folder = run_folder(args, inputs, ranks)
        if ranks.broadcast_result(folder.is_left_alone):
            log(f"the run in {args.out_dir} is finished: adapter in {folder.final}")
            return Report.read(folder.final)
        start = ranks.broadcast_result(partial(folder.check, inputs.explanations))
        data = read_data(args, inputs, ranks)
        network = Network.of(args, inputs.checkpoint, folder.lora, fabric.device)
        recorded = ranks.broadcast_result(partial(plan_of, start, args.train))
        planned = PlannedRun.of(args, network, data.train, ranks, recorded)
        folder = planned_folder(folder.with_details(data.digests), planned)
        process = network.backend.memory_in_use()
        run, progress = build_run(planned, inputs, data, folder, fabric, ranks, stop, start)
        log_choices(inputs)
        log_plan(run)
        if planned.plan:
            log(str(planned))
        if progress.step < total_steps(len(data.train), args.train):
            with task("checking memory"):
                run, planned = with_memory_checked(run, planned, progress.step, partial(under_plan, data=data))
        return carry_out(run, progress, start, inputs, data, planned.estimate(process))


def forecast(args: FinetuneLoraArgs, base: CheckpointFiles | None = None) -> str:
    """Return what a run would compute and the parts of its peak memory, as a table; no weight is loaded (--dry_run)."""
    with joined(args) as (fabric, ranks):
        inputs = find_inputs(args, base, fabric.device, ranks)
        args = inputs.args
        folder = run_folder(args, inputs, ranks)
        ranks.broadcast_result(partial(folder.check, inputs.explanations))
        data = read_data(args, inputs, ranks)
        network = Network.of(args, inputs.checkpoint, folder.lora, fabric.device)
        log_choices(inputs)
        log_adapter(folder, inputs.config)
        planned = PlannedRun.forecast(args, network, data.train, ranks)
        if planned.plan:
            log(str(planned))
        return planned.table()


@contextmanager
def joined(args: FinetuneLoraArgs) -> Iterator[tuple[Fabric, Ranks]]:
    """Join the other processes of the run, if any, and lock the output folder."""
    rank_info = find_rank_info(args.devices, args.num_nodes)
    with quietly(args.quiet), reporting_once(rank_info):
        # Fabric's bf16-true would cast the adapter too; here the base has its dtype and the adapter stays float32.
        fabric = open_fabric(rank_info, "bf16-mixed" if args.precision == "bf16-mixed" else "32-true")
        ranks = Ranks(rank_info.rank, rank_info.world_size, fabric.device)
        if ranks.world_size == 1 and args.devices * args.num_nodes > 1 and not args.dry_run:
            hint = "start them by the litlora command, torchrun or srun"
            raise LitLoraError(f"--devices ({args.devices}) needs a process for each of them: {hint}")
        if args.resume is True and not args.out_dir.exists():
            raise no_checkpoint(args.out_dir)
        lock = locked(args.out_dir, "--out_dir") if ranks.is_first and not args.dry_run else nullcontext()
        with monitor_peers(rank_info), lock:
            yield fabric, ranks


def build_run(
    planned: PlannedRun,
    inputs: Inputs,
    data: Data,
    folder: RunFolder,
    fabric: Fabric,
    ranks: Ranks,
    stop: StopRequest,
    start: Path | None,
) -> tuple[Run, Progress]:
    """Load model, adapter and optimizer, and the state of the checkpoint that the run starts from, if any."""
    args, layout = planned.args, planned.layout
    torch.manual_seed(args.seed)
    gpt = build_model(args, inputs.checkpoint, folder.lora, fabric, sharded=planned.is_sharded)
    follow_plan(gpt, planned)
    groups = adapter_groups(lora_layers(gpt).values(), args.lora_plus_ratio)
    optimizer = build_optimizer(args.optimizer, groups, args.train.peak_rate)
    _, wrapped = fabric.setup(gpt, optimizer)  # the model as it is: what Fabric wraps is for one thread alone
    wrapped = cast(Optimizer, wrapped)
    progress = restore(inputs.checkpoint, start, gpt, wrapped)
    engine = Engine(gpt, fabric, args.precision, layout.network.backend.worker_pool(layout.workers), ranks)
    completer = Completer(engine, inputs.tokenizer, inputs.style, args.eval.max_new_tokens, planned.spare)
    samples = SampleRows(completer, data.examples, folder, partial(is_told_to_stop, ranks, stop))
    show = shower(engine, data, planned, samples)
    run = Run(engine, wrapped, data.train, args.train, args.eval, args.seed, show, folder, samples, Loggers(), stop)
    return run, progress


def validate_and_print(loss: Callable[[], ValLoss], samples: SampleRows, step: int) -> ValLoss:
    """Validate, and print the loss and a sample completion on stderr."""
    val_loss = loss()
    log(f"step {step}: validation loss {val_loss}")
    samples.show(step)
    if step == 0:
        samples.record(step)
    return val_loss


def planned_folder(folder: RunFolder, planned: PlannedRun) -> RunFolder:
    """Return the folder of a run, which records its plan."""
    return replace(folder, args=planned.args, plan=planned.record())


def follow_plan(gpt: GPT, planned: PlannedRun) -> None:
    """Have the model save activations, and the process allocate memory, as a plan says."""
    gpt.model.activation_checkpointing = planned.args.train.recomputes
    planned.network.backend.prepare_for_training(tight=planned.is_tight)


def under_plan(run: Run, planned: PlannedRun, data: Data) -> Run:
    """Return the same run under another plan."""
    train, engine = planned.args.train, run.engine
    follow_plan(engine.gpt, planned)
    workers = planned.network.backend.worker_pool(planned.layout.workers)
    engine, folder = replace(engine, workers=workers), planned_folder(run.folder, planned)
    completer = replace(run.completions.completer, engine=engine, spare=planned.spare)
    samples = replace(run.completions, completer=completer, folder=folder)
    show = shower(engine, data, planned, samples)
    return replace(run, engine=engine, train=train, folder=folder, completions=samples, validate=show)


def shower(engine: Engine, data: Data, planned: PlannedRun, samples: SampleRows) -> Callable[[int], ValLoss]:
    """Return what validates, and prints what a validation shows."""
    batching = Batching.of(planned.args.train)
    loss = partial(validate, engine, data.val, batching, planned.validated_rows, data.val_sources)
    return partial(validate_and_print, loss, samples)


def carry_out(
    run: Run, progress: Progress, start: Path | None, inputs: Inputs, data: Data, estimated: dict[str, int]
) -> Report:
    """Train to the end, and save the final adapter with the report."""
    run.folder.open(start, progress.step)
    with reporting_shortage(progress, run.train), closing(open_loggers(run, progress.step)) as loggers:
        run = replace(run, loggers=loggers)
        if start is None:
            initialize_adapter(run, inputs.checkpoint)
        with run.stop.handling_signals():
            fit(run, progress)
            val_loss, by_source = select_final_adapter(run.engine.gpt, progress)
            highest = look_back(run, progress)
        report = make_report(run, progress, (val_loss, by_source), data, highest, estimated)
        if by_source:
            log(f"validation loss by source: {parts(by_source)}")
        if report.warning:
            warn(report.warning)
        receipt = find_receipt(run.folder, run.engine, inputs.checkpoint, inputs.tokenizer)
        final = run.folder.save_final(run.engine.gpt, report, receipt)
    log(f"adapter in {final}")
    return replace(report, final=final)


def open_loggers(run: Run, step: int) -> Loggers:
    """Open the loggers of the run, on rank 0 alone."""
    args = run.folder.args
    names = args.logger_name if run.engine.ranks.is_first else ()
    return Loggers.open(names, Place(args.out_dir, step + 1 if step else 0), plain(args))


def look_back(run: Run, progress: Progress) -> dict[str, Any] | None:
    """Complete the sampled rows with the final adapter, and find the training rows with the highest losses."""
    best = progress.best
    run.completions.record(best.step if best.matrices else progress.step)
    if not run.eval.highest_losses or run.completions.is_stopped():
        return None
    most_tokens, data_dir = progress.tokens // SCORED, run.folder.args.data_dir
    count, is_stopped = run.eval.highest_losses, run.completions.is_stopped
    found = highest_losses(run.engine, run.samples, count, most_tokens, run.seed, is_stopped)
    return losses_with_digests(found, data_dir / "train.jsonl") if found.scored else None


def make_report(
    run: Run,
    progress: Progress,
    losses: tuple[float | None, dict[str, float]],
    data: Data,
    highest: dict[str, Any] | None,
    estimated: dict[str, int],
) -> Report:
    """Summarize the run, whose final adapter has these validation losses, of all rows and by source."""
    folder = run.folder
    return Report.of(
        run.engine.gpt, progress, *losses, folder.adapter, data.findings, folder.prompt_style.date,
        folder.start_val_loss(), run.train.peak_rate, data.counts(), highest, estimated, folder.plan,
    )  # fmt: skip


def initialize_adapter(run: Run, checkpoint: Checkpoint) -> None:
    """Initialize a new adapter as --lora_init says, or with the matrices of --init_adapter."""
    if (adapter_dir := run.folder.args.init_adapter) is not None:
        load_matrices(run.engine.gpt, adapter_dir, checkpoint)
        return
    backward = partial(calibrate, run.engine, run.samples, Batching.of(run.train), run.seed)
    calibration = Calibration(checkpoint, backward, run.engine.ranks.broadcast)
    INITIALIZERS[run.folder.lora.init](lora_layers(run.engine.gpt), calibration)


@torch.enable_grad()
def calibrate(engine: Engine, samples: Samples, batching: Batching, seed: int) -> None:
    """Run forward and backward over the first examples of the first epoch; no gradient is retained."""
    first = epoch_order(len(samples), seed=seed, epoch=1)[:FISHER_EXAMPLES].tolist()
    parameters = list(lora_parameters(engine.gpt).values())
    with evaluating(engine.gpt):
        for micro in batching.micro_batches([samples[number] for number in first]):
            loss_and_gradients(engine, parameters, 1, micro)


def build_model(
    args: FinetuneLoraArgs, checkpoint: Checkpoint, lora: LoRAConfig, fabric: Fabric, *, sharded: bool
) -> GPT:
    """Load the base, or this device's shard of it, with a new adapter."""
    dtype = torch.bfloat16 if args.precision == "bf16-true" else torch.float32
    quantization = Quantization(args.storage, dtype) if args.storage else None
    if sharded:
        refuse_parted_head(lora, checkpoint.config)
        gpt = load_sharded(checkpoint, dtype, quantization, lora, fabric)
    else:
        gpt = checkpoint.load(dtype, fabric.device, quantization)
        add_lora(gpt, lora)
    return gpt


def restore(checkpoint: Checkpoint, start: Path | None, gpt: GPT, optimizer: Optimizer) -> Progress:
    """Load adapter and training state from the checkpoint that the run starts from, if any."""
    if start is None:
        return Progress()
    load_matrices(gpt, start, checkpoint)
    return restore_state(start, optimizer)


def select_final_adapter(gpt: GPT, progress: Progress) -> tuple[float | None, dict[str, float]]:
    """Load the best adapter into the model, if it was retained.

    Return the validation loss of the final adapter, and that of each source.
    """
    best = progress.best
    if not best.matrices:
        return progress.val_loss, progress.val_loss_by_source
    log(f"the best validation loss is that of step {best.step}: {best.loss:.4f}")
    with torch.no_grad():
        for name, parameter in lora_parameters(gpt).items():
            parameter.copy_(best.matrices[name])
    return best.loss, best.by_source


def log_plan(run: Run) -> None:
    """Print what is trained, on which devices and for how long."""
    engine = run.engine
    trainable, frozen = (count(engine.gpt, trainable=kind) for kind in (True, False))
    tokens, devices = int(run.samples.lengths.sum()), f"on {engine.fabric.device}"
    if engine.ranks.world_size > 1:
        how = "sharded over" if isinstance(engine.gpt, FSDPModule) else "on each of"
        devices = f"{how} {engine.ranks.world_size} devices, the first of them {engine.fabric.device}"
    log(f"{trainable:,} trainable parameters over {frozen:,} frozen ones, {devices}")
    log_adapter(run.folder, engine.gpt.config)
    if dropouts := ", ".join(engine.gpt.config.unapplied_dropouts):
        log(f"config.json has {dropouts}, which is not applied: the dropout of fine-tuning is --lora_dropout")
    log(f"{len(run.samples):,} examples with {tokens:,} tokens, {total_steps(len(run.samples), run.train):,} steps")


def log_adapter(folder: RunFolder, config: GPTConfig) -> None:
    """Print which adapter is trained, and on which layers."""
    log(folder.adapter)
    if note := fused_note(folder.switches, config):
        log(note)
