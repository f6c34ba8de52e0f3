"""The flags of finetune_lora."""

import os
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

from litlora.args.common import GGUF, CommandArgs, GGUFPath, Quantize, Server, as_gguf, require, require_seed
from litlora.args.values import as_blocks, as_bytes, as_targets, require_numbers_by_expression
from litlora.errors import LitLoraError

Precision = Literal["bf16-true", "bf16-mixed", "32-true"]
Strategy = Literal["auto", "ddp", "fsdp"]
Logger = Literal["csv", "tensorboard", "wandb", "mlflow"]
Start = Literal["zero", "fisher", "pissa", "pissa_niter_4", "pissa_niter_16"]

AUTO: Literal["auto"] = "auto"
EXAMPLES = 4
"""Examples of a micro-batch where neither memory nor their tokens limit them."""
FORMER_DEFAULTS: dict[str, Any] = {
    "lora_r": 8,
    "lora_alpha": 16,
    "lora_key": False,
    "lora_projection": False,
    "lora_mlp": False,
    "train.learning_rate": 2e-4,
}
"""Lit-GPT's defaults, which an earlier version had: runs that began with them resume with them."""


@dataclass(frozen=True)
class TrainArgs:
    """How the training loop runs."""

    global_batch_size: int = 16
    """Examples per optimizer step, over all devices."""
    micro_batch_size: int | None = None
    """Maximum number of examples in one forward and backward pass, if any; a number of tokens takes its place."""
    micro_batch_tokens: int | Literal["auto"] | None = "auto"
    """Maximum number of tokens in one forward and backward pass, in which a longer example is alone; auto is the
    fastest that fits in memory, null has micro_batch_size examples instead, by default 4."""
    parallel_micro_batches: int = 2
    """Maximum number of micro-batches that run concurrently on CPU, each on its share of the cores; a GPU runs one."""
    epochs: int = 1
    """Passes over the training split."""
    max_steps: int | None = None
    """Stop after this many optimizer steps, even within an epoch."""
    max_time: float | None = None
    """Stop and save a resumable checkpoint after this many seconds."""
    max_seq_length: int | None = None
    """Maximum number of tokens of an example, by default the checkpoint's limit; longer examples are truncated."""
    learning_rate: float | Literal["auto"] = "auto"
    """Peak learning rate; auto follows from the checkpoint's hidden size, and the run records the number."""
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
    activation_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute block activations in the backward pass: slower, much less memory; auto is false unless a plan for
    the memory needs it."""

    def __post_init__(self) -> None:
        for name in ("global_batch_size", "parallel_micro_batches", "epochs", "save_interval", "log_interval"):
            require(getattr(self, name) >= 1, f"--train.{name}", getattr(self, name), "at least 1")
        for name in ("micro_batch_size", "micro_batch_tokens", "max_steps", "max_seq_length", "save_total_limit"):
            value = getattr(self, name)
            require(value in (None, AUTO) or value >= 1, f"--train.{name}", value, "at least 1, or null")
        time = self.max_time
        require(time is None or time > 0, "--train.max_time", time, "above 0, or null")
        steps = self.lr_warmup_steps
        require(steps is None or steps >= 0, "--train.lr_warmup_steps", steps, "0 or more, or null")
        fraction = self.lr_warmup_fraction
        require(0 <= fraction <= 1, "--train.lr_warmup_fraction", fraction, "between 0 and 1")
        rate = self.learning_rate
        require(rate == "auto" or rate > 0, "--train.learning_rate", rate, "above 0")
        in_range = 0 <= self.min_lr and (rate == "auto" or self.min_lr <= rate)
        require(in_range, "--train.min_lr", self.min_lr, f"between 0 and learning_rate ({rate})")
        norm = self.max_norm
        require(norm is None or norm > 0, "--train.max_norm", norm, "above 0, or null for no clipping")

    @property
    def is_planned(self) -> bool:
        """Whether memory decides the micro-batches."""
        return self.micro_batch_tokens == AUTO

    @property
    def token_limit(self) -> int | None:
        """The maximum number of tokens of a micro-batch, which auto is not before there is a plan."""
        if self.micro_batch_tokens == "auto":
            raise LitLoraError("--train.micro_batch_tokens (auto) needs a plan: give a number, or null")
        return self.micro_batch_tokens

    @property
    def example_limit(self) -> int:
        """The maximum number of examples of a micro-batch that has no maximum number of tokens."""
        return self.micro_batch_size or EXAMPLES

    @property
    def recomputes(self) -> bool:
        """Whether block activations are recomputed; where nothing is planned, only if that is requested."""
        return self.activation_checkpointing is True

    @property
    def peak_rate(self) -> float:
        """The peak learning rate as a number, which auto is not before the checkpoint is known."""
        if self.learning_rate == "auto":
            raise LitLoraError("--train.learning_rate (auto) needs a checkpoint: give a number")
        return self.learning_rate

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
    samples: int = 3
    """Rows of the validation split, from evaluate_example on, whose completions before and after report.html shows."""
    highest_losses: int = 20
    """Training rows that report.html lists for their high loss after training, which is measured on a random sample
    with a tenth as many tokens as were trained; 0 measures none."""
    keep_best: bool = False
    """Save the adapter with the best validation loss as the final one, instead of the last."""
    patience: int | None = None
    """Stop after this many validations in a row without improvement; null never stops early."""

    def __post_init__(self) -> None:
        require(self.interval >= 1, "--eval.interval", self.interval, "at least 1")
        for name in ("max_iters", "patience"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--eval.{name}", value, "at least 1, or null")
        for name in ("max_new_tokens", "evaluate_example", "samples", "highest_losses"):
            require(getattr(self, name) >= 0, f"--eval.{name}", getattr(self, name), "0 or more")


@dataclass(frozen=True)
class FinetuneLoraArgs(CommandArgs):
    """Fine-tune a checkpoint with LoRA."""

    groups: ClassVar = {
        "data": ("data_dir", "prompt_style", "prompt_style_variables", "mask_prompt"),
        "LoRA": ("init_adapter", "lora_*"),
        "quantization": ("precision", "quantize"),
        "training": ("train.*", "optimizer"),
        "evaluation": ("eval.*",),
        "devices": ("devices", "num_nodes", "strategy", "memory"),
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
    """Quantize the blocks of the base to 4 bits (QLoRA), bnb.nf4-dq with the scales; or train over the weights of this
    GGUF file as they are."""
    devices: int = 1
    """Devices per machine: GPUs, or processes on CPU."""
    num_nodes: int = 1
    """Number of machines; more than one need torchrun or srun."""
    strategy: Strategy = "auto"
    """ddp replicates the base on every device, fsdp shards it; auto chooses ddp if the base fits."""
    memory: str | None = None
    """Memory that the run may take on each device, such as 8GB or 7500MiB: micro-batches are the fastest that fit."""
    init_adapter: Path | None = None
    """Continue from this LoRA adapter of litlora or PEFT, with its ranks, scalings and layers, on its base."""
    lora_r: int = 16
    """Rank of the adapter's matrices."""
    lora_alpha: int = 32
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
    lora_key: bool = True
    """Adapt the attention's key projection."""
    lora_value: bool = True
    """Adapt the attention's value projection."""
    lora_projection: bool = True
    """Adapt the attention's output projection."""
    lora_mlp: bool = True
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
    logger_name: tuple[Logger, ...] = ("csv",)
    """Loggers of the metrics, such as tensorboard,wandb: csv, OUT_DIR/metrics.csv, is always written."""
    seed: int = 1337
    """Random seed of the adapter's initialization, the order of the examples and dropout."""
    resume: bool | Literal["auto"] | Path = False
    """Resume from out_dir's newest intact checkpoint (true), if there is one (auto), or from the one at this path."""
    overwrite: bool = False
    """Replace the run in out_dir; with --resume, replace only the final adapter of a finished run."""
    deploy: tuple[Server, ...] = ()
    """Servers that will load the adapter, such as vllm,llama.cpp: refuse settings that they do not support."""
    receipt: bool = True
    """Record what the trained network answers to three prompts, by which verify tells whether a copy is the same."""
    quiet: bool = False
    """Print warnings and errors only."""
    dry_run: bool = False
    """Print steps, tokens and estimated peak memory of the run, and exit without loading weights."""

    def __post_init__(self) -> None:
        self._take_texts_as_paths()
        object.__setattr__(self, "quantize", as_gguf(self.quantize))
        if isinstance(self.quantize, GGUFPath) and self.lora_init != "zero":
            fault = "changes the base, but that of --quantize"
            raise LitLoraError(
                f"--lora_init {self.lora_init} {fault} ({self.quantize}) stays as it is in the file: leave it out"
            )
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
        self._check_memory()
        self._check_lora()
        self._adopt_rate_of_optimizer()

    def _check_memory(self) -> None:
        """Have a budget decide the micro-batches; refuse one that is no size, or beside fixed micro-batches."""
        if self.memory is None:
            return
        require(as_bytes("--memory", self.memory) > 0, "--memory", self.memory, "above 0")
        if self.train.micro_batch_tokens not in (None, AUTO):
            fault = f"does not go with --train.micro_batch_tokens {self.train.micro_batch_tokens}"
            hint = "which fixes the micro-batches: leave one of them out"
            raise LitLoraError(f"--memory {self.memory} {fault}, {hint}")
        object.__setattr__(self, "train", replace(self.train, micro_batch_tokens=AUTO))

    @property
    def memory_bytes(self) -> int | None:
        """The bytes that --memory gives, if it is given."""
        return None if self.memory is None else as_bytes("--memory", self.memory)

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
            if shapes and value not in (setting.default, FORMER_DEFAULTS.get(setting.name, setting.default)):
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
            if os.path.realpath(self.out_dir) == os.path.realpath(getattr(self, name)):
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
    def gguf(self) -> Path | None:
        """The GGUF file that has the base's weights, if one has."""
        return self.quantize if isinstance(self.quantize, GGUFPath) else None

    @property
    def storage(self) -> str | None:
        """How the blocks of the base are stored: bnb.nf4, bnb.nf4-dq, gguf, or None in the run's precision."""
        return GGUF if isinstance(self.quantize, GGUFPath) else self.quantize

    @property
    def lora_switches(self) -> tuple[str, ...]:
        """The enabled switches among query, key, value, projection, mlp and head."""
        names = ("query", "key", "value", "projection", "mlp", "head")
        return tuple(name for name in names if getattr(self, f"lora_{name}"))
