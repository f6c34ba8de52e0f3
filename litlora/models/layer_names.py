"""The names of a model's linear layers, from its configuration: without torch, which takes seconds to import."""

from collections.abc import Iterator

from litlora.models.config import GPTConfig

HEAD_LAYER = "lm_head"


def linear_layer_names(config: GPTConfig) -> list[str]:
    """Return the names that transformers and PEFT have for the model's linear layers, in the model's order."""
    return [config.hub_name(name) for name in _names(config)]


def _names(config: GPTConfig) -> Iterator[str]:
    attention = ("qkv_proj", "o_proj") if config.fused_qkv else ("q_proj", "k_proj", "v_proj", "o_proj")
    gate = ("gate_proj",) if config.gated_mlp else ()
    mlp = ("gate_up_proj", "down_proj") if config.fused_gate_up else (*gate, "up_proj", "down_proj")
    for layer in range(config.num_hidden_layers):
        yield from (f"model.layers.{layer}.self_attn.{name}" for name in attention)
        yield from (f"model.layers.{layer}.mlp.{name}" for name in mlp)
    yield HEAD_LAYER
