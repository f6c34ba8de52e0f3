"""Building a fine-tuning run from its arguments, and carrying it out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric  # not by way of lightning, which imports all of its trainer as well
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from litlora.args.common import plain
from litlora.args.finetune import FinetuneLoraArgs, TrainArgs
from litlora.data.batching import Batching, Sample, Samples, epoch_order
from litlora.data.checks import CheckedData, CheckedSplit, Finding, Severity, refuse_errors, run_checks
from litlora.data.dataset import choose_prompt_style, read_example, read_some_examples
from litlora.data.examples import Example
from litlora.data.prompts.styles import AUTO, PromptStyle, StyleSettings
from litlora.data.row_sources import RowSources, read_row_sources
from litlora.data.split_encoder import SplitEncoder
from litlora.data.token_cache import Split, find_split, open_splits, peek_splits
from litlora.data.tokenizer import Tokenizer
from litlora.data.tokens import Tokens
from litlora.distributed.fsdp import load_sharded
from litlora.distributed.launcher import find_rank_info
from litlora.distributed.process_group import Ranks, monitor_peers, open_fabric, reporting_once
from litlora.errors import LitLoraError
from litlora.evaluation.engine import Engine
from litlora.evaluation.row_losses import highest_losses
from litlora.evaluation.samples import Completer
from litlora.evaluation.validation import ValLoss, parts, validate
from litlora.export.server_limits import log_notes, refuse_faults, server_limits
from litlora.lora.adapter_folder import CONFIG, WEIGHTS, read_prompt_style, refuse_adapter
from litlora.lora.checkpoint import load_matrices
from litlora.lora.config import LoRAConfig
from litlora.lora.init import INITIALIZERS, Calibration
from litlora.lora.layer import add_lora, count, lora_layers, lora_parameters
from litlora.lora.targets import fused_note, refuse_parted_head
from litlora.models.checkpoint import Checkpoint
from litlora.models.checkpoint_files import CheckpointFiles
from litlora.models.config import GPTConfig
from litlora.models.transformer import GPT, evaluating
from litlora.models.weights import fingerprint
from litlora.nn.backend import backend
from litlora.nn.nf4 import Quantization, import_bitsandbytes
from litlora.report.files import HYPERPARAMETERS, read_settings
from litlora.train.changes import Open, explanations
from litlora.train.init_adapter import continued_adapter
from litlora.train.logger_names import check_loggers
from litlora.train.loggers import Loggers, Place
from litlora.train.loop import Run, fit, loss_and_gradients
from litlora.train.lora_flags import new_adapter
from litlora.train.memory_check import (
    check_memory,
    concurrent_micro_batches,
    has_room,
    load_of,
    longest_ahead,
    memory_factor,
    reporting_shortage,
)
from litlora.train.memory_estimate import PROCESS, Network, breakdown, table
from litlora.train.memory_plan import Plan, PlannedRun, recorded_plan
from litlora.train.optimizers import adapter_groups, build_optimizer, check_optimizer
from litlora.train.receipts import find_receipt
from litlora.train.report import Report, counts_of, losses_with_digests
from litlora.train.resume import (
    BASE,
    ROWS,
    START,
    TENSORS,
    TOKENIZATION,
    TOKENS,
    Explain,
    Identity,
    checkpoints_in,
    no_checkpoint,
    split_content,
)
from litlora.train.run_dir import ReadOnlyRunFolder, RunFolder
from litlora.train.samples import SampleRows, is_told_to_stop
from litlora.train.schedule import orders, total_steps
from litlora.train.settled import former_defaults, settle
from litlora.train.train_state import Progress, restore_state
from litlora.utils.console import log, quietly, warn
from litlora.utils.files import refuse_foreign_link
from litlora.utils.locks import locked
from litlora.utils.progress import task
from litlora.utils.signals import StopRequest

FISHER_EXAMPLES = 32
"""Examples that measure the Fisher information; eight times as many gave no lower loss."""
MOST_FACTOR = 1000.0
"""Of its estimate, what a micro-batch counts as having taken for which memory does not suffice."""
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
        estimated = estimate(planned.args, network, longest_planned(planned.args, network, data.train))
        run, progress = build_run(planned.args, inputs, data, network, folder, fabric, ranks, stop, start)
        log_choices(inputs)
        log_plan(run)
        if planned.plan:
            log(str(planned))
        if progress.step < total_steps(len(data.train), args.train):
            shards = ranks.world_size if isinstance(run.engine.gpt, FSDPModule) else 1
            with task("checking memory"):
                run = with_memory_checked(run, replace(network, shards=shards), planned, data, progress.step)
        return carry_out(run, progress, start, inputs, data, estimated)


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
        return memory_table(planned.args, network, data.train)


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


@dataclass(frozen=True)
class Inputs:
    """What a run reads, found and checked."""

    args: FinetuneLoraArgs
    """The settings, with the prompt style and the learning rate that auto stands for."""
    checkpoint: Checkpoint
    tokenizer: Tokenizer
    style: PromptStyle
    choices: tuple[str, ...]
    """What settings stand for that are not as they were given, and why, to be printed."""
    init_adapter: Path | None
    lora: LoRAConfig
    max_seq_length: int
    encoder: SplitEncoder
    splits: tuple[Split, ...]

    @property
    def config(self) -> GPTConfig:
        return self.checkpoint.config

    @property
    def hashes(self) -> dict[str, str]:
        """Hashes of the base's weights and of the tokens of each split, and how this version tokenizes."""
        tokens = {split_content(split.path.name): split.name for split in self.splits}
        files = [self.init_adapter / WEIGHTS, self.init_adapter / CONFIG] if self.init_adapter else []
        start = {START: fingerprint(files)} if files else {}
        return {BASE: self.checkpoint.fingerprint()} | tokens | TOKENIZATION | start

    @property
    def details(self) -> dict[str, str]:
        """Hashes that tell what differs from a run: those of the base's tensors, and of the rows."""
        rows = {ROWS + split.path.name: split.content for split in self.splits}
        return {TENSORS: self.checkpoint.tensor_digests} | rows

    @property
    def open(self) -> Open:
        """What opens the splits; a dry run leaves the token cache as it is."""
        return peek_splits if self.args.dry_run else open_splits

    @property
    def explanations(self) -> dict[str, Explain]:
        """What tells how base and tokens differ from those of a run."""
        return explanations(self.checkpoint, self.encoder, self.splits, self.open)


def find_inputs(args: FinetuneLoraArgs, base: CheckpointFiles | None, device: torch.device, ranks: Ranks) -> Inputs:
    """Open the base and find the splits; refuse settings that do not fit them."""
    check_loggers(args.logger_name)
    refuse_adapter(args.checkpoint_dir)
    checkpoint = Checkpoint.open(base or CheckpointFiles.find(args.checkpoint_dir, args.gguf))
    tokenizer = Tokenizer(checkpoint.dir, checkpoint.hub_config)
    for path in tokenizer.files:  # which are copied beside the adapter
        refuse_foreign_link(path)
    settings, why = find_prompt_style(args, tokenizer, ranks)
    args = replace(args, prompt_style=settings.name)
    style = tokenizer.prompt_style(settings)
    choices = [why] if why else []
    began = ranks.broadcast_result(partial(former_defaults, args))
    args = settle(args, checkpoint.config.hidden_size, began, choices.append)
    limit = args.check_model(checkpoint.config.hidden_size, checkpoint.config.positions)
    lora = _lora_config(args, checkpoint)
    limits = server_limits(args, lora, checkpoint.hub_config)
    refuse_faults(args.deploy, limits)
    log_notes(limits)
    check_optimizer(args.optimizer, args.train.peak_rate, device, args.lora_plus_ratio)
    if args.quantize and not args.gguf:
        import_bitsandbytes(f"--quantize {args.quantize}")  # only a check
    encoder = SplitEncoder(tokenizer, settings, args.mask_prompt)
    splits = tuple(find_split(args.data_dir / f"{name}.jsonl", encoder) for name in ("train", "val"))
    return Inputs(args, checkpoint, tokenizer, style, tuple(choices), args.init_adapter, lora, limit, encoder, splits)


def log_choices(inputs: Inputs) -> None:
    """Print what settings stand for."""
    for choice in inputs.choices:
        log(choice)


def _lora_config(args: FinetuneLoraArgs, checkpoint: Checkpoint) -> LoRAConfig:
    if args.init_adapter is not None:
        return continued_adapter(args.init_adapter, args, checkpoint)
    return new_adapter(args, checkpoint.config)


def find_prompt_style(args: FinetuneLoraArgs, tokenizer: Tokenizer, ranks: Ranks) -> tuple[StyleSettings, str]:
    """Return the prompt style and why; its date is that of the resumed run, or today's."""
    name, reason = choose_prompt_style(args.prompt_style, args.data_dir / "train.jsonl", tokenizer.chat_template)
    today = ranks.broadcast_result(partial(recorded_date, args))
    why = f"--prompt_style auto is {name}: {reason}" if args.prompt_style == AUTO else ""
    return StyleSettings(name, args.prompt_style_variables or {}, today), why


def recorded_date(args: FinetuneLoraArgs) -> str:
    """Return the date with which the run that is resumed tokenized its data, or else today's."""
    folders = [args.resume] if isinstance(args.resume, Path) else checkpoints_in(args.out_dir) if args.resume else []
    for folder in reversed(folders):
        with suppress(LitLoraError):  # a corrupt checkpoint is reported later
            if (was := read_prompt_style(folder)) and was.date:
                return was.date
    return datetime.now().date().isoformat()


def run_folder(args: FinetuneLoraArgs, inputs: Inputs, ranks: Ranks) -> RunFolder:
    """Return the output folder, to which rank 0 alone writes."""
    hashes = inputs.hashes
    ranks.require_identical(hashes)
    kind = RunFolder if ranks.is_first else ReadOnlyRunFolder
    style = replace(inputs.encoder.prompt_style, date=inputs.encoder.date)
    return kind(args, inputs.lora, inputs.tokenizer.files, Identity.of(args, hashes, inputs.details), style)


@dataclass(frozen=True)
class Data:
    """The samples of a run, and the rows of the validation split that it completes, counted from 0."""

    train: Samples
    val: Samples
    examples: list[tuple[int, Example]]
    findings: list[Finding]
    val_sources: RowSources
    digests: dict[str, str]
    """Hashes of the tokens of each split, as a run records them."""

    def counts(self) -> dict[str, Any]:
        """Return what the splits hold."""
        return {"train": counts_of(self.train), "val": counts_of(self.val)}


def read_data(args: FinetuneLoraArgs, inputs: Inputs, ranks: Ranks) -> Data:
    """Open the splits as tokens; those that are not cached yet are tokenized by rank 0."""
    examples = find_examples(args)
    with ranks.first_ahead():
        opened = inputs.open(inputs.splits, inputs.encoder)
    named = {split.path.name: tokens for split, tokens in zip(inputs.splits, opened, strict=True)}
    findings = check_splits(inputs, opened)
    train, val = (samples_of(name, tokens, inputs.max_seq_length) for name, tokens in named.items())
    for finding in findings:
        if finding.severity is Severity.WARNING:
            warn(finding.sentence)
        else:
            log(str(finding))
    digests = {TOKENS + name: tokens.digest for name, tokens in named.items()}
    return Data(train, val, examples, findings, read_row_sources(args.data_dir / "val.jsonl"), digests)


def find_examples(args: FinetuneLoraArgs) -> list[tuple[int, Example]]:
    """Read the rows of the validation split that are completed: --eval.evaluate_example and those after it."""
    path, first = args.data_dir / "val.jsonl", args.eval.evaluate_example
    example = read_example(path, first, "--eval.evaluate_example")
    if not args.eval.max_new_tokens:
        return []
    others = enumerate(read_some_examples(path, first + 1, args.eval.samples - 1), start=first + 1)
    return [(first, example), *others]


def check_splits(inputs: Inputs, opened: Sequence[Tokens]) -> list[Finding]:
    """Run the checks of the data, and refuse data with an error."""
    splits = [CheckedSplit(split.path, tokens) for split, tokens in zip(inputs.splits, opened, strict=True)]
    vocabulary = inputs.tokenizer.vocab_size
    findings = run_checks(CheckedData(splits, inputs.max_seq_length, inputs.config.vocab_size, vocabulary))
    refuse_errors(findings)
    return findings


def build_run(
    args: FinetuneLoraArgs,
    inputs: Inputs,
    data: Data,
    network: Network,
    folder: RunFolder,
    fabric: Fabric,
    ranks: Ranks,
    stop: StopRequest,
    start: Path | None,
) -> tuple[Run, Progress]:
    """Load model, adapter and optimizer, and the state of the checkpoint that the run starts from, if any."""
    torch.manual_seed(args.seed)
    gpt = build_model(args, inputs.checkpoint, folder.lora, fabric, sharded=is_sharded(args, network, data, ranks))
    groups = adapter_groups(lora_layers(gpt).values(), args.lora_plus_ratio)
    optimizer = build_optimizer(args.optimizer, groups, args.train.peak_rate)
    _, wrapped = fabric.setup(gpt, optimizer)  # the model as it is: what Fabric wraps is for one thread alone
    wrapped = cast(Optimizer, wrapped)
    progress = restore(inputs.checkpoint, start, gpt, wrapped)
    workers = 1 if isinstance(gpt, FSDPModule) else network.backend.workers(args.train.parallel_micro_batches)
    engine = Engine(gpt, fabric, args.precision, network.backend.worker_pool(workers), ranks)
    completer = Completer(engine, inputs.tokenizer, inputs.style, args.eval.max_new_tokens)
    samples = SampleRows(completer, data.examples, folder, partial(is_told_to_stop, ranks, stop))
    show = shower(engine, data, args, samples)
    run = Run(engine, wrapped, data.train, args.train, args.eval, args.seed, show, folder, samples, Loggers(), stop)
    return run, progress


def is_sharded(args: FinetuneLoraArgs, network: Network, data: Data, ranks: Ranks) -> bool:
    """Tell whether each of several devices holds a shard of the base: as requested, or where memory is too small."""
    if ranks.world_size == 1 or args.strategy != "auto" or network.backend.counts_process_memory:
        return ranks.world_size > 1 and args.strategy == "fsdp"
    longest = longest_ahead(data.train, args.train, args.seed, ranks.world_size)
    load = load_of(longest, network, args.train.recomputes)
    free, _ = torch.cuda.mem_get_info(network.device)
    return bool(ranks.all_reduce_max(int(not has_room(free, network, load, args.optimizer))))


def validate_and_print(loss: Callable[[], ValLoss], samples: SampleRows, step: int) -> ValLoss:
    """Validate, and print the loss and a sample completion on stderr."""
    val_loss = loss()
    log(f"step {step}: validation loss {val_loss}")
    samples.show(step)
    if step == 0:
        samples.record(step)
    return val_loss


def plan_of(start: Path | None, train: TrainArgs) -> Plan | None:
    """Return the plan of the run that is resumed, if its settings are there and allow one."""
    if start is None or not (start.parent / HYPERPARAMETERS).is_file():
        return None
    return recorded_plan(read_settings(start.parent), train)


def planned_folder(folder: RunFolder, planned: PlannedRun) -> RunFolder:
    """Return the folder of a run, which records its plan."""
    return replace(folder, args=planned.args, plan=planned.record())


def with_memory_checked(run: Run, network: Network, planned: PlannedRun, data: Data, done: int) -> Run:
    """Return the run under a plan whose longest micro-batch was computed within its memory; refuse a run without."""
    while True:
        train, optimizer = planned.args.train, planned.args.optimizer
        ranks, workers = run.engine.ranks, run.engine.workers.count
        longest = longest_ahead(data.train, train, run.seed, ranks.world_size, done, workers)
        if planned.planner is None or isinstance(run.engine.gpt, FSDPModule):
            check_memory(run.engine, network, train, optimizer, longest)
            return run
        budget = planned.planner.budget
        factor = memory_factor(run.engine, network, train, optimizer, longest, budget.used, budget.peak)
        factor = ranks.all_reduce_max(round(min(factor, MOST_FACTOR) * 1000)) / 1000
        if factor < MOST_FACTOR and planned.fits(factor):
            return run
        lowered = planned.lowered(factor)
        if lowered is None:
            if factor == MOST_FACTOR:
                check_memory(run.engine, network, train, optimizer, longest)
            warn(f"the longest micro-batch takes {factor:.1f} times its estimate, beyond {budget.name}")
            return run
        planned = lowered
        log(f"{planned}: the one before took more than its estimate")
        run = under_plan(run, planned, data)


def under_plan(run: Run, planned: PlannedRun, data: Data) -> Run:
    """Return the same run under another plan."""
    train, engine = planned.args.train, run.engine
    engine.gpt.model.activation_checkpointing = train.recomputes
    workers = backend(engine.fabric.device).worker_pool(train.parallel_micro_batches)
    engine, folder = replace(engine, workers=workers), planned_folder(run.folder, planned)
    completer = replace(run.completions.completer, engine=engine)
    samples = replace(run.completions, completer=completer, folder=folder)
    show = shower(engine, data, planned.args, samples)
    return replace(run, engine=engine, train=train, folder=folder, completions=samples, validate=show)


def shower(engine: Engine, data: Data, args: FinetuneLoraArgs, samples: SampleRows) -> Callable[[int], ValLoss]:
    """Return what validates, and prints what a validation shows."""
    loss = partial(validate, engine, data.val, Batching.of(args.train), args.eval.max_iters, data.val_sources)
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
    return report


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
    gpt.model.activation_checkpointing = args.train.recomputes
    backend(fabric.device).prepare_for_training()
    return gpt


def samples_of(name: str, tokens: Tokens, limit: int) -> Samples:
    """Cut the examples of a split to the limit."""
    samples = Samples(tokens, limit)
    if not len(samples):
        fault = f"has no example with a response within --train.max_seq_length ({limit}): raise it"
        raise LitLoraError(f"{name} {fault}")
    return samples


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


def memory_table(args: FinetuneLoraArgs, network: Network, samples: Samples) -> str:
    """Return what a run computes and the parts of its peak memory, as a table."""
    train, longest = args.train, longest_planned(args, network, samples)
    parts = estimate(args, network, longest)
    steps = total_steps(len(samples), train)
    epochs = orders(len(samples), train.global_batch_size, args.seed, after=0, total=steps)
    outline = network.outline()
    counts = {
        "trainable parameters": count(outline, trainable=True),
        "frozen parameters": count(outline, trainable=False),
        "examples": len(samples),
        "steps": steps,
        "tokens": sum(int(samples.lengths[order].sum()) for _, order in epochs),
        "tokens in the longest micro-batch": sum(len(sample.tokens) for sample in longest),
    }
    return table(counts, parts)


def longest_planned(args: FinetuneLoraArgs, network: Network, samples: Samples) -> list[Sample]:
    """Return the samples of the longest micro-batch of a run from its first step on."""
    devices, workers = args.devices * args.num_nodes, planned_workers(args, network)
    return longest_ahead(samples, args.train, args.seed, devices, workers=workers)


def planned_workers(args: FinetuneLoraArgs, network: Network) -> int:
    """Return how many micro-batches a device computes concurrently; sharded weights allow one."""
    requested = 1 if sharded(args, network).shards > 1 else args.train.parallel_micro_batches
    return network.backend.workers(requested, args.devices)


def sharded(args: FinetuneLoraArgs, network: Network) -> Network:
    """Return the network as --strategy shards it."""
    return replace(network, shards=args.devices * args.num_nodes) if args.strategy == "fsdp" else network


def estimate(args: FinetuneLoraArgs, network: Network, longest: Sequence[Sample]) -> dict[str, int]:
    """Return the parts of a run's peak memory in bytes; called before a weight is loaded."""
    train, devices = args.train, args.devices * args.num_nodes
    network = sharded(args, network)
    concurrent = concurrent_micro_batches(longest, train, devices, planned_workers(args, network))
    parts = breakdown(network, load_of(longest, network, train.recomputes, concurrent), args.optimizer)
    if network.backend.counts_process_memory:
        parts[PROCESS] = network.backend.memory_in_use()
    return parts
