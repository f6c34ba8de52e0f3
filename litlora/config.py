"""The shape of a model, read from the checkpoint's own config.json."""

from dataclasses import dataclass, fields
from typing import Any

from litlora.errors import LitLoraError

# What a file may leave unsaid, by model_type; None stands for "derived from the other keys".
FAMILY_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048, "sliding_window": None},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
# Keys that would change the result and are implemented for one value only.
ONLY_VALUES: dict[str, Any] = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0,
    "rope_interleaved": False,
    "partial_rotary_factor": 1,
}
ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
# Keys that do not change what the network computes: provenance, initialisation, generation, serving.
WITHOUT_EFFECT = {
    "architectures", "bad_words_ids", "bos_token_id", "chunk_size_feed_forward", "decoder_start_token_id",
    "do_sample", "dtype", "eos_token_id", "finetuning_task", "id2label", "initializer_range", "is_decoder",
    "label2id", "length_penalty", "max_length", "max_sequence_length", "min_length", "model_type", "num_beams",
    "pad_token_id", "prefix", "pretraining_tp", "problem_type", "repetition_penalty", "return_dict", "sep_token_id",
    "task_specific_params", "temperature", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "transformers.js_config", "transformers_version", "unsloth_fixed", "unsloth_version", "use_cache",
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
        values = {key: value for key, value in hub.items() if value is not None or key == "sliding_window"}
        values = FAMILY_DEFAULTS[model_type] | values
        sizes = {key: _size(values, key) for key in (*SIZES, "max_position_embeddings")}
        rope = _rope_parameters(hub)
        heads = sizes["num_attention_heads"]
        config = cls(
            **sizes,
            num_key_value_heads=_size({"num_key_value_heads": heads} | _known(values), "num_key_value_heads"),
            head_dim=_size({"head_dim": sizes["hidden_size"] // heads} | values, "head_dim"),
            rms_norm_eps=_number(values, "rms_norm_eps", 1e-6),
            rope_theta=_number(rope, "rope_theta", 10000.0),
            rope_scaling=_rope_scaling(rope),
            sliding_window=_size(values, "sliding_window") if values["sliding_window"] is not None else None,
            tie_word_embeddings=_boolean(values, "tie_word_embeddings"),
        )
        if heads % config.num_key_value_heads:
            raise _refusal("num_key_value_heads", config.num_key_value_heads, f"must divide {heads} heads")
        if config.head_dim % 2:
            raise _refusal("head_dim", config.head_dim, "must be even")
        return config


def _known(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _refusal(key: str, value: object, reason: str) -> LitLoraError:
    return LitLoraError(f'config.json has "{key}": {value!r}, which litlora does not support: {reason}')


def _refuse_what_is_not_implemented(hub: dict[str, Any]) -> None:
    implemented = {field.name for field in fields(GPTConfig)} | {"rope_parameters"}
    for key, value in hub.items():
        if key in implemented or key in WITHOUT_EFFECT or key.startswith("_") or value is None:
            continue
        if key in ONLY_VALUES:
            if value != ONLY_VALUES[key]:
                raise _refusal(key, value, f"only {ONLY_VALUES[key]!r} is implemented")
        elif value is not False:
            raise _refusal(key, value, "this key is not implemented and may change the result")


def _rope_parameters(hub: dict[str, Any]) -> dict[str, Any]:
    """Join the two spellings: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    rope: dict[str, Any] = {}
    if hub.get("rope_theta") is not None:
        rope["rope_theta"] = hub["rope_theta"]
    for key in ("rope_scaling", "rope_parameters"):
        value = hub.get(key)
        if value is not None and not isinstance(value, dict):
            raise _refusal(key, value, "it must be an object or null")
        rope |= value or {}
    return rope


def _rope_scaling(rope: dict[str, Any]) -> Llama3Scaling | None:
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    keys = [field.name for field in fields(Llama3Scaling)] if rope_type == "llama3" else []
    if rope_type not in ("default", "llama3"):
        raise _refusal("rope_type", rope_type, "only default and llama3 are implemented")
    for key in rope.keys() - ROPE_KEYS - set(keys):
        raise _refusal(key, rope[key], f"rope_type {rope_type} does not have it")
    if rope.get("partial_rotary_factor", 1) != 1:
        raise _refusal("partial_rotary_factor", rope["partial_rotary_factor"], "only 1 is implemented")
    if rope_type == "default":
        return None
    original = _size(rope, "original_max_position_embeddings")
    factors = {key: _number(rope, key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    return Llama3Scaling(**factors, original_max_position_embeddings=original)


def _size(values: dict[str, Any], key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise _refusal(key, value, "it must be a whole number above 0")
    return value


def _number(values: dict[str, Any], key: str, default: float | None = None) -> float:
    value = values.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise _refusal(key, value, "it must be a number above 0")
    return float(value)


def _boolean(values: dict[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise _refusal(key, value, "it must be true or false")
    return value
