"""The flags of the commands that load a checkpoint with adapters: generate, chat, evaluate and merge_lora."""

import math
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Literal

from litlora.args.common import CommandArgs, GGUFPath, Quantize, as_gguf, require, require_seed
from litlora.errors import LitLoraError

METRICS = {
    "loss": ("loss", "perplexity"),
    "exact_match": ("exact_match",),
    "rouge": ("rouge1", "rouge2", "rougeL"),
    "accuracy": ("accuracy", "weighted_f1"),
}
"""What --metrics can name, and the metrics that each reports."""
NO_PROMPT = "the prompt is empty: give one with --prompt or on standard input"


def require_adapters(args: "ModelArgs") -> None:
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


@dataclass(frozen=True)
class ModelArgs(CommandArgs):
    """Which model a command loads: a checkpoint, or adapters on it."""

    checkpoint_dir: Path | None = None
    """Folder of a checkpoint or of an adapter; with --adapters, of their base."""
    base_dir: Path | None = None
    """Folder of the adapter's base, by default the one in its adapter_config.json."""
    adapters: tuple[Path, ...] = ()
    """Folders of adapters on the same base, whose weighted sum is added to it."""
    adapter_weights: tuple[float, ...] = ()
    """Weight of each of --adapters, by default 1."""
    quantize: Quantize | Literal["none"] | None = None
    """Quantize the blocks of the base to 4 bits, or take the weights of this GGUF file; by default as the adapter was
    trained, else none."""

    def __post_init__(self) -> None:
        require_adapters(self)
        object.__setattr__(self, "quantize", as_gguf(self.quantize))


@dataclass(frozen=True)
class InferenceArgs(ModelArgs):
    """How a command computes with a model: the prompts that it expects, and the storage of its base."""

    prompt_style: str | None = None
    """alpaca, none, chat, or a text with {instruction}; by default the adapter's, else none."""
    prompt_style_variables: dict[str, Any] | None = None
    """Variables of the chat template, such as {"enable_thinking": false}; by default those of the training."""
    precision: Literal["bf16-true", "32-true"] | None = None
    """Precision of the base, by default that in which a QLoRA adapter was trained, else bf16-true."""


@dataclass(frozen=True)
class Sampling:
    """How long completions are, and how their tokens are chosen."""

    max_new_tokens: int = 50
    """Maximum number of tokens of the completion."""
    temperature: float = 0.8
    """Sampling temperature; 0 is greedy decoding."""
    top_k: int | None = 50
    """Sample from the k most likely tokens; null for all."""
    top_p: float = 1.0
    """Sample from the most likely tokens with this total probability."""
    seed: int = 1234
    """Random seed of sampling."""

    def __post_init__(self) -> None:
        require(self.max_new_tokens >= 1, "--max_new_tokens", self.max_new_tokens, "at least 1")
        require_seed(self.seed)
        require(self.temperature >= 0, "--temperature", self.temperature, "0 or more")
        require(self.top_k is None or self.top_k >= 1, "--top_k", self.top_k, "at least 1, or null for all")
        require(0 < self.top_p <= 1, "--top_p", self.top_p, "above 0 and at most 1")


SAMPLING = tuple(field.name for field in fields(Sampling))


@dataclass(frozen=True)
class GenerateArgs(Sampling, InferenceArgs):
    """Complete a prompt, or a file of prompts, with a checkpoint, or with an adapter on its base."""

    groups: ClassVar = {
        "prompts": ("prompt", "input", "system", "prompts", "out_file", "batch_size"),
        "sampling": (*SAMPLING, "num_samples"),
    }
    examples: ClassVar = (
        'litlora generate checkpoints/ORG/NAME --prompt "Once upon a time"',
        "litlora generate out/alpaca/final --prompts questions.jsonl --out_file answers.jsonl --temperature 0",
    )

    prompt: str | None = None
    """Prompt, by default read from standard input."""
    input: str = ""
    """Input of the instruction, for models that were trained with inputs."""
    system: str = ""
    """System message before the prompt; with --prompts, of the rows that have none."""
    prompts: Path | None = None
    """File of prompts, such as a .jsonl file of {"prompt": ...}, or rows of any data format."""
    out_file: Path | None = None
    """JSONL file for the rows of --prompts, each with its completion."""
    batch_size: int = 32
    """Prompts of --prompts that are completed at a time; fewer need less memory."""
    num_samples: int = 1
    """Number of completions of the prompt."""
    compile: bool = False
    """Compile the decoding step first, which takes seconds and needs a C++ compiler."""

    def __post_init__(self) -> None:
        InferenceArgs.__post_init__(self)
        Sampling.__post_init__(self)
        for name in ("num_samples", "batch_size"):
            require(getattr(self, name) >= 1, f"--{name}", getattr(self, name), "at least 1")
        if self.prompt == "":
            raise LitLoraError(NO_PROMPT)
        self._check_files()

    def _check_files(self) -> None:
        if (self.prompts is None) != (self.out_file is None):
            needed = "--prompts needs --out_file, for the completions"
            raise LitLoraError(needed if self.prompts else "--out_file is for the completions of --prompts: add these")
        others = {
            "prompt": self.prompt,
            "input": self.input,
            "num_samples": self.num_samples > 1,
            "compile": self.compile,
        }
        if self.prompts and (named := [f"--{name}" for name, value in others.items() if value]):
            raise LitLoraError(f"{named[0]} goes with one prompt, and --prompts with many: leave one of them out")


@dataclass(frozen=True)
class ChatArgs(Sampling, InferenceArgs):
    """Talk with a checkpoint, or with an adapter on its base, in a terminal."""

    groups: ClassVar = {"sampling": SAMPLING}
    examples: ClassVar = (
        "litlora chat checkpoints/ORG/NAME",
        'litlora chat out/alpaca/final --system "Answer in one sentence." --temperature 0',
    )

    max_new_tokens: int = 1024
    """Maximum number of tokens of an answer."""
    system: str = ""
    """System message at the beginning."""

    def __post_init__(self) -> None:
        InferenceArgs.__post_init__(self)
        Sampling.__post_init__(self)


@dataclass(frozen=True)
class MergeLoraArgs(ModelArgs):
    """Merge an adapter into its base and write the result as a checkpoint."""

    examples: ClassVar = (
        "litlora merge_lora out/alpaca/final --out_dir out/merged",
        "litlora merge_lora --adapters out/a/final,out/b/final --adapter_weights 0.7,0.3 --out_dir out/merged",
    )

    out_dir: Path = field(kw_only=True)
    """Output folder for the merged checkpoint."""
    checkpoint_dir: Path | None = None
    """Folder of the adapter; with --adapters, of their base."""
    quantize: GGUFPath | None = None
    """GGUF file over which the adapter was trained, by default the one that it names."""
    dequantized_base: bool = False
    """Merge into the dequantized 4-bit weights on which the adapter was trained."""
    verify: bool = True
    """Compare what the merged checkpoint computes with the receipt of the training, if there is one."""
    quiet: bool = False
    """Print warnings and errors only."""


@dataclass(frozen=True)
class EvaluateArgs(InferenceArgs):
    """Measure a checkpoint or an adapter on rows of data, with intervals, and compare it with another."""

    examples: ClassVar = (
        "litlora evaluate out/alpaca/final --data_dir data/alpaca --metrics loss,exact_match,rouge",
        "litlora evaluate out/claims/final --data_dir claims.jsonl --metrics accuracy --choices true,false",
    )

    data_dir: Path | None = None
    """Prepared data folder, or a .jsonl file of rows."""
    tasks: tuple[str, ...] = ()
    """Tasks of lm-eval instead of rows of data."""
    task_dir: Path | None = None
    """Folder with YAML files of tasks of your own."""
    num_fewshot: int | None = None
    """Examples before each question of a task, by default as many as the task says."""
    limit: int | None = None
    """Compute only this many questions of each task."""
    split: Literal["val", "train"] = "val"
    """Split of the data folder."""
    metrics: tuple[str, ...] = ("loss",)
    """What is measured: loss (with perplexity), exact_match, rouge, accuracy (with weighted F1)."""
    choices: tuple[str, ...] = ()
    """The possible answers, for accuracy: the model's is the likeliest. Each row's answer must be one of them."""
    baseline: Path | None = None
    """Folder of a checkpoint or an adapter that is measured on the same rows, for the differences."""
    fail_below: tuple[str, ...] = ()
    """Exit with code 1 if a metric is worse, such as exact_match=0.9: lower, or for loss and perplexity higher."""
    out_file: Path | None = None
    """JSON file for the metrics and what was measured for each row."""
    show: int = 0
    """Print this many rows with the expected answer and the model's."""
    max_new_tokens: int = 256
    """Maximum number of tokens of a completion."""
    max_seq_length: int | None = None
    """Number of tokens to which rows are cut for the loss, by default the checkpoint's positions."""
    seed: int = 1234
    """Random seed of the intervals."""
    quiet: bool = False
    """Print warnings and errors only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_source()
        require(bool(self.metrics), "--metrics", ",".join(self.metrics), f"some of {', '.join(METRICS)}")
        for name in self.metrics:
            require(name in METRICS, "--metrics", name, f"some of {', '.join(METRICS)}")
        self._check_choices()
        for name in ("max_new_tokens", "max_seq_length"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"--{name}", value, "at least 1")
        require(self.show >= 0, "--show", self.show, "0 or more")
        require_seed(self.seed)
        if self.show and set(self.metrics) == {"loss"}:
            raise LitLoraError("--show needs answers: add exact_match, rouge or accuracy to --metrics")
        _ = self.thresholds  # only a check

    def _check_source(self) -> None:
        if (self.data_dir is None) == (not self.tasks):
            fault = "leave one of --data_dir and --tasks out" if self.tasks else "missing --data_dir or --tasks"
            raise LitLoraError(fault, exit_code=2)
        for name, least in {"task_dir": None, "num_fewshot": 0, "limit": 1}.items():
            value = getattr(self, name)
            if value is not None and not self.tasks:
                raise LitLoraError(f"--{name} ({value}) needs --tasks: name the tasks there")
            require(value is None or least is None or value >= least, f"--{name}", value, f"at least {least}")
        if self.tasks and (self.baseline or self.choices or self.fail_below or self.show):
            raise LitLoraError("--baseline, --choices, --fail_below and --show go with --data_dir, not with --tasks")

    def _check_choices(self) -> None:
        if ("accuracy" in self.metrics) != bool(self.choices):
            needed = "--metrics accuracy needs --choices: name the answers" if not self.choices else None
            raise LitLoraError(needed or "--choices is for accuracy: add it to --metrics, or leave --choices out")
        shown = ",".join(self.choices)
        require(all(choice.strip() for choice in self.choices), "--choices", shown, "texts that are not empty")
        distinct = len({choice.strip() for choice in self.choices})
        require(distinct == len(self.choices) != 1, "--choices", shown, "two or more different answers")

    @property
    def reported(self) -> list[str]:
        """The names of the metrics that are reported."""
        return [name for metric in METRICS if metric in self.metrics for name in METRICS[metric]]

    @property
    def thresholds(self) -> dict[str, float]:
        """What --fail_below says, by the name of the metric."""
        found = {}
        for text in self.fail_below:
            name, _, value = text.partition("=")
            need = f"NAME=VALUE with one of the reported metrics ({', '.join(self.reported)}) and a number"
            require(name in self.reported and _is_number(value), "--fail_below", text, need)
            found[name] = float(value)
        return found


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
