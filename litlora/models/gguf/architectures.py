"""What llama.cpp computes for each family, and the refusal of a config for which that is another network.

A GGUF file names an architecture of llama.cpp, whose code decides all that the metadata does not say: the order in
which rotary dimensions are paired, which biases exist, whether there is a sliding window.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from litlora.errors import LitLoraError
from litlora.models.config import GPTConfig
from litlora.models.families import MULTI_MODAL
from litlora.models.layer_ropes import listed_layers
from litlora.models.rope_config import Llama3Scaling, LongRopeScaling, YarnScaling


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp's implementation of an architecture takes."""

    name: str
    """In a GGUF file."""
    interleaved: bool = False
    """Whether neighbouring dimensions are rotated together; the rows of queries and keys follow from it."""
    biases: tuple[str, ...] = ("qkv_bias",)
    """The flags of biases that may be set."""
    windows: int | None = None
    """Every n-th layer has full attention where the file does not say; None for no sliding window at all."""
    rope_factors: bool = False
    """Whether a file may have a divisor for each rotary frequency."""
    long_factors: bool = False
    """Whether it may have two lists of them, for short and long sequences."""
    attention_scale: bool = False
    """Whether the file says what scores are multiplied by."""
    own_head: bool | None = None
    """True if there must be an output head even where it is tied, False if there can be none of its own."""
    check: Callable[[GPTConfig], str | None] = lambda config: None
    """Returns what of a config the implementation lacks."""


ALL_BIASES = ("qkv_bias", "o_bias", "mlp_bias")


def _gemma_scale(config: GPTConfig) -> str | None:
    """Large Gemma 2 and 3 scale by width / heads, as the number of layers tells llama.cpp; the others by head_dim."""
    width = config.hidden_size // config.num_attention_heads if config.num_hidden_layers in (46, 62) else None
    expected = (config.head_dim if width is None else width) ** -0.5
    scale = config.attention_scale or config.head_dim**-0.5
    return None if abs(scale / expected - 1) < 1e-6 else "query_pre_attn_scalar other than head_dim"


def _every_fourth_without_rope(config: GPTConfig) -> str | None:
    expected = listed_layers({"no_rope_layer_interval": 4}, config.num_hidden_layers)
    same = [rope is not None for rope in config.ropes] == expected
    return None if same else "layers without a rotary embedding other than every fourth"


def _no_norms_of_heads(config: GPTConfig) -> str | None:
    return "norms of queries and keys" if config.qk_norm else None


def _gemma_2(config: GPTConfig) -> str | None:
    if config.logit_softcap is None or config.attention_softcap is None:
        return "scores or logits without a soft cap"
    return _gemma_scale(config)


def _gemma_3(config: GPTConfig) -> str | None:
    return "a soft cap of logits" if config.logit_softcap is not None else _gemma_scale(config)


def _olmo_3(config: GPTConfig) -> str | None:
    bases = {rope.theta for rope in config.distinct_ropes}
    return None if len(bases) == 1 else "rotary bases that differ between layers"


def _exaone_window(config: GPTConfig) -> str | None:
    """llama.cpp has the window of EXAONE 4 for its 64 layers alone."""
    has_window = config.sliding_window is not None
    return None if has_window == (config.num_hidden_layers == 64) else "this number of layers with this sliding window"


LLAMA = Architecture("llama", True, ALL_BIASES, rope_factors=True, long_factors=True)
ARCHITECTURES: dict[str, Architecture] = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3"),
    "gemma": Architecture("gemma", own_head=False),
    "gemma2": Architecture("gemma2", windows=2, own_head=False, check=_gemma_2),
    "gemma3_text": Architecture("gemma3", windows=6, check=_gemma_3),
    "olmo": Architecture("olmo", True),
    "olmo2": Architecture("olmo2", own_head=True),
    "olmo3": Architecture("olmo2", windows=4, own_head=True, check=_olmo_3),
    "granite": Architecture("granite", True, ALL_BIASES, rope_factors=True, long_factors=True, attention_scale=True),
    "stablelm": Architecture("stablelm", own_head=True),
    "starcoder2": Architecture("starcoder2", biases=ALL_BIASES),
    "phi": Architecture("phi2", biases=(*ALL_BIASES, "head_bias"), own_head=True, check=_no_norms_of_heads),
    "phi3": Architecture("phi3", biases=(), long_factors=True),
    "gpt_neox": Architecture("gptneox", biases=ALL_BIASES, own_head=True),
    "ministral3": Architecture("mistral3", True, ALL_BIASES),
    "smollm3": Architecture("smollm3", True, check=_every_fourth_without_rope),
    "glm": Architecture("chatglm", True),
    "glm4": Architecture("glm4", True),
    "cohere2": Architecture("cohere2", True, windows=4, own_head=False),
    "exaone4": Architecture("exaone4", windows=4, rope_factors=True, check=_exaone_window),
    "seed_oss": Architecture("seed_oss"),
}


def architecture_of(model_type: str, config: GPTConfig) -> Architecture:
    """Return llama.cpp's implementation of a family, which must compute what the config says."""
    if model_type not in ARCHITECTURES:
        raise LitLoraError(f"llama.cpp has no architecture for a model of the type {model_type}: use another format")
    own = ARCHITECTURES[model_type]
    if fault := _fault(own, config):
        raise LitLoraError(f"llama.cpp's {own.name} does not implement {fault}: use another format")
    return own


def architecture_of_checkpoint(hub_config: Mapping[str, Any], config: GPTConfig) -> Architecture:
    """Return llama.cpp's implementation of the model of a config.json, or of its text model."""
    model_type = str(hub_config.get("model_type"))
    if model_type in MULTI_MODAL:
        nested = hub_config.get("text_config", {}).get("model_type")
        model_type = nested or MULTI_MODAL[model_type].text_type
    return architecture_of(model_type, config)


def _fault(own: Architecture, config: GPTConfig) -> str | None:
    """Return what of a config an architecture lacks."""
    flags = (*ALL_BIASES, "head_bias")
    if biases := [flag for flag in flags if getattr(config, flag) and flag not in own.biases]:
        return f"these biases: {', '.join(biases)}"
    if own.own_head is False and not config.tie_word_embeddings:
        return "an output head other than the embedding"
    return _rope_fault(own, config) or own.check(config)


def _rope_fault(own: Architecture, config: GPTConfig) -> str | None:
    scalings = {type(rope.scaling) for rope in config.distinct_ropes}
    if Llama3Scaling in scalings and not own.rope_factors:
        return 'the rope_type "llama3"'
    if LongRopeScaling in scalings and not own.long_factors:
        return 'the rope_type "longrope"'
    yarns = [rope.scaling for rope in config.distinct_ropes if isinstance(rope.scaling, YarnScaling)]
    return "yarn without truncation" if any(not yarn.truncate for yarn in yarns) else None
