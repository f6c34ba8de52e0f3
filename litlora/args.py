"""The flags and YAML keys of every command: type, default, help (the attribute docstrings) and validation."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from litlora.errors import LitLoraError

Precision = Literal["bf16-true", "bf16-mixed", "32-true"]
Quantize = Literal["bnb.nf4", "bnb.nf4-dq"]
Strategy = Literal["auto", "ddp", "fsdp"]
Start = Literal["zero", "fisher", "pissa", "pissa_niter_4", "pissa_niter_16"]


NO_PROMPT = "the prompt is empty: give one with --prompt or on standard input"
MASK = "**********"
LAYER_NAME = re.compile(r"[\w-]+(\.[\w-]+)*")
BLOCKS = re.compile(r"(\d{1,4})(?:-(\d{1,4}))?")
"""A block, or the first and last of some."""


class SecretStr:
    """A token, which shows itself in no message, log or file."""

    def __init__(self, value: str) -> None:
        self._value = value

    def get_secret_value(self) -> str:
        """Return the token itself."""
        return self._value

    def __repr__(self) -> str:
        return MASK


def require(condition: bool, flag: str, value: object, need: str) -> None:
    """Refuse a value of a flag unless a condition holds, and state what it must be."""
    if not condition:
        raise LitLoraError(f"{flag} ({value}) must be {need}")


def require_seed(seed: int) -> None:
    """Refuse a seed that torch's generators do not accept."""
    require(0 <= seed < 2**63, "--seed", seed, "0 or more, and below 2^63")


def require_token(token: SecretStr | None) -> None:
    """Refuse what --print_config prints in place of a token."""
    if token is not None and token.get_secret_value() == MASK:
        fault = "is printed in place of a token: give the token itself, or leave the setting out"
        raise LitLoraError(f"--access_token ({MASK}) {fault}", exit_code=2)


def is_expression(text: object) -> bool:
    """Tell whether a value is a regular expression, also as a part of another."""
    try:
        return isinstance(text, str) and bool(re.compile(f"({text})$"))
    except (re.error, OverflowError, RecursionError):
        return False


def require_numbers_by_expression(flag: str, pattern: Mapping[str, float] | None) -> None:
    """Refuse a pattern unless its keys are regular expressions and its values at least 1."""
    for key, number in (pattern or {}).items():
        require(is_expression(key), flag, key, "a mapping whose keys are layer names or regular expressions")
        require(number >= 1, f"{flag}, {key}", number, "at least 1")


def as_targets(targets: list[str] | str) -> list[str] | str:
    """Return layer names as a list, whose commas part them in a text; another text is a regular expression."""
    names = [name.strip() for name in (targets.split(",") if isinstance(targets, str) else targets)]
    if "all_linear" in names:
        raise LitLoraError("--lora_targets (all_linear) names no layer: did you mean all-linear?")
    if names and all(map(LAYER_NAME.fullmatch, names)):
        return names
    is_text = isinstance(targets, str) and is_expression(targets)
    require(is_text, "--lora_targets", targets, "layer names, such as q_proj,down_proj, or a regular expression")
    return targets


def as_blocks(blocks: list[int] | int | str) -> list[int]:
    """Return the numbers of blocks that a text such as 0,2,8-15 gives."""
    texts = blocks.split(",") if isinstance(blocks, str) else blocks if isinstance(blocks, list) else [blocks]
    ranges = [BLOCKS.fullmatch(str(text).strip()) for text in texts]
    numbers = [range(int(found[1]), int(found[2] or found[1]) + 1) for found in ranges if found]
    is_right = bool(ranges) and len(numbers) == len(ranges) and all(numbers)
    require(is_right, "--lora_layers", blocks, "blocks, such as 8-15 or 0,2,5")
    return sorted({number for some in numbers for number in some})


def require_adapters(args: "GenerateArgs | MergeLoraArgs") -> None:
    """Refuse a command that names neither checkpoint nor adapters, or weights that do not go with its adapters."""
    adapters, weights = args.adapters, args.adapter_weights
    if args.checkpoint_dir is None and not adapters:
        raise LitLoraError("missing --checkpoint_dir or --adapters", exit_code=2)
    if args.checkpoint_dir and args.base_dir and adapters:
        raise LitLoraError("--checkpoint_dir and --base_dir both name the base of --adapters: leave one of them out")
    shown = ",".join(map(str, weights))
    if weights and not adapters:
        raise LitLoraError(f"--adapter_weights ({shown}) needs --adapters: name the adapters there")
    if weights and len(weights) != len(adapters):
        need = f"must have one weight for each of --adapters ({len(adapters)})"
        raise LitLoraError(f"--adapter_weights ({shown}) {need}, or be left out for 1 each")
    require(all(map(math.isfinite, weights)), "--adapter_weights", shown, "finite numbers")
    if weights and not any(weights):
        raise LitLoraError(f"--adapter_weights ({shown}) leaves the base alone: give a weight other than 0")


def plain(value: Any) -> Any:
    """Turn nested dataclasses and paths into what YAML holds."""
    if is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    return str(value) if isinstance(value, Path) else value


@dataclass(frozen=True)
class CommandArgs:
    """What --help shows beside the summary and the flags of a command."""

    groups: ClassVar[dict[str, tuple[str, ...]]] = {}
    """Titles of groups of flags, and patterns of the names in each."""
    examples: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True)
class TrainArgs:
    """How the training loop runs."""

    global_batch_size: int = 16
    """Examples per optimizer step, over all devices."""
    micro_batch_size: int = 4
    """Maximum number of examples in one forward and backward pass; unused with micro_batch_tokens."""
    micro_batch_tokens: int | None = None
    """Maximum number of tokens in one forward and backward pass; null limits the examples by micro_batch_size."""
    parallel_micro_batches: int = 2
    """Micro-batches that run concurrently on CPU, each on its share of the cores; a GPU runs one."""
    epochs: int = 1
    """Passes over the training split."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, even within an epoch."""
    max_time: float | None = None
    """Stop and save a resumable checkpoint after this many seconds."""
    max_seq_length: int | None = None
    """Maximum number of tokens of an example, by default the checkpoint's limit; longer examples are truncated."""
    learning_rate: float = 2e-4
    """Peak learning rate."""
    lr_warmup_steps: int | None = None
    """Warmup steps; overrides lr_warmup_fraction."""
    lr_warmup_fraction: float = 0.05
    """Share of all steps that are warmup steps, in which the learning rate rises linearly to its peak."""
    min_lr: float = 0.0
    """Final learning rate of the cosine schedule."""
    max_norm: float | None = 1.0
    """Clip the gradient norm at this value; null for no clipping."""
    save_interval: int = 1000
    """Save a resumable checkpoint every this many steps."""
    save_total_limit: int | None = None
    """Retain this many of the newest checkpoints, and the one with the best validation loss; null retains all."""
    log_interval: int = 1
    """Write a row of metrics.csv every this many steps."""
    activation_checkpointing: bool = False
    """Recompute block activations in the backward pass: slower, much less memory."""

    def __post_init__(self) -> None:
        for name in (
            "global_batch_size", "micro_batch_size", "parallel_micro_batches",
            "epochs", "save_interval", "log_interval",
        ):  # fmt: skip
            require(getattr(self, name) >= 1, f"--train.{name}", getattr(self, name), "at least 1")
        for name in ("micro_batch_tokens", "max_steps", "max_seq_length", "save_total_limit"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--train.{name}", value, "at least 1, or null")
        time = self.max_time
        require(time is None or time > 0, "--train.max_time", time, "above 0, or null")
        steps = self.lr_warmup_steps
        require(steps is None or steps >= 0, "--train.lr_warmup_steps", steps, "0 or more, or null")
        fraction = self.lr_warmup_fraction
        require(0 <= fraction <= 1, "--train.lr_warmup_fraction", fraction, "between 0 and 1")
        require(self.learning_rate > 0, "--train.learning_rate", self.learning_rate, "above 0")
        in_range = 0 <= self.min_lr <= self.learning_rate
        require(in_range, "--train.min_lr", self.min_lr, f"between 0 and learning_rate ({self.learning_rate})")
        norm = self.max_norm
        require(norm is None or norm > 0, "--train.max_norm", norm, "above 0, or null for no clipping")

    def sequence_limit(self, positions: int) -> int:
        """Return the maximum number of tokens of an example, given the checkpoint's number of positions."""
        most = self.max_seq_length or positions
        need = f"at most the checkpoint's number of positions ({positions})"
        require(most <= positions, "--train.max_seq_length", most, need)
        return most


@dataclass(frozen=True)
class EvalArgs:
    """When and on what the model is validated."""

    interval: int = 100
    """Validate every this many steps."""
    max_iters: int | None = None
    """Maximum number of micro-batches of a validation; null for the whole split."""
    max_new_tokens: int = 100
    """Maximum number of tokens of the sample completion printed at each validation; 0 for none."""
    initial_validation: bool = True
    """Validate before the first step."""
    final_validation: bool = True
    """Validate after the last step."""
    evaluate_example: int = 0
    """Row of the validation split whose prompt is completed, counted from 0."""
    keep_best: bool = False
    """Save the adapter with the best validation loss as the final one, instead of the last."""
    patience: int | None = None
    """Stop after this many validations in a row without improvement; null never stops early."""

    def __post_init__(self) -> None:
        require(self.interval >= 1, "--eval.interval", self.interval, "at least 1")
        for name in ("max_iters", "patience"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--eval.{name}", value, "at least 1, or null")
        for name in ("max_new_tokens", "evaluate_example"):
            require(getattr(self, name) >= 0, f"--eval.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class DownloadArgs(CommandArgs):
    """Download a checkpoint from the Hugging Face Hub."""

    examples: ClassVar = (
        "litlora download meta-llama/Llama-3.2-1B",
        "litlora download mistralai/Mistral-7B-v0.3 --checkpoint_root /data/checkpoints",
    )

    repo_id: str
    """Repository on the Hub."""
    revision: str = "main"
    """Branch, tag or commit of the repository."""
    checkpoint_root: Path = Path("checkpoints")
    """Parent folder: the checkpoint is saved as CHECKPOINT_ROOT/ORG/NAME."""
    access_token: SecretStr | None = None
    """Hub token for gated or private repositories; by default the environment's HF_TOKEN."""
    tokenizer_only: bool = False
    """Download the tokenizer and configuration without the weights."""

    def __post_init__(self) -> None:
        require_token(self.access_token)


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


@dataclass(frozen=True)
class PrepareArgs(CommandArgs):
    """The settings that all prepare commands share."""

    destination_path: Path
    """Output folder for train.jsonl, val.jsonl and dataset.json."""
    source: str | list[str]
    """File, http(s) URL, or data set ORG/NAME of the Hub; several with weights, such as a.jsonl=0.7, are mixed."""
    val_split_fraction: float
    """Share of the rows in the validation split; unused with val_source."""
    val_source: str | list[str] | None = None
    """Source of the validation split, whose rows are not those of --source."""
    deduplicate: bool = False
    """Leave out rows that repeat another, and keep those that differ in case and punctuation only on one side."""
    seed: int = 42
    """Random seed of the split and of the mixture."""
    encoding: str | None = None
    """Encoding of the files, such as cp1252, by default UTF-8; UTF-16 and UTF-32 are recognized."""
    split: str = "train"
    """Split of a data set on the Hub."""
    subset: str | None = None
    """Subset of a data set on the Hub, by default the one that its card names as default."""
    access_token: SecretStr | None = None
    """Hub token for gated or private data sets; by default the environment's HF_TOKEN."""

    @property
    def sources(self) -> list[str]:
        """The sources as a list."""
        return _as_list(self.source)

    @property
    def val_sources(self) -> list[str]:
        """The sources of the validation split as a list."""
        return _as_list(self.val_source or [])

    def __post_init__(self) -> None:
        require_seed(self.seed)
        require_token(self.access_token)
        require(bool(self.sources), "--source", self.source, "a file, an http(s) address, or ORG/NAME of the Hub")
        fraction = self.val_split_fraction
        require(0 < fraction < 1, "--val_split_fraction", fraction, "between 0 and 1, both exclusive")


@dataclass(frozen=True)
class PrepareAlpacaArgs(PrepareArgs):
    """Prepare the cleaned Alpaca archive, or another file with its keys, for fine-tuning."""

    examples: ClassVar = (
        "litlora prepare_alpaca",
        "litlora prepare_alpaca --source rows.json --destination_path data/rows",
    )

    destination_path: Path = Path("data/alpaca")
    source: str | list[str] = (
        "https://raw.githubusercontent.com/tloen/alpaca-lora/main/alpaca_data_cleaned_archive.json"
    )
    val_split_fraction: float = 0.03865  # 2,000 of the archive's 51,759 rows, as in Lit-GPT


@dataclass(frozen=True)
class PrepareLimaArgs(PrepareArgs):
    """Prepare LIMA, or another file in its format, for fine-tuning."""

    examples: ClassVar = (
        "litlora prepare_lima",
        "litlora prepare_lima --include_multiturn_conversations true",
    )

    destination_path: Path = Path("data/lima")
    source: str | list[str] = "GAIR/lima"
    val_split_fraction: float = 0.1
    include_multiturn_conversations: bool = False
    """Include all turns of a conversation instead of the first turn."""


@dataclass(frozen=True)
class PrepareJsonArgs(PrepareArgs):
    """Prepare a JSON, JSONL, CSV, TSV or Parquet file of your own for fine-tuning."""

    examples: ClassVar = (
        "litlora prepare_json --source rows.csv --destination_path data/rows",
        "litlora prepare_json --source rows.csv --destination_path data/rows --columns instruction=Q,output=A",
    )

    destination_path: Path
    source: str | list[str]
    val_split_fraction: float = 0.1
    columns: str | None = None
    """Which columns are which key: instruction=Frage,output=Antwort; also for input, system, text, messages, ..."""

    def column_names(self) -> dict[str, str]:
        """Return the columns by the keys that they stand for."""
        pairs = [pair.partition("=") for pair in (self.columns or "").split(",") if pair.strip()]
        is_right = all(name.strip() and column.strip() for name, _, column in pairs)
        require(is_right, "--columns", self.columns, "pairs such as instruction=Frage,output=Antwort")
        return {name.strip(): column.strip() for name, _, column in pairs}


@dataclass(frozen=True)
class CheckDataArgs(CommandArgs):
    """Check prepared data for what would teach the wrong thing, and show what is learned."""

    examples: ClassVar = (
        "litlora check_data checkpoints/ORG/NAME --data_dir data/alpaca",
        "litlora check_data checkpoints/ORG/NAME --data_dir data/alpaca --show 3 --strict true",
    )

    checkpoint_dir: Path
    """Folder of the base model: its tokenizer files and config.json, without weights if need be."""
    data_dir: Path
    """Folder with train.jsonl and val.jsonl, written by a prepare command."""
    prompt_style: str = "auto"
    """As in finetune_lora."""
    prompt_style_variables: dict[str, Any] | None = None
    """As in finetune_lora."""
    mask_prompt: bool = True
    """As in finetune_lora."""
    max_seq_length: int | None = None
    """Maximum number of tokens of an example, by default the checkpoint's limit."""
    show: int = 0
    """Print this many rows of the training split as they are learned, supervised tokens marked."""
    tokens: bool = False
    """Print the rows of --show with a token in each cell."""
    strict: bool = False
    """Treat warnings as errors."""

    def __post_init__(self) -> None:
        require(self.show >= 0, "--show", self.show, "0 or more")
        length = self.max_seq_length
        require(length is None or length >= 1, "--max_seq_length", length, "at least 1, or null")


@dataclass(frozen=True)
class FinetuneLoraArgs(CommandArgs):
    """Fine-tune a checkpoint with LoRA."""

    groups: ClassVar = {
        "data": ("data_dir", "prompt_style", "prompt_style_variables", "mask_prompt"),
        "LoRA": ("init_adapter", "lora_*"),
        "quantization": ("precision", "quantize"),
        "training": ("train.*", "optimizer"),
        "evaluation": ("eval.*",),
        "devices": ("devices", "num_nodes", "strategy"),
        "run": ("*",),
    }
    examples: ClassVar = (
        "litlora finetune_lora checkpoints/ORG/NAME --data_dir data/alpaca --out_dir out/alpaca",
        "litlora finetune_lora checkpoints/ORG/NAME --data_dir data/alpaca --quantize bnb.nf4 --train.epochs 3",
    )

    checkpoint_dir: Path
    """Folder of the base model in Hub format: config.json, *.safetensors and tokenizer files."""
    data_dir: Path
    """Folder with train.jsonl and val.jsonl, written by a prepare command."""
    out_dir: Path = Path("out/finetune_lora")
    """Output folder for metrics, checkpoints and the final adapter."""
    precision: Precision = "bf16-true"
    """Precision of the base and of its computation; the adapter's weights are always float32."""
    quantize: Quantize | None = None
    """Quantize the blocks of the base to 4 bits (QLoRA); bnb.nf4-dq quantizes the scales as well."""
    devices: int = 1
    """Devices per machine: GPUs, or processes on CPU."""
    num_nodes: int = 1
    """Number of machines; more than one need torchrun or srun."""
    strategy: Strategy = "auto"
    """ddp replicates the base on every device, fsdp shards it; auto chooses ddp if the base fits."""
    init_adapter: Path | None = None
    """Continue from this LoRA adapter of litlora or PEFT, with its ranks, scalings and layers, on its base."""
    lora_r: int = 8
    """Rank of the adapter's matrices."""
    lora_alpha: int = 16
    """Scaling: the adapter's output is multiplied by lora_alpha / lora_r."""
    lora_use_rslora: bool = False
    """Scale by lora_alpha / sqrt(lora_r) instead, so that high ranks learn as fast as low ones (rsLoRA)."""
    lora_dropout: float = 0.05
    """Dropout probability of the adapter's inputs."""
    lora_init: Start = "zero"
    """Start of the adapter: zero leaves the base unchanged, fisher compensates for the error of --quantize, pissa takes
    the leading singular vectors out of the weights; pissa_niter_N finds them approximately, and far faster."""
    lora_use_dora: bool = False
    """Train the magnitudes of the adapted weights apart from their directions (DoRA): slower, better at low rank."""
    lora_plus_ratio: float = 1.0
    """Learning rate of B as a multiple of that of A, such as 16 (LoRA+); A has --train.learning_rate."""
    lora_rank_pattern: dict[str, int] | None = None
    """Ranks of layers for which lora_r is not right, by last parts of names or regular expressions: {down_proj: 16}."""
    lora_alpha_pattern: dict[str, float] | None = None
    """The same for lora_alpha."""
    lora_layers: list[int] | int | str | None = None
    """Blocks to adapt, counted from 0, such as 8-15 or 0,2,5; by default all."""
    lora_targets: list[str] | str | None = None
    """Layers to adapt whatever the switches are: names such as q_proj,down_proj, or an expression for whole names."""
    lora_query: bool = True
    """Adapt the attention's query projection."""
    lora_key: bool = False
    """Adapt the attention's key projection."""
    lora_value: bool = True
    """Adapt the attention's value projection."""
    lora_projection: bool = False
    """Adapt the attention's output projection."""
    lora_mlp: bool = False
    """Adapt the three projections of the MLP."""
    lora_head: bool = False
    """Adapt the output head."""
    mask_prompt: bool = True
    """Exclude prompts from the loss; false supervises them as well."""
    prompt_style: str = "auto"
    """alpaca, none, chat (the checkpoint's own template), a text with {instruction} and {input}, or auto: chat for
    conversations if the checkpoint has a template, else alpaca."""
    prompt_style_variables: dict[str, Any] | None = None
    """Variables of the chat template, such as {"enable_thinking": false}."""
    train: TrainArgs = field(default_factory=TrainArgs)
    eval: EvalArgs = field(default_factory=EvalArgs)
    optimizer: dict[str, Any] | str = "AdamW"
    """Name of a torch optimizer, or its class_path and init_args."""
    logger_name: Literal["csv"] = "csv"
    """Logger of the metrics: csv writes OUT_DIR/metrics.csv."""
    seed: int = 1337
    """Random seed of the adapter's initialization, the order of the examples and dropout."""
    resume: bool | Literal["auto"] | Path = False
    """Resume from out_dir's newest intact checkpoint (true), if there is one (auto), or from the one at this path."""
    overwrite: bool = False
    """Replace the run in out_dir; with --resume, replace only the final adapter of a finished run."""
    dry_run: bool = False
    """Print steps, tokens and estimated peak memory of the run, and exit without loading weights."""

    def __post_init__(self) -> None:
        self._take_texts_as_paths()
        self._keep_inputs_apart_from_outputs()
        if self.quantize and self.precision == "bf16-mixed":
            hint = "choose bf16-true or 32-true, in which the adapter is float32 as well"
            raise LitLoraError(f"--quantize {self.quantize} does not go with --precision bf16-mixed: {hint}")
        if self.lora_init == "fisher" and not self.quantize and self.init_adapter is None:
            hint = "give --quantize as well, or leave it out"
            raise LitLoraError(f"--lora_init fisher compensates for the error of --quantize, which is not set: {hint}")
        for name in ("devices", "num_nodes"):
            require(getattr(self, name) >= 1, f"--{name}", getattr(self, name), "at least 1")
        require_seed(self.seed)
        self._check_lora()
        self._adopt_rate_of_optimizer()

    def _check_lora(self) -> None:
        if self.init_adapter is not None:
            self._leave_shape_to_adapter()
        require(self.lora_r >= 1, "--lora_r", self.lora_r, "at least 1")
        require(self.lora_alpha >= 1, "--lora_alpha", self.lora_alpha, "at least 1")
        require(0 <= self.lora_dropout < 1, "--lora_dropout", self.lora_dropout, "at least 0 and below 1")
        require(self.lora_plus_ratio >= 1, "--lora_plus_ratio", self.lora_plus_ratio, "at least 1")
        require_numbers_by_expression("--lora_rank_pattern", self.lora_rank_pattern)
        require_numbers_by_expression("--lora_alpha_pattern", self.lora_alpha_pattern)
        if self.lora_layers is not None:
            object.__setattr__(self, "lora_layers", as_blocks(self.lora_layers))
        if self.lora_targets is not None:
            object.__setattr__(self, "lora_targets", as_targets(self.lora_targets))
            if isinstance(self.lora_targets, str) and self.lora_layers is not None:
                hint = "choose the blocks in it"
                raise LitLoraError(f"--lora_layers does not go with the regular expression in --lora_targets: {hint}")
        elif not self.lora_switches:
            raise LitLoraError(
                "nothing would be trained: set at least one of --lora_query, --lora_key, "
                "--lora_value, --lora_projection, --lora_mlp and --lora_head to true"
            )

    def _leave_shape_to_adapter(self) -> None:
        """Refuse what --init_adapter decides; a flag at its default cannot be told from one that is not given."""
        for setting in fields(self):
            value = getattr(self, setting.name)
            shapes = setting.name.startswith("lora_") and setting.name not in ("lora_dropout", "lora_plus_ratio")
            if shapes and value != setting.default:
                fault = f"--{setting.name} ({value}) is for a new adapter, but --init_adapter brings its own"
                raise LitLoraError(f"{fault}: leave one of them out")

    def _take_texts_as_paths(self) -> None:
        """Accept from Python what the command line accepts: a folder as a text."""
        for name in ("checkpoint_dir", "data_dir", "out_dir", "init_adapter", "resume"):
            value = getattr(self, name)
            if isinstance(value, str) and (name, value) != ("resume", "auto"):
                object.__setattr__(self, name, Path(value))

    def _keep_inputs_apart_from_outputs(self) -> None:
        for name in ("checkpoint_dir", "data_dir"):
            if self.out_dir.absolute() == getattr(self, name).absolute():
                raise LitLoraError(f"--out_dir ({self.out_dir}) is --{name} as well: choose another")

    def _adopt_rate_of_optimizer(self) -> None:
        """Take the optimizer's init_args.lr, where Lit-GPT has the rate, as train.learning_rate."""
        optimizer = self.optimizer if isinstance(self.optimizer, dict) else {}
        init_args = optimizer.get("init_args")
        if not isinstance(init_args, dict) or "lr" not in init_args:
            return
        rate = init_args["lr"]
        is_number = isinstance(rate, int | float) and not isinstance(rate, bool)
        require(is_number, "--optimizer.init_args.lr", rate, "a number")
        if self.train.learning_rate not in (TrainArgs.learning_rate, rate):
            raise LitLoraError(
                f"--train.learning_rate ({self.train.learning_rate}) and --optimizer.init_args.lr ({rate}) "
                "are the same setting: give one of them"
            )
        others = {key: value for key, value in init_args.items() if key != "lr"}
        object.__setattr__(self, "train", replace(self.train, learning_rate=rate))
        object.__setattr__(self, "optimizer", {**optimizer, "init_args": others})

    def check_model(self, hidden_size: int, positions: int) -> int:
        """Refuse a rank or a length beyond the base's, and return the maximum number of tokens of an example."""
        # Every adapted layer reads or writes the residual stream: a higher rank than its width adds nothing.
        need = f"at most the checkpoint's hidden_size ({hidden_size}): a higher rank adds nothing"
        others = {f"--lora_rank_pattern, {key}": rank for key, rank in (self.lora_rank_pattern or {}).items()}
        for name, rank in {"--lora_r": self.lora_r, **others}.items():
            require(rank <= hidden_size, name, rank, need)
        return self.train.sequence_limit(positions)

    @property
    def lora_switches(self) -> tuple[str, ...]:
        """The enabled switches among query, key, value, projection, mlp and head."""
        names = ("query", "key", "value", "projection", "mlp", "head")
        return tuple(name for name in names if getattr(self, f"lora_{name}"))


@dataclass(frozen=True)
class GenerateArgs(CommandArgs):
    """Complete a prompt with a checkpoint, or with an adapter on its base."""

    examples: ClassVar = (
        'litlora generate checkpoints/ORG/NAME --prompt "Once upon a time"',
        'litlora generate out/alpaca/final --prompt "Name three primary colors." --temperature 0',
    )

    checkpoint_dir: Path | None = None
    """Folder of a checkpoint or of an adapter; with --adapters, of their base."""
    prompt: str | None = None
    """Prompt, by default read from standard input."""
    max_new_tokens: int = 50
    """Maximum number of tokens of the completion."""
    temperature: float = 0.8
    """Sampling temperature; 0 is greedy decoding."""
    top_k: int | None = 50
    """Sample from the k most likely tokens; null for all."""
    top_p: float = 1.0
    """Sample from the most likely tokens with this total probability."""
    num_samples: int = 1
    """Number of completions."""
    seed: int = 1234
    """Random seed of sampling."""
    input: str = ""
    """Input of the instruction, for models that were trained with inputs."""
    system: str = ""
    """System message before the prompt."""
    prompt_style: str | None = None
    """alpaca, none, chat, or a text with {instruction}; by default the adapter's, else none."""
    prompt_style_variables: dict[str, Any] | None = None
    """Variables of the chat template, such as {"enable_thinking": false}; by default those of the training."""
    base_dir: Path | None = None
    """Folder of the adapter's base, by default the one in its adapter_config.json."""
    adapters: tuple[Path, ...] = ()
    """Folders of adapters on the same base, whose weighted sum is added to it."""
    adapter_weights: tuple[float, ...] = ()
    """Weight of each of --adapters, by default 1."""
    precision: Literal["bf16-true", "32-true"] | None = None
    """Precision of the base, by default that in which a QLoRA adapter was trained, else bf16-true."""
    quantize: Quantize | Literal["none"] | None = None
    """Quantize the blocks of the base to 4 bits; by default as the adapter was trained, else none."""
    compile: bool = False
    """Compile the decoding step first, which takes seconds and needs a C++ compiler."""

    def __post_init__(self) -> None:
        require_adapters(self)
        for name in ("max_new_tokens", "num_samples"):
            require(getattr(self, name) >= 1, f"--{name}", getattr(self, name), "at least 1")
        if self.prompt == "":
            raise LitLoraError(NO_PROMPT)
        require_seed(self.seed)
        require(self.temperature >= 0, "--temperature", self.temperature, "0 or more")
        require(self.top_k is None or self.top_k >= 1, "--top_k", self.top_k, "at least 1, or null for all")
        require(0 < self.top_p <= 1, "--top_p", self.top_p, "above 0 and at most 1")


@dataclass(frozen=True)
class MergeLoraArgs(CommandArgs):
    """Merge an adapter into its base and write the result as a checkpoint."""

    examples: ClassVar = (
        "litlora merge_lora out/alpaca/final --out_dir out/merged",
        "litlora merge_lora --adapters out/a/final,out/b/final --adapter_weights 0.7,0.3 --out_dir out/merged",
    )

    out_dir: Path
    """Output folder for the merged checkpoint."""
    checkpoint_dir: Path | None = None
    """Folder of the adapter; with --adapters, of their base."""
    base_dir: Path | None = None
    """Folder of the base, by default the one in adapter_config.json."""
    adapters: tuple[Path, ...] = ()
    """Folders of adapters on the same base, whose weighted sum is merged into it."""
    adapter_weights: tuple[float, ...] = ()
    """Weight of each of --adapters, by default 1."""
    dequantized_base: bool = False
    """Merge into the dequantized 4-bit weights on which the adapter was trained."""

    def __post_init__(self) -> None:
        require_adapters(self)


COMMANDS: dict[str, type[CommandArgs]] = {
    "download": DownloadArgs,
    "prepare_alpaca": PrepareAlpacaArgs,
    "prepare_lima": PrepareLimaArgs,
    "prepare_json": PrepareJsonArgs,
    "check_data": CheckDataArgs,
    "finetune_lora": FinetuneLoraArgs,
    "generate": GenerateArgs,
    "merge_lora": MergeLoraArgs,
}
