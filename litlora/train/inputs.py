"""What a run reads: the base, its tokenizer, the settings that follow from them, and the splits as samples."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from litlora.args.finetune import FinetuneLoraArgs
from litlora.data.batching import Samples
from litlora.data.checks.findings import Finding, Severity
from litlora.data.checks.splits import CheckedData, CheckedSplit, refuse_errors, run_checks
from litlora.data.dataset import choose_prompt_style, read_example, read_some_examples
from litlora.data.examples import Example
from litlora.data.prompts.styles import AUTO, PromptStyle, StyleSettings
from litlora.data.row_sources import RowSources, read_row_sources
from litlora.data.split_encoder import SplitEncoder
from litlora.data.token_cache import Split, find_split, open_splits, peek_splits
from litlora.data.tokenizer import Tokenizer
from litlora.data.tokens import Tokens
from litlora.distributed.process_group import Ranks
from litlora.errors import LitLoraError
from litlora.export.server_limits import log_notes, refuse_faults, server_limits
from litlora.lora.adapter_folder import CONFIG, WEIGHTS, read_prompt_style, refuse_adapter
from litlora.lora.config import LoRAConfig
from litlora.models.checkpoint import Checkpoint
from litlora.models.checkpoint_files import CheckpointFiles
from litlora.models.config import GPTConfig
from litlora.models.weights import fingerprint
from litlora.nn.nf4 import import_bitsandbytes
from litlora.train.changes import Open, explanations
from litlora.train.init_adapter import continued_adapter
from litlora.train.logger_names import check_loggers
from litlora.train.lora_flags import new_adapter
from litlora.train.optimizers import check_optimizer
from litlora.train.report import counts_of
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
    split_content,
)
from litlora.train.run_dir import ReadOnlyRunFolder, RunFolder
from litlora.train.settled import former_defaults, settle
from litlora.utils.console import log, warn
from litlora.utils.files import refuse_foreign_link


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
    limits = server_limits(args, lora, checkpoint.hub_config, checkpoint.config)
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


def samples_of(name: str, tokens: Tokens, limit: int) -> Samples:
    """Cut the examples of a split to the limit."""
    samples = Samples(tokens, limit)
    if not len(samples):
        fault = f"has no example with a response within --train.max_seq_length ({limit}): raise it"
        raise LitLoraError(f"{name} {fault}")
    return samples
