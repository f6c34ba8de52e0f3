"""Peak memory of a run, estimated from the shapes of its network and of its longest micro-batch."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any, Self

import torch
from torch import nn

from litlora.args.finetune import FinetuneLoraArgs, Precision
from litlora.lora.config import PISSA, LoRAConfig
from litlora.lora.layer import LoRALinear, add_lora, lora_layers, lora_parameters
from litlora.lora.svd import decomposition_bytes
from litlora.models.checkpoint import Checkpoint
from litlora.models.config import GPTConfig
from litlora.models.layer_names import HEAD_LAYER
from litlora.models.transformer import GPT
from litlora.nn.attention_spec import AttentionSpec
from litlora.nn.backend import FLOAT32, AttentionShape, Backend, Span, backend, compute_dtype
from litlora.nn.linear import Linear
from litlora.nn.loss import CHUNK
from litlora.nn.nf4 import BLOCK as NF4_BLOCK
from litlora.nn.nf4 import OUTER_BLOCK
from litlora.nn.quantization import DOUBLE
from litlora.train.optimizers import build_optimizer

BFLOAT16 = 2  # bytes
POSITION = 8  # bytes
PROCESS = "Python and torch"
"""The part of the peak that a process has before it loads a weight."""


@dataclass(frozen=True)
class Network:
    """The shape of a model with its adapter, and the precision in which it is trained."""

    config: GPTConfig
    lora: LoRAConfig
    precision: Precision
    quantize: str | None
    """bnb.nf4, bnb.nf4-dq, gguf, or None for a base in the run's precision."""
    device: torch.device
    shards: int = 1
    """Number of devices over which the base is sharded."""
    quantized_bytes: int | None = None
    """Bytes of the blocks' linear layers in a GGUF file."""

    @classmethod
    def of(cls, args: FinetuneLoraArgs, checkpoint: Checkpoint, lora: LoRAConfig, device: torch.device) -> Self:
        """Describe what a run trains."""
        size = checkpoint.quantized_bytes
        return cls(checkpoint.config, lora, args.precision, args.storage, device, quantized_bytes=size)

    def outline(self) -> GPT:
        """Build the model with its adapter, without a single value."""
        dtype = torch.bfloat16 if self.stream == BFLOAT16 else torch.float32
        with torch.device("meta"):
            gpt = GPT(self.config).to(dtype)
            add_lora(gpt, self.lora)
        return gpt

    @cached_property
    def adapted(self) -> dict[str, LoRALinear]:
        """The adapter layers by name."""
        return lora_layers(self.outline())

    @property
    def stream(self) -> int:
        """Bytes of a value of the residual stream, and of a weight that is not quantized."""
        return BFLOAT16 if self.precision == "bf16-true" else FLOAT32

    @property
    def dtype(self) -> torch.dtype:
        """Of a value that a linear layer of a block returns."""
        return compute_dtype(self.precision)

    @property
    def product(self) -> int:
        """Bytes of such a value."""
        return self.dtype.itemsize

    @property
    def upcasts(self) -> bool:
        """Tell whether the products of the blocks are of bfloat16 and computed in float32."""
        return self.backend.matmul_dtype(self.dtype) is not self.dtype

    @property
    def backend(self) -> Backend:
        return backend(self.device)

    def attention(self, spec: AttentionSpec) -> AttentionShape:
        config = self.config
        return AttentionShape(config.num_attention_heads, config.num_key_value_heads, config.head_dim, spec)


@dataclass(frozen=True)
class Load:
    """The longest micro-batch of a run, and what its forward pass saves."""

    lengths: tuple[int, ...]
    supervised: int
    """Number of supervised tokens."""
    activation_checkpointing: bool = False
    shared: tuple[int, ...] = ()
    """Number of keys that each sequence shares with the one before it, as in a MicroBatch."""
    concurrent: int = 1
    """Number of such micro-batches that are computed concurrently."""

    @property
    def longest(self) -> int:
        """Largest number of keys that a query sees."""
        return max(map(sum, self.spans))

    @property
    def spans(self) -> tuple[Span, ...]:
        """Numbers of keys that each sequence shares, and has for itself."""
        return tuple(zip_longest(self.shared, self.lengths, fillvalue=0))

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


def breakdown(network: Network, load: Load, optimizer: str | dict[str, Any]) -> dict[str, int]:
    """Return the peak memory of training by parts, in bytes, without Python's and torch's own."""
    gpt = network.outline()
    adapter = list(lora_parameters(gpt).values())
    adapters, activations = sum(matrix.nbytes for matrix in adapter), activation_bytes(network, load)
    # Gradients of a micro-batch take the memory of its activations, and are summed once all are computed.
    beyond = max(0, adapters - activations) * load.concurrent
    mlp_bytes = load.tokens * network.product * network.config.intermediate_size
    overheads = network.backend.memory_overheads(activations, mlp_bytes)
    step = {
        "its gradients": adapters + beyond,
        "optimizer state": optimizer_bytes(optimizer, adapter),
        "activations": activations * load.concurrent,
        "temporaries": temporary_bytes(network, load) * load.concurrent,
        **{name: size * load.concurrent for name, size in overheads.items()},
    }
    return {
        **local_weight_bytes(network, weight_bytes(gpt, network.quantize, network.quantized_bytes)),
        "adapter, float32": adapters,
        **_start_bytes(network, sum(step.values())),
        **step,
    }


def _start_bytes(network: Network, step: int) -> dict[str, int]:
    """Return the bytes of a start that is taken out of the base, and those by which finding it exceeds a step."""
    if not network.lora.changes_base:
        return {}
    layers = network.adapted.values()
    starts = sum(matrix.nbytes for layer in layers for matrix in layer.start or ())
    exact = network.lora.init == PISSA
    finding = max((decomposition_bytes(*layer.weight.shape, exact=exact) for layer in layers), default=0)
    return {"its start": starts, "singular vectors, beyond a step": max(0, finding - step)}


def weight_bytes(gpt: GPT, quantize: str | None, quantized: int | None = None) -> dict[str, int]:
    """Return the bytes of the frozen weights: embedding, output head, norms, and the linear layers of the blocks.

    `quantized` are those of the linear layers where a file has them quantized.
    """
    is_tied = gpt.config.tie_word_embeddings and getattr(gpt.lm_head, "start", None) is None
    head = 0 if is_tied else gpt.lm_head.weight.nbytes
    modules = gpt.model.modules()
    sizes = [module.weight.shape.numel() for module in modules if isinstance(module, Linear | LoRALinear)]
    norms = [module.weight for module in gpt.modules() if isinstance(module, nn.RMSNorm | nn.LayerNorm)]
    biases = sum(p.nbytes for name, p in gpt.named_parameters() if name.endswith(".bias"))
    dtype = str(gpt.lm_head.weight.dtype).removeprefix("torch.")
    stored = dtype if quantize is None else quantize.removeprefix("bnb.").upper()
    return {
        f"embedding, {dtype}": gpt.model.embed_tokens.weight.nbytes,
        f"output head, {dtype}": head,
        f"norms, {dtype}": sum(weight.nbytes for weight in norms if weight is not None),
        f"linear layers, {stored}": (_linear_bytes(gpt, sizes, quantize) if quantized is None else quantized) + biases,
    }


def _linear_bytes(gpt: GPT, sizes: Sequence[int], quantize: str | None) -> int:
    if quantize is None:
        return sum(sizes) * gpt.lm_head.weight.itemsize
    return sum(nf4_bytes(size, double=quantize == DOUBLE) for size in sizes)


def local_weight_bytes(network: Network, weights: dict[str, int]) -> dict[str, int]:
    """Return the bytes of the frozen weights on each device: its shard of each, and what is gathered.

    Gathered are the weights outside of the blocks, and two blocks: one is gathered while the other is used.
    """
    if network.shards == 1:
        return weights
    *outside, blocks = weights.values()
    gathered = sum(outside) + blocks * 2 // network.config.num_hidden_layers
    return {name: -(-size // network.shards) for name, size in weights.items()} | {"gathered weights": gathered}


def nf4_bytes(values: int, *, double: bool) -> int:
    """Return the bytes of 4-bit values and their scales, which double quantization stores in a byte each."""
    scales = -(-values // NF4_BLOCK)
    return -(-values // 2) + (scales + FLOAT32 * -(-scales // OUTER_BLOCK) if double else FLOAT32 * scales)


def optimizer_bytes(optimizer: str | dict[str, Any], matrices: Sequence[nn.Parameter]) -> int:
    """Return the bytes of an optimizer's state for matrices, by a real step on one of each shape."""
    shapes = Counter(matrix.shape for matrix in matrices)
    return sum(count * _state_bytes(optimizer, shape) for shape, count in shapes.items())


def _state_bytes(optimizer: str | dict[str, Any], shape: torch.Size) -> int:
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.zeros_like(parameter)
    built = build_optimizer(optimizer, [parameter], lr=1e-3)
    built.step()
    return sum(value.nbytes for value in built.state[parameter].values() if isinstance(value, torch.Tensor))


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


def table(counts: Mapping[str, int], parts: Mapping[str, int]) -> str:
    """Return lines of names and numbers: counts as they are, parts of the memory in 10^9 bytes, and their sum."""
    rows = {name: f"{value:,}" for name, value in counts.items()}
    rows |= {"memory, GB": ""} | {f"  {name}": f"{size / 1e9:.3f}" for name, size in parts.items()}
    rows["peak memory, GB"] = f"{sum(parts.values()) / 1e9:.3f}"
    left, right = max(map(len, rows)), max(map(len, rows.values()))
    return "".join(f"{name:{left}}  {value:>{right}}".rstrip() + "\n" for name, value in rows.items())
