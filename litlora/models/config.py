"""The shape of a model, read from the checkpoint's own config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from litlora.errors import LitLoraError
from litlora.models.families import family_of
from litlora.models.family import Windows, renamed
from litlora.models.hub_config import boolean, refusal, size
from litlora.models.rope_config import RopeConfig, Ropes
from litlora.nn.attention_spec import AttentionSpec

SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")


@dataclass(frozen=True)
class GPTConfig:
    """The shape of a decoder and the flags of its family, which are Llama's by default; sizes have the Hub's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    norm_eps: float
    ropes: Ropes
    """The rotary embedding of each layer, or None for a layer without one."""
    sliding_window: int | None
    tie_word_embeddings: bool
    full_attention_layers: tuple[int, ...] = ()
    """Layers without the sliding window."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    fused_qkv: Literal["rows", "heads"] | None = None
    """Whether queries, keys and values come from one layer: all queries first, or the three of each head together."""
    clip_qkv: float | None = None
    """The largest magnitude of queries, keys and values."""
    qk_norm: Literal["head", "each_head", "full"] | None = None
    """A norm of queries and keys: of each head with one weight, or a weight for each, or of all heads together."""
    attention_scale: float | None = None
    """What scores are multiplied by; None is 1 / sqrt(head_dim)."""
    attention_softcap: float | None = None
    gated_mlp: bool = True
    fused_gate_up: bool = False
    activation: str = "silu"
    norm: Literal["rms", "rms_plus_one", "layer_norm"] = "rms"
    """The kind of all norms; rms_plus_one multiplies by 1 + weight."""
    norm_weight: bool = True
    norm_bias: bool = False
    pre_norms: bool = True
    """Whether attention and MLP have a norm before them."""
    post_norms: bool = False
    """Whether they have one after them, before the sum with the residual stream."""
    parallel_residual: bool = False
    """Whether the MLP reads what attention reads, and not its result, each by a norm of its own."""
    shared_pre_norm: bool = False
    """Whether both read the same output of one norm."""
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """What the outputs of attention and MLP are multiplied by."""
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    module_names: tuple[tuple[str, str], ...] = ()
    """Parts of module names that differ from Llama's, which are used here, each with that of the Hub's model."""
    left_out: tuple[str, ...] = ()
    """Modules of a multi-modal checkpoint that are not loaded."""
    unapplied_dropouts: tuple[str, ...] = field(default=(), compare=False)
    """Dropouts of the base's own training, as config.json has them."""

    @classmethod
    def from_hub(cls, hub: dict[str, Any]) -> "GPTConfig":
        """Read the content of a config.json.

        Raises LitLoraError for a key or value that would change the result and is not implemented.
        """
        family, text = family_of(hub)
        family.check_keys(text)
        values = family.values(text)
        shape: dict[str, Any] = {key: size(values, key) for key in SIZES} | _heads(values)
        windows = family.windows(values, shape["num_hidden_layers"])
        return cls(
            **shape,
            ropes=family.ropes(values, shape["head_dim"], windows),
            tie_word_embeddings=boolean(values, "tie_word_embeddings"),
            **_window(windows),
            **family.read_flags(values),
            module_names=tuple(family.module_names.items()),
            left_out=family.left_out,
            unapplied_dropouts=family.unapplied_dropouts(values),
        )

    def window(self, layer: int) -> int | None:
        """Return the sliding window of a layer."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def hub_name(self, name: str) -> str:
        """Return the name that a module or parameter has in transformers, and for PEFT."""
        return renamed(name, dict(self.module_names))

    @cached_property
    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """How the queries of each layer weight its keys."""
        windows = map(self.window, range(self.num_hidden_layers))
        scale = self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
        return tuple(AttentionSpec(window, scale, self.attention_softcap) for window in windows)

    @cached_property
    def distinct_ropes(self) -> tuple[RopeConfig, ...]:
        """The rotary embeddings that at least one layer has."""
        return tuple(rope for rope in dict.fromkeys(self.ropes) if rope is not None)

    @property
    def positions(self) -> int:
        """The number of positions of a sequence that the model is made for, extended by its rotary embeddings."""
        extended = (rope.positions(self.max_position_embeddings) for rope in self.distinct_ropes)
        return min(extended, default=self.max_position_embeddings)

    def rope_regimes(self, length: int) -> tuple[int, ...]:
        """Return what is equal for all lengths of a sequence at which it has the same frequencies."""
        return tuple(rope.regime(length) for rope in self.distinct_ropes)

    def check_ids(self, source: str, highest: int) -> None:
        """Refuse ids beyond the embedding, as of a tokenizer to which tokens were added but the weights were not."""
        if highest >= self.vocab_size:
            fault = f"{source} has the token {highest}, but the checkpoint's vocab_size is {self.vocab_size}"
            raise LitLoraError(f"{fault}: use tokenizer files and weights of the same model")


def _window(windows: Windows) -> dict[str, Any]:
    """Return the fields for the sliding window of each layer."""
    window = next((window for window in windows if window is not None), None)
    full = [layer for layer, its in enumerate(windows) if its is None and window is not None]
    return {"sliding_window": window, "full_attention_layers": tuple(full)}


def _heads(values: Mapping[str, Any]) -> dict[str, int]:
    """Read the numbers of heads and their width; absent values follow from the others."""
    hidden_size, heads = size(values, "hidden_size"), size(values, "num_attention_heads")
    if values.get("head_dim") is None and hidden_size % heads:
        raise refusal("num_attention_heads", heads, f"without head_dim it must divide hidden_size ({hidden_size})")
    derived = {"num_key_value_heads": heads, "head_dim": hidden_size // heads}
    given = {key: values[key] for key in derived if values.get(key) is not None}
    shape = {key: size(derived | given, key) for key in derived}
    if heads % shape["num_key_value_heads"]:
        reason = f"it must divide num_attention_heads ({heads})"
        raise refusal("num_key_value_heads", shape["num_key_value_heads"], reason)
    if shape["head_dim"] % 2:
        raise refusal("head_dim", shape["head_dim"], "it must be even")
    return {"num_attention_heads": heads, **shape}
