"""The flags of sweep."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from litlora.args.common import CommandArgs, require, require_seed


@dataclass(frozen=True)
class SweepArgs(CommandArgs):
    """Train with many settings, several seeds each, and compare their validation losses."""

    groups: ClassVar = {
        "runs": ("data_dir", "out_dir", "base", "evaluate"),
        "search": ("search", "method", "seeds", "trials", "pruner"),
        "processes": ("workers",),
    }
    examples: ClassVar = (
        "litlora sweep checkpoints/ORG/NAME --config config_hub/experiments/layers.yaml --data_dir data/alpaca",
        "litlora sweep checkpoints/ORG/NAME --data_dir data/alpaca --search '{lora_r: [8, 16]}' --seeds 1,2,3",
    )

    checkpoint_dir: Path | None = None
    """Folder of the base model, in place of the one in base."""
    data_dir: Path | None = None
    """Prepared data folder, in place of the one in base."""
    out_dir: Path = Path("out/sweep")
    """Output folder for the study, a folder for each trial, and sweep.html."""
    base: dict[str, Any] | None = None
    """Settings of finetune_lora that all trials share; {config: FILE.yaml} takes those of a file."""
    search: dict[str, Any] = field(kw_only=True)
    """What varies: flags of finetune_lora, each with a list of values, {low, high} or {times: FLAG, values: [...]}, or
    a name with alternatives, each of which has settings of its own."""
    method: Literal["grid", "random", "tpe"] = "grid"
    """grid trains all combinations; random draws some; tpe draws where earlier ones were good."""
    seeds: tuple[int, ...] = (1337,)
    """Seeds with which each combination is trained, a trial for each."""
    trials: int = 20
    """Number of combinations that random and tpe draw."""
    pruner: Literal["median", "halving"] | None = None
    """Stop a trial whose validation loss is above the median of the others at that step, or by successive halving."""
    evaluate: dict[str, Any] | None = None
    """Flags of evaluate, such as {metrics: exact_match, max_new_tokens: 16}, which measures each trained adapter."""
    workers: int = 1
    """Trials that run concurrently, each in a process of its own."""

    def __post_init__(self) -> None:
        require(bool(self.search), "--search", "{}", "a mapping, such as {lora_r: [8, 16]}")
        require(bool(self.seeds), "--seeds", "", "at least one number")
        require(len(set(self.seeds)) == len(self.seeds), "--seeds", self._seeds, "different numbers")
        for seed in self.seeds:
            require_seed(seed)
        for name in ("trials", "workers"):
            require(getattr(self, name) >= 1, f"--{name}", getattr(self, name), "at least 1")

    @property
    def _seeds(self) -> str:
        return ",".join(map(str, self.seeds))
