"""Scores by transformers and PEFT, which are an extra."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from litlora.errors import LitLoraError
from litlora.export.scoring import Scores, log_probs
from litlora.nn.nf4 import Quantization

try:
    import peft
    import transformers
except ImportError as error:
    raise LitLoraError("--engine peft needs transformers and peft: pip install 'litlora[peft]'") from error


@dataclass(frozen=True)
class PEFTEngine:
    """A model of transformers, with an adapter if there is one, in float32."""

    model: Any

    @torch.inference_mode()
    def __call__(self, sequences: Sequence[list[int]], starts: Sequence[int]) -> list[Scores]:
        return [self._scored(torch.tensor([ids], device=self.model.device)) for ids in sequences]

    def _scored(self, ids: torch.Tensor) -> Scores:
        scored: Scores = log_probs(self.model(ids).logits[0, :-1], ids[0, 1:]).tolist()
        return scored


def load(base_dir: Path, adapter: Path | None, dtype: torch.dtype, quantization: Quantization | None) -> PEFTEngine:
    """Load a checkpoint whose weights are rounded to a dtype or quantized as in training, and an adapter on it."""
    config = transformers.AutoConfig.from_pretrained(base_dir)
    is_text = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    auto = transformers.AutoModelForCausalLM if is_text else transformers.AutoModelForImageTextToText
    settings = {"bnb_4bit_compute_dtype": torch.float32} if quantization else {}
    quantized = transformers.BitsAndBytesConfig(**quantization.hub | settings) if quantization else None
    try:
        model = auto.from_pretrained(base_dir, dtype=dtype, quantization_config=quantized, attn_implementation="eager")
        model = model if adapter is None else peft.PeftModel.from_pretrained(model, adapter)
    except (KeyError, OSError, RuntimeError, ValueError) as error:
        fault = " ".join(str(error).split())
        raise LitLoraError(f"PEFT does not load {adapter or base_dir}: {fault[:300]}") from error
    # On a CPU, bitsandbytes rearranges its weights in evaluation, and computes in bfloat16.
    return PEFTEngine(model.train(quantization is not None) if quantization else model.float().eval())
