"""The configuration of an adapter, with PEFT's names."""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from typing import Any, TypeVar

from litlora.errors import LitLoraError
from litlora.models.checkpoint_files import first_three
from litlora.utils.limited_process import LimitedProcess

Number = TypeVar("Number", int, float)


# Which layers each --lora_* switch adapts, by the last part of their names.
TARGET_MODULES: dict[str, tuple[str, ...]] = {
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "projection": ("o_proj",),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "head": ("lm_head",),
}
PISSA = "pissa"
"""How the names of initializations begin that take the adapter's start out of the base."""
LAST_PARTS = r"(.*\.)?({})$"
"""Matches the names whose last parts match an expression."""
NUMBER_IN = r"(?:.*?\.)??{}\.(\d+)\."
"""Matches the number of a block in the list of blocks of this name."""
PROCESS = LimitedProcess("litlora.lora.pattern_process")
MOST_CHARACTERS = 10_000  # of an expression
WITHOUT_REPEATS = re.compile(r"[\w.\\$^-]*", re.ASCII)  # an expression that matches in no time


@dataclass(frozen=True)
class LayerSettings:
    """What an adapter's configuration says of one layer."""

    rank: int
    scaling: float
    """Factor of the low-rank branch."""


@dataclass(frozen=True)
class LoRAConfig:
    """The settings of an adapter, named as in adapter_config.json, and what they say of a layer by its name.

    Names are those of the base's checkpoint, without `.weight`.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...] | str
    """Last parts of layer names, or a regular expression for whole names."""
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "zero"
    """How the adapter was initialized, as --lora_init names it."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks other than r, by regular expressions for the last parts of layer names; the first match counts."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Values other than lora_alpha, in the same way."""
    layers_to_transform: tuple[int, ...] | None = None
    """Numbers of the blocks in which layers are targeted by the last parts of their names; None for all."""
    layers_pattern: tuple[str, ...] = ()
    """Names of the lists of blocks that the numbers are of; empty for any."""
    exclude_modules: tuple[str, ...] | str = ()
    """Layers that are not adapted although they are targeted, in the way of target_modules."""

    @property
    def requires_quantized_base(self) -> bool:
        """Tell whether the adapter compensates for a quantization error, which no other base has."""
        return self.init == "fisher"

    @property
    def changes_base(self) -> bool:
        """Tell whether the base holds, in training, what the adapter does not start from."""
        return self.init.startswith(PISSA)

    @property
    def saved(self) -> "LoRAConfig":
        """The configuration of the adapter's file, whose matrices have their start beside them if that is of the base.

        Ranks double then, and alphas grow so that the scaling of each layer stays the same.
        """
        return replace(self._resized(2), init=LoRAConfig.init) if self.changes_base else self

    def of_file(self, init: str) -> "LoRAConfig":
        """Return the configuration of which this one is `saved`, given its initialization."""
        config = replace(self, init=init)
        return config._resized(0.5) if config.changes_base else config

    def _resized(self, factor: float) -> "LoRAConfig":
        growth = math.sqrt(factor) if self.use_rslora else factor
        ranks = {key: int(factor * rank) for key, rank in self.rank_pattern.items()}
        alphas = {key: growth * alpha for key, alpha in self.alpha_pattern.items()}
        sizes: dict[str, Any] = {"r": int(factor * self.r), "lora_alpha": growth * self.lora_alpha}
        return replace(self, **sizes, rank_pattern=ranks, alpha_pattern=alphas)

    def adapted(self, names: Iterable[str]) -> dict[str, LayerSettings]:
        """Return the settings of each of these layers that is adapted."""
        if all(map(WITHOUT_REPEATS.fullmatch, self.expressions)):
            return self.find_layers(names)
        try:
            found = PROCESS.ask({"settings": asdict(self), "names": list(names)})
        except (MemoryError, TimeoutError) as error:
            shown = first_three(self.expressions)
            raise LitLoraError(f"the layers that match {shown} cannot be looked for: {error}") from error
        return {name: LayerSettings(*settings) for name, settings in found.items()}

    @property
    def expressions(self) -> list[str]:
        """The regular expressions among the settings."""
        modules = [text for text in (self.target_modules, self.exclude_modules) if isinstance(text, str)]
        return [*modules, *self.layers_pattern, *self.rank_pattern, *self.alpha_pattern]

    def find_layers(self, names: Iterable[str]) -> dict[str, LayerSettings]:
        """Return what `adapted` does, in this process: an expression of a stranger may take years."""
        return {name: LayerSettings(self.rank(name), self.scaling(name)) for name in names if self.targets(name)}

    def targets(self, name: str) -> bool:
        """Tell whether the layer of this name is adapted."""
        if _matches(self.exclude_modules, name) or not _matches(self.target_modules, name):
            return False
        # As in PEFT, a whole name or a regular expression chooses its blocks itself.
        if self.layers_to_transform is None or isinstance(self.target_modules, str) or name in self.target_modules:
            return True
        return self.block_of(name) in self.layers_to_transform

    def block_of(self, name: str) -> int | None:
        """Return the number of the block that a layer is part of, or None for a layer outside of the blocks."""
        for pattern in self.layers_pattern or (r"[^.]*",):
            if match := re.match(NUMBER_IN.format(pattern), name):
                return int(match[1])
        return None

    def rank(self, name: str) -> int:
        """Return the rank of a layer's matrices."""
        return _by_pattern(self.rank_pattern, name, self.r)

    def scaling(self, name: str) -> float:
        """Return a layer's alpha / rank, or alpha / sqrt(rank) for rsLoRA (Kalajdzievski 2023)."""
        alpha, rank = _by_pattern(self.alpha_pattern, name, self.lora_alpha), self.rank(name)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def compiles(expression: str, around: str = "{}") -> bool:
    """Tell whether a text is a regular expression, also as a part of another, of bearable length and complexity."""
    whole = around.format(expression)
    try:
        if WITHOUT_REPEATS.fullmatch(expression):
            return re.compile(whole) is not None
        return len(expression) <= MOST_CHARACTERS and PROCESS.ask({"expression": whole}) is True
    except (re.error, MemoryError, TimeoutError):
        return False


def _matches(modules: tuple[str, ...] | str, name: str) -> bool:
    if isinstance(modules, str):
        return re.fullmatch(modules, name) is not None
    return any(name == module or name.endswith(f".{module}") for module in modules)


def first_match(pattern: Mapping[str, Number], name: str) -> str | None:
    """Return the first key that matches the last parts of a layer's name, as PEFT does."""
    return next((key for key in pattern if _compiled(LAST_PARTS.format(key)).match(name)), None)


@cache
def _compiled(expression: str) -> re.Pattern[str]:
    """Return an expression compiled: an adapter may have more of them, one a layer, than re remembers."""
    return re.compile(expression)


def _by_pattern(pattern: Mapping[str, Number], name: str, default: Number) -> Number:
    key = first_match(pattern, name)
    return default if key is None else pattern[key]
