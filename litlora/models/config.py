"""The shape of a model, read from the checkpoint's own config.json."""

import json
import sys
from dataclasses import dataclass, fields
from typing import Any

from litlora.errors import LitLoraError

# What a file may leave unsaid, by model_type.
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
# Keys that would change the result and are implemented for one value only.
ONLY_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "rope_interleaved": False,
    "partial_rotary_factor": 1,
    "pruned_heads": {},
}
# Beyond these no model goes, and arithmetic on its shape could overflow.
MOST = 2**20
LENGTHS = ("vocab_size", "max_position_embeddings", "original_max_position_embeddings", "sliding_window")
MOST_OF = dict.fromkeys(LENGTHS, 2**31)
REASONS = {"quantization_config": "take the checkpoint that it was made from, which --quantize can quantize"}
SHOWN = 60  # characters of a value in a refusal
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# Keys that do not change what the network computes: provenance, initialisation, generation, serving.
WITHOUT_EFFECT = {
    "architectures", "bad_words_ids", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id",
    "diversity_penalty", "do_sample", "dtype", "encoder_no_repeat_ngram_size", "eos_token_id", "finetuning_task",
    "id2label", "initializer_range", "is_decoder", "is_llama_config", "label2id", "length_penalty", "max_length",
    "max_sequence_length", "min_length", "model_type", "neftune_noise_alpha", "no_repeat_ngram_size",
    "num_beam_groups", "num_beams", "num_return_sequences", "pad_token_id", "prefix", "pretraining_tp",
    "problem_type", "repetition_penalty", "return_dict", "sep_token_id", "task_specific_params", "temperature",
    "tokenizer_class", "top_k", "top_p", "torch_dtype", "transformers.js_config", "transformers_version",
    "typical_p", "unsloth_fixed", "unsloth_version", "use_cache",
}  # fmt: skip


@dataclass(frozen=True)
class Llama3Scaling:
    """Llama 3.1's stretching of the rotary wavelengths (rope_type llama3)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a Llama-style decoder; the names are those of config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Llama3Scaling | None
    sliding_window: int | None
    tie_word_embeddings: bool

    @classmethod
    def from_hub(cls, hub: dict[str, Any]) -> "GPTConfig":
        """Read the content of a config.json.

        Raises LitLoraError for a key or value that would change the result and is not implemented.
        """
        model_type = hub.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILY_DEFAULTS:
            raise _refusal("model_type", model_type, f"supported are {', '.join(FAMILY_DEFAULTS)}")
        _refuse_what_is_not_implemented(hub)
        values = FAMILY_DEFAULTS[model_type] | hub
        rope = _rope_parameters(hub)
        return cls(
            **{key: _size(values, key) for key in SIZES},
            **_heads(values),
            rms_norm_eps=_number(values, "rms_norm_eps", 1e-6),
            rope_theta=_number(rope, "rope_theta", 10000.0),
            rope_scaling=_rope_scaling(rope),
            sliding_window=_window(model_type, values),
            tie_word_embeddings=_boolean(values, "tie_word_embeddings"),
        )

    def check_ids(self, source: str, highest: int) -> None:
        """Refuse ids beyond the embedding, as of a tokenizer to which tokens were added but the weights were not."""
        if highest >= self.vocab_size:
            fault = f"{source} has the token {highest}, but the checkpoint's vocab_size is {self.vocab_size}"
            raise LitLoraError(f"{fault}: take tokenizer files and weights of one and the same model")


def _refusal(key: str, value: object, reason: str) -> LitLoraError:
    return LitLoraError(f'config.json has "{key}": {_shown(value)}, which litlora does not support: {reason}')


def _shown(value: object) -> str:
    """Write a value as the file has it, the beginning of a long one."""
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _refuse_what_is_not_implemented(hub: dict[str, Any]) -> None:
    implemented = {field.name for field in fields(GPTConfig)} | {"rope_parameters"}
    for key, value in hub.items():
        if key in implemented or key in WITHOUT_EFFECT or key.startswith("_") or value is None:
            continue
        if key in ONLY_VALUES:
            if value != ONLY_VALUES[key]:
                raise _refusal(key, value, f"only {_shown(ONLY_VALUES[key])} is implemented")
        elif value is not False:
            raise _refusal(key, value, REASONS.get(key, "this key is not implemented and may change the result"))


def _heads(values: dict[str, Any]) -> dict[str, int]:
    """Read how many heads there are and how wide one is; what is not given follows from the rest."""
    hidden_size, heads = _size(values, "hidden_size"), _size(values, "num_attention_heads")
    if values.get("head_dim") is None and hidden_size % heads:
        raise _refusal("num_attention_heads", heads, f"without head_dim it must divide hidden_size ({hidden_size})")
    derived = {"num_key_value_heads": heads, "head_dim": hidden_size // heads}
    given = {key: values[key] for key in derived if values.get(key) is not None}
    shape = {key: _size(derived | given, key) for key in derived}
    if heads % shape["num_key_value_heads"]:
        reason = f"it must divide num_attention_heads ({heads})"
        raise _refusal("num_key_value_heads", shape["num_key_value_heads"], reason)
    if shape["head_dim"] % 2:
        raise _refusal("head_dim", shape["head_dim"], "it must be even")
    return {"num_attention_heads": heads, **shape}


def _rope_parameters(hub: dict[str, Any]) -> dict[str, Any]:
    """Join the two spellings: `rope_theta` beside `rope_scaling`, or `rope_parameters`."""
    key = "rope_scaling" if hub.get("rope_scaling") else "rope_parameters"
    rope = hub.get(key) or {}
    if not isinstance(rope, dict):
        raise _refusal(key, rope, "it must be an object or null")
    theta = hub.get("rope_theta")
    return rope if theta is None else {"rope_theta": theta} | rope


def _rope_scaling(rope: dict[str, Any]) -> Llama3Scaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    keys = [field.name for field in fields(Llama3Scaling)] if rope_type == "llama3" else []
    if rope_type not in ("default", "llama3"):
        raise _refusal("rope_type", rope_type, "only default and llama3 are implemented")
    for key in sorted(rope.keys() - ROPE_KEYS - set(keys)):
        raise _refusal(key, rope[key], f"rope_type {rope_type} does not have it")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise _refusal("partial_rotary_factor", rope["partial_rotary_factor"], "only 1 is implemented")
    if rope_type == "default":
        return None
    original = _size(rope, "original_max_position_embeddings")
    factors = {key: _number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    if factors["low_freq_factor"] >= factors["high_freq_factor"]:
        raise _refusal("low_freq_factor", rope["low_freq_factor"], "it must be below high_freq_factor")
    return Llama3Scaling(**factors, original_max_position_embeddings=original)


def _window(model_type: str, values: dict[str, Any]) -> int | None:
    window = values.get("sliding_window")
    if window is not None and model_type == "llama":
        raise _refusal("sliding_window", window, "a model of the type llama has none")
    return None if window is None else _size(values, "sliding_window")


def _size(values: dict[str, Any], key: str) -> int:
    value = _given(values, key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _refusal(key, value, "it must be a whole number above 0")
    if value > (most := MOST_OF.get(key, MOST)):
        raise _refusal(key, value, f"it must be at most {most}")
    return value


def _number(values: dict[str, Any], key: str, default: float | None = None) -> float:
    value = _given({key: default} | values, key)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value <= sys.float_info.max:
        raise _refusal(key, value, "it must be a number above 0")
    return float(value)


def _given(values: dict[str, Any], key: str) -> object:
    if values.get(key) is None:
        raise LitLoraError(f'config.json has no "{key}", without which the model cannot be built')
    return values[key]


def _boolean(values: dict[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise _refusal(key, value, "it must be true or false")
    return value
