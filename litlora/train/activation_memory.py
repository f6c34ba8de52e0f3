"""Memory of the forward and backward pass of a micro-batch: what is saved for backward, and temporaries beside it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from litlora.lora.layer import LoRALinear
from litlora.models.config import GPTConfig
from litlora.models.layer_names import HEAD_LAYER
from litlora.nn.attention_spec import AttentionSpec
from litlora.nn.backend_interface import FLOAT32
from litlora.nn.loss import CHUNK
from litlora.train.network_shape import BFLOAT16, Load, Network

POSITION = 8  # bytes


def activation_bytes(network: Network, load: Load) -> int:
    """Return the bytes that the forward pass of a micro-batch saves for backward."""
    width = network.config.hidden_size * network.stream
    blocks = list(_blocks(network, load))
    head = _head_gradient_bytes(network)
    if not any(blocks):
        return head  # whose gradient is there at once, and nothing below it needs one
    if load.activation_checkpointing:
        saved = load.tokens * (len(blocks) * width + _norm_width(network))
    else:
        final_norm = 0 if network.config.pre_norms else load.tokens * _norm_width(network)
        saved = sum(blocks) + final_norm + load.tokens * _angles_width(network)
    return saved + load.supervised * (width + POSITION) + head  # supervised states have a gradient and a position


def _head_gradient_bytes(network: Network) -> int:
    """Return the bytes of the gradient of an adapted head, which the forward pass computes already."""
    head = network.adapted.get(HEAD_LAYER)
    return sum(p.nbytes for p in head.adapter_parameters().values()) if head else 0


def _blocks(network: Network, load: Load) -> Iterator[int]:
    """Yield the bytes that each block saves, including the norm of the next one and not its own first norm."""
    specs = network.config.attention_specs
    stages = {spec: _stages(network, load, spec) for spec in set(specs)}
    flows = False  # whether a gradient goes back through what is computed so far
    for layer, spec in enumerate(specs):
        saved, shared = 0, False  # whether the input that attention and MLP share is counted
        for stage in stages[spec]:
            names = (f"model.layers.{layer}.{name}" for name in stage.layers)
            adapted = [network.adapted[name] for name in names if name in network.adapted]
            if (adapted or (flows and stage.input_is_saved)) and not (stage.input_is_shared and shared):
                saved += load.tokens * stage.width * stage.size
                shared = shared or stage.input_is_shared
            saved += sum(layer.variant.saved_bytes(layer, load.tokens, network.product) for layer in adapted)
            saved += flows * (stage.cast_weights + _extra_cast_bytes(stage, adapted))
            flows = flows or bool(adapted)
            saved += flows * stage.after
        yield saved


@dataclass(frozen=True)
class Stage:
    """Linear layers of a block with one input, and what is computed from their outputs before the next such layers."""

    layers: tuple[str, ...]
    width: int
    """Values of a token in the input, which is saved if one of the layers is adapted."""
    size: int
    """Bytes of each of them."""
    after: int
    """Bytes saved between these layers and the next stage."""
    cast_weights: int
    """Bytes of the copies that mixed precision makes of the weights, saved if the input needs a gradient."""
    input_is_saved: bool = False
    """Whether the operation that computed the input saves it, whether one of the layers is adapted or not."""
    input_is_shared: bool = False
    """Whether another stage has the same input."""


def _extra_cast_bytes(stage: Stage, adapted: Sequence[LoRALinear]) -> int:
    """Return the bytes of the copies of weights that adapter layers multiply by once more, in mixed precision."""
    sizes = (layer.weight.shape.numel() * layer.variant.extra_products(layer) for layer in adapted)
    return sum(sizes) * BFLOAT16 if stage.cast_weights else 0


def _stages(network: Network, load: Load, spec: AttentionSpec) -> tuple[Stage, ...]:
    config, stream, product = network.config, network.stream, network.product
    hidden, inner = config.hidden_size, config.intermediate_size
    up = inner * (2 if config.gated_mlp else 1)
    copied = BFLOAT16 if network.precision == "bf16-mixed" else 0
    inside = 0 if network.upcasts else copied  # where the input is bfloat16 already, the weight is read as it is
    heads, keys = _head_widths(config)
    attention = network.backend.attention_saved_bytes(network.attention(spec), load.spans, network.dtype)
    attention += load.tokens * _head_norm_width(network)
    post = hidden * product + _norm_statistics(config) if config.post_norms else 0
    following = _norm_width(network) if config.pre_norms else 0
    shared = config.shared_pre_norm
    return (
        Stage(
            _layers("self_attn", "q", "k", "v", "qkv"),
            hidden,
            stream,
            attention,
            (heads + 2 * keys) * hidden * copied,
            input_is_shared=shared,
        ),
        Stage(
            _layers("self_attn", "o"),
            heads,
            product,
            load.tokens * (post + _mlp_norm_width(network)),
            heads * hidden * inside,
            network.backend.saves_attention_output(spec, network.dtype),
        ),
        Stage(
            _layers("mlp", "gate", "up", "gate_up"),
            hidden,
            stream,
            load.tokens * up * product,
            up * hidden * copied,
            input_is_shared=shared,
        ),
        Stage(_layers("mlp", "down"), inner, product, load.tokens * (post + following), inner * hidden * inside),
    )


def _layers(part: str, *names: str) -> tuple[str, ...]:
    return tuple(f"{part}.{name}_proj" for name in names)


def _head_widths(config: GPTConfig) -> tuple[int, int]:
    """Return the values per token of all queries, and of all keys."""
    return config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim


def _norm_width(network: Network) -> int:
    """Return the bytes that a norm of the residual stream saves per token: its input and statistics."""
    return network.config.hidden_size * network.stream + _norm_statistics(network.config)


def _norm_statistics(config: GPTConfig) -> int:
    """Return the bytes of a row's scale, and of the mean that LayerNorm has as well."""
    return FLOAT32 * (2 if config.norm == "layer_norm" else 1)


def _mlp_norm_width(network: Network) -> int:
    """Return the bytes per token that the norm before the MLP saves; parallel to attention, its input is saved."""
    config = network.config
    if not config.pre_norms or config.shared_pre_norm:
        return 0
    return _norm_statistics(config) if config.parallel_residual else _norm_width(network)


def _head_norm_width(network: Network) -> int:
    """Return the bytes per token that norms of queries and keys save, and clipping of all three."""
    config = network.config
    heads, keys = _head_widths(config)
    clipped = (heads + 2 * keys) * network.product if config.clip_qkv else 0
    if config.qk_norm is None:
        return clipped
    rows = 2 if config.qk_norm == "full" else config.num_attention_heads + config.num_key_value_heads
    return clipped + (heads + keys) * network.product + rows * _norm_statistics(config)


def _angles_width(network: Network) -> int:
    """Return the bytes per token of cosines, sines and factors of queries, once for the layers that share them."""
    ropes = network.config.distinct_ropes
    return sum(2 * rope.dim + (rope.query_scaling is not None) for rope in ropes) * network.stream


def temporary_bytes(network: Network, load: Load) -> int:
    """Return the most bytes beside the activations: for the loss of a chunk, or for the gradients of a block."""
    again = max(_blocks(network, load)) + load.tokens * _angles_width(network) if load.activation_checkpointing else 0
    in_block = max(_mlp_bytes(network, load), _attention_bytes(network, load), _branch_bytes(network, load))
    return max(_loss_bytes(network, load), again + in_block)


def _loss_bytes(network: Network, load: Load) -> int:
    """Return the bytes of a chunk of logits, of some in float32, and of the supervised states."""
    config, rows = network.config, min(CHUNK, load.supervised)
    float32_rows = 0 if network.product == FLOAT32 else network.backend.scored_rows(rows, config.vocab_size)
    copies = 3 if config.logit_softcap else 1  # of the logits, what tanh saves and what it gives
    logits = config.vocab_size * (copies * rows * network.product + float32_rows * FLOAT32)
    cast = BFLOAT16 * config.vocab_size * config.hidden_size if network.precision == "bf16-mixed" else 0
    head = network.adapted.get(HEAD_LAYER)
    scaled = rows * head.variant.widest_temporary(head) * FLOAT32 if head else 0
    return logits + cast + scaled + load.supervised * config.hidden_size * network.stream


def _mlp_bytes(network: Network, load: Load) -> int:
    """Return the bytes of the gradients of the MLP's values, and of a weight cast for its product."""
    config, values = network.config, 3 if network.config.gated_mlp else 2
    rows = network.backend.cast_rows(config.intermediate_size)
    size = FLOAT32 if network.upcasts else network.product if network.quantize else 0
    return (load.tokens * values * network.product * config.intermediate_size) + rows * size * config.hidden_size


def _attention_bytes(network: Network, load: Load) -> int:
    """Return the bytes of three gradients, and of the scores that exist at one time."""
    config = network.config
    shapes = map(network.attention, set(config.attention_specs))
    scores = max(network.backend.attention_score_bytes(shape, load.longest) for shape in shapes)
    gradients = network.product * load.tokens * config.head_dim
    return config.num_attention_heads * (scores + 3 * gradients)


def _branch_bytes(network: Network, load: Load) -> int:
    """Return the bytes of the widest float32 tensor of an adapter layer: itself, with dropout, and its gradient."""
    blocks = (layer for name, layer in network.adapted.items() if name != HEAD_LAYER)
    return load.tokens * max((layer.variant.widest_temporary(layer) for layer in blocks), default=0) * 3 * FLOAT32
