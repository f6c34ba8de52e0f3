"""What an adapter folder tells without its tensors: base and prompt style. Imports no torch."""

from pathlib import Path
from typing import Any

import yaml

from litlora.args.common import GGUF
from litlora.data.prompts.styles import StyleSettings
from litlora.errors import LitLoraError
from litlora.hub.filenames import CONFIG as BASE_CONFIG
from litlora.utils.files import read_json, read_yaml

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
PROMPT_STYLE = "prompt_style.yaml"
VARIABLES, DATE = "prompt_style_variables", "template_date"  # keys of it
FINAL = "final"  # in the folder of a run
# PEFT warns of keys that it does not know; this one is for whatever tells how to open the base, and unused with LoRA.
BASE = "auto_mapping"
LOCAL_PATH = "local_path"
GGUF_PATH = "gguf_path"
QUANTIZATION = "quantization_config"
CHECKPOINTS = Path("checkpoints")  # download's --checkpoint_root


def find_named_gguf(adapter_dir: Path) -> Path | None:
    """Return the GGUF file over which an adapter was trained, if it was one."""
    recorded = read_json(adapter_dir / CONFIG).get(BASE)
    recorded = recorded if isinstance(recorded, dict) else {}
    if isinstance(named := recorded.get(GGUF_PATH), str):
        return Path(named)
    quantization = recorded.get(QUANTIZATION)
    if isinstance(quantization, dict) and quantization.get("quant_method") == GGUF:
        fault = f"{adapter_dir} was trained over a GGUF file and does not say where it is"
        raise LitLoraError(f"{fault}: name it with --quantize")
    return None


def is_adapter(directory: Path) -> bool:
    """Tell an adapter directory from a checkpoint's."""
    return (directory / CONFIG).is_file()


def require_adapter(directory: Path) -> None:
    """Refuse a folder that holds no adapter."""
    if not is_adapter(directory):
        raise LitLoraError(f"no adapter in {directory} (expected {CONFIG}); {_hint(directory)}")
    if (directory / PICKLE).is_file() and not (directory / WEIGHTS).is_file():
        hint = "load it in PEFT and save it again"
        raise LitLoraError(f"{directory} has its weights in {PICKLE}, a pickle, and not in {WEIGHTS}: {hint}")


def _hint(directory: Path) -> str:
    """Suggest which folder to name, or how to make an adapter."""
    if (directory / BASE_CONFIG).is_file():
        return "it is a checkpoint: name the folder of an adapter on it"
    out_dir = directory.parent if directory.name == FINAL else directory
    return run_folder_hint(directory) or f"train one with: litlora finetune_lora --out_dir {out_dir}"


def run_folder_hint(out_dir: Path) -> str | None:
    """Suggest the final adapter where the folder of its run is given."""
    return f"did you mean {out_dir / FINAL}?" if is_adapter(out_dir / FINAL) else None


def read_prompt_style(directory: Path) -> StyleSettings | None:
    """Return the prompt style that an adapter was trained on, or None where a folder does not say."""
    path = directory / PROMPT_STYLE
    if not path.is_file():
        return None
    content = read_yaml(path)
    if not isinstance(content, dict) or not isinstance(content.get("prompt_style"), str):
        raise LitLoraError(f"{path} must have the key prompt_style, with a text")
    variables, date = content.get(VARIABLES) or {}, content.get(DATE)
    if not isinstance(variables, dict) or not isinstance(date, str | None):
        raise LitLoraError(f"{path}: {VARIABLES} must be a mapping, and {DATE} a text")
    return StyleSettings(content["prompt_style"], variables, date)


def same_style(style: StyleSettings, other: StyleSettings) -> bool:
    """Tell whether two models expect the same prompts; the date of the training does not matter."""
    return (style.name, style.variables) == (other.name, other.variables)


def write_prompt_style(directory: Path, settings: StyleSettings) -> None:
    """Write the prompt style into the folder of an adapter or of a merged checkpoint."""
    others = {VARIABLES: dict(settings.variables), DATE: settings.date}
    content = {"prompt_style": settings.name} | {key: value for key, value in others.items() if value}
    (directory / PROMPT_STYLE).write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")


def refuse_adapter(directory: Path) -> None:
    """Refuse an adapter, or the folder of a finished run, where --checkpoint_dir must name a base."""
    adapter = directory if is_adapter(directory) else directory / FINAL
    if is_adapter(adapter) and not (directory / BASE_CONFIG).is_file():
        hint = f"to continue from it on new data, pass --init_adapter {adapter}"
        raise LitLoraError(f"--checkpoint_dir ({directory}) is an adapter, not its base; {hint}")


def find_named_base(adapter_dir: Path, flag: str) -> Path:
    """Return the base that an adapter names; LitLoraError names the flag that can name it instead."""
    require_adapter(adapter_dir)
    config = read_json(adapter_dir / CONFIG)
    for path in _base_candidates(config):
        if path.is_dir():
            return path
    fault = f"the base of the adapter {adapter_dir} is not there ({config.get('base_model_name_or_path')})"
    raise LitLoraError(f"{fault}; say where it is with {flag}")


def find_base(directory: Path, base_dir: Path | None) -> tuple[Path, Path | None]:
    """Tell base and adapter apart: a checkpoint is a base alone, an adapter has the given base or the one it names."""
    if not is_adapter(directory):
        if hint := run_folder_hint(directory):
            raise LitLoraError(f"{directory} is the folder of a run; {hint}")
        if base_dir is not None:
            raise LitLoraError(f"--base_dir ({base_dir}) goes with an adapter, but {directory} has no {CONFIG}")
        return directory, None
    if base_dir is None:
        return find_named_base(directory, "--base_dir"), directory
    if not base_dir.is_dir():
        raise LitLoraError(f"there is no base at --base_dir ({base_dir})")
    return base_dir, directory


def _base_candidates(config: dict[str, Any]) -> list[Path]:
    """Return where the base of an adapter may be: where it was trained, or where download puts its repository."""
    recorded = config.get(BASE)
    local = recorded.get(LOCAL_PATH) if isinstance(recorded, dict) else None
    named = config.get("base_model_name_or_path")
    paths = [Path(name) for name in (local, named) if isinstance(name, str)]
    return [*paths, CHECKPOINTS / named] if isinstance(named, str) else paths
