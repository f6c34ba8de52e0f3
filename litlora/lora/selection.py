"""Which base and adapters the arguments of a command name. Imports no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from litlora.args.common import GGUFPath
from litlora.args.inference import InferenceArgs, ModelArgs
from litlora.data.prompts.styles import AUTO, StyleSettings
from litlora.errors import LitLoraError
from litlora.lora.adapter_config import read_settings
from litlora.lora.adapter_folder import (
    find_base,
    find_named_base,
    find_named_gguf,
    is_adapter,
    read_prompt_style,
    same_style,
)
from litlora.models.checkpoint_files import CheckpointFiles


@dataclass(frozen=True)
class Weighted:
    """An adapter folder, and its weight in a sum of adapters."""

    folder: Path
    weight: float = 1.0


Adapters = tuple[Weighted, ...]


def find_folders(args: ModelArgs) -> tuple[Path, Adapters]:
    """Return the base that a command's arguments name, and the adapters: none, one, or those of --adapters.

    LitLoraError names a setting of an adapter that is not implemented.
    """
    adapters = tuple(map(Weighted, args.adapters, args.adapter_weights or [1.0] * len(args.adapters)))
    for adapter in adapters:
        read_settings(adapter.folder)
    if adapters:
        return _shared_base(args.checkpoint_dir, args.base_dir, args.adapters), adapters
    assert args.checkpoint_dir is not None  # or the arguments would have been refused
    base, folder = find_base(args.checkpoint_dir, args.base_dir)
    if folder is None:
        return base, ()
    read_settings(folder)
    return base, (Weighted(folder),)


def find_files(args: ModelArgs) -> tuple[CheckpointFiles, Adapters]:
    """Return the files of the base that a command's arguments name, and the adapters."""
    base_dir, adapters = find_folders(args)
    return CheckpointFiles.find(base_dir, find_gguf(args, adapters)), adapters


def find_gguf(args: ModelArgs, adapters: Adapters) -> Path | None:
    """Return the GGUF file that has the base's weights, as requested, else as the adapters were trained."""
    if args.quantize is not None:
        return args.quantize if isinstance(args.quantize, GGUFPath) else None
    named = {path: adapter.folder for adapter in adapters if (path := find_named_gguf(adapter.folder)) is not None}
    if len(named) > 1:
        (one, other), hint = list(named.values())[:2], "name the one that both are for"
        raise LitLoraError(f"{one} and {other} were trained over different GGUF files: {hint}")
    for path, folder in named.items():
        if not path.is_file():
            fault = f"the GGUF file over which {folder} was trained is not there ({path})"
            raise LitLoraError(f"{fault}: name it with --quantize")
    return next(iter(named), None)


def find_adapters(args: ModelArgs) -> tuple[Path, Adapters]:
    """Return the base and the adapters that a command's arguments name; LitLoraError where there are none."""
    if args.checkpoint_dir is not None and not args.adapters:
        read_settings(args.checkpoint_dir)
    return find_folders(args)


def _shared_base(directory: Path | None, base_dir: Path | None, adapters: Sequence[Path]) -> Path:
    """Return the base of several adapters: the one that is given, else the one that all of them name."""
    if directory is not None and is_adapter(directory):
        hint = "add it to --adapters, and name their base or leave it out"
        raise LitLoraError(f"--checkpoint_dir ({directory}) is an adapter: {hint}")
    if base := directory or base_dir:
        return base
    first, *others = ((folder, find_named_base(folder, "--checkpoint_dir")) for folder in adapters)
    for folder, base in others:
        if base.resolve() != first[1].resolve():
            fault = f"{first[0]} and {folder} name different bases ({first[1]}, {base})"
            raise LitLoraError(f"{fault}: say which it is with --checkpoint_dir")
    return first[1]


def shared_prompt_style(adapters: Iterable[Weighted]) -> StyleSettings | None:
    """Return the prompt style that adapters were trained on, or None where none of them says."""
    read = [(adapter.folder, read_prompt_style(adapter.folder)) for adapter in adapters]
    styles = [(folder, style) for folder, style in read if style is not None]
    for folder, style in styles[1:]:
        first, one = styles[0]
        if not same_style(style, one):
            fault = f"{first} and {folder} were trained on different prompt styles ({one.name}, {style.name})"
            raise LitLoraError(f"{fault}: choose one with --prompt_style")
    return styles[0][1] if styles else None


def style_settings(args: InferenceArgs, base_dir: Path, adapters: Adapters, untrained: StyleSettings) -> StyleSettings:
    """Return the prompt style as requested, else that of the adapters or the merged folder, else `untrained`."""
    name, variables = args.prompt_style, args.prompt_style_variables
    if name is None or name == AUTO or len(adapters) == 1:
        trained = shared_prompt_style(adapters) or read_prompt_style(base_dir) or untrained
        if name in (None, AUTO, trained.name):
            return StyleSettings(trained.name, trained.variables if variables is None else variables)
    return StyleSettings(str(name), variables or {})
