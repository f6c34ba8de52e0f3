"""The model families that litlora supports, each as a few small configs."""

import shutil
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from helpers.reference import auto_class
from transformers import AutoConfig, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

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


# Sizes of the matrix: rows end with a block of NF4.
WHOLE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MHA, MQA, TIED, UNTIED = (
    {"num_key_value_heads": 4},
    {"num_key_value_heads": 1},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
)
WINDOW = {"sliding_window": 7}
BIASES = {"attention_bias": True}
IMAGES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
IMAGES |= {"image_size": 28, "patch_size": 14}
VISION = {
    "gemma3": {"model_type": "siglip_vision_model", **IMAGES},
    "mistral3": {"model_type": "pixtral", "head_dim": 16, **IMAGES},
}
"""The vision_config of multi-modal model types."""


@dataclass(frozen=True)
class Case:
    """A config of the matrix: its model_type, and the keys in which it differs from the small sizes."""

    name: str
    model_type: str
    keys: dict[str, Any] = field(default_factory=dict)

    def config(self) -> PretrainedConfig:
        text = WHOLE | deepcopy(self.keys)  # transformers completes the objects in it
        if self.model_type in VISION:
            text_type = text.pop("model_type")
            nested = {"text_config": {"model_type": text_type, **text}, "vision_config": VISION[self.model_type]}
            return AutoConfig.for_model(self.model_type, **nested, image_token_index=299, mm_tokens_per_image=4)
        return AutoConfig.for_model(self.model_type, **text)

    def write(self, folder: Path, tokenizer_files: Path) -> None:
        """Have transformers write a random checkpoint, in which norms and biases are random as well."""
        torch.manual_seed(0)
        model = auto_class(config := self.config()).from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data += torch.empty_like(parameter).normal_(std=0.3)
            else:
                parameter.data.normal_(std=0.08)
        model.save_pretrained(folder)
        shutil.copytree(tokenizer_files, folder, dirs_exist_ok=True)


def rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    """Return the keys of a rotary embedding."""
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 5000.0, **parameters}}


# Sequences are longer than these lengths.
ORIGINAL = {"original_max_position_embeddings": 16}
LINEAR = rope("linear", factor=2.0)
DYNAMIC = {"max_position_embeddings": 16, **rope("dynamic", factor=2.0)}
LLAMA_3 = rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, **ORIGINAL)
YARN = rope("yarn", factor=4.0, **ORIGINAL)
HALF_YARN = rope("yarn", factor=4.0, partial_rotary_factor=0.5, **ORIGINAL)
MINISTRAL = rope("yarn", factor=4.0, mscale=1.0, mscale_all_dim=0.5, llama_4_scaling_beta=0.3, **ORIGINAL)
FACTORS = {"short_factor": [1, 1.1, 1.3, 1.5, 1.5, 2, 2, 3], "long_factor": [1, 1.5, 2, 4, 5, 8, 9, 10]}
LONGROPE = rope("longrope", **FACTORS, **ORIGINAL)
MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
UPPER = {"use_sliding_window": True, "max_window_layers": 1}
NARROW, WIDE = {"head_dim": 16}, {"head_dim": 32}
NO_BIASES = {"attention_bias": False}
NO_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0}
"""bitsandbytes multiplies right in training mode alone, in which transformers would drop."""


def three(name: str, *keys: dict[str, Any]) -> list[Case]:
    """Return cases of one family, numbered."""
    return [Case(f"{name}-{number}", name.partition("-")[0], its) for number, its in enumerate(keys)]


def by_layer_type(full: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of this embedding for the layers with full attention, and a plain one for the others."""
    local = {"rope_type": "default", "rope_theta": 1000.0}
    return {"rope_parameters": {"full_attention": full["rope_parameters"], "sliding_attention": local}}


SHORT_LONGROPE = LONGROPE["rope_parameters"] | {key: factors[:6] for key, factors in FACTORS.items()}
MULTIPLIERS = {
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.3,
    "attention_multiplier": 0.9,
    "logits_scaling": 2.0,
}
GEMMA_2 = {"query_pre_attn_scalar": 24, "head_dim": 16, **WINDOW}

MATRIX = [
    *three("llama", {}, {**MHA, **TIED, **BIASES}, {**MQA, "mlp_bias": True, "head_dim": 32}),
    *three(
        "qwen3",
        {"head_dim": 32},
        {**MHA, **TIED, **BIASES, "head_dim": 16},
        {**MQA, **WINDOW, "use_sliding_window": True, "max_window_layers": 1, "head_dim": 16},
    ),
    *three("gemma", {"head_dim": 32}, {**MQA, "head_dim": 16}, {**MHA, **UNTIED, **BIASES, "head_dim": 16}),
    *three(
        "gemma2",
        {**GEMMA_2, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 2.0},
        {**GEMMA_2, **MHA, **UNTIED, "attn_logit_softcapping": 1.0, "final_logit_softcapping": None},
        {**GEMMA_2, **MQA, **BIASES, "attn_logit_softcapping": None, "layer_types": MIXED["layer_types"][::-1]},
    ),
    *three(
        "gemma3_text",
        {**GEMMA_2, "sliding_window_pattern": 2, "num_hidden_layers": 3},
        {**GEMMA_2, **MIXED, **by_layer_type(LINEAR), **MHA, **UNTIED, "final_logit_softcapping": 2.0},
        {**GEMMA_2, **MIXED, **MQA, **BIASES},
    ),
    *three("olmo", {"clip_qkv": 0.5}, {**MHA, **TIED}, {**MQA, **BIASES}),
    *three("olmo2", {}, {**MHA, **TIED}, {**MQA, **BIASES}),
    *three(
        "olmo3",
        {**WINDOW, "num_hidden_layers": 4},
        {**WINDOW, **MIXED, **by_layer_type(YARN), **MHA, **TIED},
        {**WINDOW, **MIXED, **MQA, **BIASES},
    ),
    *three("granite", MULTIPLIERS, {**MULTIPLIERS, **MHA, **TIED, **BIASES}, {**MULTIPLIERS, **MQA, "mlp_bias": True}),
    *three(
        "stablelm",
        {"qk_layernorm": True},
        {**MHA, **TIED, "use_qkv_bias": True, "use_parallel_residual": True},
        {**MQA, "partial_rotary_factor": 0.5, "use_parallel_residual": True, "qk_layernorm": True},
    ),
    *three("starcoder2", WINDOW, {**MHA, **UNTIED}, {**MQA, "use_bias": False, "hidden_act": "gelu"}),
    *three("phi", {}, {**MHA, "qk_layernorm": True, "partial_rotary_factor": 0.25}, {**MQA, **LINEAR}),
    *three(
        "phi3",
        {**LONGROPE, **ORIGINAL},
        {**MHA, **WINDOW},
        {
            **MQA,
            **TIED,
            "head_dim": 16,
            "rope_parameters": {**SHORT_LONGROPE, "partial_rotary_factor": 0.75},
            **ORIGINAL,
        },
    ),
    *three(
        "gpt_neox",
        {},
        {"use_parallel_residual": False, **TIED, "rotary_pct": 0.5},
        {"attention_bias": False, "hidden_act": "gelu_new", "rotary_pct": 1.0, "rotary_emb_base": 1000},
    ),
    Case("gemma3", "gemma3", {**GEMMA_2, **MIXED, "model_type": "gemma3_text"}),
    Case("gemma3-mha", "gemma3", {**GEMMA_2, **MIXED, **by_layer_type(LINEAR), **MHA, "model_type": "gemma3_text"}),
    Case("gemma3-mqa", "gemma3", {**GEMMA_2, **MIXED, **MQA, **BIASES, "model_type": "gemma3_text"}),
    Case("mistral3", "mistral3", {**WINDOW, "head_dim": 16, "model_type": "mistral"}),
    Case("mistral3-mha", "mistral3", {**MHA, **YARN, **NARROW, "sliding_window": None, "model_type": "mistral"}),
    Case("mistral3-mqa", "mistral3", {**MQA, **WINDOW, **LINEAR, **WIDE, "model_type": "mistral"}),
    *three("mistral", WINDOW, {**MHA, **TIED, **YARN, "sliding_window": None}, {**MQA, **WINDOW, **LINEAR, **WIDE}),
    *three("ministral3", NARROW, {**MHA, **TIED, **WINDOW, **WIDE}, {**MQA, **MINISTRAL, **NARROW}),
    *three("qwen2", LLAMA_3, {**MHA, **TIED, **WINDOW, **YARN, **UPPER}, {**MQA, **WINDOW, **UPPER, **MIXED}),
    *three("qwen2-lengths", LINEAR, {**MHA, **DYNAMIC}, {**MQA, **LONGROPE}),
    *three(
        "smollm3",
        {"no_rope_layer_interval": 2},
        {**MHA, **UNTIED, **BIASES, **YARN, "no_rope_layers": [0, 1], "mlp_bias": True},
        {**MQA, **WINDOW, "use_sliding_window": True, "no_rope_layer_interval": 2},
    ),
    *three("glm", NARROW, {**MHA, **TIED, **NO_BIASES, **WIDE}, {**MQA, **HALF_YARN, **NARROW}),
    *three("glm4", NARROW, {**MHA, **TIED, **NO_BIASES, **WIDE}, {**MQA, **HALF_YARN, **NARROW}),
    *three(
        "cohere2",
        {**WINDOW, "sliding_window_pattern": 2},
        {**MHA, **UNTIED, **BIASES, **MIXED, **WINDOW},
        {**MQA, **YARN, **WINDOW, "logit_scale": 0.5},
    ),
    *three(
        "exaone4",
        {**WINDOW, "sliding_window_pattern": 2},
        {**MHA, **TIED, "layer_types": ["full_attention"] * 2, "sliding_window": None},
        {**MQA, **WINDOW, **LLAMA_3},
    ),
    *three(
        "seed_oss",
        {**NARROW, **NO_DROPOUT},
        {**MHA, **TIED, **NO_BIASES, **WIDE, **NO_DROPOUT, "attention_out_bias": True},
        {**MQA, **YARN, **NARROW, **NO_DROPOUT, "mlp_bias": True},
    ),
]
"""Configs of each family, which together have every flag of it."""
