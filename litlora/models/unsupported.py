"""What of a config.json shows that its model is not a dense decoder, in the words of the refusal."""

from collections.abc import Mapping
from typing import Any

MIXTURE = "a mixture of experts"
RECURRENT = "a model with state-space, recurrent or linear-attention layers"
ENCODER = "an encoder, or an encoder with a decoder"
VISION = "a model of images, sound or video"

KINDS: dict[str, tuple[str, ...]] = {
    MIXTURE: (
        "dbrx", "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "exaone_moe", "glm4_moe", "gpt_oss", "granitemoe",
        "granitemoeshared", "jetmoe", "llama4", "llama4_text", "minimax", "mixtral", "olmoe", "phimoe", "qwen2_moe",
        "qwen3_moe", "switch_transformers",
    ),
    RECURRENT: (
        "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "mamba",
        "mamba2", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_text", "qwen3_next", "recurrent_gemma", "rwkv",
        "xlstm", "zamba", "zamba2",
    ),
    ENCODER: (
        "albert", "bart", "bert", "deberta", "deberta-v2", "distilbert", "electra", "led", "longformer",
        "m2m_100", "marian", "mbart", "modernbert", "mt5", "pegasus", "roberta", "t5", "t5gemma", "umt5", "xlm-roberta",
    ),
    VISION: (
        "clip", "clip_vision_model", "dinov2", "gemma3n", "idefics3", "llava", "llava_next", "mllama", "paligemma",
        "pixtral", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "siglip", "siglip2", "siglip_vision_model", "smolvlm", "vit",
        "wav2vec2", "whisper",
    ),
}  # fmt: skip
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def kind_of(hub: Mapping[str, Any]) -> str | None:
    """Return what kind of unsupported model a config.json describes, or None where it does not show."""
    model_type = hub.get("model_type")
    known = next((kind for kind, types in KINDS.items() if model_type in types), None)
    if known is None and any(hub.get(key) for key in EXPERTS):
        return MIXTURE
    if known is None and "vision_config" in hub:
        return VISION
    if known is None and hub.get("is_encoder_decoder") is True:
        return ENCODER
    return known
