"""Building a fine-tuning run from its arguments, and carrying it out."""

import math
import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric  # not by way of lightning, which imports all of its trainer as well
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from litlora.args import FinetuneLoraArgs
from litlora.data.batching import Samples, epoch_order, micro_batches
from litlora.data.encoding import Tokens
from litlora.data.examples import Example, read_example
from litlora.data.prompt_styles import PromptStyle
from litlora.data.token_cache import Split, SplitEncoder, find_split, open_splits
from litlora.data.tokenizer import Tokenizer
from litlora.distributed.fsdp import load_sharded
from litlora.distributed.launcher import find_rank_info
from litlora.distributed.process_group import Ranks, monitor_peers, open_fabric, reporting_once
from litlora.errors import LitLoraError
from litlora.generation.sampler import Sampler
from litlora.generation.session import generate
from litlora.lora.checkpoint import load_matrices
from litlora.lora.config import TARGET_MODULES, LoRAConfig
from litlora.lora.init import INITIALIZERS, Calibration
from litlora.lora.layer import add_lora, count, lora_layers, lora_parameters
from litlora.models.checkpoint import Checkpoint
from litlora.models.config import GPTConfig
from litlora.models.transformer import GPT, evaluating
from litlora.nn.backend import backend
from litlora.nn.nf4 import Quantization, import_bitsandbytes
from litlora.train.loop import Run, fit, loss_and_gradients
from litlora.train.memory_check import at_once, check_memory, load_of, longest_ahead, must_shard, shortage_said
from litlora.train.memory_estimate import Network, breakdown, table
from litlora.train.metrics import peak_memory_gb
from litlora.train.optimizers import build_optimizer, check_optimizer
from litlora.train.resume import BASE, Identity, no_checkpoint
from litlora.train.run_dir import ReadOnlyRunFolder, RunFolder
from litlora.train.schedule import orders, total_steps
from litlora.train.train_state import Progress, restore_state
from litlora.utils.locks import locked
from litlora.utils.signals import StopRequest

FISHER_EXAMPLES = 32
"""Examples that measure the Fisher information; eight times as many gave no lower loss."""


def finetune(args: FinetuneLoraArgs) -> None:
    """Fine-tune a checkpoint with LoRA."""
    stopping = StopRequest(args.train.max_time)
    rank_info = find_rank_info(args.devices, args.num_nodes)
    with reporting_once(rank_info):
        # Fabric's bf16-true would cast the adapter too; here the base has its dtype and the adapter stays float32.
        fabric = open_fabric(rank_info, "bf16-mixed" if args.precision == "bf16-mixed" else "32-true")
        ranks = Ranks(rank_info.rank, rank_info.world_size, fabric.device)
        if args.resume is True and not args.out_dir.exists():
            raise no_checkpoint(args.out_dir)
        lock = locked(args.out_dir, "--out_dir") if ranks.is_first and not args.dry_run else nullcontext()
        with monitor_peers(rank_info), lock:
            train_adapter(args, stopping, fabric, ranks)


def train_adapter(args: FinetuneLoraArgs, stopping: StopRequest, fabric: Fabric, ranks: Ranks) -> None:
    """Train in a folder that is the first rank's own."""
    checkpoint = Checkpoint.open(args.checkpoint_dir)
    config = checkpoint.config
    tokenizer = Tokenizer(checkpoint.dir, checkpoint.hub_config)
    style = tokenizer.prompt_style(args.prompt_style)
    limit = sequence_limit(args.train.max_seq_length, config.max_position_embeddings)
    check_optimizer(args.optimizer, args.train.learning_rate, fabric.device)
    if args.quantize:
        import_bitsandbytes(f"--quantize {args.quantize}")  # only a check
    encoder = SplitEncoder(tokenizer, args.prompt_style, args.mask_prompt)
    splits = [find_split(args.data_dir / f"{name}.jsonl", encoder) for name in ("train", "val")]
    read = contents(checkpoint, splits)
    ranks.require_identical(read)
    kind = RunFolder if ranks.is_first else ReadOnlyRunFolder
    folder = kind(args, lora_config(args), tokenizer.files, Identity.of(args, read))
    start = ranks.broadcast_result(folder.check)
    shown = read_example(args.data_dir / "val.jsonl", args.eval.evaluate_example, "--eval.evaluate_example")
    with ranks.first_ahead():
        opened = open_splits(splits, encoder)
    named = {split.path.name: tokens for split, tokens in zip(splits, opened, strict=True)}
    require_embedded(named, tokenizer, config)
    train, val = (samples_of(name, tokens, limit, args.train.micro_batch_tokens) for name, tokens in named.items())

    torch.manual_seed(args.seed)
    network = Network(config, folder.lora, args.precision, args.quantize, fabric.device)
    if args.dry_run:
        sys.stdout.write(forecast(args, network, train))
        return
    gpt = build_model(args, checkpoint, folder.lora, fabric, sharded=must_shard(args, network, train, ranks))
    optimizer = build_optimizer(args.optimizer, lora_parameters(gpt).values(), args.train.learning_rate)
    _, optimizer = fabric.setup(gpt, optimizer)  # the model as it is: what Fabric wraps is for one thread alone
    progress = go_on(checkpoint, start, gpt, optimizer)

    answer = partial(
        sample_answer, fabric, gpt, tokenizer, style, shown, args.eval.max_new_tokens, OneChoice(ranks=ranks)
    )
    its_backend = backend(fabric.device)
    count = 1 if isinstance(gpt, FSDPModule) else its_backend.workers(args.train.parallel_micro_batches)
    workers = its_backend.worker_pool(count)
    run = Run(fabric, gpt, cast(Optimizer, optimizer), train, val, args, folder, answer, stopping, ranks, workers)
    carry_out(run, checkpoint, progress, start)


def carry_out(run: Run, checkpoint: Checkpoint, progress: Progress, start: Path | None) -> None:
    """Train from where a run stands to its end, and leave what comes of it in its folder."""
    say_plan(run)
    check_memory(run, progress.step)
    run.folder.open(start, progress.step)
    with shortage_said(progress, run.args.train):
        if start is None:
            initialize_adapter(run, checkpoint)
        with run.stopping.handling_signals():
            fit(run, progress)
        final = run.folder.save_final(run.gpt, report(run.gpt, progress, take_best(run.gpt, progress)))
    say(f"adapter in {final}")


def initialize_adapter(run: Run, checkpoint: Checkpoint) -> None:
    """Initialize a new adapter as --lora_init says."""
    calibration = Calibration(checkpoint, partial(backward_over_some, run), run.ranks.broadcast)
    INITIALIZERS[run.folder.lora.init](lora_layers(run.gpt), calibration)


@torch.enable_grad()
def backward_over_some(run: Run) -> None:
    """Run forward and backward over the first examples of the first epoch; no gradient is retained."""
    first = epoch_order(len(run.train), seed=run.args.seed, epoch=1)[:FISHER_EXAMPLES].tolist()
    samples, train = [run.train[number] for number in first], run.args.train
    matrices = list(lora_parameters(run.gpt).values())
    with evaluating(run.gpt):
        for micro in micro_batches(samples, train.micro_batch_size, train.micro_batch_tokens):
            loss_and_gradients(run, matrices, 1, micro)


def require_embedded(tokens: Mapping[str, Tokens], tokenizer: Tokenizer, config: GPTConfig) -> None:
    """Refuse splits with tokens that the embedding does not have, which only a larger vocabulary can give."""
    if tokenizer.vocab_size > config.vocab_size:
        for name, split in tokens.items():
            config.check_ids(name, split.highest())


def build_model(
    args: FinetuneLoraArgs, checkpoint: Checkpoint, lora: LoRAConfig, fabric: Fabric, *, sharded: bool
) -> GPT:
    """Load the base, whole or this device's part of it, with a new adapter."""
    dtype = torch.bfloat16 if args.precision == "bf16-true" else torch.float32
    quantization = Quantization(args.quantize, dtype) if args.quantize else None
    if sharded:
        gpt = load_sharded(checkpoint, dtype, quantization, lora, fabric)
    else:
        gpt = checkpoint.load(dtype, fabric.device, quantization)
        add_lora(gpt, lora)
    gpt.model.activation_checkpointing = args.train.activation_checkpointing
    backend(fabric.device).prepare_for_training()
    return gpt


def contents(checkpoint: Checkpoint, splits: Sequence[Split]) -> dict[str, str]:
    """Return the hashes of what a run reads: the base's weights, and the tokens of each split."""
    tokens = {f"the rows or the tokenizer of {split.path.name}": split.name for split in splits}
    return {BASE: checkpoint.fingerprint()} | tokens


def lora_config(args: FinetuneLoraArgs) -> LoRAConfig:
    targets = tuple(module for switch in args.lora_switches for module in TARGET_MODULES[switch])
    return LoRAConfig(args.lora_r, args.lora_alpha, args.lora_dropout, targets, init=args.lora_init)


def sequence_limit(asked: int | None, positions: int) -> int:
    """Return the most tokens of an example: what is asked for, or all the positions that the checkpoint has."""
    if asked is not None and asked > positions:
        need = f"must be at most the checkpoint's max_position_embeddings ({positions})"
        raise LitLoraError(f"--train.max_seq_length ({asked}) {need}")
    return asked or positions


def samples_of(name: str, tokens: Tokens, limit: int, micro_batch_tokens: int | None) -> Samples:
    """Cut the examples of a split to the limit, and say what of them is lost."""
    samples = Samples(tokens, limit)
    if samples.cut:
        dropped = f", {samples.dropped} of them dropped: nothing of the response is left" if samples.dropped else ""
        say(f"{name}: {samples.cut} of {len(samples) + samples.dropped} examples are cut to {limit} tokens{dropped}")
    if not len(samples):
        fault = f"has no example with a response within --train.max_seq_length ({limit}): raise it"
        raise LitLoraError(f"{name} {fault}")
    longest = int(samples.lengths.max())
    if micro_batch_tokens is not None and micro_batch_tokens < longest:
        need = f"must be at least the longest example of {name} ({longest}): raise it, or cut the examples by"
        raise LitLoraError(f"--train.micro_batch_tokens ({micro_batch_tokens}) {need} --train.max_seq_length")
    return samples


def go_on(checkpoint: Checkpoint, start: Path | None, gpt: GPT, optimizer: Optimizer) -> Progress:
    """Put the adapter and the training state to where the checkpoint stands that the run starts from, if any."""
    if start is None:
        return Progress()
    load_matrices(gpt, start, checkpoint)
    return restore_state(start, optimizer)


def take_best(gpt: GPT, progress: Progress) -> float | None:
    """Put the best adapter in the place of the last one, if it is kept; return the validation loss of the result."""
    best = progress.best
    if not best.matrices:
        return progress.val_loss
    say(f"the best validation loss is that of step {best.step}: {best.loss:.4f}")
    with torch.no_grad():
        for name, parameter in lora_parameters(gpt).items():
            parameter.copy_(best.matrices[name])
    return best.loss


@dataclass(frozen=True)
class OneChoice(Sampler):
    """Has all ranks take the token that the first chooses: one that went another way would leave them waiting."""

    ranks: Ranks = field(kw_only=True)

    def choose(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose as the first rank does."""
        return self.ranks.broadcast(super().choose(logits))


def sample_answer(
    fabric: Fabric, gpt: GPT, tokenizer: Tokenizer, style: PromptStyle, example: Example, limit: int, sampler: Sampler
) -> str:
    """Return a question and the likeliest answer of at most `limit` tokens; nothing if the limit is 0."""
    if not limit:
        return ""
    turn = example.turns[0]
    prompt = style.prompt(turn.instruction, turn.input, example.system)
    ids = tokenizer.encode(prompt, style.add_special_tokens).ids
    with fabric.autocast():
        tokens = generate(gpt, ids, sampler, max_new_tokens=limit, stop_ids=tokenizer.stop_ids)
        question = " ".join(filter(None, (turn.instruction, turn.input)))
        return f"  {question}\n  -> {''.join(tokenizer.stream(ids, tokens))}"


def say_plan(run: Run) -> None:
    trainable, frozen = (count(run.gpt, trainable=kind) for kind in (True, False))
    tokens, devices = int(run.train.lengths.sum()), f"on {run.fabric.device}"
    if run.ranks.world_size > 1:
        how = "sharded over" if isinstance(run.gpt, FSDPModule) else "on each of"
        devices = f"{how} {run.ranks.world_size} devices, the first of them {run.fabric.device}"
    say(f"{trainable:,} trainable parameters over {frozen:,} frozen ones, {devices}")
    say(f"{len(run.train):,} examples with {tokens:,} tokens, {total_steps(len(run.train), run.args.train):,} steps")


def forecast(args: FinetuneLoraArgs, network: Network, train: Samples) -> str:
    """Say what a run would compute, and what parts its peak memory would have."""
    total = total_steps(len(train), args.train)
    devices = args.devices * args.num_nodes
    longest = longest_ahead(train, args, devices, 0)
    if args.strategy == "fsdp":
        network = replace(network, shards=devices)
    asked = 1 if network.shards > 1 else args.train.parallel_micro_batches
    together = at_once(longest, args.train, devices, network.backend.workers(asked, args.devices))
    load = load_of(longest, network, args.train.activation_checkpointing, together)
    outline = network.outline()
    counts = {
        "trainable parameters": count(outline, trainable=True),
        "frozen parameters": count(outline, trainable=False),
        "examples": len(train),
        "steps": total,
        "tokens": sum(int(train.lengths[order].sum()) for _, order in orders(len(train), args, after=0, total=total)),
        "tokens in the longest micro-batch": sum(len(sample.tokens) for sample in longest),
    }
    parts = breakdown(network, load, args.optimizer)
    if network.backend.counts_process_memory:
        parts["Python and torch"] = round(peak_memory_gb() * 1e9)  # of this process, which has loaded no weight
    return table(counts, parts)


def report(gpt: GPT, progress: Progress, val_loss: float | None) -> dict[str, Any]:
    """Return the content of report.json."""
    return {
        "train_loss": progress.train_loss,
        "val_loss": val_loss,
        "val_perplexity": perplexity(val_loss),
        "steps": progress.step,
        "supervised_tokens": progress.supervised_tokens,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "tokens_per_second": progress.tokens / progress.seconds,
        "peak_memory_gb": peak_memory_gb(),
        "trainable_parameters": count(gpt, trainable=True),
        "frozen_parameters": count(gpt, trainable=False),
        "versions": {package: version(package) for package in ("litlora", "torch", "bitsandbytes")},
    }


def perplexity(loss: float | None) -> float | None:
    """Return e to the power of a loss, or None where there is none or no float is as large."""
    return None if loss is None or loss > math.log(sys.float_info.max) else math.exp(loss)


def say(line: str) -> None:
    sys.stderr.write(line + "\n")
