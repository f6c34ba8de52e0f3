import json
from copy import deepcopy
from dataclasses import MISSING, fields
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from litlora.errors import LitLoraError
from litlora.models.config import GPTConfig
from litlora.models.families import FAMILIES, SUPPORTED
from litlora.models.family import ACTIVATIONS
from litlora.models.rope_config import Llama3Scaling, RopeConfig

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
FACTORS = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}

MIXED = ["sliding_attention", "full_attention"]
ONLY_FACTORS = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

# config.json of published models.
PUBLISHED = {
    "Llama-1-7B": """{"architectures": ["LLaMAForCausalLM"], "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu",
"hidden_size": 4096, "intermediate_size": 11008, "initializer_range": 0.02, "max_sequence_length": 2048,
"model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "pad_token_id": -1, "rms_norm_eps": 1e-06,
"torch_dtype": "float16", "transformers_version": "4.27.0.dev0", "use_cache": true, "vocab_size": 32000}""",
    "Llama-2-7B": """{"_name_or_path": "meta-llama/Llama-2-7b-hf", "architectures": ["LlamaForCausalLM"],
"bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
"initializer_range": 0.02, "intermediate_size": 11008,
"max_position_embeddings": 4096, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
"num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
"tie_word_embeddings": false, "torch_dtype": "float16", "transformers_version": "4.31.0.dev0", "use_cache": true,
"vocab_size": 32000}""",
    "Llama-3.1-8B": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
"initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false,
"model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0, "low_freq_factor": 1.0,
"high_freq_factor": 4.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
"tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.42.3", "use_cache": true,
"vocab_size": 128256}""",
    "Llama-3.2-1B": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 128000, "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
"initializer_range": 0.02, "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false,
"model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8,
"pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0,
"low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}, "rope_theta": 500000.0,
"tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.45.0.dev0", "use_cache": true,
"vocab_size": 128256}""",
    "TinyLlama-1.1B": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1,
"eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 5632,
"max_position_embeddings": 2048, "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22,
"num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 10000.0,
"tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.35.0", "use_cache": true,
"vocab_size": 32000}""",
    "SmolLM2-135M": """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
"bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 576,
"initializer_range": 0.041666666666666664, "intermediate_size": 1536, "is_llama_config": true,
"max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 9,
"num_hidden_layers": 30, "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
"rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true,
"torch_dtype": "bfloat16", "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
"transformers_version": "4.42.3", "use_cache": true, "vocab_size": 49152}""",
    "Mistral-7B-v0.1": """{"architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
"hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
"max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
"num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
"tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": true,
"vocab_size": 32000}""",
    "Mistral-7B-v0.3": """{"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1,
"eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
"max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
"num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": null,
"tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.42.0.dev0", "use_cache": true,
"vocab_size": 32768}""",
    "Qwen2.5-0.5B": """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
"eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
"max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
"num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
"sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
"use_cache": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}""",
    "Qwen2.5-7B-Instruct": """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
"eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
"intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
"num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
"rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
"transformers_version": "4.43.1", "use_cache": true, "use_sliding_window": false, "vocab_size": 152064}""",
}

# The keys of published models of other families, without those that no implementation reads.
OTHERS = {
    "Phi-2": """{"attention_dropout": 0.0, "bos_token_id": 50256, "embd_pdrop": 0.0, "hidden_act": "gelu_new",
"hidden_size": 2560, "intermediate_size": 10240, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
"model_type": "phi", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
"partial_rotary_factor": 0.4, "qk_layernorm": false, "resid_pdrop": 0.1, "rope_scaling": null, "rope_theta": 10000.0,
"tie_word_embeddings": false, "vocab_size": 51200}""",
    "Phi-3-mini-4k": """{"attention_bias": false, "attention_dropout": 0.0, "embd_pdrop": 0.0, "hidden_act": "silu",
"hidden_size": 3072, "intermediate_size": 8192, "max_position_embeddings": 4096, "model_type": "phi3",
"num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
"original_max_position_embeddings": 4096, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05, "rope_scaling": null,
"rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": false, "vocab_size": 32064}""",
    "Gemma-2B": """{"attention_bias": false, "attention_dropout": 0.0, "head_dim": 256, "hidden_act": "gelu",
"hidden_size": 2048, "intermediate_size": 16384, "max_position_embeddings": 8192, "model_type": "gemma",
"num_attention_heads": 8, "num_hidden_layers": 18, "num_key_value_heads": 1, "rms_norm_eps": 1e-06,
"rope_scaling": null, "rope_theta": 10000.0, "vocab_size": 256000}""",
    "Gemma-2-2B": """{"attention_bias": false, "attention_dropout": 0.0, "attn_logit_softcapping": 50.0,
"cache_implementation": "hybrid", "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
"hidden_activation": "gelu_pytorch_tanh", "hidden_size": 2304, "intermediate_size": 9216,
"max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8, "num_hidden_layers": 26,
"num_key_value_heads": 4, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
"sliding_window": 4096, "vocab_size": 256000}""",
    "Gemma-3-1B": """{"attention_bias": false, "attention_dropout": 0.0, "attn_logit_softcapping": null,
"cache_implementation": "hybrid", "final_logit_softcapping": null, "head_dim": 256,
"hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
"max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
"num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
"rope_scaling": null, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
"vocab_size": 262144}""",
    "Gemma-3-4B": """{"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 255999,
"eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144, "mm_tokens_per_image": 256,
"model_type": "gemma3", "text_config": {"hidden_size": 2560, "intermediate_size": 10240, "model_type": "gemma3_text",
"num_hidden_layers": 34, "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
"vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
"model_type": "siglip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14}}""",
    "Qwen3-0.6B": """{"attention_bias": false, "attention_dropout": 0.0, "head_dim": 128, "hidden_act": "silu",
"hidden_size": 1024, "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
"model_type": "qwen3", "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
"rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null,
"tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936}""",
    "OLMo-1B": """{"attention_bias": false, "attention_dropout": 0.0, "clip_qkv": null, "hidden_act": "silu",
"hidden_size": 2048, "intermediate_size": 8192, "max_position_embeddings": 2048, "model_type": "olmo",
"num_attention_heads": 16, "num_hidden_layers": 16, "num_key_value_heads": 16, "rope_scaling": null,
"rope_theta": 10000.0, "tie_word_embeddings": true, "vocab_size": 50304}""",
    "OLMo-3-7B": """{"attention_bias": false, "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 4096,
"intermediate_size": 11008, "max_position_embeddings": 65536, "model_type": "olmo3", "num_attention_heads": 32,
"num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-06, "rope_scaling": {"attention_factor":
1.2079441541679836, "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0, "original_max_position_embeddings": 8192,
"rope_type": "yarn"}, "rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": false,
"vocab_size": 100278}""",
    "Granite-3.1-2B": """{"attention_bias": false, "attention_dropout": 0.1, "attention_multiplier": 0.015625,
"embedding_multiplier": 12.0, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
"logits_scaling": 8.0, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "granite",
"num_attention_heads": 32, "num_hidden_layers": 40, "num_key_value_heads": 8, "residual_multiplier": 0.22,
"rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 5000000.0, "tie_word_embeddings": true,
"vocab_size": 49155}""",
    "StableLM-2-1.6B": """{"attention_dropout": 0.0, "hidden_act": "silu", "hidden_dropout": 0.0, "hidden_size": 2048,
"intermediate_size": 5632, "layer_norm_eps": 1e-05, "max_position_embeddings": 4096, "model_type": "stablelm",
"num_attention_heads": 32, "num_hidden_layers": 24, "num_key_value_heads": 32, "partial_rotary_factor": 0.25,
"qk_layernorm": false, "rope_scaling": null, "rope_theta": 10000, "tie_word_embeddings": false,
"use_parallel_residual": false, "use_qkv_bias": true, "vocab_size": 100352}""",
    "StarCoder2-3B": """{"attention_dropout": 0.1, "embedding_dropout": 0.1, "hidden_act": "gelu_pytorch_tanh",
"hidden_size": 3072, "intermediate_size": 12288, "layer_norm_epsilon": 1e-05, "max_position_embeddings": 16384,
"mlp_type": "default", "model_type": "starcoder2", "norm_epsilon": 1e-05, "norm_type": "layer_norm",
"num_attention_heads": 24, "num_hidden_layers": 30, "num_key_value_heads": 2, "residual_dropout": 0.1,
"rope_theta": 999999.4420358813, "sliding_window": 4096, "use_bias": true, "vocab_size": 49152}""",
    "Pythia-160M": """{"hidden_act": "gelu", "hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-05,
"max_position_embeddings": 2048, "model_type": "gpt_neox", "num_attention_heads": 12, "num_hidden_layers": 12,
"rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": false, "use_parallel_residual": true,
"vocab_size": 50304}""",
}


def theirs(hub: dict[str, Any]) -> GPTConfig:
    """Return the shape that transformers reads from the same config.json, and the flags of the model that it builds."""
    config = AutoConfig.for_model(**json.loads(json.dumps(hub)))
    with torch.device("meta"):
        layers = AutoModelForCausalLM.from_config(config).model.layers
    rope = config.rope_parameters
    scaling = Llama3Scaling(**{key: rope[key] for key in FACTORS}) if rope["rope_type"] == "llama3" else None
    windows = [layer_window(config, layer.self_attn) for layer in layers]
    window = next((window for window in windows if window), None)
    attention, mlp = layers[0].self_attn, layers[0].mlp
    special = {
        "ropes": (RopeConfig(rope["rope_theta"], attention.head_dim, scaling),) * len(layers),
        "sliding_window": window,
        "full_attention_layers": tuple(i for i, its in enumerate(windows) if window and not its),
        "qkv_bias": attention.q_proj.bias is not None,
        "o_bias": attention.o_proj.bias is not None,
        "mlp_bias": mlp.down_proj.bias is not None,
    }
    special |= {"head_dim": attention.head_dim, "norm_eps": config.rms_norm_eps}  # not every config has a head_dim
    names = {field.name for field in fields(GPTConfig) if field.default is MISSING} - special.keys()
    return GPTConfig(**{name: getattr(config, name) for name in names}, **special)


def layer_window(config: PretrainedConfig, attention: nn.Module) -> int | None:
    """Return the sliding window that a layer of transformers has, by itself or by its config."""
    return getattr(attention, "sliding_window", getattr(config, "sliding_window", None))


@pytest.mark.parametrize("hub", [json.loads(text) for text in PUBLISHED.values()], ids=PUBLISHED)
def test_published_config_is_read_as_in_transformers(hub):
    assert GPTConfig.from_hub(hub) == theirs(hub)


@pytest.mark.parametrize("hub", [json.loads(text) for text in (PUBLISHED | OTHERS).values()], ids=PUBLISHED | OTHERS)
def test_config_rewritten_by_transformers_is_equal(hub):
    """It has the values of keys that the original leaves out, and rotary embeddings in the newer spelling."""
    rewritten = json.loads(AutoConfig.for_model(**deepcopy(hub)).to_json_string(use_diff=False))
    assert rewritten.get("text_config", rewritten)["rope_parameters"]
    assert GPTConfig.from_hub(rewritten) == GPTConfig.from_hub(hub)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_default_of_every_key_is_that_of_transformers(model_type):
    sizes = {"hidden_size": 512, "num_attention_heads": 32, "num_hidden_layers": 8}  # heads of all defaults divide 32
    hub = TINY | sizes | {"model_type": model_type}
    rewritten = json.loads(AutoConfig.for_model(**hub).to_json_string(use_diff=False))
    assert GPTConfig.from_hub(rewritten) == GPTConfig.from_hub(hub)


@pytest.mark.parametrize(
    "hub",
    [
        {"model_type": "llama"},
        {"model_type": "llama", "num_key_value_heads": None, "head_dim": None},
        {"model_type": "mistral", "num_attention_heads": 16},
        {"model_type": "mistral", "num_attention_heads": 16, "head_dim": None},
        {"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None},
        {"model_type": "llama", "num_key_value_heads": 1, "head_dim": 16},
        {"model_type": "llama", "rope_theta": 5000},
        {"model_type": "llama", "rope_theta": 5000.0, "rope_scaling": {"type": "llama3", **FACTORS}},
        {"model_type": "llama", "rope_theta": 5000.0, "rope_scaling": {"rope_type": "llama3", **FACTORS}},
        {"model_type": "llama", "rope_theta": 5000.0, "rope_scaling": {"rope_type": "default"}},
        {"model_type": "llama", "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}},
        {"model_type": "llama", "rope_parameters": {"rope_theta": 5000.0, "rope_type": "llama3", **FACTORS}},
        {"model_type": "llama", "rope_theta": 7.0, "rope_parameters": {"rope_theta": 5000.0, "rope_type": "default"}},
        {"model_type": "llama", "rope_scaling": {"type": "llama3", **FACTORS}, "rope_parameters": {"rope_theta": 7.0}},
        {"model_type": "llama", "rope_scaling": ONLY_FACTORS},
        {"model_type": "llama", "rope_scaling": ONLY_FACTORS, "original_max_position_embeddings": 64},
        {"model_type": "llama", "rope_scaling": {"type": "llama3", **FACTORS}, "original_max_position_embeddings": 64},
        {"model_type": "llama", "attention_bias": True},
        {"model_type": "llama", "mlp_bias": True},
        {"model_type": "llama", "layer_types": ["full_attention", "attention"]},
        {"model_type": "mistral", "num_key_value_heads": 2, "attention_bias": True, "mlp_bias": True},
        {"model_type": "qwen2", "hidden_size": 64, "num_attention_heads": 32},
        {"model_type": "qwen2", "num_key_value_heads": None, "head_dim": 16},
        {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True},
        {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 0},
        {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 1},
        {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "sliding_window": None},
        {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "layer_types": MIXED},
        {"model_type": "qwen2", "num_key_value_heads": 2, "attention_bias": False, "mlp_bias": True},
        {"model_type": "mistral", "num_key_value_heads": 2, "use_sliding_window": False, "max_window_layers": 1},
    ],
    ids=str,
)
def test_absent_keys_have_the_values_of_transformers(hub):
    assert GPTConfig.from_hub(TINY | hub) == theirs(TINY | hub)


# Keys of published checkpoints that the implementations in transformers do not read, or that have no effect.
IGNORED = {
    "license": "mit",
    "auto_map": {"AutoConfig": "x.Y"},
    "classifier_dropout": 0.1,
    "use_sdpa": True,
    "gradient_checkpointing": True,
    "model_max_length": 4096,
    "rope_interleaved": True,
    "pruned_heads": {"0": [1]},
    "use_cache": False,
    "torch_dtype": "float16",
    "a_key_of_the_future": 0,
    "attention_dropout": 0.0,
    "quantization_config": None,
}


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("key", IGNORED)
def test_key_that_transformers_does_not_read_is_ignored(key, model_type):
    hub = TINY | {"model_type": model_type, "num_key_value_heads": 4}
    assert GPTConfig.from_hub(hub | {key: IGNORED[key]}) == GPTConfig.from_hub(hub)


QUANTIZED = "use the checkpoint that it was made from, which --quantize can quantize"
INTEGER = "it must be a whole number above 0"
NUMBER = "it must be a number above 0"


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("model_type", "gpt2", f"supported are {', '.join(SUPPORTED)}"),
        ("model_type", None, f"supported are {', '.join(SUPPORTED)}"),
        ("model_type", ["llama"], f"supported are {', '.join(SUPPORTED)}"),
        ("hidden_act", "relu", f"implemented are {', '.join(ACTIVATIONS)}"),
        ("attention_bias", "yes", "it must be true or false"),
        ("mlp_bias", 1, "it must be true or false"),
        ("is_causal", False, "only true is implemented"),
        ("per_layer_config", {"0": {"head_dim": 4}}, "only {} is implemented"),
        ("attention_chunk_size", 8, "only null is implemented"),
        ("partial_rotary_factor", 0.5, "only 1 is implemented"),
        ("layer_types", ["sliding_attention"] * 2, "a model of the type llama has no sliding window"),
        ("layer_types", ["full_attention"], "it must have num_hidden_layers (2) entries"),
        ("layer_types", ["linear_attention"] * 2, "it must be a list of full_attention and sliding_attention"),
        ("layer_types", "full_attention", "it must be a list of full_attention and sliding_attention"),
        ("sliding_window", 4096, "a model of the type llama has none"),
        ("quantization_config", {"quant_method": "gptq"}, QUANTIZED),
        ("num_attention_heads", 5, "without head_dim it must divide hidden_size (32)"),
        ("num_key_value_heads", 3, "it must divide num_attention_heads (4)"),
        ("num_key_value_heads", 8, "it must divide num_attention_heads (4)"),
        ("head_dim", 7, "it must be even"),
        ("vocab_size", 0, INTEGER),
        ("hidden_size", -32, INTEGER),
        ("num_hidden_layers", True, INTEGER),
        ("intermediate_size", "48", INTEGER),
        ("num_attention_heads", 4.0, INTEGER),
        ("max_position_embeddings", 0, INTEGER),
        ("head_dim", 0, INTEGER),
        ("num_key_value_heads", 0, INTEGER),
        ("rms_norm_eps", 0, NUMBER),
        ("rms_norm_eps", "1e-6", NUMBER),
        ("rope_theta", True, NUMBER),
        ("rope_theta", -1.0, NUMBER),
        ("tie_word_embeddings", 1, "it must be true or false"),
        ("rope_scaling", "llama3", "it must be an object or null"),
    ],
)
def test_unimplemented_value_is_refused_by_key(key, value, reason):
    with pytest.raises(LitLoraError) as refused:
        GPTConfig.from_hub(TINY | {"model_type": "llama", key: value})
    written = json.dumps(value)
    assert str(refused.value) == f'config.json has "{key}": {written}, which litlora does not support: {reason}'


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("layer_types", MIXED, "there is no sliding window without use_sliding_window and sliding_window"),
        ("layer_types", [*MIXED, MIXED[0]], "it must have num_hidden_layers (2) entries"),
        ("layer_types", ["chunked_attention"] * 2, "it must be a list of full_attention and sliding_attention"),
        ("use_sliding_window", 1, "it must be true or false"),
    ],
)
def test_unimplemented_window_is_refused_by_key(key, value, reason):
    with pytest.raises(LitLoraError) as refused:
        GPTConfig.from_hub(TINY | {"model_type": "qwen2", "num_key_value_heads": 2, key: value})
    written = json.dumps(value)
    assert str(refused.value) == f'config.json has "{key}": {written}, which litlora does not support: {reason}'


@pytest.mark.parametrize("first", [-1, 0.5, None, True])
def test_first_window_layer_must_be_an_integer(first):
    hub = TINY | {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True}
    with pytest.raises(LitLoraError, match=r'^config\.json has "max_window_layers": '):
        GPTConfig.from_hub(hub | {"max_window_layers": first})


@pytest.mark.parametrize(
    ("rope", "fault"),
    [
        ({"type": "linear", "factor": 2.0, "beta_fast": 1}, '"beta_fast": 1'),
        ({"type": "dynamic", "factor": -2.0}, '"factor": -2.0'),
        ({"rope_type": "yarn", "factor": 2.0, "truncate": 1}, '"truncate": 1'),
        ({"rope_type": "longrope", "long_factor": [1.0], "short_factor": [1.0]}, '"short_factor": [1.0]'),
        ({"rope_type": "longrope", "long_factor": [1.0] * 4, "short_factor": [0.0] * 4}, '"short_factor": 0.0'),
        ({"rope_type": "mrope"}, '"rope_type": "mrope"'),
        ({"rope_type": "of the future"}, '"rope_type": "of the future"'),
        ({"rope_type": ["llama3"]}, '"rope_type": ["llama3"]'),
        ({"rope_type": "default", "factor": 2.0}, '"factor": 2.0'),
        ({"rope_type": "default", "partial_rotary_factor": 0.5}, '"partial_rotary_factor": 0.5'),
        ({"rope_type": "llama3", **FACTORS, "attention_factor": 1.0}, '"attention_factor": 1.0'),
        ({"rope_type": "llama3", **FACTORS, "factor": "8"}, '"factor": "8"'),
        ({"rope_type": "llama3", **FACTORS, "low_freq_factor": 4.0}, '"low_freq_factor": 4.0'),
        ({"rope_type": "llama3", **FACTORS, "original_max_position_embeddings": 8192.0},
         '"original_max_position_embeddings": 8192.0'),
        ({"full_attention": {"rope_type": "default"}}, '"full_attention": {"rope_type": "default"}'),
    ],
)  # fmt: skip
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_unimplemented_rope_is_refused_by_key(key, rope, fault):
    with pytest.raises(LitLoraError) as refused:
        GPTConfig.from_hub(TINY | {"model_type": "llama", key: rope})
    assert str(refused.value).startswith(f"config.json has {fault}, which litlora does not support: ")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("key", ["rms_norm_eps", "rope_theta", "hidden_size"])
def test_nan_and_infinity_are_refused(key, number):
    hub = TINY | {"model_type": "llama"} | json.loads(f'{{"{key}": {number}}}')
    with pytest.raises(LitLoraError, match=f'^config.json has "{key}": {number}, '):
        GPTConfig.from_hub(hub)


@pytest.mark.parametrize("key", TINY)
def test_missing_size_is_named(key):
    with pytest.raises(LitLoraError) as refused:
        GPTConfig.from_hub({"model_type": "llama"} | {name: size for name, size in TINY.items() if name != key})
    assert str(refused.value) == f'config.json has no "{key}", without which the model cannot be built'


def test_long_value_is_cut_off():
    hub = {"quant_method": "bitsandbytes", "modules": [f"model.layers.{i}.mlp" for i in range(1000)]}
    with pytest.raises(LitLoraError) as refused:
        GPTConfig.from_hub(TINY | {"model_type": "llama", "quantization_config": hub})
    shown = '"quantization_config": {"quant_method": "bitsandbytes", "modules": ["model.layers.0...'
    assert str(refused.value) == f"config.json has {shown}, which litlora does not support: {QUANTIZED}"
