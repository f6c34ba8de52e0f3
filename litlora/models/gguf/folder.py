"""The folder of a checkpoint whose weights are in a GGUF file: config.json and tokenizer, from the file if need be."""

import json
from pathlib import Path
from typing import Any

from litlora.hub.filenames import CONFIG, TOKENIZERS
from litlora.models.config import GPTConfig
from litlora.models.gguf.hub_config import config_of, not_rebuilt
from litlora.models.gguf.hub_tokenizer import tokenizer_files
from litlora.models.gguf.reader import GGUFHeader
from litlora.utils.console import log
from litlora.utils.files import write_atomically


def complete_folder(folder: Path, header: GGUFHeader) -> None:
    """Write the config and the tokenizer that a folder lacks; a file that is there stays as it is."""
    contents: dict[str, dict[str, Any]] = {}
    if not (folder / CONFIG).is_file():
        contents[CONFIG] = _checked_config(header)
    if not any((folder / name).is_file() for name in TOKENIZERS):
        contents |= tokenizer_files(header)
    missing = {folder / name: content for name, content in contents.items() if not (folder / name).exists()}
    if missing:
        texts = {path: json.dumps(content, indent=2, ensure_ascii=False) for path, content in missing.items()}
        write_atomically({path: text.encode() for path, text in texts.items()})
        log(f"{', '.join(path.name for path in missing)} in {folder}: written from {header.path}")


def _checked_config(header: GGUFHeader) -> dict[str, Any]:
    """Return the config of a file's model, from which the file's own metadata follows again."""
    from litlora.models.gguf import comparison  # an extra, and torch

    hub_config = config_of(header)
    for fault in comparison.differences(header, hub_config, GPTConfig.from_hub(hub_config)):
        raise not_rebuilt(header, fault)
    return hub_config
