"""What a merged folder holds about prompts: the prompt style, and the token that ends an answer."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from litlora.data.prompts.styles import StyleSettings
from litlora.data.tokenizer import Tokenizer
from litlora.hub.filenames import GENERATION_CONFIG
from litlora.lora.adapter_folder import write_prompt_style
from litlora.utils.files import read_json


def write_prompt_files(folder: Path, tokenizer: Tokenizer, settings: StyleSettings) -> None:
    """Write the prompt style of an adapter, and add the token that ends its answers to generation_config.json."""
    write_prompt_style(folder, replace(settings, date=None))
    path = folder / GENERATION_CONFIG
    stop_ids = tokenizer.stop_ids_of(tokenizer.prompt_style(settings))
    if stop_ids == tokenizer.stop_ids and path.is_file():
        return
    content: dict[str, Any] = read_json(path) if path.is_file() else {}
    ids = sorted(stop_ids)
    content["eos_token_id"] = ids[0] if len(ids) == 1 else ids
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
