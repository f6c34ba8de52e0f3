"""adapter_config.json: PEFT's keys as a LoRAConfig; what would not be honoured is refused. Imports no torch."""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from litlora.errors import LitLoraError
from litlora.lora.adapter_folder import BASE, CONFIG, require_adapter
from litlora.lora.config import LAST_PARTS, NUMBER_IN, LoRAConfig, compiles
from litlora.utils.files import read_json

INIT = "lora_init"
IMPLEMENTED = {
    "alpha_pattern", "exclude_modules", "layers_pattern", "layers_to_transform", "lora_alpha", "lora_dropout",
    "peft_type", "r", "rank_pattern", "target_modules", "use_dora", "use_rslora",
}  # fmt: skip
# Keys that do not change what a trained adapter computes on linear layers.
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "fan_in_fan_out", "inference_mode",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
    "corda_config", "eva_config", "loftq_config", "lora_ga_config",  # as init_lora_weights is checked
}  # fmt: skip
KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("fan_in_fan_out", "inference_mode", "use_dora", "use_rslora"), (bool, "true or false")),
    **dict.fromkeys(("base_model_name_or_path", "peft_version", "revision", "task_type"), (str, "a text")),
    **dict.fromkeys((BASE, "alpha_pattern", "rank_pattern"), (dict, "an object")),
}
"""The types of keys for which null is as good as no key."""
NEUTRAL: tuple[Any, ...] = (None, False, "none", [], {})
HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initializations that leave the base as it is; others (PiSSA, OLoRA, CorDA, LoftQ) train beside a changed one."""
WAY_OUT = "merge the adapter in PEFT, or train one without it"
CONVERSION = "save it in PEFT with path_initial_model_for_weight_conversion"
MOST_PATTERNS = 5_000  # of an adapter, one a layer
ALL_LINEAR = r".*\.\d+\..*"
"""The layers of the blocks: PEFT leaves the head out."""


def read_settings(adapter_dir: Path) -> LoRAConfig:
    """Read the shape and reach of an adapter; LitLoraError names a key that is not implemented."""
    require_adapter(adapter_dir)
    path = adapter_dir / CONFIG
    config = read_json(path)
    _refuse_what_is_not_implemented(path, config)
    keys = _Keys(path, config)
    keys.refuse_other_types()
    saved = LoRAConfig(
        r=keys.number("r", int),
        lora_alpha=keys.number("lora_alpha", int | float),
        lora_dropout=0.0,  # acts in training only
        target_modules=keys.target_modules(),
        use_rslora=bool(config.get("use_rslora")),
        use_dora=bool(config.get("use_dora")),
        rank_pattern=keys.pattern("rank_pattern", int),
        alpha_pattern=keys.pattern("alpha_pattern", int | float),
        layers_to_transform=keys.blocks() or None,
        layers_pattern=keys.texts("layers_pattern"),
        exclude_modules=keys.modules("exclude_modules"),
    )
    trained = saved.of_file(keys.init())
    if trained.saved.rank_pattern != saved.rank_pattern or trained.saved.r != saved.r:
        raise keys.refusal("r", "even, as that of an adapter with its start beside it")
    return trained


def settings_as_keys(lora: LoRAConfig) -> dict[str, Any]:
    """Return the keys of adapter_config.json that describe an adapter to PEFT."""
    return {
        "alpha_pattern": dict(lora.alpha_pattern),
        "bias": "none",
        "exclude_modules": lora.exclude_modules or None,
        "fan_in_fan_out": False,
        "layers_pattern": lora.layers_pattern or None,
        "layers_to_transform": lora.layers_to_transform,
        "lora_alpha": lora.lora_alpha,
        "lora_dropout": lora.lora_dropout,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.r,
        "rank_pattern": dict(lora.rank_pattern),
        "target_modules": lora.target_modules,
        "task_type": "CAUSAL_LM",
        "use_dora": lora.use_dora,
        "use_rslora": lora.use_rslora,
    }


def of_base(config: Mapping[str, Any], key: str) -> Any:
    """Return what an adapter says of its base under a key, or None where it says nothing."""
    base = config.get(BASE)
    return base.get(key) if isinstance(base, dict) else None


def _refuse_what_is_not_implemented(path: Path, config: Mapping[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        fault = f'{path} has "peft_type": {config.get("peft_type")!r}, but only LORA is implemented'
        raise LitLoraError(f"{fault}: {WAY_OUT}")
    start = config.get("init_lora_weights", True)
    if start not in HARMLESS_STARTS:
        raise LitLoraError(f'{path} has "init_lora_weights": {start!r}, which changes the base as well: {CONVERSION}')
    for key, value in config.items():
        if key not in IMPLEMENTED | WITHOUT_EFFECT | {"init_lora_weights"} and value not in NEUTRAL:
            raise LitLoraError(f'{path} has "{key}": {value!r}, which litlora does not implement: {WAY_OUT}')


class _Keys:
    """The keys of an adapter_config.json, each refused unless it is as PEFT writes it."""

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path, self.config = path, config

    def refusal(self, key: str, need: str) -> LitLoraError:
        return LitLoraError(f'{self.path} has "{key}": {self.config.get(key)!r}, but it must be {need}')

    def refuse_other_types(self) -> None:
        """Refuse values that another program could take for something else, such as "yes" for true."""
        for key, (kind, need) in KINDS.items():
            if not isinstance(self.config.get(key), kind | None):
                raise self.refusal(key, need)
        dropout = self.config.get("lora_dropout", 0)
        if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0 <= dropout <= 1:
            raise self.refusal("lora_dropout", "a number from 0 to 1")

    def init(self) -> str:
        """Return how the adapter was initialized, as litlora has recorded it."""
        init = of_base(self.config, INIT) or LoRAConfig.init
        if not isinstance(init, str):
            raise self.refusal(BASE, f"an object with a text as its {INIT}")
        return init

    def number(self, key: str, kind: Any) -> Any:
        value = self.config.get(key)
        if not _is_positive(value, kind):
            quotes = ", without quotes" if isinstance(value, str) else ""
            raise self.refusal(key, f"a {'whole ' if kind is int else ''}number above 0{quotes}")
        return value

    def pattern(self, key: str, kind: Any) -> dict[str, Any]:
        """Return numbers by regular expressions for layer names."""
        value = self.config.get(key) or {}
        if not isinstance(value, dict) or len(value) > MOST_PATTERNS:
            raise self.refusal(key, f"an object with at most {MOST_PATTERNS:,} keys")
        if not all(_is_expression(name, LAST_PARTS) for name in value):
            raise self.refusal(key, "an object with regular expressions as its keys")
        if not all(_is_positive(number, kind) for number in value.values()):
            raise self.refusal(key, "an object with numbers above 0 as its values")
        return value

    def blocks(self) -> tuple[int, ...]:
        value = self.config.get("layers_to_transform")
        blocks = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(block, int) and not isinstance(block, bool) for block in blocks):
            raise self.refusal("layers_to_transform", "the number of a block, or a list of them")
        return tuple(blocks)

    def texts(self, key: str) -> tuple[str, ...]:
        value = self._or_empty(key)
        texts = value if isinstance(value, list) else [value]
        if not all(_is_expression(text, NUMBER_IN) for text in texts):
            raise self.refusal(key, "a name, or a list of names")
        return tuple(texts)

    def modules(self, key: str) -> tuple[str, ...] | str:
        """Return the names of layers, or a regular expression for them."""
        value = self._or_empty(key)
        if isinstance(value, list) and all(isinstance(name, str) for name in value):
            return tuple(value)
        if not _is_expression(value):
            raise self.refusal(key, "a list of layer names or a regular expression")
        return str(value)

    def _or_empty(self, key: str) -> Any:
        value = self.config.get(key)
        return [] if value is None else value

    def target_modules(self) -> tuple[str, ...] | str:
        value = self.modules("target_modules")
        if not value:
            raise self.refusal("target_modules", "a list of layer names or a regular expression")
        return ALL_LINEAR if isinstance(value, str) and value.lower() == "all-linear" else value


def _is_positive(value: object, kind: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and 0 < value <= sys.float_info.max


def _is_expression(value: object, around: str = "{}") -> bool:
    return isinstance(value, str) and compiles(value, around)
