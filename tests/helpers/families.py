"""The model families that litlora supports, each as a small config."""

from dataclasses import dataclass, field
from typing import Any

from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

SMALL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,  # far from linear, so that an error shows
    "bos_token_id": 0,
    "eos_token_id": 1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

UPPER_WINDOW = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}


@dataclass(frozen=True)
class Family:
    """A network by the keys in which its config differs from the small one."""

    name: str
    kind: type[PretrainedConfig]
    keys: dict[str, Any] = field(default_factory=dict)

    def config(self) -> PretrainedConfig:
        return self.kind(**{**SMALL, **self.keys})


FAMILIES = [
    Family("llama", LlamaConfig),
    Family("llama-gqa", LlamaConfig, {"num_key_value_heads": 2, "rms_norm_eps": 1e-5}),
    Family("llama-mqa-wide-heads", LlamaConfig, {"num_key_value_heads": 1, "head_dim": 16}),
    Family("llama-3.2", LlamaConfig, {"rope_parameters": LLAMA3, "tie_word_embeddings": True}),
    Family("llama-biases", LlamaConfig, {"num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True}),
    Family("mistral", MistralConfig, {"num_key_value_heads": 2, "sliding_window": 7}),
    Family("qwen2", Qwen2Config, {"num_key_value_heads": 2, "rope_theta": 1e6}),
    Family("qwen2-window", Qwen2Config, {"num_key_value_heads": 1, **UPPER_WINDOW, "tie_word_embeddings": True}),
    Family("mistral-no-window", MistralConfig, {"sliding_window": None, "head_dim": 4}),
]
# Rows end with a block of NF4, so that bitsandbytes' own product is right on every CPU, and fast on a GPU.
BLOCK_SIZES = {"hidden_size": 64, "intermediate_size": 128}
WHOLE_BLOCKS = Family("whole-blocks", LlamaConfig, BLOCK_SIZES)
BIASED_BLOCKS = [
    Family("llama-biases", LlamaConfig, {**BLOCK_SIZES, "attention_bias": True, "mlp_bias": True}),
    Family("qwen2", Qwen2Config, BLOCK_SIZES),
]
"""Families with biases, for comparisons in NF4."""
