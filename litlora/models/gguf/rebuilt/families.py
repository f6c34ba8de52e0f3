"""What the config.json of each of llama.cpp's architectures has beside the sizes that all have."""

from collections.abc import Mapping
from dataclasses import dataclass, field

WINDOW, WINDOW_PATTERN = "attention.sliding_window", "attention.sliding_window_pattern"


@dataclass(frozen=True)
class HubFamily:
    """How config.json names what a file of one architecture holds."""

    name: str
    """Of its class in transformers, without what all have in common."""
    biases: Mapping[str, str] = field(default_factory=dict)
    """The flags of biases, and the tensor that is there if they are set."""
    numbers: Mapping[str, str] = field(default_factory=dict)
    """Numbers, by config.json's keys; what a file lacks is transformers' default, which is llama.cpp's."""
    ignored: tuple[str, ...] = ()
    """Keys that llama.cpp ignores."""
    model_type: str | None = None
    """The name in config.json, if it is not that of llama.cpp."""
    is_partly_rotated: bool = False
    """Whether heads may have dimensions that are not rotated."""
    has_local_rope: bool = False
    """Whether layers with a sliding window have a rotary embedding of their own."""
    scales_by_pre_attn_scalar: bool = False
    """Whether config.json says by what scores are divided, which llama.cpp knows by the number of layers."""

    @property
    def has_windows(self) -> bool:
        """Whether some of the layers can have a sliding window."""
        return WINDOW in self.numbers.values()


ATTENTION_BIAS = {"attention_bias": "blk.0.attn_q.bias"}
BIASES = {**ATTENTION_BIAS, "mlp_bias": "blk.0.ffn_up.bias"}
SOFT_CAPS = {name: name for name in ("attn_logit_softcapping", "final_logit_softcapping")}
MULTIPLIERS = {
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention.scale",
    "logits_scaling": "logit_scale",
}
WINDOWED = {"sliding_window": WINDOW}
FAMILIES = {
    "llama": HubFamily("Llama", BIASES),
    "qwen2": HubFamily("Qwen2"),
    "qwen3": HubFamily("Qwen3", ATTENTION_BIAS),
    "smollm3": HubFamily("SmolLM3", BIASES),
    "gemma": HubFamily("Gemma", ATTENTION_BIAS),
    "gemma2": HubFamily("Gemma2", ATTENTION_BIAS, {**SOFT_CAPS, **WINDOWED}, scales_by_pre_attn_scalar=True),
    "gemma3": HubFamily(
        "Gemma3",
        ATTENTION_BIAS,
        WINDOWED,
        model_type="gemma3_text",
        has_local_rope=True,
        scales_by_pre_attn_scalar=True,
    ),
    "phi3": HubFamily("Phi3", ignored=(WINDOW, WINDOW_PATTERN), is_partly_rotated=True),
    "granite": HubFamily("Granite", BIASES, MULTIPLIERS),
    "olmo2": HubFamily("Olmo2", ATTENTION_BIAS),
    "glm4": HubFamily("Glm4", ATTENTION_BIAS, is_partly_rotated=True),
    "seed_oss": HubFamily("SeedOss", BIASES | {"attention_out_bias": "blk.0.attn_output.bias"}),
}
"""The architectures whose config.json can be rebuilt."""
