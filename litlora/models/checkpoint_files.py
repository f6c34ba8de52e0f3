"""The files of a checkpoint folder, as far as they can be read and validated without torch."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from litlora.errors import LitLoraError
from litlora.hub.filenames import CONFIG, INDEX, PICKLES, WEIGHTS
from litlora.models.config import GPTConfig
from litlora.models.gguf.reader import SUFFIX, read_gguf
from litlora.models.gguf.rebuilt.folder import complete_folder
from litlora.utils.files import read_json

DOWNLOADS = "checkpoints"  # download's --checkpoint_root


@dataclass(frozen=True)
class CheckpointFiles:
    """A checkpoint folder as far as it is read without torch."""

    dir: Path
    hub_config: dict[str, Any]
    """The content of config.json."""
    config: GPTConfig
    weights: list[Path]
    """The safetensors files, or one GGUF file."""

    @classmethod
    def find(cls, checkpoint_dir: Path, gguf: Path | None = None) -> Self:
        """Read config.json and find the weights, which may be a GGUF file of the same model in another place.

        The file completes a folder without config or tokenizer. LitLoraError if something is missing or not supported.
        """
        if gguf is not None and checkpoint_dir.is_dir():
            complete_folder(checkpoint_dir, read_gguf(gguf).require_trainable())
        config = read_config(checkpoint_dir)
        return cls(checkpoint_dir, *config, weight_files(checkpoint_dir) if gguf is None else [gguf])

    @property
    def gguf(self) -> Path | None:
        """The GGUF file, if the weights are in one."""
        return next((path for path in self.weights if path.suffix == SUFFIX), None)


def read_config(checkpoint_dir: Path) -> tuple[dict[str, Any], GPTConfig]:
    """Read a checkpoint's config.json, and the shape of the model that it describes."""
    hub_config = read_hub_config(checkpoint_dir)
    try:
        return hub_config, GPTConfig.from_hub(hub_config)
    except LitLoraError as error:
        raise LitLoraError(f"{checkpoint_dir}: {error}") from error


def read_hub_config(checkpoint_dir: Path) -> dict[str, Any]:
    """Read a checkpoint's config.json unchanged."""
    if not checkpoint_dir.is_dir():
        hint = f"fetch one with: litlora download --repo_id {_repo_id(checkpoint_dir)}"
        raise LitLoraError(f"there is no checkpoint folder {checkpoint_dir}; {hint}")
    if not (checkpoint_dir / CONFIG).is_file():
        hint = "pass the folder that has it beside the weights"
        raise LitLoraError(f"{checkpoint_dir} has no config.json, so it is not a checkpoint of the Hub: {hint}")
    return read_json(checkpoint_dir / CONFIG)


def _repo_id(checkpoint_dir: Path) -> str:
    """Return the repository that download saves in a folder checkpoints/ORG/NAME; a placeholder for other folders."""
    root, *names = checkpoint_dir.parts[-3:] or ("",)
    return shlex.quote("/".join(names)) if root == DOWNLOADS and len(names) == 2 else "ORG/NAME"


def weight_files(checkpoint_dir: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint, as its index lists them where it has one."""
    if (checkpoint_dir / WEIGHTS).is_file():
        return [checkpoint_dir / WEIGHTS]
    if not (checkpoint_dir / INDEX).is_file():
        pickled = any(path.suffix in PICKLES for path in checkpoint_dir.iterdir())
        reason = "pickled ones are never read, since a pickle can run code" if pickled else f"expected {WEIGHTS}"
        hint = "fetch a repository that has them with: litlora download --repo_id ORG/NAME"
        raise LitLoraError(f"{checkpoint_dir} has no safetensors weights ({reason}); {hint}")
    weight_map = read_json(checkpoint_dir / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LitLoraError(f"{checkpoint_dir / INDEX} has no weight_map that lists its files")
    names = sorted({str(name) for name in weight_map.values()})
    present = {path.name for path in checkpoint_dir.glob("*.safetensors")}
    if missing := [name for name in names if name not in present]:
        fault = f"lists {first_three(missing)}, missing from {checkpoint_dir}"
        raise LitLoraError(f"{checkpoint_dir / INDEX} {fault}; download it again")
    return [checkpoint_dir / name for name in names]


def first_three(names: Sequence[str]) -> str:
    """List the first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
