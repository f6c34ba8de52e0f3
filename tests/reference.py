"""The same computations by transformers and peft, which litlora must equal."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, PreTrainedModel


def hugging_face(checkpoint: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=dtype, attn_implementation="eager").eval()


def with_peft(checkpoint: Path, adapter: Path, *, trainable: bool = False) -> PeftModel:
    return PeftModel.from_pretrained(hugging_face(checkpoint), adapter, is_trainable=trainable)
