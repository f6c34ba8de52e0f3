"""Model families: one entry per model_type of config.json.

An entry has the values of absent keys, the flags of the transformer, the keys that the family's implementation in
transformers reads and that litlora implements for one value only, and the checkpoint's names of layers. A key that
transformers does not read for a family has no effect there, and is ignored here. Nothing here needs torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from litlora.models.family import (
    Family,
    Flags,
    activation,
    flag,
    no_window,
    one_window,
    optional,
    positive,
    window_by_layer,
    window_by_pattern,
    window_of_layers_without_rope,
)
from litlora.models.hub_config import boolean, number, refusal, size
from litlora.models.layer_ropes import (
    neox_rope,
    phi3_rope,
    rope_by_layer_type,
    rope_of_listed_layers,
    rope_of_sliding_layers,
    rope_of_sliding_layers_or_all,
    rope_with_query_scaling,
)
from litlora.models.unsupported import kind_of

BIASED_ATTENTION: Flags = {"qkv_bias": flag("attention_bias"), "o_bias": flag("attention_bias")}
LAYER_NORM: Flags = {"norm": "layer_norm", "norm_bias": True, "norm_eps": positive("layer_norm_eps")}
GEMMA: Flags = {
    **BIASED_ATTENTION,
    "norm": "rms_plus_one",
    "embedding_scale": lambda values: size(values, "hidden_size") ** 0.5,
}
GEMMA_2: Flags = {
    **GEMMA,
    "activation": activation("hidden_activation"),
    "post_norms": True,
    "attention_scale": lambda values: number(values, "query_pre_attn_scalar") ** -0.5,
    "logit_softcap": optional("final_logit_softcapping"),
}
GEMMA_DEFAULTS: dict[str, Any] = {
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
OLMO_2: Flags = {**BIASED_ATTENTION, "qk_norm": "full", "pre_norms": False, "post_norms": True}
POST_NORMS = {
    "post_self_attn_layernorm": "post_attention_layernorm",
    "post_mlp_layernorm": "post_feedforward_layernorm",
}
PRE_AND_POST_NORMS = {**POST_NORMS, "post_attention_layernorm": "pre_feedforward_layernorm"}

GLM: Flags = {"qkv_bias": flag("attention_bias"), "fused_gate_up": True}
GLM_DEFAULTS: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1.5625e-07,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        defaults={"max_position_embeddings": 2048},
        windows=no_window,
        flags={**BIASED_ATTENTION, "mlp_bias": flag("mlp_bias")},
    ),
    "mistral": Family(
        defaults={"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
        windows=one_window,
    ),
    "qwen2": Family(
        defaults={
            "num_key_value_heads": 32,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        windows=window_by_layer,
        flags={"qkv_bias": True},
    ),
    "qwen3": Family(
        defaults={
            "num_key_value_heads": 32,
            "head_dim": 128,
            "max_position_embeddings": 32768,
            "sliding_window": 4096,
            "max_window_layers": 28,
        },
        windows=window_by_layer,
        flags={**BIASED_ATTENTION, "qk_norm": "head"},
    ),
    "gemma": Family(
        defaults={
            "num_key_value_heads": 16,
            "head_dim": 256,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "hidden_act": "gelu_pytorch_tanh",
        },
        windows=no_window,
        flags={**GEMMA, "activation": activation("hidden_act", {"gelu": "gelu_tanh"})},
        single_values={"use_bidirectional_attention": False},
    ),
    "gemma2": Family(
        defaults={
            **GEMMA_DEFAULTS,
            "num_key_value_heads": 4,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
        windows=window_by_pattern(2),
        flags={**GEMMA_2, "attention_softcap": optional("attn_logit_softcapping")},
        single_values={"use_bidirectional_attention": False},
        module_names=PRE_AND_POST_NORMS,
    ),
    "gemma3_text": Family(
        defaults={
            **GEMMA_DEFAULTS,
            "vocab_size": 262208,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "max_position_embeddings": 131072,
            "sliding_window_pattern": 6,
        },
        windows=window_by_pattern("sliding_window_pattern"),
        layer_ropes=rope_by_layer_type(1e6, 1e4, "rope_local_base_freq"),
        flags={**GEMMA_2, "qk_norm": "head"},
        single_values={"use_bidirectional_attention": False},
        module_names=PRE_AND_POST_NORMS,
    ),
    "olmo": Family(
        defaults={"max_position_embeddings": 2048},
        windows=no_window,
        flags={
            **BIASED_ATTENTION,
            "norm": "layer_norm",
            "norm_weight": False,
            "norm_eps": 1e-5,
            "clip_qkv": optional("clip_qkv"),
        },
    ),
    "olmo2": Family(
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
        windows=no_window,
        flags=OLMO_2,
        module_names=POST_NORMS,
    ),
    "olmo3": Family(
        defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "sliding_window": 4096},
        windows=window_by_pattern(4),
        layer_ropes=rope_by_layer_type(5e5, 5e5),
        flags=OLMO_2,
        module_names=POST_NORMS,
    ),
    "granite": Family(
        defaults={
            "max_position_embeddings": 2048,
            "embedding_multiplier": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": 1.0,
            "logits_scaling": 1.0,
        },
        windows=no_window,
        flags={
            **BIASED_ATTENTION,
            "mlp_bias": flag("mlp_bias"),
            "embedding_scale": positive("embedding_multiplier"),
            "residual_scale": positive("residual_multiplier"),
            "attention_scale": positive("attention_multiplier"),
            "logit_scale": lambda values: 1 / number(values, "logits_scaling"),
        },
    ),
    "stablelm": Family(
        defaults={
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
            "layer_norm_eps": 1e-5,
            "partial_rotary_factor": 0.25,
        },
        windows=no_window,
        dropouts=("hidden_dropout",),
        flags={
            **LAYER_NORM,
            "qkv_bias": flag("use_qkv_bias"),
            "qk_norm": lambda values: "each_head" if boolean(values, "qk_layernorm") else None,
            "shared_pre_norm": flag("use_parallel_residual"),
        },
        unread=("head_dim",),
        module_names={"q_norm": "q_layernorm", "k_norm": "k_layernorm"},
    ),
    "starcoder2": Family(
        defaults={
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "norm_epsilon": 1e-5,
            "hidden_act": "gelu_pytorch_tanh",
            "use_bias": True,
            "tie_word_embeddings": True,
        },
        windows=one_window,
        dropouts=("residual_dropout", "embedding_dropout"),
        flags={
            **LAYER_NORM,
            "norm_eps": positive("norm_epsilon"),
            "gated_mlp": False,
            "qkv_bias": flag("use_bias"),
            "o_bias": flag("use_bias"),
            "mlp_bias": flag("use_bias"),
        },
        module_names={"up_proj": "c_fc", "down_proj": "c_proj"},
    ),
    "phi": Family(
        defaults={
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu_new",
            "partial_rotary_factor": 0.5,
        },
        windows=no_window,
        dropouts=("resid_pdrop", "embd_pdrop"),
        flags={
            **LAYER_NORM,
            "gated_mlp": False,
            "qkv_bias": True,
            "o_bias": True,
            "mlp_bias": True,
            "head_bias": True,
            "qk_norm": lambda values: "head" if boolean(values, "qk_layernorm") else None,
            "shared_pre_norm": True,
        },
        module_names={
            "o_proj": "dense",
            "up_proj": "fc1",
            "down_proj": "fc2",
            "norm": "final_layernorm",
            "q_norm": "q_layernorm",
            "k_norm": "k_layernorm",
        },
    ),
    "phi3": Family(
        defaults={
            "max_position_embeddings": 4096,
            "original_max_position_embeddings": 4096,
            "rms_norm_eps": 1e-5,
            "partial_rotary_factor": 1.0,
        },
        windows=one_window,
        layer_ropes=phi3_rope,
        dropouts=("resid_pdrop",),
        flags={"fused_qkv": "rows", "fused_gate_up": True},
    ),
    "gpt_neox": Family(
        defaults={
            "max_position_embeddings": 2048,
            "layer_norm_eps": 1e-5,
            "hidden_act": "gelu",
            "partial_rotary_factor": 0.25,
            "rotary_pct": 0.25,
            "rotary_emb_base": 10000,
            "use_parallel_residual": True,
            "attention_bias": True,
        },
        windows=no_window,
        layer_ropes=neox_rope,
        dropouts=("hidden_dropout",),
        flags={
            **LAYER_NORM,
            **BIASED_ATTENTION,
            "fused_qkv": "heads",
            "gated_mlp": False,
            "mlp_bias": True,
            "parallel_residual": flag("use_parallel_residual"),
        },
        unread=("head_dim", "num_key_value_heads"),
        module_names={
            "model": "gpt_neox",
            "embed_tokens": "embed_in",
            "norm": "final_layer_norm",
            "self_attn": "attention",
            "qkv_proj": "query_key_value",
            "o_proj": "dense",
            "up_proj": "dense_h_to_4h",
            "down_proj": "dense_4h_to_h",
        },
        file_names=(("embed_out.", "lm_head."),),
        unused=r"\.attention\.(bias|masked_bias)$",
    ),
    "ministral3": Family(
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
        },
        windows=one_window,
        layer_ropes=rope_with_query_scaling,
    ),
    "smollm3": Family(
        defaults={
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "rope_theta": 2000000.0,
            "no_rope_layer_interval": 4,
            "tie_word_embeddings": True,
        },
        windows=window_of_layers_without_rope,
        layer_ropes=rope_of_listed_layers,
        flags={**BIASED_ATTENTION, "mlp_bias": flag("mlp_bias")},
    ),
    "glm": Family(
        defaults=GLM_DEFAULTS,
        windows=no_window,
        interleaved_rope=True,
        flags=GLM,
    ),
    "glm4": Family(
        defaults=GLM_DEFAULTS,
        windows=no_window,
        interleaved_rope=True,
        flags={**GLM, "post_norms": True},
    ),
    "cohere2": Family(
        defaults={
            "max_position_embeddings": 8192,
            "layer_norm_eps": 1e-5,
            "logit_scale": 0.0625,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
            "tie_word_embeddings": True,
        },
        windows=window_by_pattern("sliding_window_pattern"),
        layer_ropes=rope_of_sliding_layers,
        interleaved_rope=True,
        flags={
            **BIASED_ATTENTION,
            **LAYER_NORM,
            "norm_bias": False,
            "shared_pre_norm": True,
            "logit_scale": positive("logit_scale"),
        },
    ),
    "exaone4": Family(
        defaults={
            "num_key_value_heads": 32,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        windows=window_by_pattern("sliding_window_pattern"),
        layer_ropes=rope_of_sliding_layers_or_all,
        flags={"qk_norm": "head", "pre_norms": False, "post_norms": True},
        module_names=POST_NORMS,
    ),
    "seed_oss": Family(
        defaults={
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 524288,
            "attention_bias": True,
            "attention_dropout": 0.1,
            "residual_dropout": 0.1,
        },
        windows=no_window,
        dropouts=("residual_dropout",),
        flags={
            "qkv_bias": flag("attention_bias"),
            "o_bias": flag("attention_out_bias"),
            "mlp_bias": flag("mlp_bias"),
        },
    ),
}


LLAVA_FILES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("language_model.", "model.language_model."),
)
VISION = "vision_tower", "multi_modal_projector"


@dataclass(frozen=True)
class MultiModal:
    """A model_type whose text model is nested in the config, and is loaded alone."""

    text_type: str
    """The model_type of a text_config that has none."""
    tie_word_embeddings: bool
    """What a config.json without the key means."""


MULTI_MODAL = {"gemma3": MultiModal("gemma3_text", True), "mistral3": MultiModal("mistral", False)}


DENSE = "and only dense decoders are implemented: choose one, such as a Llama, Qwen or Gemma model"


def family_of(hub: Mapping[str, Any]) -> tuple[Family, Mapping[str, Any]]:
    """Return the family of a config.json, and the keys of its text model."""
    model_type = hub.get("model_type")
    if isinstance(model_type, str) and model_type in MULTI_MODAL:
        return _text_family(hub, MULTI_MODAL[model_type])
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        kind, names = kind_of(hub), ", ".join(SUPPORTED)
        raise refusal("model_type", model_type, f"it is {kind}, {DENSE}" if kind else f"supported are {names}")
    return FAMILIES[model_type], hub


SUPPORTED = (*FAMILIES, *MULTI_MODAL)


def _text_family(hub: Mapping[str, Any], multi_modal: MultiModal) -> tuple[Family, Mapping[str, Any]]:
    """Return the family of a nested text_config, under the names that a multi-modal model has for its modules."""
    text = hub.get("text_config")
    if not isinstance(text, dict):
        raise refusal("text_config", text, "it must be an object")
    tied = {"tie_word_embeddings": multi_modal.tie_word_embeddings}
    outer = {key: hub[key] for key in ("tie_word_embeddings", "quantization_config") if hub.get(key) is not None}
    family, values = family_of({"model_type": multi_modal.text_type} | tied | text | outer)
    names = dict(family.module_names) | {"model": "model.language_model"}
    return replace(family, module_names=names, file_names=LLAVA_FILES, left_out=VISION), values
