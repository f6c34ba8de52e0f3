"""What an adapter folder tells without its tensors: base, settings, prompt style. Imports no torch."""

import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from litlora.errors import LitLoraError
from litlora.hub.filenames import CONFIG as BASE_CONFIG
from litlora.lora.config import LoRAConfig
from litlora.utils.files import YAML_ERRORS, read_json

CONFIG = "adapter_config.json"
PROMPT_STYLE = "prompt_style.yaml"
FINAL = "final"  # in the folder of a run
# PEFT warns of keys that it does not know; this one is for whatever tells how to open the base, and unused with LoRA.
BASE = "auto_mapping"
LOCAL_PATH, INIT = "local_path", "lora_init"
CHECKPOINTS = Path("checkpoints")  # download's --checkpoint_root
# Keys of adapter_config.json that are implemented, and those that do not change what a trained adapter computes.
IMPLEMENTED = {"peft_type", "r", "lora_alpha", "lora_dropout", "target_modules", "use_dora", "use_rslora"}
WITHOUT_EFFECT = {
    "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "eva_config", "inference_mode",
    "megatron_core", "peft_version", "qalora_group_size", "revision", "runtime_config", "task_type",
}  # fmt: skip
NEUTRAL: tuple[Any, ...] = (None, False, "none", [], {})
HARMLESS_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # others (PiSSA, OLoRA …) change the base itself


def is_adapter(directory: Path) -> bool:
    """Tell an adapter directory from a checkpoint's."""
    return (directory / CONFIG).is_file()


def require_adapter(directory: Path) -> None:
    """Refuse a folder that holds no adapter."""
    if not is_adapter(directory):
        raise LitLoraError(f"no adapter in {directory} (expected {CONFIG}); {_hint(directory)}")


def _hint(directory: Path) -> str:
    """Suggest which folder to name, or how to make an adapter."""
    if (directory / BASE_CONFIG).is_file():
        return "it is a checkpoint: name the folder of an adapter on it"
    out_dir = directory.parent if directory.name == FINAL else directory
    return run_folder_hint(directory) or f"train one with: litlora finetune_lora --out_dir {out_dir}"


def run_folder_hint(out_dir: Path) -> str | None:
    """Suggest the final adapter where the folder of its run is given."""
    return f"did you mean {out_dir / FINAL}?" if is_adapter(out_dir / FINAL) else None


def read_prompt_style(directory: Path) -> str | None:
    """Return the prompt style that an adapter was trained on, or None where a folder does not say."""
    path = directory / PROMPT_STYLE
    if not path.is_file():
        return None
    try:
        content = yaml.safe_load(path.read_bytes())
    except YAML_ERRORS as error:
        raise LitLoraError(f"{path} is not valid YAML") from error
    if not isinstance(content, dict) or not isinstance(content.get("prompt_style"), str):
        raise LitLoraError(f"{path} must hold one key, prompt_style, with a text")
    return str(content["prompt_style"])


def find_base(directory: Path, base_dir: Path | None) -> tuple[Path, Path | None]:
    """Tell base and adapter apart: a checkpoint is a base alone, an adapter has the given base or the one it names."""
    if not is_adapter(directory):
        if hint := run_folder_hint(directory):
            raise LitLoraError(f"{directory} is the folder of a run; {hint}")
        if base_dir is not None:
            raise LitLoraError(f"--base_dir ({base_dir}) goes with an adapter, but {directory} has no {CONFIG}")
        return directory, None
    config = read_json(directory / CONFIG)
    named = config.get("base_model_name_or_path") if base_dir is None else str(base_dir)
    candidates = [base_dir] if base_dir else _base_candidates(config)
    for path in candidates:
        if path.is_dir():
            return path, directory
    hint = "say where it is with --base_dir"
    raise LitLoraError(f"the base of the adapter {directory} is not there ({named}); {hint}")


def _base_candidates(config: dict[str, Any]) -> list[Path]:
    """Return where the base of an adapter may be: where it was trained, or where download puts its repository."""
    recorded = config.get(BASE)
    local = recorded.get(LOCAL_PATH) if isinstance(recorded, dict) else None
    named = config.get("base_model_name_or_path")
    paths = [Path(name) for name in (local, named) if isinstance(name, str)]
    return [*paths, CHECKPOINTS / named] if isinstance(named, str) else paths


def read_settings(adapter_dir: Path) -> LoRAConfig:
    """Read the shape and reach of an adapter; LitLoraError names a key that is not implemented."""
    require_adapter(adapter_dir)
    path = adapter_dir / CONFIG
    config = read_json(path)
    _refuse_what_is_not_implemented(path, config)
    return LoRAConfig(
        r=_number(path, config, "r", int),
        lora_alpha=_number(path, config, "lora_alpha", int | float),
        lora_dropout=0.0,  # acts in training only
        target_modules=_target_modules(path, config.get("target_modules")),
        use_rslora=config.get("use_rslora") is True,
        use_dora=config.get("use_dora") is True,
        init=str(of_base(config, INIT) or LoRAConfig.init),
    )


def of_base(config: dict[str, Any], key: str) -> Any:
    """Return what an adapter says of its base under a key, or None where it says nothing."""
    base = config.get(BASE)
    return base.get(key) if isinstance(base, dict) else None


def _refuse_what_is_not_implemented(path: Path, config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise LitLoraError(f'{path} has "peft_type": {config.get("peft_type")!r}, but only LORA is implemented')
    for key, value in config.items():
        harmless = key in IMPLEMENTED | WITHOUT_EFFECT or value in NEUTRAL
        if not harmless and not (key == "init_lora_weights" and value in HARMLESS_STARTS):
            raise LitLoraError(f'{path} has "{key}": {value!r}, which litlora does not implement')


def _number(path: Path, config: dict[str, Any], key: str, kind: Any) -> Any:
    value = config.get(key)
    if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise LitLoraError(f'{path} has "{key}": {value!r}, but it must be a number above 0')
    return value


def _target_modules(path: Path, value: object) -> tuple[str, ...] | str:
    if value == "all-linear":
        return r"model\.layers\..*"  # PEFT leaves the head out
    if isinstance(value, list) and value and all(isinstance(name, str) for name in value):
        return tuple(value)
    if isinstance(value, str):
        with suppress(re.error, OverflowError, RecursionError):
            return re.compile(value).pattern
    raise LitLoraError(
        f'{path} has "target_modules": {value!r}, but it must be a list of layer names or a regular expression'
    )
