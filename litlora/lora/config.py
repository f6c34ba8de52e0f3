"""The configuration of an adapter, with PEFT's names."""

import math
import re
from dataclasses import dataclass

# Which layers each --lora_* switch adapts, by the last part of their names.
TARGET_MODULES: dict[str, tuple[str, ...]] = {
    "query": ("q_proj",),
    "key": ("k_proj",),
    "value": ("v_proj",),
    "projection": ("o_proj",),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "head": ("lm_head",),
}


@dataclass(frozen=True)
class LoRAConfig:
    """The settings of an adapter; those that PEFT has as well are named as in adapter_config.json."""

    r: int
    lora_alpha: float
    lora_dropout: float
    target_modules: tuple[str, ...] | str
    """Last parts of layer names, or a regular expression for whole names."""
    use_rslora: bool = False
    use_dora: bool = False
    init: str = "zero"
    """How the adapter was initialized, as --lora_init names it."""

    @property
    def scaling(self) -> float:
        """Factor of the low-rank branch: alpha / r, or alpha / sqrt(r) for rsLoRA (Kalajdzievski 2023)."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def requires_quantized_base(self) -> bool:
        """Tell whether the adapter compensates for a quantization error, which no other base has."""
        return self.init == "fisher"

    def targets(self, name: str) -> bool:
        """Tell whether the layer of this name is adapted."""
        if isinstance(self.target_modules, str):
            return re.fullmatch(self.target_modules, name) is not None
        return any(name == target or name.endswith(f".{target}") for target in self.target_modules)
