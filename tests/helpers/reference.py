"""The same computations by transformers and peft, which litlora must equal."""

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from litlora.nn.nf4 import Quantization


def auto_class(config: PretrainedConfig) -> Any:
    """Return the class that loads a model with a language model's head."""
    return AutoModelForCausalLM if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING else AutoModelForImageTextToText


def hugging_face(checkpoint: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    auto = auto_class(AutoConfig.from_pretrained(checkpoint))
    return auto.from_pretrained(checkpoint, dtype=dtype, attn_implementation="eager").eval()


def in_4_bits(checkpoint: Path, quantization: Quantization, device: torch.device) -> PreTrainedModel:
    # In training mode, since bitsandbytes rearranges its weights in evaluation where a CPU has AVX512-BF16.
    return (
        auto_class(AutoConfig.from_pretrained(checkpoint))
        .from_pretrained(
            checkpoint,
            dtype=quantization.dtype,
            quantization_config=BitsAndBytesConfig(**quantization.hub),
            attn_implementation="eager",
            device_map={"": device},
        )
        .train()
    )


def with_peft(checkpoint: Path, adapter: Path, *, trainable: bool = False) -> PeftModel:
    return PeftModel.from_pretrained(hugging_face(checkpoint), adapter, is_trainable=trainable)
