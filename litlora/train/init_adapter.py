"""The adapter that a run continues from: --init_adapter."""

from dataclasses import replace
from pathlib import Path

from litlora.args.finetune import FinetuneLoraArgs
from litlora.lora.adapter_folder import read_prompt_style
from litlora.lora.checkpoint import read_adapter, read_lora_config, refuse_compensation
from litlora.lora.config import LoRAConfig
from litlora.lora.selection import Weighted
from litlora.models.checkpoint import Checkpoint
from litlora.utils.console import log


def continued_adapter(adapter_dir: Path, args: FinetuneLoraArgs, checkpoint: Checkpoint) -> LoRAConfig:
    """Return the configuration of the adapter that a run continues from, which must fit the base."""
    if not args.quantize:
        refuse_compensation([Weighted(adapter_dir)], "pass --quantize bnb.nf4")
    style = read_prompt_style(adapter_dir)
    if style and style.name != args.prompt_style:
        log(f"{adapter_dir} was trained on the prompt style {style.name}, and this run is on {args.prompt_style}")
    read_adapter(adapter_dir, checkpoint)  # only a check: its tensors are loaded into the model later
    return replace(read_lora_config(adapter_dir), lora_dropout=args.lora_dropout)
