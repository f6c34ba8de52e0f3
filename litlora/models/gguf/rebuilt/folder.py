"""The folder of a checkpoint whose weights are in a GGUF file: config.json and tokenizer, from the file if need be."""

from pathlib import Path
from typing import Any

from litlora.hub.filenames import CONFIG, TOKENIZERS
from litlora.models.config import GPTConfig
from litlora.models.gguf.reader import GGUFHeader
from litlora.models.gguf.rebuilt import tokenizer
from litlora.models.gguf.rebuilt.byte_level import HubBPE
from litlora.models.gguf.rebuilt.config import config_of
from litlora.models.gguf.rebuilt.metadata import not_rebuilt
from litlora.models.gguf.rebuilt.sentencepiece_model import HubSentencePiece
from litlora.utils.console import log
from litlora.utils.files import write_atomically

REBUILT: dict[str, type[tokenizer.HubTokenizer]] = {"gpt2": HubBPE, "llama": HubSentencePiece}
"""What rebuilds a tokenizer, by llama.cpp's name of its kind."""


def complete_folder(folder: Path, header: GGUFHeader) -> None:
    """Write the config and the tokenizer that a folder lacks; a file that is there stays as it is."""
    contents: dict[str, bytes] = {}
    if not (folder / CONFIG).is_file():
        contents[CONFIG] = tokenizer.to_json(_checked_config(header))
    if not any((folder / name).is_file() for name in TOKENIZERS):
        contents |= _tokenizer_files(header)
    if missing := {folder / name: content for name, content in contents.items() if not (folder / name).exists()}:
        write_atomically(missing)
        log(f"{', '.join(path.name for path in missing)} in {folder}: written from {header.path}")


def _tokenizer_files(header: GGUFHeader) -> dict[str, bytes]:
    kind = str(header.metadata.get(f"{tokenizer.PREFIX}model"))
    if kind not in REBUILT:
        raise tokenizer.not_rebuilt(header, f"it is of the type {kind}, and only {' and '.join(REBUILT)} can be")
    return REBUILT[kind](header).files()


def _checked_config(header: GGUFHeader) -> dict[str, Any]:
    """Return the config of a file's model, from which the file's own metadata follows again."""
    from litlora.models.gguf import comparison  # an extra, and torch

    hub_config = config_of(header)
    for fault in comparison.differences(header, hub_config, GPTConfig.from_hub(hub_config)):
        raise not_rebuilt(header, fault)
    return hub_config
