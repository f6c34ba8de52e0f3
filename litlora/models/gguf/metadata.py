"""The metadata of a model: its sizes and all that llama.cpp reads of its computation."""

import math

from litlora.models.config import GPTConfig
from litlora.models.gguf.architectures import Architecture
from litlora.models.gguf.library import gguf
from litlora.models.rope_config import DynamicScaling, LinearScaling, LongRopeScaling, RopeConfig, YarnScaling
from litlora.utils.console import log


def add_metadata(writer: gguf.GGUFWriter, own: Architecture, config: GPTConfig) -> None:
    """Write the metadata of a model into a file's header."""
    add_computation(writer, own, config)
    writer.add_context_length(context_length(own, config))


def add_computation(writer: gguf.GGUFWriter, own: Architecture, config: GPTConfig) -> None:
    """Write all but the length of the context, which is no part of the network."""
    _add_sizes(writer, config)
    _add_norms_and_scales(writer, own, config)
    if own.windows is not None and config.sliding_window is not None:
        writer.add_sliding_window(config.sliding_window)
        full = config.full_attention_layers
        writer.add_sliding_window_pattern([layer not in full for layer in range(config.num_hidden_layers)])
    _add_ropes(writer, config)


def context_length(own: Architecture, config: GPTConfig) -> int:
    """Return the longest sequence for which llama.cpp computes the same network: a window that it lacks limits it."""
    dynamic = any(isinstance(rope.scaling, DynamicScaling) for rope in config.distinct_ropes)
    positions = config.max_position_embeddings if dynamic else config.positions  # up to which it is no scaling
    if config.sliding_window is None or own.windows is not None or config.sliding_window >= positions:
        return positions
    limit = config.sliding_window
    log(f"llama.cpp has no sliding window for this architecture: the context is limited to the window's {limit} tokens")
    return limit


def _add_sizes(writer: gguf.GGUFWriter, config: GPTConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)


def _add_norms_and_scales(writer: gguf.GGUFWriter, own: Architecture, config: GPTConfig) -> None:
    if config.norm == "layer_norm":
        writer.add_layer_norm_eps(config.norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.clip_qkv is not None:
        writer.add_clamp_kqv(config.clip_qkv)
    if config.attention_softcap is not None:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap is not None:
        writer.add_final_logit_softcapping(config.logit_softcap)
    if own.name == "gptneox":
        writer.add_parallel_residual(config.parallel_residual)
    if own.name == "cohere2":
        writer.add_logit_scale(config.logit_scale)
    if own.attention_scale:  # Granite, which divides by the scale of logits
        writer.add_logit_scale(1 / config.logit_scale)
        writer.add_attention_scale(config.attention_specs[0].scale)
        writer.add_embedding_scale(config.embedding_scale)
        writer.add_residual_scale(config.residual_scale)


def _add_ropes(writer: gguf.GGUFWriter, config: GPTConfig) -> None:
    """Write the rotary embedding of the layers with full attention, or of all, and the base of the others."""
    windowed, full = ([rope for layer, rope in enumerate(config.ropes) if rope and (config.window(layer) is not None)
                       is has_window] for has_window in (True, False))  # fmt: skip
    rope = next(iter(full or windowed))
    writer.add_rope_dimension_count(rope.dim)
    writer.add_rope_freq_base(rope.theta)
    if full and windowed:
        writer.add_rope_freq_base_swa(windowed[0].theta)
    _add_scaling(writer, rope, config)


def _add_scaling(writer: gguf.GGUFWriter, rope: RopeConfig, config: GPTConfig) -> None:
    kinds = gguf.RopeScalingType
    match rope.scaling:
        case LinearScaling(factor):
            writer.add_rope_scaling_type(kinds.LINEAR)
            writer.add_rope_scaling_factor(factor)
        case YarnScaling():
            _add_yarn(writer, rope.scaling)
        case LongRopeScaling():
            original = rope.scaling.original_max_position_embeddings
            log(
                f"llama.cpp takes the long rotary factors for every text if its context (-c) is above {original} tokens"
            )
            writer.add_rope_scaling_type(kinds.LONGROPE)
            writer.add_rope_scaling_orig_ctx_len(original)
            writer.add_rope_scaling_attn_factors(rope.scaling.attention_factor)
    if rope.query_scaling is not None:
        writer.add_attn_temperature_scale(rope.query_scaling.beta)
        writer.add_attn_temperature_length(rope.query_scaling.original_max_position_embeddings)


def _add_yarn(writer: gguf.GGUFWriter, yarn: YarnScaling) -> None:
    """Write YaRN; llama.cpp multiplies the factor of queries and keys by that of the paper."""
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(yarn.factor)
    writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)
    writer.add_rope_scaling_attn_factors(yarn.attention_factor / (0.1 * math.log(yarn.factor) + 1))
    writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)
